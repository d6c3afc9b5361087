"""A student with experts learns from a teacher with experts: transformers' losses and gradient norms wherever the experts of either lie."""

import contextlib

import pytest
import torch

from minitron.config.schema import Distill, Parallel, Train
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.optimizer_state import share_counts
from minitron.engine.parallel import beside
from minitron.engine.trainer import Trainer
from minitron.errors import Stopped
from minitron.weights.load import load, load_head
from minitron.weights.source import open_folder
from tests.engine.runs import SETTINGS, Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.experts import save_experts
from tests.oracles.models import tokens_of
from tests.oracles.training import distil

BATCH, LENGTH, STEPS, TEMPERATURE = 8, 12, 4, 2.0
OURS = {"steps": 6, "global_batch_size": BATCH, "seq_length": LENGTH, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_grad": 1.0}
# (the student's layout, the teacher's (tp, ep), sequences of a microbatch)
RUNS = [
    (Layout(dp=2, ep=2), (1, 2), 2),
    *(pytest.param(*run, marks=pytest.mark.long) for run in (
        (Layout(), (1, 1), 4),
        (Layout(tp=2), (2, 1), 4),
        (Layout(tp=2, dp=2, ep=2, sp=True), (2, 2), 2),
        (Layout(pp=2, dp=2, ep=2), (1, 2), 2),
        (Layout(cp=2, ep=2), (1, 2), 4),
        (Layout(dp=2, ep=2), (1, 1), 2),
        (Layout(dp=2), (1, 2), 2),
        (Layout(tp=2, dp=2), (1, 2), 4),  # two microbatches for four replicas of the teacher, whose experts two of them share
    )),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_experts(root / "student", "qwen2_moe", 2), save_experts(root / "teacher", "mixtral", 1)


@pytest.fixture(scope="module")
def expected(folders):
    return distil(*folders, global_batches(), Train(**OURS), TEMPERATURE)[0]


def global_batches():
    return [tokens_of(61, BATCH, LENGTH + 1, seed) for seed in range(STEPS)]


def trained(world, folders, tp, ep, micro_batch_size):
    """The metrics of every step."""
    student, source = load(open_folder(folders[0], "model.path"), world, torch.float32), open_folder(folders[1], "teacher.path")
    same = (tp, ep) == (world.tp, world.ep)
    its_world = world if same else beside(world, Parallel(tp=tp, pp=world.pp, cp=world.cp, ep=ep, timeout_minutes=3))
    model = load(source, its_world, torch.float32).requires_grad_(False)
    head = None if same else Head(*load_head(source, world, torch.float32))
    teacher = LiveTeacher(model, world) if head is None else ForeignTeacher(model, its_world, head, world)
    trainer = Trainer(student, Train(**OURS, micro_batch_size=micro_batch_size), world)
    loss = distillation_loss(student, teacher, Distill(temperature=TEMPERATURE, chunk_tokens=5), world)
    lines = []
    for step, tokens in enumerate(global_batches()):
        microbatches = [Batch(part) for part in tokens[world.dp_rank :: world.dp].split(micro_batch_size)]
        lines.append(trainer.update(microbatches, loss(step, microbatches)))
    return lines


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "own", "micro_batch_size"), RUNS, ids=str)
def test_steps_are_those_of_transformers(layout, own, micro_batch_size, folders, expected):
    for lines in on_ranks(trained, layout, folders, *own, micro_batch_size):
        for name in ("loss", "grad_norm"):
            assert [line[name] for line in lines] == pytest.approx([line[name] for line in expected], rel=1e-4), name


def part_of(world, folder, out, stop_after):
    """The figures of the steps from the newest checkpoint to `stop_after`, where the run is saved."""
    run = Run(world, folder, SETTINGS)
    Checkpoints(out).resume(run.trainer)
    with contextlib.suppress(Stopped):
        run.fit(out, stop_after)
    return [{name: line[name] for name in ("loss", "grad_norm", "lr")} for line in run.lines]


PAIRS = [  # saved at, gone on at
    (Layout(dp=2, ep=2), Layout()),
    *(pytest.param(*pair, marks=pytest.mark.long) for pair in (
        (Layout(), Layout(dp=2, ep=2)),
        (Layout(tp=2, dp=2, ep=2, sp=True), Layout(pp=2)),
        (Layout(pp=2, dp=2, ep=2), Layout(tp=2)),
        (Layout(dp=2), Layout(tp=2, dp=2, ep=2)),
    )),
]  # fmt: skip


def test_groups_that_the_first_rank_has_nothing_in_are_given_the_count_of_steps():
    dense, empty = {"optimizer": {"param_groups": [{"lr": 1.0, "step": 7}]}}, {"optimizer": {"param_groups": [{"lr": 1.0}]}}
    share_counts({0: dense, 1: empty})
    assert empty["optimizer"]["param_groups"] == [{"lr": 1.0, "step": 7}]
    share_counts(alone := {"optimizer": {"param_groups": [{"lr": 1.0}]}})
    assert alone["optimizer"]["param_groups"] == [{"lr": 1.0}]


@pytest.mark.slow
@pytest.mark.multirank
def test_a_stage_without_experts_is_saved_and_goes_on(tmp_path):
    """The first of two stages holds dense blocks alone, so that its optimizer of experts has nothing to update."""
    folder = save_experts(tmp_path / "student", "qwen2_moe", 2, mlp_only_layers=[0, 1])
    unbroken = on_ranks(part_of, Layout(), folder, tmp_path / "unbroken", 4)[0]
    first = on_ranks(part_of, Layout(pp=2), folder, tmp_path / "run", 2)[0]
    second = on_ranks(part_of, Layout(pp=2), folder, tmp_path / "run", 3)[0]
    third = on_ranks(part_of, Layout(), folder, tmp_path / "run", 4)[0]  # the counts of steps that the first rank wrote are read for all
    for line, expected in zip([*first, *second, *third], unbroken, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.multirank
@pytest.mark.parametrize(("before", "after"), PAIRS, ids=str)
def test_a_training_goes_on_over_another_number_of_expert_ranks(before, after, folders, tmp_path):
    unbroken = on_ranks(part_of, Layout(), folders[0], tmp_path / "unbroken", 4)[0]
    first = on_ranks(part_of, before, folders[0], tmp_path / "run", 2)[0]
    second = on_ranks(part_of, after, folders[0], tmp_path / "run", 4)[0]
    for line, expected in zip([*first, *second], unbroken, strict=True):
        for name, value in expected.items():
            assert line[name] == pytest.approx(value, rel=1e-4), name
