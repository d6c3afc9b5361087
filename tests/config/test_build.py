"""Trees of settings into dataclasses: types, values, names, and back through YAML."""

import dataclasses

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.config import build, schema
from minitron.config.schema import Config
from minitron.errors import RequestError


def refusal(tree):
    with pytest.raises(RequestError) as caught:
        build.build(Config, tree)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_tree_gives_the_defaults():
    assert build.build(Config, {}) == Config()


@pytest.mark.parametrize(
    ("setting", "given_value", "value"),
    [
        ("train.lr", 1, 1.0),  # a whole number serves as a number
        ("train.lr", "1e-4", 1e-4),  # as PyYAML reads it
        ("search.params", "8B", 8e9),
        ("search.active_params", "1.5 k", 1500.0),
        ("target.hidden_size", 512, 512),
        ("target.hidden_size", 0.5, 0.5),
        ("target.hidden_size", None, None),
        ("data.valid", "a.txt", "a.txt"),
        ("data.valid", None, None),
        ("parallel.sp", True, True),
        ("teacher.parallel.tp", 2, 2),
        ("distill.hidden.layers", [-1], [-1]),
        ("distill.hidden.alpha", "dynamic", "dynamic"),
        ("distill.hidden.alpha", 1, 1.0),
        ("eval.texts", {"a": "x.txt"}, {"a": "x.txt"}),
        ("seed", 0, 0),
    ],
)
def test_values_that_fit(setting, given_value, value):
    tree = given_value
    for part in reversed(setting.split(".")):
        tree = {part: tree}
    built = build.value_at(build.build(Config, tree), setting)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"steps": 1.5}}, "train.steps=1.5: a whole number is needed"),
        ({"train": {"steps": True}}, "train.steps=true: a whole number is needed"),
        ({"train": {"steps": "10"}}, "train.steps=10: a whole number is needed"),
        ({"train": {"steps": None}}, "train.steps=null: a whole number is needed"),
        ({"train": {"lr": False}}, "train.lr=false: a number is needed"),
        ({"train": {"lr": "high"}}, "train.lr=high: a number is needed"),
        ({"train": {"lr": float("nan")}}, "train.lr=nan: a number is needed"),
        ({"train": {"lr": float("inf")}}, "train.lr=inf: a number is needed"),
        ({"target": {"hidden_size": True}}, "target.hidden_size=true: a number or null is needed"),
        ({"search": {"params": "8GB"}}, "search.params=8GB: a number or null is needed (8e9 or 8B, say)"),
        ({"search": {"memory_gb": "8B"}}, "search.memory_gb=8B: a number or null is needed"),
        ({"search": {"hidden_size": []}}, "search.hidden_size=[]: a list with at least one number or null is needed"),
        ({"parallel": {"sp": 1}}, "parallel.sp=1: true or false is needed"),
        ({"run": {"dir": 7}}, "run.dir=7: text is needed (a number as text is written 'run.dir=\"7\"')"),
        ({"data": {"train": ["a", "b"]}}, "data.train=[a, b]: text is needed"),
        ({"train": {"steps": [1, None]}}, "train.steps=[1, null]: a whole number is needed"),
        ({"eval": {"texts": "a.txt"}}, "eval.texts=a.txt: names are needed below it: eval.texts.NAME=TEXT"),
        ({"eval": {"texts": {"a": None}}}, "eval.texts.a=null: text is needed"),
        ({"parallel": 8}, "parallel=8: this is a group: parallel.tp, parallel.pp"),
        ({"teacher": {"parallel": {"tp": "x"}}}, "teacher.parallel.tp=x: a whole number or null is needed"),
    ],
)
def test_wrong_types_are_refused_by_full_name(tree, message):
    assert refusal(tree).startswith(message)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"steps": 0}}, "train.steps=0: at least 1 is needed"),
        ({"train": {"micro_batch_size": 0}}, "train.micro_batch_size=0: at least 1 is needed"),  # not a division by zero
        ({"train": {"global_batch_size": 6, "micro_batch_size": 4}}, "train.global_batch_size=6: a multiple of train.micro_batch_size=4"),
        ({"train": {"lr": 1e-6}}, "train.min_lr=1e-05: at most train.lr=1e-06"),
        ({"train": {"lr": 0}}, "train.lr=0.0: more than 0 is needed"),
        ({"search": {"params": 0.5}}, "search.params=0.5: a number of parameters is needed, such as 8e9 or 8B, not a share of the model's"),
        ({"data": {"valid_fraction": 0.9}}, "data.valid_fraction=0.9: at most 0.5 is allowed"),
        ({"calibrate": {"seq_agg": "max"}}, "calibrate.seq_agg=max: one of mean, l2, var is needed"),
        ({"calibrate": {"skip_layers": 2, "criterion": "random"}}, "calibrate.skip_layers=2: must be null with calibrate.criterion=random"),
        ({"calibrate": {"skip_layers": [1, 0]}}, "calibrate.skip_layers=[1, 0]: at least 1 is needed"),
        ({"calibrate": {"choices": "set.jsonl"}}, "calibrate.choices=set.jsonl: calibrate.skip_layers is needed with it"),
        ({"distill": {"loss": "none"}}, "distill.cross_entropy=0.0: nothing is left to train on with distill.loss=none: more than 0 is needed"),
        (
            {"distill": {"loss": "none", "cross_entropy": 1, "top_k": 5}},
            "distill.top_k=5: must be null with distill.loss=none, which has no teacher to compare with",
        ),
        (
            {"distill": {"loss": "none", "cross_entropy": 1, "temperature": 2.0}},
            "distill.temperature=2.0: must be 1.0 with distill.loss=none, which has no teacher to compare with",
        ),
        (
            {"distill": {"loss": "none", "cross_entropy": 1, "hidden": {"enabled": True}}},
            "distill.hidden.enabled=true: must be false with distill.loss=none, which has no teacher to compare with",
        ),
        ({"train": {"overlap_param_gather": True}}, "train.overlap_param_gather=true: train.overlap_grad_reduce=true is needed with it"),
        (
            {"train": {"schedule": "wsd"}},
            "train.decay_steps=null: 1 to 960 steps, what the warm-up leaves of train.steps=1000, are needed with train.schedule=wsd",
        ),
        ({"train": {"decay_steps": 5}}, "train.decay_steps=5: must be null with train.schedule=cosine, which would not read it"),
        ({"distill": {"loss": "mse"}}, "distill.loss=mse: one of forward_kl, reverse_kl, jsd, none is needed"),
        ({"data": {"prompt_key": "text"}}, "data.prompt_key=text: that is data.text_key, the field of the text: another field is needed"),
        ({"distill": {"beta": 1.0}}, "distill.beta=1.0: less than 1 is needed"),
        ({"teacher": {"parallel": {"pp": 0}}}, "teacher.parallel.pp=0: at least 1 is needed"),
        ({"device": "tpu"}, "device=tpu: one of auto, cpu, cuda is needed"),
        ({"distill": {"hidden": {"kind": "l1"}}}, "distill.hidden.kind=l1: one of cosine, mse is needed"),
        ({"distill": {"hidden": {"alpha": "fixed"}}}, "distill.hidden.alpha=fixed: dynamic or a number of at least 0 is needed"),
        ({"distill": {"hidden": {"alpha": -1}}}, "distill.hidden.alpha=-1.0: dynamic or a number of at least 0 is needed"),
        ({"distill": {"hidden": {"layers": [1, 2]}}}, "distill.hidden.teacher_layers=[-3]: one for each of distill.hidden.layers=[1, 2] is needed"),
        (
            {"distill": {"hidden": {"enabled": True, "layers": None, "teacher_layers": None}}},
            "distill.hidden.layers=null: nothing is compared: layers, or distill.hidden.embeddings=true, are needed",
        ),
    ],
)
def test_values_out_of_range_are_refused_by_full_name(tree, message):
    assert refusal(tree).startswith(message)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"stesp": 3}}, "train.stesp=3: there is no such setting; did you mean train.steps?"),
        ({"trian": {"lr": 3}}, "trian={lr: 3}: there is no such setting"),
        ({"train": {"temperature": 2}}, "train.temperature=2: there is no such setting; did you mean distill.temperature?"),
        ({"sede": 3}, "sede=3: there is no such setting; did you mean seed?"),
        ({"parallel": {"zzz": 3}}, "parallel.zzz=3: there is no such setting; the settings of parallel are tp, pp, vpp"),
        ({"zzz": None}, "zzz=null: there is no such setting; --help lists all"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest_one(tree, message):
    assert refusal(tree).startswith(message)


def test_every_setting_says_what_it_means():
    for setting in build.settings():
        assert setting.rule.get("help"), setting.name
        assert set(setting.kinds) <= {*build.KINDS, dict}, setting.name


def test_every_default_passes_its_own_checks():
    assert build.build(Config, dataclasses.asdict(Config())) == Config()


def test_what_a_verb_needs():
    given_run = build.build(Config, {"run": {"dir": "x"}, "data": {"calibration": "c.txt"}, "model": {"path": ""}})
    build.require(given_run, "calibrate", ("run.dir", "data.train | data.calibration"))
    with pytest.raises(RequestError, match=r"^data.train=\?\?\?: evaluate needs at least one of data.train, eval.texts$"):
        build.require(given_run, "evaluate", ("run.dir", "data.train | eval.texts"))
    with pytest.raises(RequestError, match=r"^model.path=: export needs this setting: the model to compress"):
        build.require(given_run, "export", ("model.path",))


texts = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=20) | st.sampled_from(
    ["???", "null", "1e-4", "${x", "${run.dir}", "yes", "007", "a: b", "# no"]
)


