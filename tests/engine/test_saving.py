"""Checkpoints that are damaged, that fail to be written, that are written beside the training; and which of them are kept."""

import io
import shutil
import threading
from pathlib import Path

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async

from minitron.engine import checkpoint, sharded
from minitron.engine.checkpoint import Checkpoints, random_state, retained, set_random_state
from minitron.engine.verified import MARKER, fault, mark, sums, whole
from minitron.errors import RequestError, Stopped
from tests.engine.runs import Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", 2, **BIASES)


def two_checkpoints(world, model, out):
    Run(world, model).fit(out, stop_after=None)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """Checkpoints of steps 2 (the best), 4 and 6 of a run on two ranks."""
    out = tmp_path_factory.mktemp("saved") / "checkpoints"
    on_ranks(two_checkpoints, Layout(tp=2), model, out)
    assert Checkpoints(out).steps() == [2, 4, 6]
    return out


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {"cut": cut, "flipped": flip, "deleted": lambda path: path.unlink()}


def test_a_folder_is_whole_only_with_its_marker_and_every_file(tmp_path):
    (tmp_path / "one").write_bytes(b"1234")
    (tmp_path / "two").write_bytes(b"")
    assert not whole(tmp_path)
    mark(tmp_path, sums(tmp_path, [tmp_path / "one", tmp_path / "two"]))
    assert whole(tmp_path)
    assert fault(tmp_path) is None
    flip(tmp_path / "one")
    assert whole(tmp_path)  # lengths alone
    assert fault(tmp_path, 1, 2) is None  # the other's share
    assert fault(tmp_path, 0, 2) == f"{tmp_path / 'one'}: it is not what was written: its checksum differs"
    cut(tmp_path / "one")
    assert fault(tmp_path, 1, 2) == f"{tmp_path / 'one'}: it has 3 bytes, and 4 were written"
    (tmp_path / "one").unlink()
    assert fault(tmp_path) == f"{tmp_path / 'one'}: No such file or directory"


def test_no_byte_of_the_marker_can_change(tmp_path):
    (tmp_path / "one").write_bytes(b"1234")
    mark(tmp_path, sums(tmp_path, [tmp_path / "one"]))
    written = (tmp_path / MARKER).read_bytes()
    for place in range(len(written)):
        for changed in (written[:place], written[:place] + bytes([written[place] ^ 4]) + written[place + 1 :]):
            (tmp_path / MARKER).write_bytes(changed)
            assert fault(tmp_path) == f"{tmp_path / MARKER}: it is not what was written"


def chosen_after_damages(world, saved, scratch):
    """For each file of the newest checkpoint and each damage: what was chosen."""
    found, said = {}, []
    checkpoint.say_once = said.append
    for file in sorted(path.name for path in (saved / "step_00000006").iterdir()):
        for name, damage in DAMAGES.items():
            copy = scratch / f"{file}-{name}"
            if world.is_main:
                shutil.copytree(saved, copy)
                damage(copy / "step_00000006" / file)
            torch.distributed.barrier()
            here = Checkpoints(copy)
            found[file, name] = here.choose("last", world), set(here.damaged), here.choose("last", world)
    return found, said


@pytest.mark.multirank
def test_damage_to_any_file_is_found_and_the_checkpoint_before_is_taken(saved, tmp_path):
    files = sorted(path.name for path in (saved / "step_00000006").iterdir())
    assert {MARKER, ".metadata", "common.pt", "__0_0.distcp", "__1_0.distcp", "notes.json"} <= {*files}
    found = on_ranks(chosen_after_damages, Layout(tp=2), saved, tmp_path)
    assert [chosen for chosen, _ in found] == [{(file, name): (4, {6}, 4) for file in files for name in DAMAGES}] * 2
    assert found[1][1] == []
    for line, (file, name) in zip(found[0][1], found[0][0], strict=True):
        assert line.startswith(f"{tmp_path}/{file}-{name}/step_00000006/{file}: ")
        assert line.endswith(": this checkpoint is skipped")


def gone_on(world, model, saved):
    """The steps after which a run that goes on from `saved` is there, and what was skipped stays until then."""
    run, here = Run(world, model), Checkpoints(saved, keep_last=1)
    assert here.resume(run.trainer)
    began = run.trainer.step
    run.step()
    here.save(run.trainer)
    between = sorted(path.name for path in saved.glob("step_*"))
    run.step()
    here.save(run.trainer)
    here.drop()
    return began, between, sorted(path.name for path in saved.glob("*step_*")), set(here.damaged)


