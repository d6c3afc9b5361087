"""A chain of models: what each is cut from and taught by, where it goes on, what is refused before any of it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.compose import compose
from minitron.errors import RequestError
from minitron.stages.family import members, plan, relations
from minitron.weights.source import open_folder
from tests.oracles.metrics import without_costs
from tests.oracles.models import same_tensors, save_model, saved_tensors
from tests.stages.commands import minitron, running, wait_until

STEPS = ['family.steps.middle="target.hidden_size=56 target.ffn_hidden_size=144"', 'family.steps.small="target.hidden_size=48 train.steps=6"']


@pytest.fixture(scope="module")
def chain(stories, tales):
    """Settings of a chain of two small models."""
    return [
        f"model.path={stories}", f"data.train={tales}", *STEPS, "calibrate.samples=8", "calibrate.seq_length=64", "train.steps=4",
        "train.global_batch_size=4", "train.micro_batch_size=4", "train.seq_length=64", "train.eval_interval=4", "train.eval_tokens=512",
        "train.save_interval=2", "train.warmup_steps=1", "train.lr=2e-3", "eval.tokens=1024", "logging.progress=false", "device=cpu", "dtype=fp32",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def made(chain, tmp_path_factory):
    """The folder of a finished chain, its output in family.out."""
    root = tmp_path_factory.mktemp("family")
    done = minitron(root / "family", "family", f"run.dir={root / 'run'}", *chain)
    assert (done.code, done.err) == (0, ""), done
    return root / "run"


def read(file):
    return json.loads(file.read_text())


def fingerprint(folder):
    return open_folder(folder, "model.path").fingerprint()


def lines(run):
    with open(run / "metrics.jsonl", encoding="utf-8") as handle:
        return without_costs(map(json.loads, handle))


def losses(run):
    return {name: entry["loss"] for name, entry in read(run / "eval.json").items()}


def written(run):
    """When each file but reports and records was written."""
    left_out = ("report.html", "config.yaml", "family.json")
    return {str(path.relative_to(run)): path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name not in left_out}


def test_each_model_is_cut_from_the_one_before_and_taught_by_the_original(made, stories):
    middle, small = (read(made / name / "stages.json") for name in ("middle", "small"))
    assert middle["prune"]["inputs"]["model"] == fingerprint(stories)
    assert small["prune"]["inputs"]["model"] == fingerprint(made / "middle" / "hf")
    assert small["distill"]["inputs"]["teacher"] == fingerprint(stories)
    assert small["distill"]["settings"]["train.steps"] == 6
    arch = read(made / "small" / "arch.json")
    assert [arch["original"][name] for name in ("hidden_size", "ffn_hidden_size")] == [56, 144]
    assert [arch["pruned"][name] for name in ("hidden_size", "ffn_hidden_size")] == [48, 144]
    assert losses(made / "small")["teacher"] == losses(made / "middle")["teacher"]
    assert losses(made / "small")["pruned"] != losses(made / "middle")["student"]


def test_the_text_is_tokenised_once(made):
    files = [made / name / "data" / "train.bin" for name in ("middle", "small")]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    assert (made / "small" / "data" / "manifest.json").read_bytes() == (made / "middle" / "data" / "manifest.json").read_bytes()


def test_the_table_has_all_models(made, stories, tmp_path):
    models = read(made / "family.json")["models"]
    assert [one["name"] for one in models] == ["original", "middle", "small"]
    assert models[0]["path"] == str(stories)
    assert [one["loss"] for one in models] == [losses(made / "middle")["teacher"], *(losses(made / name)["student"] for name in ("middle", "small"))]
    assert [one["params"] for one in models[1:]] == [open_folder(Path(one["path"]), "x").arch.num_parameters() for one in models[1:]]
    assert [(one["cut_from"], one["taught_by"]) for one in models[1:]] == [("original", "original"), ("middle", "original")]
    out = (made.parent / "family.out").read_text().splitlines()
    assert [line for line in out if line.startswith("[") and "cut from" in line] == [
        "[1/2] middle: cut from original, taught by original", "[2/2] small: cut from middle, taught by original",
    ]  # fmt: skip
    for verb in ("summary", "report"):
        done = minitron(tmp_path / verb, verb, f"run.dir={made}")
        assert (done.code, done.err) == (0, "")
        assert f"{made / 'small' / 'report.html'}" in done.out
        assert any(line.split()[:1] == ["small"] and f"{models[2]['loss']:.3f}" in line for line in done.out.splitlines())


def test_the_same_command_again_does_nothing_again(made, chain, tmp_path):
    before, table = written(made), (made / "family.json").read_bytes()
    done = minitron(tmp_path / "log", "family", f"run.dir={made}", *chain)
    assert (done.code, done.err) == (0, "")
    assert written(made) == before
    assert (made / "family.json").read_bytes() == table


def test_a_chain_killed_in_a_later_step_goes_on_to_the_same_end(made, chain, tmp_path):
    run, command = tmp_path / "run", ["family", f"run.dir={tmp_path / 'run'}", *chain]
    with running(tmp_path / "log", *command) as ranks:
        wait_until(lambda: (run / "small" / "checkpoints" / "step_00000002" / "manifest.json").exists(), ranks)
    before = written(run / "middle")
    assert read(run / "family.json")["models"][-1]["name"] == "middle"
    done = minitron(tmp_path / "log", *command)
    assert (done.code, done.err) == (0, "")
    assert written(run / "middle") == before
    assert lines(run / "small") == lines(made / "small")
    assert same_tensors(saved_tensors(run / "small" / "hf"), saved_tensors(made / "small" / "hf"))


@pytest.mark.slow
def test_a_step_that_was_not_begun_is_made_with_its_new_settings_and_a_finished_one_is_refused_others(made, chain, tmp_path):
    run = shutil.copytree(made, tmp_path / "run")
    shutil.rmtree(run / "small")
    before = written(run / "middle")
    done = minitron(tmp_path / "log", "family", f"run.dir={run}", *chain, "family.teacher=previous")
    assert (done.code, done.err) == (0, "")
    assert written(run / "middle") == before
    record = read(run / "small" / "stages.json")
    assert record["distill"]["inputs"]["teacher"] == fingerprint(run / "middle" / "hf")
    assert losses(run / "small")["teacher"] == losses(run / "middle")["student"]
    assert read(run / "family.json")["models"][2]["taught_by"] == "middle"
    done = minitron(tmp_path / "log", "family", f"run.dir={run}", *chain)
    assert done.code == 2
    assert done.err.startswith("minitron: teacher.path=")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ('family.steps.small="target.hiden_size=48"', "family.steps.small: target.hiden_size=48: there is no such setting; did you mean"),
        (
            'family.steps.small="target.hidden_size=60"',
            "family.steps.small: target.hidden_size=60: the model has 56: pruning can only make it smaller",
        ),
        ('family.steps.small="target.hidden_size=56"', "family.steps.small: target.hidden_size=56: nothing to prune"),
        ('family.steps.small="train.steps=6"', "family.steps.small: target.num_layers=null: compress needs at least one of"),
        ('family.steps.small="target.num_attention_heads=7"', "family.steps.small: target.num_attention_heads=7: every KV group keeps"),
        ('family.steps.small="target.hidden_size=48 run.dir=/x"', "family.steps.small: run.dir=/x: the chain decides this; a step can't"),
        ('family.steps.small="target.hidden_size=48 model.path=/x"', "family.steps.small: model.path=/x: the chain decides this; a step can't"),
        ('family.steps.small="target.hidden_size=48 parallel.tp=3"', "family.steps.small: parallel.tp=3: "),
        ('family.steps={a/b: "target.hidden_size=48"}', "family.steps=a/b: a name of letters"),
    ],
)
def test_what_can_be_told_of_any_step_is_refused_before_the_first(change, line, chain, tmp_path):
    given = [value for value in chain if not (change.startswith("family.steps={") and value.startswith("family.steps"))]
    done = minitron(tmp_path / "log", "family", f"run.dir={tmp_path / 'run'}", *given, change)
    assert done.code == 2
    assert done.err.startswith(f"minitron: {line}"), done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of models by name: one to cut, a deeper one, one of another vocabulary."""
    root = tmp_path_factory.mktemp("models")
    changes = {"cut": {}, "deep": {"num_hidden_layers": 7}, "strange": {"vocab_size": 97}}
    return {name: save_model(root / name, **change) for name, change in changes.items()}


