"""Requests that cannot be met: one line on stderr, exit 2, and nothing half-written."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from tests.oracles.models import save_model, saved_tensors
from tests.stages.commands import minitron, running, wait_until

FINISHED = ("importance.safetensors", "keep.safetensors", "arch.json", "pruned", "checkpoints", "eval.json", "hf", "report.html")


def half_written(folder):
    return {path for path in folder.rglob("*") if path.name.endswith((".partial", ".tmp")) or path.stat().st_size == 0 < path.is_file()}


@pytest.fixture
def refused(settings, tmp_path):
    """`refused(SETTINGS, verb=, run=, prepare=)`: the one line that a command with these settings besides the usual ones is refused with.

    Before it there may be a line for each save on the way that could not be written, where `lost_saves`.
    """

    def run_it(*changes, verb="compress", run=tmp_path / "run", prepare=None, lost_saves=False):
        changed = {change.split("=")[0].lstrip("+") for change in changes}
        usual = [value for value in settings if value.split("=")[0] not in changed]
        there = half_written(run)  # of another process, stopped in the middle of a file
        done = minitron(tmp_path / "log", verb, f"run.dir={run}", *usual, *changes, prepare=prepare)
        assert done.code == 2, done
        *before, line = done.err.splitlines(keepends=True)
        assert line.startswith("minitron: ") and line.endswith("\n")
        lost = [one for one in before if "are free there" not in one]  # a remark of the preflight
        assert lost_saves or not before, done.err
        assert all("cannot write" in one and one.endswith("and the training goes on\n") for one in lost), done.err
        assert bool(lost) == lost_saves, done.err
        assert "Traceback" not in done.out
        assert half_written(run) <= there
        return line.removeprefix("minitron: ").rstrip("\n")

    return run_it


@pytest.fixture
def copy(stories, tmp_path):
    """A copy of the model, to be spoiled."""
    shutil.copytree(stories, tmp_path / "model", copy_function=shutil.copyfile)
    (tmp_path / "model").chmod(0o755)
    return tmp_path / "model"


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def of_unknown_kind(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "rwkv"}))


def without_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (truncated, "model.safetensors is missing, truncated or not safetensors"),
        (without_weights, "no model.safetensors and no model.safetensors.index.json"),
        (of_unknown_kind, "model_type 'rwkv' is not supported; supported: gemma, "),
        (without_tokenizer, "tokenizer"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_models_that_cannot_be_read(refused, copy, tmp_path, spoil, said):
    spoil(copy)
    line = refused(f"model.path={copy}")
    assert said in line
    assert str(copy) in line
    assert not any((tmp_path / "run" / name).exists() for name in FINISHED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("target.hidden_size=65", "target.hidden_size=65: the model has 64: pruning can only make it smaller"),
        ("target.num_layers=6", "target.num_layers=6: the model has 5"),
        ("target.num_attention_heads=6", "target.num_attention_heads=6: every KV group keeps the same number of heads: a multiple of 4 is needed"),
        ("target.ffn_hidden_size=0", "target.ffn_hidden_size=0: more than 0 is needed"),
        ("target.num_moe_experts=2", "target.num_moe_experts=2: must be null: this model has no experts"),
        ("train.global_batch_size=6", "train.global_batch_size=6: a multiple of train.micro_batch_size=4 is needed"),
        ("model.path=/no/such/model", "model.path=/no/such/model: no such file or folder"),
        ("data.train=/no/such/text.jsonl", "data.train=/no/such/text.jsonl: "),
        ("parallel.tp=2", "parallel.tp=2: tp x pp x cp = 2 must divide the number of processes, 1"),
        ("parallel.sp=true", "parallel.sp=true: sequence parallelism needs parallel.tp of at least 2"),
        ("eval.tokens=32", "eval.tokens=32: less than one window of train.seq_length=64 tokens"),
        ("eval.seq_length=8192", "eval.tokens=4096: less than one window of eval.seq_length=8192 tokens"),
        ("train.eval_tokens=32", "train.eval_tokens=32: less than one window of train.seq_length=64 tokens"),
        ("distill.top_k=512", "distill.top_k=512: fewer than the model's 512 tokens are needed, or null for all"),
        ("teacher.parallel.tp=2", "teacher.parallel.tp=2: the teacher's tp x pp x parallel.cp = 2 must divide the number of processes, 1"),
        ("device=cuda", "device=cuda: no GPU is visible to torch; use auto or cpu"),
    ],
)
def test_settings_that_no_run_can_have(refused, tmp_path, change, said):
    if change == "device=cuda" and torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert refused(change).startswith(said)
    assert not any((tmp_path / "run" / name).exists() for name in (*FINISHED, "data"))


@pytest.mark.parametrize("verb", ["compress", "prune"])
def test_a_target_that_is_the_model_itself(refused, tmp_path, verb):
    line = refused("target.hidden_size=64", "target.ffn_hidden_size=null", verb=verb)
    assert line == "target.hidden_size=64: nothing to prune: the model has these sizes already"
    assert not (tmp_path / "run").exists()


def without_wandb():
    """As where the package is not installed."""
    sys.modules["wandb"] = None


def without_tensorboard():
    """Likewise."""
    sys.modules["tensorboard"] = None


def test_packages_that_are_not_there_are_missed_at_once(refused, tmp_path):
    assert refused("logging.wandb=true", prepare=without_wandb).startswith("logging.wandb=true: the package wandb is not installed")
    assert refused("logging.tensorboard=true", prepare=without_tensorboard).startswith("logging.tensorboard=true: the package tensorboard is not")
    assert not (tmp_path / "run").exists()
    if not torch.cuda.is_available():
        assert refused("spec=transformer_engine") == "spec=transformer_engine: Transformer Engine needs a GPU; use auto or torch"
        assert not (tmp_path / "run" / "data").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("eval.texts.novel={text}", r"eval.texts.novel={text}: too short: it has \d tokens, and one window of train.seq_length=64 needs 65"),
        ("data.valid={text}", r"data.valid={text}: too short: it has \d tokens, and one window of train.seq_length=64 needs 65"),
        ("data.calibration={text}", r"data.calibration={text}: too short: it has \d tokens, and one window of calibrate.seq_length=64 needs 65"),
        ("data.train={text}", r"data.train={text}: too short: it has \d tokens, and one window of calibrate.seq_length=64 needs 65"),
        (
            "data.valid_fraction=0.001 eval.seq_length=500",
            r"data.train=.*: too short: its held-out documents \(data.valid_fraction=0.001\) have \d+ tokens, "
            "and one window of eval.seq_length=500 needs 501",
        ),
    ],
)
def test_texts_that_are_too_short_are_refused_before_any_model_is_loaded(refused, tmp_path, change, said):
    text = tmp_path / "short.txt"
    text.write_text("Once upon")
    line = refused(*change.format(text=text).split())
    assert re.fullmatch(said.format(text=re.escape(str(text))), line), line
    assert json.loads((tmp_path / "run" / "stages.json").read_text()) == {}


def test_more_text_than_there_is(refused, tmp_path):
    assert "calibrate.samples=100000" in refused("calibrate.samples=100000")
    assert not (tmp_path / "run" / "importance.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "data.train={text}: "),
        ("empty.jsonl", b"", "data.train={text}: "),
        ("binary.txt", b"\x00\xff\xfe\x80" * 1000, "data.train={text}: "),
        ("binary.jsonl", b"\x00\xff\xfe\x80" * 1000, "data.train={text}: "),
        ("number.jsonl", b'{"text": 3}\n', "data.train={text}: "),
        ("pages.jsonl", b'{"page": "words"}\n', "data.text_key=text: line 1 of {text} has no such field; it has page"),
    ],
    ids=lambda value: value if isinstance(value, str) and "." in value[-6:] else "",
)
def test_texts_that_are_none(refused, tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert refused(f"data.train={tmp_path / name}").startswith(said.format(text=tmp_path / name))
    assert not list((tmp_path / "run").rglob("*.bin"))


def test_a_refused_request_does_not_stand_in_the_way_of_the_right_one(refused, settings, tmp_path):
    """One folder all along: settings that were refused, wherever that was, are no settings of the run."""
    short, broken = tmp_path / "short.txt", tmp_path / "broken.jsonl"
    short.write_text("Once upon")
    broken.write_text(json.dumps({"text": "Once upon a time."}) + "\n{broken\n")
    refused("target.hidden_size=65")
    assert "line 2 is not JSON" in refused(f"data.train={broken}")
    assert "too short" in refused(f"data.train={short}")
    assert "calibrate.samples=100000" in refused("calibrate.samples=100000", "train.lr=1")
    assert "the student's is 512" in refused(f"teacher.path={save_model(tmp_path / 'teacher', vocab_size=300)}")
    assert "lower train.lr=1e+30" in refused("train.lr=1e30", "calibrate.samples=8")
    assert (tmp_path / "run" / "pruned").is_dir()
    usual = [value for value in settings if not value.startswith("calibrate.samples")]
    done = minitron(tmp_path / "log", "compress", f"run.dir={tmp_path / 'run'}", *usual, "calibrate.samples=8")
    assert (done.code, done.err) == (0, "")


@pytest.fixture
def unfinished(finished, tmp_path):
    """The folder of a run that was stopped after step 12 of 16."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "step_00000016")
    (run / "checkpoints" / "latest").write_text("12\n")
    record = json.loads((run / "stages.json").read_text())
    for stage in ("distill", "evaluate", "export"):
        record[stage]["done"] = False
    (run / "stages.json").write_text(json.dumps(record))
    return run


