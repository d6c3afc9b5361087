"""Composition: defaults, the files under configs/, the command line."""

import dataclasses
import shlex

import pytest
from hydra.core.global_hydra import GlobalHydra

from minitron.config import compose as composing
from minitron.config.build import settings
from minitron.config.compose import choices, compose, configs_dir, from_yaml, to_yaml
from minitron.config.schema import Config
from minitron.config.verbs import VERBS
from minitron.errors import RequestError
from minitron.stages.family import settings_of

RECIPES = sorted(choices("recipe"))
SMOL = "recipe=smollm2_135m_to_100m"


def refusal(*overrides, verb="compress"):
    with pytest.raises(RequestError) as caught:
        compose(verb, list(overrides))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("verb", VERBS)
def test_without_overrides_every_verb_has_the_defaults_alone(verb):
    assert compose(verb, [], complete=False) == Config()


@pytest.mark.parametrize("verb", VERBS)
def test_the_verbs_name_groups_and_settings_that_exist(verb):
    assert set(VERBS[verb].groups) <= {field.name for field in dataclasses.fields(Config)}
    names = {setting.name for setting in settings()}
    for need in VERBS[verb].needs:
        assert set(need.split(" | ")) <= names
        assert {name.split(".")[0] for name in need.split(" | ")} <= set(VERBS[verb].groups)


def test_there_is_one_primary_file_per_verb():
    assert {path.stem for path in configs_dir().glob("*.yaml")} == {"base", *VERBS}


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_defaults():
    config = compose("compress", ["train.steps=7", SMOL, "target.hidden_size=0.5", "eval.texts.mine=/a/b.txt", "train.lr=1e-3"])
    assert (config.train.steps, config.target.hidden_size, config.train.lr) == (7, 0.5, 1e-3)
    assert config.eval.texts == {"mine": "/a/b.txt"}
    assert config.target.ffn_hidden_size == 1152
    assert config.train.beta2 == Config().train.beta2


def test_a_group_chosen_on_the_command_line_wins_over_the_recipes_choice():
    assert compose("compress", [SMOL, "model=llama31_8b"]).model.path == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize("form", ["eval.texts.a=x", "+eval.texts.a=x", "++eval.texts.a=x", "eval.texts={a: x}"])
def test_new_names_need_no_special_form(form):
    assert compose("report", ["run.dir=r", form]).eval.texts == {"a": "x"}


def test_values_may_hold_blends_and_refer_to_other_settings():
    config = compose("data", ["run.dir=runs/${seed}", "model.path=m", "data.train=0.7 /a/x.jsonl 0.3 org/name"])
    assert config.run.dir == "runs/1234"
    assert config.data.train == "0.7 /a/x.jsonl 0.3 org/name"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_complete_but_for_the_users_own_text(recipe):
    given = compose("family", [f"recipe={recipe}"], complete=False)
    without_files = given.model.path == "???"
    config = compose(
        "family" if given.family.steps else "compress",
        [f"recipe={recipe}", "data.train=text.jsonl", *(["model.path=folder"] if without_files else [])],
    )
    assert config.run.dir == f"runs/{recipe}"
    assert choices("recipe")[recipe], "the comment that opens the file is what --help shows"


def test_the_two_laptop_recipes_differ_in_the_target_alone():
    width, depth = (compose("compress", [f"recipe={name}"]) for name in ("smollm2_135m_to_100m", "smollm2_135m_to_106m_depth"))
    assert dataclasses.replace(width, run=depth.run, target=depth.target) == depth
    assert (width.target.hidden_size, width.target.ffn_hidden_size, width.target.num_layers) == (512, 1152, None)
    assert (depth.target.hidden_size, depth.target.ffn_hidden_size, depth.target.num_layers) == (None, None, 22)


def test_a_familys_recipe_has_the_published_sizes():
    family = compose("family", ["recipe=nemotron4_15b_family", "model.path=folder", "data.train=text.jsonl", "run.dir=runs/f"])
    eight, four = (settings_of(family, name, shlex.split(text)) for name, text in family.family.steps.items())
    assert (eight.target.hidden_size, eight.target.ffn_hidden_size, eight.target.num_attention_heads) == (4096, 16384, None)
    assert (four.target.hidden_size, four.target.ffn_hidden_size, four.target.num_attention_heads) == (3072, 9216, 24)
    assert (four.model.path, four.teacher.path) == ("runs/f/minitron_8b/hf", "folder")
    assert dataclasses.replace(four, run=eight.run, model=eight.model, teacher=eight.teacher, target=eight.target) == eight


