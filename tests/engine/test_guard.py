"""Steps that are left out: which, on every rank alike, and again after a break."""

import dataclasses
import math

import pytest
import torch

from minitron.config.schema import Train
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.guard import Guard, fault
from minitron.errors import RequestError, Stopped
from tests.engine.runs import SETTINGS, Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.metrics import without_costs
from tests.oracles.models import save_model

SPIKES = dataclasses.replace(SETTINGS, steps=8, spike_factor=3.0, spike_window=3, save_interval=100, eval_interval=100)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, num_hidden_layers=2)


@pytest.mark.parametrize(
    ("loss", "grad_norm", "good", "found"),
    [
        (1.0, 1.0, [], None),
        (math.nan, math.nan, [], "its loss was not finite"),
        (math.inf, math.nan, [], "its loss was not finite"),
        (1.0, math.inf, [], "its gradient was not finite"),
        (99.0, 1.0, [1.0, 1.0], None),  # too few to tell
        (3.0, 1.0, [1.0, 9.0, 1.0], None),  # not above three times the median
        (3.1, 1.0, [1.0, 9.0, 1.0], "its loss of 3.1 was more than train.spike_factor=3.0 times 1, the median before it"),
        (3.1, 1.0, [1.0, 1.0, 2.0, 2.0, 2.0], None),  # the newest three count
        (0.1, 1e9, [1.0, 1.0, 1.0], None),
    ],
)
def test_what_is_wrong_with_a_step(loss, grad_norm, good, found):
    assert fault({"loss": loss, "kd_loss": 1.0}, grad_norm, good, SPIKES) == found


def test_without_a_factor_no_loss_is_too_high():
    assert fault({"loss": 1e9}, 1.0, [1.0] * 100, Train()) is None


def test_a_part_of_the_loss_that_is_not_finite_is_enough():
    assert fault({"loss": 1.0, "hidden_loss": math.nan}, math.nan, [], SPIKES) == "its loss was not finite"


def test_losses_of_steps_that_were_left_out_are_not_looked_back_on():
    guard = Guard(SPIKES)
    passed = [guard.passes({"loss": loss}, 1.0) for loss in (1.0, 1.0, 1.0, 50.0, 50.0, 50.0, 50.0, 1.0, 2.0)]
    assert passed == [True] * 3 + [False] * 4 + [True] * 2
    assert (guard.skipped, guard.in_a_row, [*guard.good]) == (4, 0, [1.0, 1.0, 2.0])


def test_one_bad_step_may_be_one_too_many():
    guard = Guard(dataclasses.replace(SPIKES, max_bad_steps=1))
    for loss in (1.0, 1.0, 1.0):
        guard.passes({"loss": loss}, 1.0)
    assert guard.verdict(3, "a.txt") is None
    guard.passes({"loss": 9.0}, 1.0)
    assert guard.verdict(4, "a.txt") == (
        "step 4 (samples 12 to 15 of a.txt) was left out: its loss of 9 was more than train.spike_factor=3.0 times 1, the median before it; "
        "lower train.lr=0.003, raise train.spike_factor, or look at the data there"
    )


def planted(loss, bad, factor, rank=None):
    """A loss like `loss`, but `factor` times as large at the steps `bad`, on one rank or on all."""

    def for_step(step, batches):
        inner = loss(step, batches)

        def compute(number, hidden):
            total, tokens, parts = inner.last(number, hidden)
            return total * factor, tokens, {**parts, "loss": parts["loss"] * factor}

        here = step in bad and rank in (None, torch.distributed.get_rank())
        return dataclasses.replace(inner, last=compute) if here else inner

    return for_step


def with_bad_steps(world, folder, bad, factor, rank):
    """The metrics that matter, and the model at the end, bit by bit."""
    run = Run(world, folder, SPIKES)
    task_loss = planted(run.task.loss, bad, factor, rank)
    lines = []
    for step in range(6):
        batch = run.microbatches(step)
        lines.append(run.trainer.update(batch, task_loss(step, batch)))
    whole = torch.cat([parameter.detach().flatten() for parameter in run.trainer.model.parameters()])
    return [line["skipped"] for line in lines], lines[-1]["skipped_steps"], whole.isfinite().all().item()


@pytest.mark.multirank
@pytest.mark.parametrize(("factor", "rank"), [(math.nan, 1), (1000.0, 0)], ids=["nan", "spike"])
@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, pp=2)], ids=str)
def test_what_one_rank_s_loss_does_is_left_out_by_all(layout, factor, rank, folder):
    rank = rank if layout.pp == 1 else layout.size - 2 + rank  # of the last stage
    assert on_ranks(with_bad_steps, layout, folder, {3, 5}, factor, rank) == [([0, 0, 0, 1, 0, 1], 2, True)] * layout.size


def seen(lines):
    return without_costs(lines)


@pytest.mark.parametrize("stop", [2, 5, 6])  # before the window is full; after the first spike; between two
def test_a_resumed_run_judges_as_one_without_a_break(stop, folder, alone, tmp_path):
    bad = {4, 5, 6}
    whole = Run(alone, folder, SPIKES)
    whole.fit(tmp_path / "whole", loss=planted(whole.task.loss, bad, 50.0))
    first, second = Run(alone, folder, SPIKES), Run(alone, folder, SPIKES)
    with pytest.raises(Stopped, match=f"stopped at step {stop}"):
        first.fit(tmp_path / "broken", stop_after=stop, loss=planted(first.task.loss, bad, 50.0))
    Checkpoints(tmp_path / "broken").resume(second.trainer)
    second.fit(tmp_path / "broken", loss=planted(second.task.loss, bad, 50.0))
    assert seen(first.lines + second.lines) == seen(whole.lines)
    assert [line["skipped_steps"] for line in whole.lines] == [0, 0, 0, 0, 1, 2, 3, 3]
    assert second.trainer.guard.state_dict() == whole.trainer.guard.state_dict()


def test_bad_steps_in_a_row_are_counted_over_a_break(folder, alone, tmp_path):
    settings = dataclasses.replace(SPIKES, max_bad_steps=3)
    first, second = Run(alone, folder, settings), Run(alone, folder, settings)
    with pytest.raises(Stopped, match="stopped at step 5"):
        first.fit(tmp_path, stop_after=5, loss=planted(first.task.loss, {3, 4, 5}, math.nan))
    Checkpoints(tmp_path).resume(second.trainer)
    with pytest.raises(RequestError, match=r"^step 6 \(samples 20 to 23 of the training data\) was the last of 3 in a row"):
        second.fit(tmp_path, loss=planted(second.task.loss, {3, 4, 5}, math.nan))
