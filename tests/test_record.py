"""Which settings bind a run, and the lock on its folder."""

import dataclasses
import json
import os
import re

import pytest

from minitron.config.build import build, from_yaml
from minitron.config.schema import Config, Model
from minitron.engine.verified import mark
from minitron.errors import RequestError
from minitron.files import write_json
from minitron.record import ARTIFACTS, LOCK, RECORD, claim, locked, made_with, own, settings_of

DONE = ("data", "calibrate", "prune", "distill", "evaluate", "export")


def config(**changes):
    """Settings of a compression, some of them other ones: `train={"lr": 1}`."""
    usual = {"run": {"dir": "x"}, "model": {"path": "m"}, "data": {"train": "t"}, "target": {"num_layers": 2}, "train": {"steps": 8}}
    return build(Config, {**usual, **{group: {**usual.get(group, {}), **values} for group, values in changes.items()}})


@pytest.fixture
def run(tmp_path):
    """`run(DONE, BEGUN, STEPS)`: a folder in which stages are done or only begun, with checkpoints of these steps."""

    def make(done=(), begun=(), steps=(), cfg=None):
        cfg = cfg or config()
        write_json(tmp_path / RECORD, {stage: {"done": stage in done, "settings": settings_of(cfg, stage, free=True)} for stage in (*done, *begun)})
        for file in (tmp_path / ARTIFACTS[stage] for stage in done if stage != "distill"):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("{}")
        for folder in (tmp_path / "checkpoints" / f"step_{step:08}" for step in steps):
            folder.mkdir(parents=True, exist_ok=True)
            mark(folder, {})
        return tmp_path

    return make


OTHERS = {
    "data": {"data": {"train": "other"}},
    "calibrate": {"calibrate": {"samples": 7}},
    "target": {"target": {"num_layers": 3}},
    "lr": {"train": {"lr": 1}},
    "beta": {"train": {"beta1": 0.5}},
    "teacher": {"teacher": {"path": "other"}},
    "dtype": {"dtype": "fp32"},
}


def test_text_binds_a_cut_that_measures_again_alone(run):
    """Rounds are newer than some runs: those go on, and prune alone need not be given the text."""
    once, again = config(), config(target={"num_layers": 2, "rounds": 2})
    assert not [name for name in settings_of(once, "prune", free=True) if name.startswith("data.")]
    assert settings_of(again, "prune", free=True)["data.train"] == "t"
    old = {name: value for name, value in settings_of(once, "prune", free=True).items() if name != "target.rounds"}
    assert made_with({"settings": old}, "prune") == settings_of(once, "prune", free=True)
    newer = {name: value for name, value in settings_of(again, "prune", free=True).items() if name != "data.prompt_key"}
    assert made_with({"settings": newer}, "prune") == settings_of(again, "prune", free=True)
    folder = run(done=["data", "calibrate"])
    claim(folder, config(data={"train": "other"}), "prune")
    with pytest.raises(RequestError, match=r"^data.train=other"):
        claim(folder, config(data={"train": "other"}, target={"num_layers": 2, "rounds": 2}), "prune")


def test_where_the_teacher_lies_binds_nothing(run):
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4])
    claim(folder, config(teacher={"parallel": {"tp": 2, "pp": 2}, "offload": True}), "compress")
    with pytest.raises(RequestError, match=r"^teacher.path=other"):
        claim(folder, config(teacher={"path": "other"}), "compress")


@pytest.mark.parametrize(
    ("state", "binding"),
    [
        ({}, set()),
        ({"begun": DONE}, set()),  # begun and refused, or killed: nothing came of it
        ({"done": ["data"]}, {"data"}),
        ({"done": ["data"], "begun": ["calibrate"]}, {"data"}),
        ({"done": ["data", "calibrate"], "begun": ["prune"]}, {"data", "calibrate", "dtype"}),
        ({"done": ["data", "calibrate", "prune"], "begun": ["distill"]}, {"data", "calibrate", "target", "dtype"}),
        ({"done": ["data", "calibrate", "prune"], "begun": ["distill"], "steps": [4]}, {*OTHERS} - {"lr"}),
        ({"done": ["data", "calibrate", "prune", "distill"], "steps": [4, 8]}, {*OTHERS}),
        ({"begun": ["data", "calibrate", "prune", "distill"], "steps": [8]}, {*OTHERS}),  # trained to the end, begun again before
        ({"begun": ["data", "calibrate", "prune", "distill"], "steps": [4]}, {*OTHERS} - {"lr"}),
        ({"done": ["evaluate", "export"]}, set()),  # nothing follows from these
    ],
)
def test_settings_bind_once_something_was_made_with_them(run, state, binding):
    folder, refused = run(**state), {}
    for name, change in OTHERS.items():
        cfg = dataclasses.replace(config(), **change) if name == "dtype" else config(**change)
        try:
            claim(folder, cfg, "compress")
        except RequestError as error:
            refused[name] = str(error)
    assert {*refused} == binding
    claim(folder, config(), "compress")


