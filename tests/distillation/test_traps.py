"""Mistakes that distillation losses are known to make: each is made here in its smallest form, is shown to be wrong, and is not made by ours.

Legend: T tokens, V vocabulary, v this rank's part of it.
"""

import pytest
import torch
import torch.distributed as dist
from torch.nn.functional import kl_div

from minitron.config.schema import Distill
from minitron.distillation.fused import linear_distillation
from minitron.distillation.signal import Head, LiveTeacher, WholeSignal
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.schedule import forward_only
from minitron.engine.trainer import global_means
from minitron.engine.vocab import live_head
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, save_model, tokens_of

TOKENS, VOCAB = 6, 10
FLAT = Distill(temperature=8.0)  # one more token matters where all are about as likely


def logits():
    """(student, teacher) [T, V]."""
    generator = torch.Generator().manual_seed(1)
    return [2 * torch.randn(TOKENS, VOCAB, generator=generator) for _ in range(2)]


def kl(student_TV, teacher_TV):
    """KL(teacher || student) summed over tokens."""
    return kl_div(student_TV.log_softmax(-1), teacher_TV.log_softmax(-1), reduction="sum", log_target=True)


def ours(student_TV, teacher_TV, world, settings, mask_T=None):
    """The fused loss of whole logits: they are taken as hidden states, with rows of the identity as heads."""
    rows = student_TV.shape[1] // world.tp
    mine = slice(world.tp_rank * rows, (world.tp_rank + 1) * rows)
    identity = torch.eye(student_TV.shape[1])[mine]
    mask_T = torch.ones(len(student_TV), dtype=torch.bool) if mask_T is None else mask_T
    heads = Head(identity, mine.start), WholeSignal(teacher_TV, Head(identity, mine.start))
    return linear_distillation(student_TV, *heads, mask_T, world, settings).total


def gradient_of(loss, student_TV, teacher_TV, *rest):
    student_TV = student_TV.clone().requires_grad_()
    loss(student_TV, teacher_TV, *rest).backward()
    return student_TV.grad


def reduced_in_place(world):
    """Gradients to this rank's logits: with a sum over ranks that autograd does not see, and ours."""
    student, teacher = logits()
    mine = slice(world.tp_rank * VOCAB // 2, (world.tp_rank + 1) * VOCAB // 2)

    def trap(student_Tv, log_teacher_Tv):
        total_T = student_Tv.exp().sum(-1)
        dist.all_reduce(total_T, group=world.groups.tp)
        return (log_teacher_Tv.exp() * (log_teacher_Tv - student_Tv + total_T.log()[:, None])).sum()

    wrong = gradient_of(trap, student[:, mine], teacher.log_softmax(-1)[:, mine])
    return wrong, gradient_of(ours, student, teacher, world, Distill())[:, mine]


class Gathered(torch.autograd.Function):
    """[T, v] of every rank -> [T, V]; backward, what every rank says of a part is summed, as a gather's gradient is."""

    @staticmethod
    def forward(ctx, part_Tv, world):
        ctx.world = world
        parts = [torch.empty_like(part_Tv) for _ in range(world.tp)]
        dist.all_gather(parts, part_Tv.contiguous(), group=world.groups.tp)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, grad_TV):
        total_TV = grad_TV.clone()
        dist.all_reduce(total_TV, group=ctx.world.groups.tp)
        return total_TV.chunk(ctx.world.tp, dim=1)[ctx.world.tp_rank], None


def same_loss_on_every_rank(world):
    """Gradients to this rank's logits: with the whole loss on every rank behind a gather, and ours."""
    student, teacher = logits()
    mine = slice(world.tp_rank * VOCAB // 2, (world.tp_rank + 1) * VOCAB // 2)
    wrong = gradient_of(lambda part, whole: kl(Gathered.apply(part, world), whole), student[:, mine], teacher)
    return wrong, gradient_of(ours, student, teacher, world, Distill())[:, mine]


@pytest.mark.multirank
@pytest.mark.parametrize("battery", [reduced_in_place, same_loss_on_every_rank], ids=lambda battery: battery.__name__)
def test_gradients_over_tensor_ranks(battery):
    student, teacher = logits()
    right = gradient_of(kl, student, teacher)
    wrong, found = (torch.cat(parts, dim=1) for parts in zip(*on_ranks(battery, Layout(tp=2)), strict=True))
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    if battery is same_loss_on_every_rank:
        torch.testing.assert_close(wrong, 2 * right, rtol=1e-5, atol=1e-6)
    else:
        local_mass = torch.cat([part.sum(-1, keepdim=True).expand_as(part) for part in teacher.softmax(-1).chunk(2, dim=1)], dim=1)
        torch.testing.assert_close(wrong, student.softmax(-1) * local_mass - teacher.softmax(-1))
        assert (wrong - right).norm() > 0.1 * right.norm()


def test_temperature_squared_on_the_report_but_not_on_the_gradient(alone):
    student, teacher = logits()
    temperature = 3.0
    trap = student.clone().requires_grad_()
    loss = kl(trap / temperature, teacher / temperature)
    reported = loss.item() * temperature**2
    loss.backward()
    settings = Distill(temperature=temperature)
    assert ours(student, teacher, alone, settings).item() == pytest.approx(reported, rel=1e-5)
    found = gradient_of(ours, student, teacher, alone, settings)
    torch.testing.assert_close(found, temperature**2 * trap.grad, rtol=1e-5, atol=1e-6)
    # the loss that is reported, differentiated by its definition
    nudge = torch.zeros_like(student).double()
    nudge[2, 3] = 1e-4
    ends = [kl((student.double() + sign * nudge) / temperature, teacher.double() / temperature) * temperature**2 for sign in (1, -1)]
    assert found[2, 3].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-4, rel=1e-4)