@pytest.mark.multirank
def test_a_damaged_checkpoint_stays_until_its_step_is_saved_again(saved, model, tmp_path):
    """It takes no good one's place: beside it the best (2) and the newest are kept."""
    copy = shutil.copytree(saved, tmp_path / "copy")
    flip(copy / "step_00000006" / "common.pt")
    (copy / ".step_00000007.partial").mkdir()
    (copy / ".step_00000001.removed").mkdir()
    began, between, after, damaged = on_ranks(gone_on, Layout(), model, copy)[0]
    assert began == 4
    assert between == ["step_00000002", "step_00000005", "step_00000006"]
    assert after == ["step_00000002", "step_00000006"]
    assert damaged == set()
    assert fault(copy / "step_00000006") is None


def test_where_no_checkpoint_is_left_nothing_begins_anew(saved, tmp_path, alone):
    copy = shutil.copytree(saved, tmp_path / "copy")
    for step in (2, 4, 6):
        cut(copy / f"step_0000000{step}" / MARKER)
    with pytest.raises(RequestError, match=r"step_00000006/manifest.json: it is not what was written \(and 2 more\): no checkpoint in .* is left"):
        Checkpoints(copy).choose("last", alone)
    for folder in copy.glob("step_*"):
        shutil.rmtree(folder)
    with pytest.raises(RequestError, match="has no checkpoint any more"):
        Checkpoints(copy).choose("last", alone)
    assert Checkpoints(tmp_path / "new").choose("last", alone) is None


@pytest.mark.parametrize("pointer", ["2\n", "999\n", "", "not a number", None])
def test_the_pointer_misleads_nobody(pointer, saved, tmp_path, alone):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "latest").unlink()
    if pointer is not None:
        (copy / "latest").write_text(pointer)
    assert Checkpoints(copy).choose("last", alone) == 6


def test_a_checkpoint_is_asked_for_by_its_step_or_as_the_best(saved, tmp_path, alone):
    copy = shutil.copytree(saved, tmp_path / "copy")
    here = Checkpoints(copy)
    assert [here.choose(which, alone) for which in ("last", "best", 4)] == [6, 2, 4]
    with pytest.raises(RequestError, match=r"^run.checkpoint=3: there is no such checkpoint in .*; last, best or a step are allowed, of 2, 4, 6$"):
        here.choose(3, alone)
    flip(copy / "step_00000002" / "__0_0.distcp")
    assert Checkpoints(copy).choose("best", alone) == 4  # validated as 2.0, the damaged one as 1.0
    with pytest.raises(RequestError, match=r"^run.checkpoint=2: .*step_00000002/__0_0.distcp: it is not .*; last, best or another step are allowed$"):
        Checkpoints(copy).choose(2, alone)
    (tmp_path / "none").mkdir()
    with pytest.raises(RequestError, match=r"^run.checkpoint=best: no checkpoint in .* had a validation; .*, of none$"):
        Checkpoints(tmp_path / "none").choose("best", alone)


@pytest.mark.parametrize(
    ("losses", "keep_last", "keep_every", "kept"),
    [
        ({}, 2, None, set()),
        ({2: None, 4: None, 6: None}, 2, None, {4, 6}),
        ({2: 3.0, 4: 1.0, 6: 2.0, 8: 1.0}, 1, None, {4, 8}),
        ({2: 3.0, 4: None, 6: 2.0, 8: 2.5}, 1, 4, {4, 6, 8}),
        ({3: 1.0, 6: 2.0, 9: 3.0}, 5, 100, {3, 6, 9}),
    ],
)
def test_which_checkpoints_stay(losses, keep_last, keep_every, kept):
    assert retained(losses, keep_last, keep_every) == kept