def test_the_published_llama_settings():
    config = compose("compress", ["recipe=llama31_8b_to_4b", "data.train=text"])
    assert (config.target.hidden_size, config.target.ffn_hidden_size) == (3072, 9216)
    train = config.train
    assert (train.lr, train.min_lr, train.warmup_steps, train.global_batch_size, train.seq_length) == (1e-4, 1e-5, 40, 1152, 8192)
    assert train.steps * train.global_batch_size * train.seq_length == pytest.approx(94e9, rel=0.01)
    assert refusal("recipe=llama31_8b_to_4b").startswith("data.train=???: compress needs this setting: ")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.lr=3", "trian.lr=3: there is no such setting; did you mean train.lr?"),
        ("lr=3", "lr=3: there is no such setting; did you mean train.lr?"),
        ("hydra.run.dir=x", "hydra.run.dir=x: there is no such setting; did you mean run.dir?"),
        ("recipe=nope", f"recipe=nope: one of {', '.join(RECIPES)} is needed"),
        ("recipe=null", f"recipe=null: one of {', '.join(RECIPES)} is needed"),
        ("recipe=[a,b]", "recipe=[a, b]: one of "),
        ("recipe=_smollm2_135m", "recipe=_smollm2_135m: one of "),
        ("data=nope", "data=nope: one of wikipedia_leads is needed"),
        ("data@x=wikipedia_leads", "data@x=wikipedia_leads: there is no such setting"),
        ("train.steps=many", "train.steps=many: a whole number is needed"),
        ("train.steps=1,2", "train.steps=1,2: one value is needed; quote what belongs together: 'train.steps=\"1,2\"'"),
        ("train.steps", "train.steps: SETTING=VALUE is needed"),
        ("job", "job: --cfg takes no word after it; minitron VERB [SETTING=VALUE ...] --cfg prints the composed settings"),
        ("=3", "=3: SETTING=VALUE is needed"),
        ("~train.steps", "~train.steps: a setting can't be removed"),
        ("run.dir=a=b", "run.dir=a=b: Hydra can't read this; quote special characters: 'run.dir=\"a=b\"'"),
        ("run.dir='a", "run.dir='a: Hydra can't read this"),
        ("run.dir=${train.stepz}", "run.dir: Interpolation key 'train.stepz' not found"),
        ("run.dir=", "run.dir=: compress needs this setting: folder that receives every file"),
        ("train.micro_batch_size=0", "train.micro_batch_size=0: at least 1 is needed"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(override, message):
    assert refusal(SMOL, override).startswith(message)


@pytest.mark.parametrize(
    ("verb", "given", "message"),
    [
        ("report", [], "run.dir=???: report needs"),
        ("export", ["run.dir=r"], "model.path=???: export needs"),
        (
            "compress",
            ["run.dir=r", "model.path=m", "data.train=t", "target.multiple_of=16"],
            "target.num_layers=null: compress needs at least one of target.num_layers, target.h",
        ),
        ("calibrate", ["run.dir=r", "model.path=m"], "data.train=???: calibrate needs at least one of data.train, data.calibration"),
    ],
)
def test_a_verb_asks_for_what_it_needs(verb, given, message):
    assert refusal(*given, verb=verb).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# @package _global_\ntrain: {stepz: 1}\n", "train.stepz=1: there is no such setting; did you mean train.steps?"),
        ("# @package _global_\ntrain: [1\n", "cannot compose the settings: while parsing a flow sequence"),
        ("# @package _global_\ndefaults: [nope]\n", "cannot compose the settings: In 'recipe/mine': Could not load 'recipe/nope'"),
    ],
)
def test_a_wrong_recipe_file_is_refused_in_one_line(tmp_path, monkeypatch, text, message):
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe" / "mine.yaml").write_text(text)
    (tmp_path / "compress.yaml").write_text("defaults: [schema, {recipe: null}, _self_]\n")
    monkeypatch.setattr(composing, "configs_dir", lambda: tmp_path)
    assert refusal("recipe=mine").startswith(message)


def test_hydra_is_left_as_it_was():
    compose("compress", [SMOL])
    refusal("recipe=nope")
    assert not GlobalHydra.instance().is_initialized()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_composed_config_survives_yaml(recipe):
    config = compose("compress", [f"recipe={recipe}"], complete=False)
    assert from_yaml(to_yaml(config)) == config
