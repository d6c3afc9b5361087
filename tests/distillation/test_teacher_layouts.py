"""A teacher in another layout than the student's: the same training steps, nothing of it in the student's pipeline, Megatron's groups kept apart.

Legend: S sequence, B microbatch, H hidden, N microbatches of all replicas.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from minitron.config.schema import Distill, Parallel, Train
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.exchange import Relay, share_of
from minitron.engine.parallel import beside, inside
from minitron.engine.schedule import whole_sequence
from minitron.engine.scoring import language_model_score
from minitron.engine.trainer import StepLoss, Trainer
from minitron.weights.load import load, load_head
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, UNTIED, hf_model, save_model, tokens_of
from tests.oracles.training import distil

BATCH, LENGTH, STEPS, TEMPERATURE = 8, 12, 5, 2.0
SETTINGS = {"steps": 7, "global_batch_size": BATCH, "seq_length": LENGTH, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_grad": 1.0}
# (the student's layout, the teacher's (tp, pp), sequences of a microbatch)
RUNS = [
    (Layout(), (1, 1), 4), (Layout(tp=2), (2, 1), 4), (Layout(pp=2), (1, 2), 2), (Layout(tp=2, pp=2, sp=True), (2, 2), 2), (Layout(dp=2), (1, 1), 2),
    (Layout(cp=2), (1, 1), 4),
    (Layout(tp=2), (1, 1), 4), (Layout(tp=2), (1, 2), 2), (Layout(dp=2), (2, 1), 2), (Layout(tp=2, pp=2), (1, 2), 2),
    (Layout(pp=2), (1, 1), 8), (Layout(tp=2, pp=2, vpp=2, sp=True), (1, 1), 2), (Layout(tp=2, cp=2), (1, 2), 4), (Layout(dp=4), (4, 1), 2),
    (Layout(pp=3), (1, 1), 8),  # one microbatch for three replicas of the teacher
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{name: (student, teacher)} of other depth and width; a tied teacher, and one with biases whose head is its own."""
    root = tmp_path_factory.mktemp("models")
    student = save_model(root / "student", 2, hidden_size=36, num_hidden_layers=4, intermediate_size=24)
    return {
        "tied": (student, save_model(root / "tied", 1, num_hidden_layers=5)),
        "untied": (student, save_model(root / "untied", 3, num_hidden_layers=3, **BIASES, **UNTIED)),
    }


@pytest.fixture(scope="module")
def expected(folders):
    return {name: distil(*pair, global_batches(), Train(**SETTINGS), TEMPERATURE)[0] for name, pair in folders.items()}


def global_batches():
    return [tokens_of(61, BATCH, LENGTH + 1, seed) for seed in range(STEPS)]


def layout_of(world, tp, pp):
    return Parallel(tp=tp, pp=pp, cp=world.cp, timeout_minutes=3)


def teacher_on(world, folder, tp, pp):
    """The teacher as `minitron distill` makes it, and its model."""
    source = open_folder(folder, "teacher.path")
    its_world = world if (tp, pp) == (world.tp, world.pp) else beside(world, layout_of(world, tp, pp))
    model = load(source, its_world, torch.float32).requires_grad_(False)
    if its_world is world:
        return LiveTeacher(model, world), model
    return ForeignTeacher(model, its_world, Head(*load_head(source, world, torch.float32)), world), model


