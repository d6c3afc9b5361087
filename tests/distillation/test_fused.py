"""Loss and gradients from hidden states and vocabulary shards against float64 autograd over whole logits.

Legend: S sequence, B microbatch, T = S x B tokens, H and G hidden sizes of student and teacher, V vocabulary.
"""

import itertools

import pytest
import torch

from minitron.config.schema import Distill
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.signal import Head, TopSignal, WholeSignal
from minitron.engine.schedule import whole_sequence
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.distillation import buckets, logits, reference

SEQUENCE, BATCH, HIDDEN, TEACHER_HIDDEN, VOCAB = 12, 3, 24, 32, 61
TOKENS = SEQUENCE * BATCH
KINDS = ("forward_kl", "reverse_kl", "jsd")
# (mask, chunk_tokens, gradients), in turn over the products of everything else
TURNS = (("some", 7, "forward"), ("all", 36, "recompute"), ("none", 5, "forward"), ("some", 512, "recompute"), ("some", 1, "forward"))
# relative error allowed, in the norm of the whole tensor
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SOFTCAP = 6.0


def cases():
    """(settings, softcap, mask, whether the signal comes from elsewhere)."""
    everything = itertools.product(KINDS, (0.5, 1.0, 3.0), (None, 5), (0.0, 0.4), (None, SOFTCAP), (False, True))
    for number, (kind, temperature, top_k, weight, softcap, cached) in enumerate(everything):
        if cached and top_k is None:
            continue
        mask, chunk, gradients = TURNS[number % len(TURNS)]
        beta = (0.5, 0.2)[number % 2]
        yield Distill(kind, beta, temperature, top_k, weight, gradients, chunk), softcap, mask, cached


def inputs(dtype):
    """Hidden states and heads, spread so that some distributions are sharp and some flat."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCAB, TEACHER_HIDDEN)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    spread_T1 = torch.linspace(0.1, 1.0, TOKENS)[:, None]
    return [(tensor * spread_T1 if tensor.shape[0] == TOKENS else tensor).to(dtype) for tensor in tensors]


def labels():
    return torch.randint(0, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(5))


def mask_of(kind):
    generator = torch.Generator().manual_seed(4)
    return {"all": torch.ones(TOKENS), "none": torch.zeros(TOKENS), "some": torch.rand(TOKENS, generator=generator) > 0.3}[kind].bool()


def cache(teacher, teacher_head, settings, softcap):
    """What a cache would hold of the teacher's distributions."""
    log_probs = (logits(teacher, teacher_head, 0.9, softcap) / settings.temperature).log_softmax(-1)
    tokens = log_probs.topk(settings.top_k, dim=1).indices
    found = buckets(log_probs, tokens).float()
    return TopSignal(tokens, found[:, :-1], found[:, -1])


def expected(dtype, settings, softcap, mask):
    """(total, kd, ce, gradient to the student's hidden states, to its head)."""
    student, head, teacher, teacher_head = (tensor.double() for tensor in inputs(dtype))
    student.requires_grad_()
    head.requires_grad_()
    whole = logits(student, head, 1.1, softcap), logits(teacher, teacher_head, 0.9, softcap)
    losses = reference(*whole, mask_of(mask), settings, labels())
    return *(loss.detach() for loss in losses), *torch.autograd.grad(losses[0], (student, head))


def battery(world, dtype):
    """For every case: the three losses, the gradient to this rank's hidden states and to its part of the head."""
    found = []
    student, head, teacher, teacher_head = inputs(dtype)
    rows = -(-VOCAB // world.tp)
    mine = slice(world.tp_rank * rows, (world.tp_rank + 1) * rows)
    scratch = Scratch()
    for settings, softcap, mask, cached in cases():
        hidden = student.view(SEQUENCE, BATCH, HIDDEN)
        if world.sequence_parallel:
            hidden = hidden.chunk(world.tp)[world.tp_rank]
        hidden, weight = hidden.clone().requires_grad_(), head[mine].clone().requires_grad_()
        whole = WholeSignal(teacher, Head(teacher_head[mine], mine.start, 0.9, softcap))
        signal = cache(teacher, teacher_head, settings, softcap) if cached else whole
        ours = Head(weight, mine.start, 1.1, softcap)
        losses = linear_distillation(whole_sequence(hidden, world).flatten(0, 1), ours, signal, mask_of(mask), world, settings, labels(), scratch)
        (losses.total * 0.25).backward()  # what comes from above is passed on
        found.append((*(loss.detach() for loss in losses), 4 * hidden.grad.float(), 4 * weight.grad.float()))
    return found


def off(found, expected, allowed):
    """The relative error where it is more than allowed; a gradient that must be zero must be exactly that."""
    error = (found.double() - expected).norm().item()
    scale = expected.norm().item()
    return None if (error == 0 if scale == 0 else error / scale < allowed) else error / max(scale, 1e-300)


@pytest.mark.multirank
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sp=True), Layout(tp=4), Layout(tp=4, sp=True)], ids=str)
def test_loss_and_gradients_are_those_of_whole_logits(layout, dtype):
    ranks = on_ranks(battery, layout, dtype)
    wrong = {}
    for number, (settings, softcap, mask, cached) in enumerate(cases()):
        for rank in ranks:
            assert all(torch.equal(mine, first) for mine, first in zip(rank[number][:3], ranks[0][number][:3], strict=True))
        hidden = torch.cat([rank[number][3] for rank in ranks]) if layout.sp else ranks[0][number][3]
        found = [*ranks[0][number][:3], hidden.flatten(0, 1), torch.cat([rank[number][4] for rank in ranks])]
        both = zip(("total", "kd", "ce", "hidden", "head"), found, expected(dtype, settings, softcap, mask), strict=True)
        if errors := {name: error for name, mine, right in both if (error := off(mine, right, ALLOWED[dtype])) is not None}:
            wrong[settings, softcap, mask, cached] = errors
    assert wrong == {}
