"""Loss and gradients from hidden states and vocabulary shards against float64 autograd over whole logits.

Legend: T tokens, H and G hidden sizes of student and teacher, V vocabulary.
"""

import itertools

import pytest
import torch

from minitron.distillation.fused import linear_forward_kl
from minitron.engine.parallel import sum_over_tensor_ranks
from tests.multirank.ranks import Layout, on_ranks

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 37, 24, 32, 60
TEMPERATURES, CHUNKS, MASKS = (0.5, 1.0, 3.0), (1, 8, 37, 512), ("all", "some", "none")
# relative error allowed, in the norm of the whole tensor
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def inputs(dtype):
    """Hidden states and heads, spread so that some distributions are sharp and some flat."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(TOKENS, HIDDEN), (VOCAB, HIDDEN), (TOKENS, TEACHER_HIDDEN), (VOCAB, TEACHER_HIDDEN)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    spread_T1 = torch.linspace(0.1, 1.0, TOKENS)[:, None]
    return [(tensor * spread_T1 if tensor.shape[0] == TOKENS else tensor).to(dtype) for tensor in tensors]


def mask_of(kind):
    generator = torch.Generator().manual_seed(4)
    return {"all": torch.ones(TOKENS), "none": torch.zeros(TOKENS), "some": torch.rand(TOKENS, generator=generator) > 0.3}[kind].bool()


def reference(dtype, temperature, mask):
    """(loss, its gradient to the student's hidden states, to the student's head) by autograd in float64."""
    student, head, teacher, teacher_head = (tensor.double() for tensor in inputs(dtype))
    student.requires_grad_()
    head.requires_grad_()
    log_student = (student @ head.t() / temperature).log_softmax(-1)
    log_teacher = (teacher @ teacher_head.t() / temperature).log_softmax(-1)
    divergence_T = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    loss = (divergence_T * mask).sum()
    return loss.detach(), *torch.autograd.grad(loss, (student, head))


def battery(world, dtype):
    """For every setting: (loss, gradient to the hidden states summed over tensor ranks, gradient to this rank's part of the head)."""
    found = {}
    student, head, teacher, teacher_head = inputs(dtype)
    mine = slice(world.tp_rank * VOCAB // world.tp, (world.tp_rank + 1) * VOCAB // world.tp)
    for temperature, chunk, mask in itertools.product(TEMPERATURES, CHUNKS, MASKS):
        hidden, weight = student.clone().requires_grad_(), head[mine].clone().requires_grad_()
        arguments = (teacher, teacher_head[mine], mask_of(mask), world, temperature, chunk)
        loss = linear_forward_kl(hidden, weight, *arguments)
        (loss * 0.25).backward()  # what comes from above is passed on
        gradient = sum_over_tensor_ranks(hidden.grad.float(), world)
        found[temperature, chunk, mask] = (loss.detach(), 4 * gradient, 4 * weight.grad.float())
    return found


def off(found, expected, allowed):
    """The relative error where it is more than allowed; a gradient that must be zero must be exactly that."""
    error = (found.double() - expected).norm().item()
    scale = expected.norm().item()
    return None if (error == 0 if scale == 0 else error / scale < allowed) else error / max(scale, 1e-300)


@pytest.mark.multirank
@pytest.mark.parametrize("dtype", ALLOWED, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=4)], ids=str)
def test_loss_and_gradients_are_those_of_whole_logits(layout, dtype):
    ranks = on_ranks(battery, layout, dtype)
    wrong = {}
    for setting in itertools.product(TEMPERATURES, CHUNKS, MASKS):
        loss, hidden_grad, head_grad = reference(dtype, setting[0], mask_of(setting[2]))
        results = {
            "loss": (ranks[0][setting][0], loss),
            "hidden": (ranks[0][setting][1], hidden_grad),
            "head": (torch.cat([rank[setting][2] for rank in ranks]), head_grad),
        }
        errors = {name: error for name, (found, expected) in results.items() if (error := off(found, expected, ALLOWED[dtype])) is not None}
        if errors:
            wrong[setting] = errors
        assert all(torch.equal(rank[setting][0], ranks[0][setting][0]) for rank in ranks)
    assert wrong == {}


def test_the_smallest_and_largest_logits_stay_finite(alone):
    """Distributions so sharp that a naive exponential overflows."""
    student, teacher = (1e3 * torch.eye(4).roll(shift, 0) for shift in (0, 1))
    student.requires_grad_()
    loss = linear_forward_kl(student, torch.eye(4), teacher, torch.eye(4), torch.ones(4, dtype=torch.bool), alone)
    loss.backward()
    assert loss.item() == pytest.approx(4000.0)
    assert student.grad.isfinite().all()