def test_what_binds_is_named_as_it_is_written(run):
    folder = run(done=["data", "calibrate", "prune"], cfg=config(target={"num_layers": None, "ffn_hidden_size": [8, 4]}))
    belongs = re.escape(f"run.dir={folder} belongs to a run whose prune was made with ")
    with pytest.raises(RequestError, match=rf"^target.ffn_hidden_size=null: {belongs}target.ffn_hidden_size=\[8, 4\]; use that, or another run.dir$"):
        claim(folder, config(), "compress")
    with pytest.raises(RequestError, match=rf"^target.merge_heads=true: {belongs}target.merge_heads=false; use that"):
        claim(folder, config(target={"num_layers": None, "ffn_hidden_size": [8, 4], "merge_heads": True}), "compress")


def test_a_setting_that_is_newer_than_the_run_has_its_default_there(run):
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4])
    record = json.loads((folder / RECORD).read_text())
    for name in ("distill.cross_entropy", "train.clip_grad"):  # an older version's record; the second may change in the middle
        del record["distill"]["settings"][name]
    write_json(folder / RECORD, record)
    claim(folder, config(train={"clip_grad": 0.5}), "distill")
    with pytest.raises(RequestError, match=r"^distill.cross_entropy=0.5: .* whose distill was made with distill.cross_entropy=0.0; use that"):
        claim(folder, config(distill={"cross_entropy": 0.5}), "distill")


def test_a_stage_without_an_entry_binds_nothing(run):
    folder = run(begun=["distill"], steps=[4])  # pruned elsewhere, and copied
    claim(folder, config(calibrate={"samples": 7}), "calibrate")


def cache(**changes):
    return {"teacher": {"cache": changes}}


def test_what_would_be_read_of_a_cache_binds_only_where_one_is_read(run):
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4])
    for verb in ("distill", "compress", "cache"):
        claim(folder, config(**cache(top_k=32)), verb)
    with pytest.raises(RequestError, match=r"^teacher.cache.folder=c: .* whose distill was made with teacher.cache.folder=null; use that"):
        claim(folder, config(**cache(folder="c", top_k=32)), "distill")
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4], cfg=config(**cache(folder="c")))
    with pytest.raises(RequestError, match=r"^teacher.cache.top_k=32: .* whose distill was made with teacher.cache.top_k=64; use that"):
        claim(folder, config(**cache(folder="c", top_k=32)), "distill")


def test_a_cache_is_made_whatever_the_run_reads_in_the_teacher_s_place(run):
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4])
    claim(folder, config(**cache(folder="other", top_k=7)), "cache")
    folder = run(done=["data", "calibrate", "prune"], begun=["distill"], steps=[4], cfg=config(**cache(folder="c")))
    claim(folder, config(**cache(top_k=7)), "cache")
    with pytest.raises(RequestError, match=r"^teacher.path=other"):
        claim(folder, config(teacher={"path": "other"}), "cache")


def test_a_training_says_what_changed(run, capsys):
    folder = run(begun=["distill"], steps=[2, 4])
    claim(folder, config(train={"lr": 1e-3, "warmup_steps": 2}), "distill")
    changed = "train.lr=0.001 (before: 0.0001), train.warmup_steps=2 (before: 40)"
    assert capsys.readouterr().err == f"minitron: {changed} from step 5 on\n"
    claim(folder, config(), "distill")
    claim(folder, config(train={"lr": 1e-3}), "evaluate")
    assert capsys.readouterr().err == ""


def test_one_command_at_a_time(tmp_path):
    who = f"process {os.getpid()} on "
    for _ in range(2):
        with locked(tmp_path):
            with (
                pytest.raises(RequestError, match=f"^run.dir={tmp_path}: {who}.* is at work in it; wait for it, or use another run.dir$"),
                locked(tmp_path),
            ):
                pass
            assert (tmp_path / LOCK).read_text().startswith(who)  # nor did the other one take it away
        assert [*tmp_path.iterdir()] == []


def test_a_folder_is_named_by_its_setting(tmp_path):
    folder = tmp_path / "new" / "cache"
    with (
        locked(folder, "teacher.cache.folder"),
        pytest.raises(RequestError, match=f"^teacher.cache.folder={folder}: process .* wait for it, or use another teacher.cache.folder$"),
        locked(folder, "teacher.cache.folder"),
    ):
        pass
    (tmp_path / "file").touch()
    with (
        pytest.raises(RequestError, match=f"^cannot use teacher.cache.folder {tmp_path}/file/cache: "),
        locked(tmp_path / "file" / "cache", "teacher.cache.folder"),
    ):
        pass


