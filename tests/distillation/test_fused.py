"""Loss and gradients from hidden states and vocabulary shards against float64 autograd over whole logits.

Legend: S sequence, B microbatch, T = S x B tokens, H and G hidden sizes of student and teacher, V vocabulary.
"""

import dataclasses
import itertools

import pytest
import torch

from minitron.config.schema import Distill
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.signal import Head, TopSignal, WholeSignal
from minitron.engine.schedule import whole_sequence
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.distillation import buckets, logits, reference
from tests.oracles.memory import LiveBytes

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
    everything = itertools.product(KINDS, (0.5, 1.0, 3.0), (None, 5, 20), (0.0, 0.4), (None, SOFTCAP), (False, True))
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


def battery(world, dtype, every=1):
    """For every case: the three losses, the gradient to this rank's hidden states and to its part of the head."""
    found = []
    student, head, teacher, teacher_head = inputs(dtype)
    rows = -(-VOCAB // world.tp)
    mine = slice(world.tp_rank * rows, (world.tp_rank + 1) * rows)
    scratch = Scratch()
    for settings, softcap, mask, cached in itertools.islice(cases(), 0, None, every):
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


def both_types(world, every):
    """The battery of each type."""
    return {dtype: battery(world, dtype, every) for dtype in ALLOWED}


def off(found, expected, allowed):
    """The relative error where it is more than allowed; a gradient that must be zero must be exactly that."""
    error = (found.double() - expected).norm().item()
    scale = expected.norm().item()
    return None if (error == 0 if scale == 0 else error / scale < allowed) else error / max(scale, 1e-300)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=2, sp=True), Layout(tp=4), Layout(tp=4, sp=True)], ids=str)
def test_loss_and_gradients_are_those_of_whole_logits(layout):
    every = 1 if layout.size == 1 else 3  # of the cases: with several ranks each costs much more
    ranks, wrong = on_ranks(both_types, layout, every), {}
    for dtype, (number, case) in itertools.product(ALLOWED, enumerate(itertools.islice(cases(), 0, None, every))):
        mine = [rank[dtype][number] for rank in ranks]
        for rank in mine:
            assert all(torch.equal(found, first) for found, first in zip(rank[:3], mine[0][:3], strict=True))
        hidden = torch.cat([rank[3] for rank in mine]) if layout.sp else mine[0][3]
        results = [*mine[0][:3], hidden.flatten(0, 1), torch.cat([rank[4] for rank in mine])]
        both = zip(("total", "kd", "ce", "hidden", "head"), results, expected(dtype, *case[:3]), strict=True)
        if errors := {name: error for name, found, right in both if (error := off(found, right, ALLOWED[dtype])) is not None}:
            wrong[dtype, case] = errors
    assert wrong == {}


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_and_largest_logits_stay_finite(kind, alone):
    """Distributions so sharp that a naive exponential overflows, and a token's probability is 0."""
    student, teacher = (1e3 * torch.eye(4).roll(shift, 0) for shift in (0, 1))
    student.requires_grad_()
    for top_k in (None, 2):
        settings = Distill(kind, top_k=top_k, cross_entropy=0.5)
        signal, mask, labels = WholeSignal(teacher, Head(torch.eye(4))), torch.ones(4, dtype=torch.bool), torch.arange(4)
        losses = linear_distillation(student, Head(torch.eye(4)), signal, mask, alone, settings, labels)
        losses.total.backward()
        right = 4 * torch.tensor(2.0).log().item() if kind == "jsd" else 4000.0
        assert losses.kd.item() == pytest.approx(right, rel=1e-3 if top_k else 1e-6)  # the teacher's tail is twice as likely as a token there
        assert losses.ce.item() == pytest.approx(0.0, abs=1e-5)
        assert student.grad.isfinite().all()