class Gate:
    """In the place of the writing of one tensor: it waits until it is opened."""

    def __init__(self, monkeypatch, error=None):
        self.opened, self.error, self.usual = threading.Event(), error, filesystem_async._write_item
        monkeypatch.setattr(filesystem_async, "_write_item", self)

    def __call__(self, *args, **kwargs):
        assert self.opened.wait(60)
        if self.error is not None:
            raise self.error
        return self.usual(*args, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_save_in_the_background_holds_the_state_of_its_step(model, tmp_path, alone, monkeypatch, dtype):
    run, here = Run(alone, model, dtype=dtype), Checkpoints(tmp_path, in_background=True)
    here.begin(run.trainer)
    for _ in range(2):  # the second into the same memory as the first
        run.step()
        here.wait(alone)
        gate = Gate(monkeypatch)
        here.save(run.trainer, final=False)
        after = [run.step()["loss"] for _ in range(2)]  # nothing is written yet
        here.poll(alone)
        assert here.pending is not None
        assert here.latest() in (None, run.trainer.step - 5)
        gate.opened.set()
        monkeypatch.undo()
    here.wait(alone)
    fresh = Run(alone, model, dtype=dtype)
    assert Checkpoints(tmp_path).resume(fresh.trainer)
    assert fresh.trainer.step == run.trainer.step - 2
    assert [fresh.step()["loss"] for _ in range(2)] == after


def test_a_run_that_ends_by_an_error_completes_what_is_in_flight_and_leaves_no_writer(model, tmp_path, alone, monkeypatch):
    gate = Gate(monkeypatch)

    def report(line):
        if line["step"] == 3:
            gate.opened.set()
            raise RequestError("no more")

    with pytest.raises(RequestError, match="no more"):
        Run(alone, model).fit(tmp_path, report=report)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("save", "ThreadPool"))] == []
    assert Checkpoints(tmp_path).steps() == [2]  # which was in flight
    monkeypatch.undo()
    assert Checkpoints(tmp_path).resume(Run(alone, model).trainer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


def test_a_stop_with_a_save_in_flight_saves_the_newest(model, tmp_path, alone, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(Stopped, match="stopped at step 3"):
        Run(alone, model).fit(tmp_path, stop_after=3, report=lambda line: line["step"] == 3 and gate.opened.set())
    assert Checkpoints(tmp_path).steps() == [2, 3]


PLACES = {  # what writes the shards, what rank 0 writes alone first and last
    "shards": (filesystem_async, "_write_item"),
    "common": (torch, "save"),
    "marker": (sharded, "mark"),
}


def fit_with_failures(world, model, out, place, fails_at):
    """Train while `place` fails for one step's checkpoint; the steps that are there at last, how the training ended, and its length."""
    run, said = Run(world, model), []
    checkpoint.say_once = said.append
    owner, name = PLACES[place]
    usual = getattr(owner, name)

    def fail(*args, **kwargs):
        paths = [str(getattr(arg, "name", arg)) for arg in args if isinstance(arg, str | Path | io.BufferedWriter)]
        if any(f"step_{fails_at:08d}" in path for path in paths) and (place != "shards" or world.rank == world.size - 1):
            raise OSError(28, "No space left on device")
        return usual(*args, **kwargs)

    setattr(owner, name, fail)
    try:
        run.fit(out)
        ended = None
    except RequestError as error:
        ended = str(error)
    return Checkpoints(out).steps(), ended, run.trainer.step, said


@pytest.mark.multirank
@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_keeps_the_checkpoint_before_and_the_training_goes_on(place, model, tmp_path):
    found = on_ranks(fit_with_failures, Layout(tp=2), model, tmp_path, place, 4)
    assert [(steps, ended, step) for steps, ended, step, _ in found] == [([2, 6], None, 6)] * 2
    said = found[0][3]
    assert (len(said), found[1][3]) == (1, [])
    assert said[0].startswith(f"cannot write {tmp_path}/step_00000004: ")
    assert "No space left on device" in said[0]
    assert said[0].endswith(": this checkpoint is not there, the one of step 2 stays, and the training goes on")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002", "step_00000006"]


@pytest.mark.multirank
def test_at_the_last_step_a_full_disk_is_an_error(model, tmp_path):
    for steps, ended, *_ in on_ranks(fit_with_failures, Layout(tp=2), model, tmp_path, "shards", 6):
        assert steps == [2, 4]
        assert ended.startswith(f"cannot write {tmp_path}/step_00000006: ") and "No space left on device" in ended
        assert ended.endswith(": this checkpoint is not there, the one of step 4 stays; with room for it, the same command continues")


def test_random_states_go_on_at_the_same_place_only(alone):
    state = random_state(alone)
    drawn = torch.rand(3)
    set_random_state({place.replace("tp=1", "tp=2"): mine for place, mine in state.items()}, alone)
    assert not torch.equal(torch.rand(3), drawn)
    set_random_state(state, alone)
    assert torch.equal(torch.rand(3), drawn)