@pytest.fixture
def chain_of(models, tales, tmp_path):
    """A chain's settings: two steps that lose neurons, with what each adds, and the chain's own words; models are named in {}."""

    def make(one="", two="", *words):
        steps = [f'family.steps.{name}="target.ffn_hidden_size={size} {more}"' for name, size, more in (("one", 30, one), ("two", 24, two))]
        given = ["model.path={cut}", f"run.dir={tmp_path / 'run'}", f"data.train={tales}", *steps, *words]
        return compose("family", [word.format(**models, run=tmp_path / "run") for word in given])

    return make


HIDDEN = "distill.hidden.enabled=true distill.hidden.layers=[2] distill.hidden.teacher_layers=[{}]"


@pytest.mark.parametrize(
    ("two", "words", "deepest"),
    [
        ("", (), 4),
        ("", ("teacher.path={deep}",), 7),
        ("teacher.path={deep}", (), 7),
        ("teacher.path={cut}", ("family.teacher=previous",), 4),
        ("teacher.path={run}/one/hf", ("teacher.path={deep}",), 4),
        ("teacher.path=null", ("teacher.path={deep}",), 4),
    ],
)
def test_a_step_is_held_against_the_sizes_of_the_teacher_that_it_will_have(two, words, deepest, chain_of):
    assert [*plan(chain_of("", f"{two} {HIDDEN.format(deepest)}", *words))] == ["one", "two"]
    with pytest.raises(RequestError, match=r"^family\.steps\.two: distill\.hidden\.teacher_layers"):
        plan(chain_of("", f"{two} {HIDDEN.format(deepest + 1)}", *words))


