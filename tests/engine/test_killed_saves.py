"""A rank is killed before each file operation of a training in turn, most of them a save's: what follows is bitwise as if nothing had happened."""

import dataclasses
import functools

import pytest

from minitron.engine.checkpoint import Checkpoints
from minitron.errors import LostRank
from tests.engine.runs import SETTINGS, Run
from tests.multirank.ranks import LOST, Layout, on_ranks
from tests.oracles.metrics import without_costs
from tests.oracles.models import same_tensors, save_model
from tests.stages.watched import Moment, Orders, Watch

SHORT = dataclasses.replace(SETTINGS, steps=3, save_interval=1, eval_interval=3)  # the third save forgets the first
PLACE = "save:checkpoints"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "model", 4, num_hidden_layers=2)


def train(world, folder, root, moment=None):
    """From where a run goes on, its lines from there to the end, the student then, and how many file operations this rank did."""
    watch = Watch(Orders(str(root), str(root.parent), moment), world.rank)
    watch.stage = "save"
    run, checkpoints = Run(world, folder, SHORT, hidden={"layers": [-1], "teacher_layers": [-1]}), Checkpoints(root / "checkpoints")
    checkpoints.resume(run.trainer)
    start = run.trainer.step
    run.fit(root / "checkpoints")
    figures = [{name: value for name, value in line.items() if name != "valid_loss"} for line in without_costs(run.lines)]
    return start, figures, {name: tensor.detach().clone() for name, tensor in run.trainer.model.named_parameters()}, watch.counts[PLACE]


def files(root):
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


@pytest.fixture(scope="module")
def unbroken(folder, tmp_path_factory):
    """`unbroken(LAYOUT)`: what each rank has of a training without a break, and the files that it leaves."""

    @functools.cache
    def trained(layout):
        root = tmp_path_factory.mktemp("unbroken") / "run"
        return on_ranks(train, layout, folder, root), files(root)

    return trained


def go_on(root, folder, layout, moment, unbroken):
    """Killed at a moment, then gone on with; from which step."""
    answers, left = unbroken(layout)
    root.parent.mkdir(exist_ok=True)
    with pytest.raises((RuntimeError, LostRank)) as ended:
        on_ranks(train, layout, folder, root, moment)
    assert isinstance(ended.value, LostRank) or any(sign in str(ended.value) for sign in ("exit code -9", *LOST)), ended.value
    assert (root.parent / "fired").read_text() == f"{moment.place}\n"
    found = on_ranks(train, layout, folder, root)
    for rank, (start, lines, student, _) in enumerate(found):
        assert lines == answers[rank][1][start:]
        assert same_tensors(student, answers[rank][2])
    assert {*left} <= {*files(root)}
    # a checkpoint that was about to be forgotten may stay
    assert [name for name in {*files(root)} - {*left} if not name.startswith("checkpoints/step_")] == []
    return found[0][0]


@pytest.mark.parametrize("part", range(4))
def test_killed_at_operations_over_a_whole_training(part, folder, unbroken, tmp_path):
    count = unbroken(Layout())[0][0][3]
    assert count > 30  # of three checkpoints: folders and files made, named, removed
    go_on(tmp_path / "run", folder, Layout(), Moment(PLACE, 1 + part * (count - 1) // 3), unbroken)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("layout", "victim"), [(Layout(), 0), pytest.param(Layout(dp=2), 0, marks=pytest.mark.long), (Layout(dp=2), 1)], ids=str)
def test_killed_at_every_operation_in_turn(layout, victim, folder, unbroken, tmp_path):
    numbers = range(1, unbroken(layout)[0][victim][3] + 1)
    starts = [go_on(tmp_path / str(number) / "run", folder, layout, Moment(PLACE, number, "rank", victim), unbroken) for number in numbers]
    assert starts == sorted(starts)
    assert {*starts} >= {0, 1, 2}
