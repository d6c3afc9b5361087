"""`minitron cache`, and a distillation that reads what it left, on a real model."""

import functools
import json
import os
import shutil

import pytest

from minitron.engine.checkpoint import Checkpoints
from minitron.record import locked
from tests.stages.commands import minitron, running, wait_until

KEPT = 511  # of 512 tokens: what is read differs from the live teacher by its rounding alone


@pytest.fixture
def run(finished, tmp_path):
    """A run that is pruned and not trained yet."""
    return shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl", "hf", "eval.json"))


def losses(run):
    with open(run / "metrics.jsonl", encoding="utf-8") as handle:
        return [json.loads(line)["loss"] for line in handle]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def test_a_distillation_from_the_cache_of_a_killed_command(run, finished, settings, tmp_path):
    """Killed and started again, the verb leaves what an undisturbed one does; a student that reads it learns what the live teacher's does."""
    command = ["cache", f"run.dir={run}", *settings, f"teacher.cache.top_k={KEPT}", "teacher.cache.samples_per_file=4"]
    folder = run / "cache"
    with running(tmp_path / "log", *command) as ranks:
        wait_until(lambda: any(folder.glob("*.npz")), ranks)
    early = files(folder)
    assert "manifest.json" not in early

    done = minitron(tmp_path / "log", *command)
    assert (done.code, done.err) == (0, "")
    before = sum(name.endswith(".npz") and not name.startswith(".") for name in early)
    assert 0 < before < 32
    assert f"  {before} of 32 files were made before\n" in done.out
    size = sum(map(len, (content for name, content in files(folder).items() if name.endswith(".npz"))))
    assert done.out.endswith(
        f"  {folder}: the 511 most probable tokens at each of 8.2 K tokens, {size / 1e6:.1f} MB, {size / 8192:,.1f} bytes per token\n"
        f"  minitron distill reads it with teacher.cache.folder={folder} teacher.cache.top_k=511\n"
    )

    again = minitron(tmp_path / "log", *command[:-1])  # teacher.cache.samples_per_file is the cache's own
    assert "  32 of 32 files were made before: nothing is left to do\n" in again.out
    undisturbed = minitron(tmp_path / "log", *command, f"teacher.cache.folder={tmp_path / 'other'}")
    assert (undisturbed.code, undisturbed.err) == (0, "")
    assert files(tmp_path / "other") == files(folder)

    reading = [*settings, f"teacher.cache.top_k={KEPT}", f"teacher.cache.folder={folder}"]
    done = minitron(tmp_path / "log", "distill", f"run.dir={run}", *reading)
    assert (done.code, done.err) == (0, "")
    assert f"  no teacher is loaded: the 511 most probable tokens are read from {folder}\n" in done.out
    assert losses(run) == pytest.approx(losses(finished), rel=2e-3)


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(run, settings, tmp_path):
    folder = tmp_path / "cache"
    reading = [*settings, f"run.dir={run}", f"teacher.cache.folder={folder}", "teacher.cache.top_k=8"]
    assert minitron(tmp_path / "log", "cache", *reading).code == 0
    (run / "pruned" / "arch.json").unlink()  # whatever loads it fails
    file = folder / "samples_0000000064.npz"
    for change, said in {
        "distill.temperature=2.0": f"teacher.cache.folder={folder}: made with another distill.temperature: 1.0, and this run's is 2.0",
        "teacher.cache.top_k=9": f"teacher.cache.top_k=9: the cache in {folder} holds 8: no more can be read",
        "train.steps=17": f"teacher.cache.folder={folder}: it holds 128 samples, and train.steps x train.global_batch_size = 136 are needed",
        "teacher.cache.folder=/no/such": "teacher.cache.folder=/no/such: no finished cache is there; minitron cache makes one, "
        "and finishes one that it began",
        "distill.top_k=4": "distill.top_k=4: must be null with teacher.cache.folder, where teacher.cache.top_k counts in its place",
        "distill.hidden.enabled=true": "distill.hidden.enabled=true: a cache holds no hidden states: teacher.cache.folder must be null",
        "data.separate_documents=true": f"teacher.cache.folder={folder}: made with another data.separate_documents: false, and this run's is true",
        "device=cpu": f"teacher.cache.folder={folder}: {file} is missing; minitron cache makes it again",
    }.items():
        file.unlink(missing_ok=True)  # seen last, after all that the manifest says
        refused = minitron(tmp_path / "log", "distill", *reading, change)
        assert (refused.code, refused.err) == (2, f"minitron: {said}\n"), change


