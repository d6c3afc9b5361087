"""Every recipe composes and plans without files of a model; those of published models come to the published numbers of parameters and tokens."""

import pytest

from minitron.config.compose import choices, compose
from minitron.errors import RequestError
from minitron.launching.launch import refuse_too_large, way_out
from minitron.stages.plan import planned, shape_of
from tests.oracles.published import PARAMETERS

BIG = [name for name in choices("recipe") if not name.startswith("smollm2")]
# recipe -> the models of its plan, by the names of the oracle
MODELS = {
    "nemotron4_15b_family": ["Nemotron-4 15B", "Minitron-8B", "Minitron-4B"],
    "llama31_8b_to_4b": ["Llama-3.1-8B", "Llama-3.1-Minitron-4B-Width"],
    "llama31_8b_to_4b_depth": ["Llama-3.1-8B", "Llama-3.1-Minitron-4B-Depth"],
    "mistral_nemo_12b_to_8b": [None, "Mistral-NeMo-Minitron-8B"],
}
TRAINING = {  # tokens, batch, length, peak and last learning rate
    "nemotron4_15b_family": (94e9, 1152, 4096, 2e-4, 4.5e-7),
    "llama31_8b_to_4b": (94e9, 1152, 8192, 1e-4, 1e-5),
    "llama31_8b_to_4b_depth": (94e9, 1152, 8192, 1e-4, 1e-5),
    "mistral_nemo_12b_to_8b": (380e9, 768, 8192, 1e-4, 4.5e-7),
}
WARMUP = {"llama31_8b_to_4b": 40, "llama31_8b_to_4b_depth": 40, "mistral_nemo_12b_to_8b": 60}


def plan_of(recipe, *settings):
    cfg = compose("plan", [f"recipe={recipe}", "plan.layouts=0", *settings])
    return cfg, planned(shape_of(cfg), cfg)


@pytest.mark.parametrize("recipe", BIG)
def test_a_recipe_plans_and_its_layout_fits_its_machines(recipe):
    cfg, plan = plan_of(recipe)
    if cfg.search.budgets:
        assert plan.models
        assert plan.launch is None
        return
    refuse_too_large(plan.launch, cfg)
    assert [run["name"] for run in plan.launch["runs"]] == [model.name for model in plan.models]
    assert plan.launch["runs"][0]["gpus"] == 8 * cfg.plan.nodes
    assert all(run["taught"] for run in plan.launch["runs"])


@pytest.mark.parametrize("recipe", MODELS)
def test_counts_are_the_published_ones(recipe):
    _, plan = plan_of(recipe)
    for name, model in zip(MODELS[recipe], [plan.original, *plan.models], strict=True):
        if name is not None:
            digits, unit = PARAMETERS[name].split()
            assert f"{model.costs['params'] / {'M': 1e6, 'B': 1e9}[unit]:.{len(digits.split('.')[1])}f}" == digits


@pytest.mark.parametrize("recipe", TRAINING)
def test_trainings_are_the_published_ones(recipe):
    tokens, *settings = TRAINING[recipe]
    train = compose("plan", [f"recipe={recipe}"]).train
    assert [train.global_batch_size, train.seq_length, train.lr, train.min_lr] == settings
    assert train.steps * train.global_batch_size * train.seq_length == pytest.approx(tokens, rel=0.01)
    assert train.warmup_steps == WARMUP.get(recipe, train.warmup_steps)


def test_sizes_of_models_that_others_counted():
    """Parameters that torch's own modules of the hub's classes have: Mistral-NeMo-Base-2407 and Llama-3.1-70B."""
    assert plan_of("mistral_nemo_12b_to_8b")[1].original.costs["params"] == 12_247_782_400
    large = plan_of("llama31_70b_to_35b")
    assert large[1].original.costs["params"] == 70_553_706_496
    assert round(large[1].models[0].costs["params"] / 1e9) == 35
    assert (large[0].parallel.tp, large[0].parallel.pp, large[1].launch["runs"][0]["layout"]["dp"]) == (8, 4, 8)


def test_a_family_has_the_original_for_its_teacher_or_the_one_before():
    original, previous = (plan_of("nemotron4_15b_family", f"family.teacher={who}")[1].launch["runs"][1] for who in ("original", "previous"))
    assert previous["flops"] < original["flops"]


def test_what_does_not_fit_names_settings_that_do():
    cfg, plan = plan_of("llama31_70b_to_35b", "parallel.tp=1", "parallel.sp=false", "parallel.pp=1")
    with pytest.raises(
        RequestError, match=r"^parallel.tp=1 parallel.pp=1 train.micro_batch_size=1: a rank needs \d+\.\d GiB, and 75.0 GiB of a H100 "
    ):
        refuse_too_large(plan.launch, cfg)
    layout = {"tp": 4, "pp": 2, "vpp": 1, "ep": 1, "sp": True, "micro_batch_size": 2, "recompute": "full"}
    said = "parallel.tp=4 parallel.pp=2 parallel.vpp=1 parallel.sp=true train.micro_batch_size=2 train.recompute=full fits"
    assert way_out({"fitting": [{"layout": layout}]}) == said
    assert "parallel.vpp=1 parallel.ep=8 parallel.sp=true" in way_out({"fitting": [{"layout": {**layout, "ep": 8}}]})
    assert "parallel.ep=1" in way_out({"fitting": [{"layout": layout}]}, ep=2)  # what must be taken back is told
    assert way_out({"fitting": []}).startswith("no layout of these machines fits")