def trained(world, folders, tp, pp, micro_batch_size):
    """The metrics of every step, and whether a teacher holds gradients."""
    lines, gradients = {}, []
    for name, (student_folder, teacher_folder) in folders.items():
        student = load(open_folder(student_folder, "model.path"), world, torch.float32)
        teacher, model = teacher_on(world, teacher_folder, tp, pp)
        trainer = Trainer(student, Train(**SETTINGS, micro_batch_size=micro_batch_size), world)
        loss = distillation_loss(student, teacher, Distill(temperature=TEMPERATURE, chunk_tokens=5), world)
        lines[name] = []
        for step, tokens in enumerate(global_batches()):
            microbatches = [Batch(part) for part in tokens[world.dp_rank :: world.dp].split(micro_batch_size)]
            lines[name].append(trainer.update(microbatches, loss(step, microbatches)))
        gradients += [p.requires_grad or p.grad is not None or hasattr(p, "main_grad") for p in model.parameters()]
        assert all(hasattr(p, "main_grad") for p in student.parameters())
    return lines, any(gradients)


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "own", "micro_batch_size"), RUNS, ids=str)
def test_steps_are_the_same_wherever_the_teacher_lies(layout, own, micro_batch_size, folders, expected):
    for lines, gradients in on_ranks(trained, layout, folders, *own, micro_batch_size):
        assert not gradients
        for name, book in expected.items():
            assert [line["loss"] for line in lines[name]] == pytest.approx([line["loss"] for line in book], rel=1e-5)
            assert [line["grad_norm"] for line in lines[name]] == pytest.approx([line["grad_norm"] for line in book], rel=1e-5)


class Posted:
    """Bytes that this rank's pipeline sends to its neighbours, and those that the exchange between layouts sends to other ranks."""

    def __init__(self, monkeypatch):
        self.pipeline = self.exchanged = 0
        isend, all_to_all = dist.isend, dist.all_to_all_single

        def counted_isend(tensor, *args, **kwargs):
            self.pipeline += tensor.numel() * tensor.element_size()
            return isend(tensor, *args, **kwargs)

        def counted_all_to_all(received, sent, back, to):
            row = sent[0].numel() * sent.element_size() if len(sent) else 0
            self.exchanged += row * sum(count for rank, count in enumerate(to) if rank != dist.get_rank())
            return all_to_all(received, sent, back, to)

        monkeypatch.setattr(dist, "isend", counted_isend)
        monkeypatch.setattr(dist, "all_to_all_single", counted_all_to_all)


def plain_loss(world):
    """A loss without a teacher: what it is does not matter here, as the last stage computes it alone."""

    def loss(number, hidden_SBH):
        total = whole_sequence(hidden_SBH, world).square().sum()
        tokens = torch.tensor(hidden_SBH.shape[:2].numel(), dtype=torch.int)
        return total, tokens, {"loss": total.detach(), "tokens": tokens}

    return StepLoss(loss)


def sent(world, folders, tp, pp):
    """Bytes that this rank's pipeline sends in plain training, in the teacher's pass, and in the student's pass of a distillation step; and
    those of the exchange between layouts."""
    student_folder, teacher_folder = folders["tied"]
    student = load(open_folder(student_folder, "model.path"), world, torch.float32)
    teacher, _ = teacher_on(world, teacher_folder, tp, pp)
    trainer = Trainer(student, Train(**SETTINGS, micro_batch_size=2), world)
    batches = [Batch(part) for part in global_batches()[0][world.dp_rank :: world.dp].split(2)]
    with pytest.MonkeyPatch.context() as patch:
        posted = Posted(patch)
        marks = [0]
        trainer.update(batches, plain_loss(world))
        marks.append(posted.pipeline)
        loss = distillation_loss(student, teacher, Distill(), world)(0, batches)
        marks.append(posted.pipeline)
        trainer.update(batches, loss)
        marks.append(posted.pipeline)
    return *(after - before for before, after in itertools.pairwise(marks)), posted.exchanged


STUDENT_H, TEACHER_H, MICROBATCHES = 36, 48, 4
# (the student's layout, the teacher's (tp, pp), hidden states of a microbatch that the exchange sends to another rank)
SENDS = [
    (Layout(pp=2), (1, 2), 0),  # equal layouts
    (Layout(tp=2, pp=2), (2, 2), 0),
    (Layout(pp=2), (1, 1), 2),  # of two replicas one lies where the student's last stage is
    (Layout(tp=2, pp=2), (2, 1), 2 * 2),  # the same with two tensor ranks
    (Layout(dp=2), (2, 1), 0),  # both tensor ranks hold everything
    (Layout(tp=2), (1, 2), 4),  # the last stage sends to the other tensor rank
]


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "own", "travels"), SENDS, ids=str)
def test_nothing_of_the_teacher_travels_in_the_students_pipeline(layout, own, travels, folders):
    ranks = on_ranks(sent, layout, folders, *own)
    assert all(plain == distilling for plain, _, distilling, _ in ranks)
    microbatch = 4 * LENGTH * 2  # bytes of one hidden unit's activations, fp32
    plain, teachers, _, exchanged = map(sum, zip(*ranks, strict=True))
    assert plain == 2 * (layout.pp - 1) * layout.tp * MICROBATCHES * microbatch * STUDENT_H  # forth and back
    tp, pp = own
    assert teachers == (pp - 1) * tp * MICROBATCHES * microbatch * TEACHER_H  # forth, once for the whole global batch
    assert exchanged == travels * microbatch * TEACHER_H