def padded(world, folder, teacher_folder, tokens):
    """(loss over all rows of both heads, ours), summed, with rows of zeros or of anything where the vocabulary is padded."""
    student, teacher = (load(open_folder(path, "model.path"), world, torch.float32) for path in (folder, teacher_folder))
    batches, found = [Batch(tokens)], []
    for filling in (0.0, 0.2):
        with torch.no_grad():
            for model in (student, teacher):
                model.head_weight()[len(live_head(model, world)[0]) :] = filling

        def both(number, hidden_SBH):
            source = LiveTeacher(teacher, world)
            signal, rest = source.signals(0, batches)[0], (torch.ones(tokens[:, 1:].numel(), dtype=torch.bool), world, FLAT)
            whole = WholeSignal(signal.hidden_TG, Head(teacher.head_weight(), signal.head.first))
            wrong = linear_distillation(hidden_SBH.flatten(0, 1), Head(student.head_weight(), signal.head.first), whole, *rest)
            return wrong.total.item(), distillation_loss(student, source, FLAT, world)(0, batches).last(number, hidden_SBH)[0].item()

        found += forward_only(student, [batches[0].inputs_BS], world, both)
    return found


@pytest.mark.multirank
def test_rows_that_pad_the_vocabulary_are_no_tokens(tmp_path):
    """61 tokens on two ranks leave a row over: a logit of 0, or whatever a trained row gives, would take part in both distributions."""
    folders = save_model(tmp_path / "student", 2), save_model(tmp_path / "teacher", 1)
    tokens = tokens_of(61, 2, 9)
    with torch.no_grad():
        student, teacher = (hf_model(folder)(tokens[:, :-1]).logits.flatten(0, 1) for folder in folders)
    right = kl(student / FLAT.temperature, teacher / FLAT.temperature).item() * FLAT.temperature**2
    for rank in on_ranks(padded, Layout(tp=2), *folders, tokens):
        for wrong, found in rank:
            assert found == pytest.approx(right, rel=1e-5)
            assert abs(wrong - right) > 1e-3 * right


def test_a_smaller_vocabulary_padded_with_logits_of_zero(alone):
    """Made as long as a larger one by logits of 0, both distributions lose mass to tokens that are none."""
    student, teacher = (tensor - 5.0 for tensor in logits())  # what a softmax never sees, the zeros beside them do
    wrong = kl(*(torch.nn.functional.pad(tensor, (0, 6)) for tensor in (student, teacher)))
    right = kl(student, teacher)
    assert ours(student, teacher, alone, Distill()).item() == pytest.approx(right.item(), rel=1e-5)
    assert wrong < 0.9 * right


def test_renormalised_top_k_forgets_the_tail(alone):
    """A student that agrees about the largest tokens among themselves, and gives nearly everything to the others."""
    teacher = torch.tensor([[4.0, 3.0, 2.0, 0.0, 0.0, 0.0]])
    student = teacher + torch.tensor([[0.0, 0.0, 0.0, 9.0, 9.0, 9.0]])
    top = teacher.topk(3).indices
    assert kl(student.gather(1, top), teacher.gather(1, top)).item() == pytest.approx(0.0, abs=1e-6)
    settings = Distill(top_k=3)
    whole = kl(student, teacher).item()
    assert ours(student, teacher, alone, settings).item() == pytest.approx(whole, rel=1e-5)  # equal here: the tail is flat in both
    assert whole > 1.0
    torch.testing.assert_close(gradient_of(ours, student, teacher, alone, settings), gradient_of(kl, student, teacher), rtol=1e-4, atol=1e-6)


def test_means_per_microbatch_weigh_short_samples_more(alone):
    student, teacher = logits()
    counted = torch.ones(TOKENS, dtype=torch.bool)
    counted[1 : TOKENS // 2] = False  # one token of the first half, all of the second
    halves = [(student[part], teacher[part], counted[part]) for part in (slice(0, TOKENS // 2), slice(TOKENS // 2, None))]
    wrong = sum(kl(*(x[mask] for x in (mine, right))).item() / int(mask.sum()) for mine, right, mask in halves) / 2
    right = kl(student[counted], teacher[counted]).item() / int(counted.sum())
    logs = [{"loss": ours(mine, other, alone, Distill(), mask).detach(), "tokens": mask.sum()} for mine, other, mask in halves]
    assert global_means(logs, alone)["loss"] == pytest.approx(right, rel=1e-5)
    assert abs(wrong - right) > 0.05 * right