def test_a_folder_of_something_else_is_refused_before_the_teacher_is_loaded(run, settings, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    for folder, said in (
        (run / "data", "the folder holds files that are not a cache's; an empty or new folder is needed"),
        (file, "a file is there; a folder is needed"),
    ):
        before = sorted(folder.glob("*"))
        refused = minitron(tmp_path / "log", "cache", f"run.dir={run}", *settings, f"teacher.cache.folder={folder}")
        assert (refused.code, refused.out, refused.err) == (2, "", f"minitron: teacher.cache.folder={folder}: {said}\n")
        assert sorted(folder.glob("*")) == before


def test_compress_refuses_a_cache_that_does_not_fit_before_it_measures(run, finished, settings, tales, tmp_path):
    """What settings tell before anything is made; another text right after it is tokenised. Both are called by their names."""
    folder, other = tmp_path / "cache", tmp_path / "other.txt"
    assert minitron(tmp_path / "log", "cache", f"run.dir={run}", *settings, f"teacher.cache.folder={folder}").code == 0
    other.write_text(tales.read_text()[1:] + "Once upon another time. " * 400)
    new = ["compress", f"run.dir={tmp_path / 'new'}", *settings, f"teacher.cache.folder={folder}"]
    for change, said, left in (
        ("seed=7", "seed: 1234, and this run's is 7", False),
        (f"data.train={other}", f"text (data.train): {tales}, and this run's is {other}", True),
    ):
        refused = minitron(tmp_path / "log", *new, change)
        assert (refused.code, refused.err.splitlines()[-1]) == (2, f"minitron: teacher.cache.folder={folder}: made with another {said}")
        assert ((tmp_path / "new" / "data" / "manifest.json").exists(), (tmp_path / "new" / "importance.safetensors").exists()) == (left, False)


def test_no_more_than_the_vocabulary(run, settings, tmp_path):
    refused = minitron(tmp_path / "log", "cache", f"run.dir={run}", *settings, "teacher.cache.top_k=512")
    assert (refused.code, refused.err) == (2, "minitron: teacher.cache.top_k=512: less than the vocabulary's 512 is needed\n")


@pytest.fixture
def cached(run, settings, tmp_path):
    """`cached(*CHANGES)`: the folder of a new cache for the run."""

    def make(*changes):
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        done = minitron(tmp_path / "log", "cache", f"run.dir={run}", *settings, f"teacher.cache.folder={tmp_path / 'cache'}", *changes)
        assert (done.code, done.err) == (0, "")
        return tmp_path / "cache"

    return make


def lose_after(step, folder):
    """The cache loses its files when this many steps are done."""
    from minitron.engine.trainer import Trainer

    update = Trainer.update

    @functools.wraps(update)
    def updating(trainer, *args):
        if trainer.step == step - 1:
            os.rename(folder, folder.with_name("away"))
        return update(trainer, *args)

    Trainer.update = updating


@pytest.mark.slow
def test_a_cache_that_is_lost_or_replaced_in_mid_training(run, cached, settings, tmp_path):
    """Lost, the steps that were done are saved; another one in its place is refused; the same, in other files, is gone on with."""
    few = "teacher.cache.samples_per_file=8"  # a step's
    folder = cached(few)
    reading = ["distill", f"run.dir={run}", *settings, f"teacher.cache.folder={folder}"]
    lost = minitron(tmp_path / "log", *reading, prepare=functools.partial(lose_after, 6, folder))
    where = f"{run}/checkpoints/step_00000006"
    assert lost.code == 2
    assert lost.err.startswith(f"minitron: cannot read {folder}/samples_0000000048.npz: ")
    assert lost.err.endswith(f"; minitron cache makes it again; stopped at step 6, saved in {where}\n")
    assert Checkpoints(run / "checkpoints").latest() == 6

    cached("teacher.cache.top_k=100")
    other = "its checkpoints were trained from another pruned model, or by another teacher or cache; remove checkpoints/ or use another run.dir"
    refused = minitron(tmp_path / "log", *reading)
    assert (refused.code, refused.err) == (2, f"minitron: run.dir={run}: {other}\n")

    cached("teacher.cache.samples_per_file=50")
    done = minitron(tmp_path / "log", *reading)
    assert (done.code, done.err) == (0, "")
    unbroken = shutil.copytree(run, tmp_path / "unbroken", ignore=shutil.ignore_patterns("checkpoints", "metrics.jsonl"))
    assert minitron(tmp_path / "log", "distill", f"run.dir={unbroken}", *reading[2:]).code == 0
    assert losses(run) == losses(unbroken)


def test_one_command_at_a_time_makes_a_cache(run, settings, tmp_path):
    folder = tmp_path / "cache"
    with locked(folder):
        refused = minitron(tmp_path / "log", "cache", f"run.dir={run}", *settings, f"teacher.cache.folder={folder}")
    assert refused.code == 2
    assert refused.err.startswith(f"minitron: teacher.cache.folder={folder}: process {os.getpid()} on ")
    assert refused.err.endswith(" is at work in it; wait for it, or use another teacher.cache.folder\n")
    assert [*folder.iterdir()] == []