@pytest.mark.parametrize(
    ("two", "said"),
    [
        ("teacher.path={strange}", "vocabulary of 97, the student's is 61"),
        ("teacher.path={deep}er", "no such file or folder"),
        ("teacher.path={run}/oen/hf", "no such file or folder"),
        ("teacher.path={run}/two/hf", "no such file or folder"),
    ],
)
def test_a_later_steps_own_teacher_is_looked_at_before_the_first_step(two, said, chain_of):
    with pytest.raises(RequestError, match=rf"^family\.steps\.two: teacher\.path=.*: {said}"):
        plan(chain_of("", two))


def test_who_teaches_is_told_by_each_steps_own_settings(chain_of, models):
    def told(*given):
        cfg = chain_of(*given)
        return [relations(cfg, step) for step in plan(cfg).values()]

    none = "distill.loss=none distill.cross_entropy=1"
    deep = str(models["deep"])
    assert told() == [("original", "original"), ("one", "original")]
    assert told("", "", "family.teacher=previous") == [("original", "original"), ("one", "one")]
    assert told("", none) == [("original", "original"), ("one", "nobody")]
    assert told("teacher.path={deep}") == [("original", deep), ("one", "original")]
    assert told("", "teacher.path={run}/one/hf", "teacher.path={deep}") == [("original", deep), ("one", "one")]


def test_the_originals_loss_is_not_that_of_another_teacher(chain_of, tmp_path):
    folder = tmp_path / "run" / "one"
    folder.mkdir(parents=True)
    (tmp_path / "run" / "family.json").write_text('{"models": []}')
    figures = {"loss": 2.0, "perplexity": 7.4, "params": 9}
    (folder / "stages.json").write_text(json.dumps({name: {"done": True} for name in ("evaluate", "export")}))
    (folder / "eval.json").write_text(json.dumps({name: figures for name in ("teacher", "pruned", "student")}))
    for one, loss in (("", 2.0), ("teacher.path={cut}", 2.0), ("teacher.path={deep}", None)):
        cfg = chain_of(one)
        assert [(model.name, model.loss) for model in members(cfg, plan(cfg))] == [("original", loss), ("one", 2.0)]


def test_another_runs_folder_is_left_alone(chain, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stages.json").write_text("{}")
    done = minitron(tmp_path / "log", "family", f"run.dir={tmp_path / 'run'}", *chain)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "files that are not a family's" in done.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["stages.json"]


def test_sizes_are_compared_where_the_models_own_are_not_known():
    from minitron.config.schema import Target
    from minitron.stages.family import check_sizes

    sizes = {}
    check_sizes(Target(hidden_size=512, ffn_hidden_size=0.5), sizes)
    check_sizes(Target(hidden_size=448), sizes)
    with pytest.raises(RequestError, match=r"target\.hidden_size=512: the model before has 448"):
        check_sizes(Target(hidden_size=512), sizes)
    with pytest.raises(RequestError, match=r"target\.hidden_size=448: nothing to prune"):
        check_sizes(Target(hidden_size=448), sizes)


@pytest.mark.slow
@pytest.mark.multirank
def test_two_ranks_under_torchrun_open_one_group_after_another(made, chain, tmp_path):
    """The second step has another layout."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minitron", "family", f"run.dir={run}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    layouts = [*chain, STEPS[1].replace("train.steps", "parallel.tp=1 parallel.pp=2 train.steps"), "parallel.tp=2"]
    done = subprocess.run([*command, *layouts], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("middle", "small"):
        assert losses(run / name) == {key: pytest.approx(loss, rel=1e-4) for key, loss in losses(made / name).items()}
        assert read(run / name / "arch.json") == read(made / name / "arch.json")
    assert [one["name"] for one in read(run / "family.json")["models"]] == ["original", "middle", "small"]
