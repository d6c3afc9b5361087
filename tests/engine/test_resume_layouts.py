"""A training goes on at another layout as at its own: weights, the optimizer's moments, the schedule, a projection, dynamic alpha, the data."""

import contextlib
import dataclasses
import shutil

import pytest

from minitron.engine.checkpoint import Checkpoints
from minitron.errors import Stopped
from tests.engine.runs import SETTINGS, Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import UNTIED, save_model

# four microbatches: one for each of four replicas; steps so small that rounding does not grow
FOUR_A_STEP = dataclasses.replace(SETTINGS, micro_batch_size=1, save_interval=10, lr=3e-4, min_lr=1e-5)
TOLERANCE, OF_NORMS = 1e-6, 5e-6  # relative
FIGURES = ("loss", "kd_loss", "hidden_loss", "alpha", "grad_norm", "projection_grad_norm", "lr")
PAIRS = [  # saved at, gone on at
    (Layout(tp=2, pp=2), Layout(dp=4)),
    (Layout(tp=2, sp=True), Layout(pp=2, vpp=2)),
    (Layout(pp=4), Layout(cp=2)),
    pytest.param(Layout(dp=4), Layout(tp=2, pp=2), marks=pytest.mark.slow),
    pytest.param(Layout(tp=4), Layout(pp=4), marks=pytest.mark.slow),
    pytest.param(Layout(pp=4), Layout(tp=4), marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, vpp=2), Layout(cp=2), marks=pytest.mark.slow),
    pytest.param(Layout(cp=2), Layout(tp=2, sp=True), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Groups that neither two nor four tensor ranks divide, a vocabulary that they pad."""
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, intermediate_size=40, **UNTIED)


def part_of(world, folder, out, stop_after):
    """The figures of the steps from the newest checkpoint to `stop_after`, where the run is saved."""
    run = Run(world, folder, FOUR_A_STEP, hidden={"layers": [-2], "teacher_layers": [-2], "projection": True})
    Checkpoints(out).resume(run.trainer)
    with contextlib.suppress(Stopped):
        run.fit(out, stop_after)
    return [{name: line[name] for name in FIGURES} for line in run.lines]


@pytest.fixture(scope="module")
def halves(folder, tmp_path_factory):
    """`halves(LAYOUT)`: the checkpoint after three steps."""
    made = {}

    def make(layout):
        if layout not in made:
            made[layout] = tmp_path_factory.mktemp("half") / str(layout)
            on_ranks(part_of, layout, folder, made[layout], 3)
        return made[layout]

    return make


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """Six steps on one rank."""
    return on_ranks(part_of, Layout(), folder, tmp_path_factory.mktemp("unbroken"), 6)[0]


@pytest.mark.multirank
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_losses_go_on_at_another_layout(before, after, folder, halves, unbroken, tmp_path):
    out = shutil.copytree(halves(before), tmp_path / "run")
    for line, expected in zip(on_ranks(part_of, after, folder, out, 6)[0], unbroken[3:], strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=OF_NORMS if "norm" in name else TOLERANCE), name
