"""Checkpoints: complete or absent, a run goes on from them as if it had never stopped, another layout reads them."""

import resource

import pytest
import torch

from minitron.engine.checkpoint import Checkpoints
from minitron.engine.sharded import load_sharded
from minitron.engine.verified import mark
from minitron.errors import RequestError, Stopped
from tests.engine.runs import Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, save_model

FIGURES = ("step", "loss", "kd_loss", "grad_norm", "lr", "tokens", "valid_loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tied model of three KV groups and 61 tokens: two ranks pad both. Over stages, its embedding's bucket of gradients needs padding too."""
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, **BIASES)


def figures(lines):
    return [{key: line[key] for key in FIGURES if key in line} for line in lines]


def unbroken_and_resumed(world, folder, out, dtype):
    """Lines of a run in one piece, and of one that is stopped twice: on a signal after step 3, and after its checkpoint of step 4."""
    whole = Run(world, folder, dtype=dtype).fit(out / "whole").lines
    lines = []
    for stop_after in (3, 5, None):
        run = Run(world, folder, dtype=dtype)
        assert Checkpoints(out / "broken").resume(run.trainer) == (stop_after != 3)
        try:
            run.fit(out / "broken", stop_after)
        except Stopped as stopped:
            assert f"stopped at step {stop_after}, saved in" in str(stopped)
        lines += figures(run.lines)
    return figures(whole), lines, Checkpoints(out / "broken").steps()


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        (Layout(), torch.float32),
        (Layout(), torch.bfloat16),
        (Layout(tp=2, sp=True), torch.float32),
        (Layout(dp=2), torch.bfloat16),
        (Layout(pp=2), torch.float32),
        (Layout(pp=2, vpp=2), torch.bfloat16),
        (Layout(cp=2), torch.float32),
    ],
    ids=str,
)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(layout, dtype, folder, tmp_path):
    whole, broken, steps = on_ranks(unbroken_and_resumed, layout, folder, tmp_path, dtype)[0]
    assert [line["step"] for line in whole] == [1, 2, 3, 4, 5, 6]
    assert len({line["loss"] for line in whole}) == 6
    drop = {"valid_loss"}  # counts validations, which start anew with the process
    assert [{key: line[key] for key in line.keys() - drop} for line in broken] == [{key: line[key] for key in line.keys() - drop} for line in whole]
    assert [line["step"] for line in broken if "valid_loss" in line] == [2, 4, 6]
    assert steps == [2, 5, 6]  # the newest two and the best


LAYOUTS = [Layout(), Layout(tp=2), Layout(dp=2), Layout(pp=3), Layout(cp=2), Layout(pp=2, vpp=2)]


def first_half(world, folder, out):
    with pytest.raises(Stopped):
        Run(world, folder).fit(out, stop_after=3)


def second_halves(world, folder, checkpoints):
    """The losses after step 3, gone on from each of the checkpoints."""
    found = {}
    for before, path in checkpoints.items():
        run = Run(world, folder)
        assert Checkpoints(path).resume(run.trainer)
        found[before] = [run.step()["loss"] for _ in range(3)]
    return found


def in_one_piece(world, folder):
    run = Run(world, folder)
    return [run.step()["loss"] for _ in range(6)]


@pytest.fixture(scope="module")
def checkpoints(folder, tmp_path_factory):
    """{layout: the checkpoint that its ranks left after step 3}"""
    root = tmp_path_factory.mktemp("checkpoints")
    for layout in LAYOUTS:
        on_ranks(first_half, layout, folder, root / str(layout))
    return {str(layout): root / str(layout) for layout in LAYOUTS}


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_training_goes_on_at_another_layout(layout, checkpoints, folder):
    expected = on_ranks(in_one_piece, Layout(), folder)[0][3:]
    found = on_ranks(second_halves, layout, folder, checkpoints)[0]
    assert found == {before: pytest.approx(expected, rel=1e-5) for before in checkpoints}


def saved_before_any_step(world, folder, out):
    """A run that is stopped when no step has changed anything yet, and goes on from there."""
    Checkpoints(out).save(Run(world, folder).trainer)
    run = Run(world, folder)
    assert Checkpoints(out).resume(run.trainer)
    return [run.step()["loss"] for _ in range(3)]


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2)], ids=str)
def test_a_checkpoint_before_the_first_step(layout, folder, tmp_path):
    assert on_ranks(saved_before_any_step, layout, folder, tmp_path)[0] == pytest.approx(on_ranks(in_one_piece, Layout(), folder)[0][:3], rel=1e-5)


def test_only_complete_checkpoints_count(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.steps(), checkpoints.latest()) == ([], None)
    for name in ("step_00000004", "step_00000012", ".step_00000030.partial"):
        (tmp_path / name).mkdir()
        mark(tmp_path / name, {})
    (tmp_path / "step_00000020").mkdir()  # no marker: not finished
    (tmp_path / "step_x").mkdir()
    (tmp_path / "latest").write_text("12\n")
    assert (checkpoints.steps(), checkpoints.latest()) == ([4, 12], 12)
    assert checkpoints.path(12) == tmp_path / "step_00000012"


def test_an_incomplete_checkpoint_is_refused(tmp_path, alone):
    (tmp_path / "step_00000001").mkdir()
    with pytest.raises(RequestError, match="step_00000001 is not a complete checkpoint"):
        load_sharded({}, tmp_path / "step_00000001")


def saved_until_full(world, folder, out, limit):
    """Save twice, the second time with room for files of `limit` bytes only; which steps are there then, and what was said."""
    run, checkpoints = Run(world, folder), Checkpoints(out)
    run.step()
    checkpoints.save(run.trainer)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    run.step()
    try:
        checkpoints.save(run.trainer)
    except RequestError as error:
        return checkpoints.steps(), str(error)
    return checkpoints.steps(), None


@pytest.mark.multirank
@pytest.mark.parametrize("limit", [4096, 1024, 16])  # in the shards; in what rank 0 writes alone; in the smallest file
@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2), Layout(pp=2)], ids=str)
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_and_nothing_else(layout, limit, folder, tmp_path):
    for steps, said in on_ranks(saved_until_full, layout, folder, tmp_path, limit):
        assert steps == [1]
        assert said.startswith(f"cannot write {tmp_path}/step_00000002: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    assert (tmp_path / "latest").read_text() == "1\n"


def unwritable(world, folder, out):
    run = Run(world, folder)
    run.step()
    with pytest.raises(RequestError, match="cannot write"):
        Checkpoints(out).save(run.trainer)


@pytest.mark.multirank
def test_every_rank_hears_that_a_folder_cannot_be_made(folder, tmp_path):
    (tmp_path / "file").write_text("")
    on_ranks(unwritable, Layout(tp=2), folder, tmp_path / "file" / "checkpoints")