def entered(world):
    """What Megatron takes for the tensor and pipeline sizes: before, inside, after a pass that failed, and after all of it."""

    def sizes():
        return parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_world_size()

    before, groups = sizes(), parallel_state.get_tensor_model_parallel_group()
    second = beside(world, layout_of(world, 1, 2))
    found = [sizes()]
    try:
        with inside(second):
            found.append(sizes())
            with inside(world):
                found.append(sizes())
            found.append(sizes())
            raise ValueError
    except ValueError:
        found.append(sizes())
    return before, found, parallel_state.get_tensor_model_parallel_group() is groups, (second.tp, second.pp, second.dp)


@pytest.mark.multirank
def test_megatron_sees_the_second_layout_inside_it_alone():
    for before, found, same, second in on_ranks(entered, Layout(tp=2, pp=2)):
        assert before == (2, 2)
        assert found == [(2, 2), (1, 2), (2, 2), (1, 2), (2, 2)]
        assert same
        assert second == (1, 2, 2)


def scored(world, folder, tp, pp):
    """Next-token loss in a second layout, whose replicas read the windows as they would in a first."""
    its_world = beside(world, layout_of(world, tp, pp))
    model = load(open_folder(folder, "teacher.path"), its_world, torch.float32)
    windows = tokens_of(61, 6, LENGTH + 1)
    mine = [(windows[row : row + 1], torch.tensor([True])) for row in range(its_world.dp_rank, 6, its_world.dp)]
    return language_model_score(model, mine, its_world).loss


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "own"), [(Layout(tp=2, sp=True), (1, 1)), (Layout(dp=2), (1, 2)), (Layout(pp=2, vpp=2), (2, 1))], ids=str)
def test_a_teacher_is_scored_in_its_own_layout(layout, own, folders):
    folder = folders["untied"][1]
    windows = tokens_of(61, 6, LENGTH + 1)
    expected = hf_model(folder)(windows, labels=windows).loss.item()
    assert on_ranks(scored, layout, folder, *own) == pytest.approx([expected] * layout.size, rel=1e-5)


@pytest.mark.parametrize("replicas", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 4, 7])
def test_every_microbatch_has_one_replica_and_none_more_than_its_share(replicas, count):
    shares = [share_of(replica, replicas, count) for replica in range(replicas)]
    assert [number for share in shares for number in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def carried(world, count):
    """Hidden states that say whose they are, on their way from a layout of (tp 1, pp 2) to `world`."""
    source = beside(world, layout_of(world, 1, 2))
    relay = Relay(source, world)
    mine = [torch.full((3, 1, 2), float(number), dtype=torch.bfloat16) for number in relay.share(count)] if source.is_last_stage else []
    return [part.float().mean().item() for part in relay.carry(mine, count, torch.empty(3, 1, 2, dtype=torch.bfloat16, device="meta"))]


@pytest.mark.multirank
def test_microbatches_arrive_in_order_where_replicas_have_unequal_shares():
    """Of two replicas that run them, one may run more than the other, or all."""
    layout = Layout(tp=2, dp=2)
    assert on_ranks(carried, layout, 6) == [[0, 1, 2]] * 2 + [[3, 4, 5]] * 2
    assert on_ranks(carried, Layout(tp=4), 1) == [[0]] * 4
    assert on_ranks(carried, Layout(tp=2, pp=2), 3) == [[]] * 2 + [[0, 1, 2]] * 2