def test_a_training_may_go_on_with_another_learning_rate(refused, unfinished, settings, tmp_path):
    before = [json.loads(line) for line in (unfinished / "metrics.jsonl").read_text().splitlines()]
    assert "train.beta1=0.8: run.dir=" in refused("train.beta1=0.8", run=unfinished)
    assert "train.steps=32: run.dir=" in refused("train.steps=32", run=unfinished)
    usual = [value for value in settings if not value.startswith("train.lr")]
    done = minitron(tmp_path / "log", "compress", f"run.dir={unfinished}", *usual, "train.lr=4e-4", "train.clip_grad=0.5")
    said = "minitron: train.lr=0.0004 (before: 0.002), train.clip_grad=0.5 (before: 1.0) from step 13 on\n"
    assert (done.code, done.err) == (0, said)
    after = [json.loads(line) for line in (unfinished / "metrics.jsonl").read_text().splitlines()]
    assert after[:12] == before[:12]
    cosine = [(1 + math.cos(math.pi * (step - 2) / (16 - 2))) / 2 for step in (13, 14, 15, 16)]  # a warm-up of 2 steps
    assert [line["lr"] for line in after[12:]] == pytest.approx([1e-5 + share * (4e-4 - 1e-5) for share in cosine])
    assert "train.lr=0.002: run.dir=" in refused("train.clip_grad=0.5", run=unfinished)  # it is finished now