def test_a_lock_ends_with_its_command(tmp_path):
    """However that ends, whatever file it leaves, and whatever children it forked that live on."""
    waiting, go_on = os.pipe()
    born, tell = os.pipe()
    command = os.fork()
    if not command:
        os.close(go_on)
        with locked(tmp_path):
            if os.fork():
                os.read(born, 1)
                os._exit(0)  # as if killed
            os.write(tell, b"!")
            os.read(waiting, 1)  # until the end of this test
            os._exit(0)
    try:
        os.waitpid(command, 0)
        assert (tmp_path / LOCK).read_text().startswith(f"process {command} on ")
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        for end in (go_on, born, tell):
            os.close(end)


def test_errors_inside_the_lock_pass_as_they_are(tmp_path):
    with pytest.raises(FileNotFoundError), locked(tmp_path):
        (tmp_path / "nothing").read_text()
    assert [*tmp_path.iterdir()] == []


def test_a_file_that_was_removed_under_the_lock_is_no_lock(tmp_path, monkeypatch):
    """Whoever waited for a command to remove its file holds a file that nobody else will look at."""
    import fcntl

    flock, calls = fcntl.flock, []

    def removed_before(handle, how):
        calls.append(handle)
        if len(calls) == 1:
            (tmp_path / LOCK).unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", removed_before)
    with locked(tmp_path), pytest.raises(RequestError), locked(tmp_path):
        pass
    assert len(calls) == 3


def test_file_systems_without_locks_are_told_of(tmp_path, monkeypatch, capsys):
    def unable(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", unable)
    with locked(tmp_path):
        assert "its file system has no locks (Operation not supported)" in capsys.readouterr().err


def test_the_folder_of_something_else(tmp_path):
    own(tmp_path / "new")
    own(tmp_path / "new")
    (tmp_path / "new" / "thesis.txt").touch()
    with pytest.raises(RequestError, match="the folder holds files that are not a run's"):
        own(tmp_path / "new")
    (tmp_path / "new" / RECORD).write_text(json.dumps({}))
    own(tmp_path / "new")


def test_how_training_reads_its_text_binds_training_alone(run):
    packed = config(data={"packing": "documents"})
    claim(run(["data", "calibrate", "prune"]), packed, "distill")
    with pytest.raises(RequestError, match=r"^data.packing=documents: .* whose distill was made with data.packing=stream; use that"):
        claim(run(["data", "calibrate", "prune"], ["distill"], [4]), packed, "distill")


def test_an_evaluation_needs_none_of_the_training_s_settings_and_leaves_them_as_they_were(run):
    """It reads the length of a sequence; that one still binds it."""
    trained = config(train={"steps": 50, "lr": 1e-3, "beta1": 0.5, "seq_length": 64, "global_batch_size": 4})
    folder = run(["data", "calibrate", "prune", "distill"], steps=[50], cfg=trained)
    claim(folder, trained, "distill")
    before = from_yaml((folder / "config.yaml").read_text())
    plain = config(train={"steps": 1000, "seq_length": 64}, eval={"tokens": 128}, run={"checkpoint": "best"})
    claim(folder, plain, "evaluate")
    after = from_yaml((folder / "config.yaml").read_text())
    assert after.train == before.train == trained.train
    assert (after.eval.tokens, after.run.checkpoint) == (128, "best")
    with pytest.raises(RequestError, match=r"^train.seq_length=1024: .* made with train.seq_length=64; use that"):
        claim(folder, config(), "evaluate")
    with pytest.raises(RequestError, match=r"^train.beta1=0.9: .* whose distill was made with train.beta1=0.5; use that"):
        claim(folder, dataclasses.replace(plain, train=dataclasses.replace(trained.train, beta1=0.9)), "distill")


def test_what_an_evaluation_of_an_earlier_version_noted_of_the_training_is_passed_over():
    noted = settings_of(config(train={"seq_length": 64}), "evaluate", free=True)
    assert [name for name in noted if name.startswith("train.")] == ["train.seq_length"]
    assert made_with({"settings": {**noted, "train.lr": 0.1}}, "evaluate") == noted


def test_sizes_that_plan_alone_reads_bind_nothing():
    shaped = dataclasses.replace(Config(), model=Model(path="x", shape={"hidden_size": 8}))
    assert not [name for name in settings_of(shaped, "calibrate", free=True) if name.startswith("model.shape")]