@settings(max_examples=60, deadline=None)
@given(
    folder=texts,
    sources=st.dictionaries(texts, texts, max_size=3),
    lr=st.floats(1e-30, 1e30),
    size=st.none() | st.integers(1, 10**9) | st.floats(1e-9, 1.0),
    sp=st.booleans(),
)
def test_yaml_gives_back_the_same_config(folder, sources, lr, size, sp):
    config = dataclasses.replace(
        Config(),
        run=schema.Run(dir=folder),
        eval=schema.Eval(texts=sources),
        train=schema.Train(lr=lr, min_lr=0.0),
        target=schema.Target(hidden_size=size),
        parallel=schema.Parallel(sp=sp),
    )
    assert build.from_yaml(build.to_yaml(config)) == config


def test_yaml_holds_every_setting():
    tree = yaml.safe_load(build.to_yaml(Config()))
    for setting in build.settings():
        node = tree
        for part in setting.name.split("."):
            assert part in node, setting.name
            node = node[part]


@pytest.mark.parametrize("text", ["train: [1", "train: {steps: 0}", "- 1", "nonsense"])
def test_yaml_that_is_no_config_is_refused(text):
    with pytest.raises(RequestError):
        build.from_yaml(text)


@pytest.mark.parametrize(("asked", "lengths"), [(None, []), (8, [8]), ([4, 1, 4], [1, 4])])
def test_runs_of_layers_are_of_one_length_or_several(asked, lengths):
    assert build.build(Config, {"calibrate": {"skip_layers": asked}}).calibrate.skip_lengths == lengths