def calibrates(run):
    """Its calibration has begun."""
    return (run / "stages.json").exists() and "calibrate" in json.loads((run / "stages.json").read_text())


@pytest.mark.multirank
def test_a_second_command_on_one_folder_is_refused_on_all_its_ranks(refused, settings, tmp_path):
    run = tmp_path / "run"
    with running(tmp_path / "first", "compress", f"run.dir={run}", *settings) as first:
        wait_until(lambda: calibrates(run), first)
        os.kill(first.processes[0].pid, signal.SIGSTOP)
        at_work = rf"run.dir={re.escape(str(run))}: process {first.processes[0].pid} on \S+ is at work in it; wait for it, or use another run.dir"
        assert re.fullmatch(at_work, refused("parallel.timeout_minutes=9"))
        with running(tmp_path / "second", "export", f"run.dir={run}", *settings, "parallel.tp=2", size=2) as second:
            assert second.results(timeout=120) == [2, 2]
        said = "".join((tmp_path / f"second{rank}.err").read_text() for rank in (0, 1))
        assert re.fullmatch(f"minitron: {at_work}\n", said), said
    assert refused("calibrate.samples=100000").startswith("calibrate.samples=100000: the text holds")  # the first was killed, and its lock with it


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("target.hidden_size=56", "target.hidden_size=56: run.dir={run} belongs to a run whose .* was made with target.hidden_size=48"),
        (
            "calibrate.batch_agg=mean",
            "calibrate.batch_agg=mean: run.dir={run} belongs to a run whose calibrate was made with .*=l2;",
        ),
        ("train.lr=1", "train.lr=1.0: run.dir={run} belongs to a run whose distill was made with train.lr=0.002"),
        ("seed=7", "seed=7: run.dir={run} belongs to a run whose .* was made with seed=1234"),
        ("dtype=bf16", "dtype=bf16: run.dir={run} belongs to a run whose .* was made with dtype=fp32;"),
    ],
)
def test_the_folder_of_another_run(refused, finished, change, said):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert re.match(said.format(run=re.escape(str(finished))), refused(change, run=finished))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_folder_that_is_no_run_s(refused, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("It was a dark and stormy night.")
    assert "the folder holds files that are not a run's" in refused(run=tmp_path / "thesis")
    assert [path.name for path in (tmp_path / "thesis").iterdir()] == ["chapter1.txt"]


def test_a_folder_that_cannot_be_made(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert refused(run=tmp_path / "file" / "run").startswith(f"cannot use run.dir {tmp_path}/file/run: Not a directory")


def small_files():
    """Files of more than 32 KiB can't be written: what a quota does, and a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 << 10, 32 << 10))


@pytest.mark.parametrize(("stage", "artifact"), [("data", "data"), ("prune", "pruned"), ("distill", "checkpoints"), ("export", "hf")])
def test_each_stage_meets_files_that_cannot_grow(refused, finished, tmp_path, stage, artifact):
    """What a stage made is taken out of a finished run, to be made again with no room for large files."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    shutil.rmtree(run / artifact)
    record = json.loads((run / "stages.json").read_text())
    record[stage]["done"] = False
    (run / "stages.json").write_text(json.dumps(record))
    assert refused(prepare=small_files, lost_saves=stage == "distill").startswith("cannot write")
    assert not list((run / artifact).rglob("*.safetensors"))


@pytest.fixture
def megabytes(request, tmp_path):
    """A file system of so many."""
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={request.param}m", "tmpfs", str(place)], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("megabytes", [1], indirect=True)
def test_a_disk_without_room_for_a_checkpoint(refused, megabytes):
    assert "a checkpoint takes about" in refused(run=megabytes / "run")


@pytest.mark.parametrize("megabytes", [3], indirect=True)
def test_a_disk_that_is_full_on_the_way(refused, megabytes):
    line = refused(run=megabytes / "run", lost_saves=True)
    assert "No space left on device" in line
    assert str(megabytes / "run") in line


def change_weights(folder):
    """Other weights of the same sizes in a model's place."""
    tensors = saved_tensors(folder)
    noise = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        if "embed" not in name:
            tensor += 0.2 * tensor.std() * torch.randn(tensor.shape, generator=noise)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_a_teacher_that_changes_under_a_run(refused, settings, copy, tmp_path):
    changed = [value for value in settings if not value.startswith(("train.steps", "train.warmup"))]
    short = [f"teacher.path={copy}", "train.steps=2", "train.warmup_steps=1"]
    done = minitron(tmp_path / "log", "compress", f"run.dir={tmp_path / 'run'}", *changed, *short)
    assert (done.code, done.err) == (0, "")
    change_weights(copy)
    assert "trained from another pruned model, or by another teacher or cache; remove checkpoints/" in refused(*short)


def test_weights_that_change_under_a_run(refused, settings, copy, tmp_path):
    """Scores and checkpoints are of the model as it was: neither is taken for one of what lies in its place now."""
    model, short = f"model.path={copy}", ["train.steps=2", "train.warmup_steps=1"]
    changed = [value for value in settings if not value.startswith(("model.path", "train.steps", "train.warmup"))]
    done = minitron(tmp_path / "log", "compress", f"run.dir={tmp_path / 'run'}", *changed, model, *short)
    assert (done.code, done.err) == (0, "")
    change_weights(copy)
    assert "importance.safetensors was measured on another model" in refused(model, *short, verb="prune")
    assert "its checkpoints were trained from another pruned model" in refused(model, *short)


def test_a_teacher_with_another_vocabulary(refused, tmp_path):
    teacher = save_model(tmp_path / "teacher", vocab_size=300)
    line = refused(f"teacher.path={teacher}")
    assert line == f"teacher.path={teacher}: vocabulary of 300, the student's is 512"


def test_a_teacher_with_another_tokenizer(refused, data_root, tmp_path):
    """Two tokens change places: as many as the student's, and each model's text is nonsense to the other."""
    teacher = tmp_path / "teacher"
    shutil.copytree(data_root / "stories260k", teacher)
    file = teacher / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    line = refused(f"teacher.path={teacher}")
    token = min(one, other)
    assert line == f"teacher.path={teacher}: its tokenizer differs: token {token!r} is {vocabulary[token]} there and " + (
        f"{vocabulary[max(one, other)]} in the student's"
    )


def without_trained(run, *others):
    """Of a finished run all that binds `calibrate.samples`, or that is exported instead of the pruned model, and more."""
    shutil.rmtree(run / "checkpoints")
    for name in others:
        (run / name).unlink()


SPOILED = {  # what becomes of a finished run, what a verb is then refused for, and the line
    "data": (lambda run: (run / "data" / "manifest.json").unlink(), "data.train={tmp}/text.jsonl", "data.train={tmp}/text.jsonl"),
    "calibrate": (lambda run: without_trained(run, "importance.safetensors"), "calibrate.samples=1000000", "calibrate.samples=1000000: "),
    "prune": (lambda run: (run / "importance.safetensors").write_text("{}"), "seed=1234", "cannot read"),
    "distill": (lambda run: (run / "checkpoints" / "pruned_from").write_text("another"), "seed=1234", "run.dir="),
    "evaluate": (lambda run: (run / "pruned" / "unit_order.json").write_text("{"), "seed=1234", "{tmp}/run/pruned/unit_order.json: it has"),
    "export": (lambda run: without_trained(run, "pruned/unit_order.json"), "seed=1234", "{tmp}/run/pruned/unit_order.json: No such file"),
}


@pytest.mark.parametrize("verb", SPOILED)
def test_a_command_that_is_refused_puts_nothing_out_of_date(verb, refused, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    spoil, setting, said = SPOILED[verb]
    (tmp_path / "text.jsonl").write_text("no json\n")
    spoil(run)
    record = (run / "stages.json").read_bytes()
    assert refused(setting.format(tmp=tmp_path), verb=verb).startswith(said.format(tmp=tmp_path))
    assert (run / "stages.json").read_bytes() == record