@pytest.mark.parametrize("top_k", [None, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_digits_are_left_where_student_and_teacher_nearly_agree(kind, top_k, alone):
    """A student after training: losses of a few thousandths, from logits with an offset that no distribution sees."""
    generator = torch.Generator().manual_seed(6)
    teacher = 2 * torch.randn(200, 50, generator=generator) + 20.0
    student = teacher + 0.05 * torch.randn(200, 50, generator=generator) - 3.0
    settings, identity, mask = Distill(kind, top_k=top_k), Head(torch.eye(50)), torch.ones(200, dtype=torch.bool)
    found = linear_distillation(student, identity, WholeSignal(teacher, identity), mask, alone, settings).total.item()
    expected = reference(student.double(), teacher.double(), mask, settings)[0].item()
    assert expected < 1.0
    assert found == pytest.approx(expected, rel=1e-4)


MEMORY_CASES = {
    "whole": Distill(),
    "reverse": Distill("reverse_kl", temperature=2.0),
    "jsd": Distill("jsd"),
    "cross-entropy": Distill(cross_entropy=0.5),
    "top-k": Distill(top_k=3),
}


def memory(world, settings, dtype, tokens, vocab, hidden):
    """(most bytes above the arguments, bytes held between the passes), of a scratch's first use; a third of the tokens don't count."""
    student, head, teacher, teacher_head = (torch.randn(rows, hidden).to(dtype) for rows in (tokens, vocab, tokens, vocab))
    student.requires_grad_()
    head.requires_grad_()
    mask, labels = torch.arange(tokens) % 3 > 0, torch.zeros(tokens, dtype=torch.long)
    softcap = SOFTCAP if settings.cross_entropy else None
    with LiveBytes([student, head, teacher, teacher_head, mask, labels]) as live:
        ours, signal = Head(head, softcap=softcap), WholeSignal(teacher, Head(teacher_head, softcap=softcap))
        total = linear_distillation(student, ours, signal, mask, world, settings, labels).total
        between = live.now
        total.backward()
    assert student.grad.dtype == head.grad.dtype == dtype
    return live.peak, between


@pytest.mark.parametrize("gradients", ["forward", "recompute"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", MEMORY_CASES)
def test_memory_is_two_chunks_of_logits_and_the_gradients(case, dtype, gradients, alone):
    """Above the arguments at most: two chunks in fp32, the gradient of the head in fp32, and the gradient of the hidden states."""
    vocab, hidden, chunk = 4099, 68, 37  # twice as wide as a chunk has tokens: the head just does not go through in two parts
    chunks, head = 2 * chunk * vocab * 4, vocab * hidden * 4
    settings = dataclasses.replace(MEMORY_CASES[case], gradients=gradients, chunk_tokens=chunk)
    for tokens in (101, 1009):
        states = tokens * hidden * dtype.itemsize
        peak, between = memory(alone, settings, dtype, tokens, vocab, hidden)
        assert 0.8 * chunks + head + states < peak <= chunks + head + states  # most of it is used: it is not a bound that says nothing
        assert between <= chunks + (head + states if gradients == "forward" else 0)


def signal_of(teacher, head, settings, cached):
    """As a live teacher or a cache gives it, of hidden states that may be no numbers."""
    if not cached:
        return WholeSignal(teacher, Head(head))
    found = cache(teacher.nan_to_num(), head, settings, None)
    garbage = ~teacher.isfinite().all(dim=1)
    return TopSignal(found.tokens_TK, found.log_probs_TK.masked_fill(garbage[:, None], torch.nan), found.tail_T.masked_fill(garbage, torch.nan))


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e38], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(("top_k", "cached"), [(None, False), (5, False), (5, True)], ids=["whole", "top-k", "cached"])
def test_what_a_token_that_does_not_count_has_reaches_nothing(top_k, cached, dtype, what, alone):
    """Its hidden states give logits that are no numbers: loss and gradients are those of the others, bit for bit, and its own gradient is 0."""
    student, head, teacher, teacher_head = inputs(dtype)
    mask = mask_of("some")
    for kind, gradients in itertools.product(KINDS, ("forward", "recompute")):
        settings, found = Distill(kind, top_k=top_k, cross_entropy=0.4, gradients=gradients, chunk_tokens=7), []
        for filling in (0.0, what):
            hidden, weight = student.clone(), head.clone().requires_grad_()
            hidden[~mask] = filling
            signal = signal_of(teacher.masked_fill(~mask[:, None], filling), teacher_head, settings, cached)
            right = labels().masked_fill(~mask, 0 if filling == 0 else -100)
            losses = linear_distillation(hidden.requires_grad_(), Head(weight), signal, mask, alone, settings, right)
            losses.total.backward()
            found.append((*(loss.detach() for loss in losses), hidden.grad, weight.grad))
        for clean, dirty in zip(*found, strict=True):
            torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert found[1][3][~mask].count_nonzero() == 0
        assert all(tensor.isfinite().all() and tensor.count_nonzero() for tensor in found[1])
