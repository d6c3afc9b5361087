"""The fused loss beside nvidia-modelopt's on whole logits, where that is installed."""

import importlib
import importlib.util

import pytest
import torch

from minitron.config.schema import Distill
from minitron.distillation.fused import linear_distillation
from minitron.distillation.signal import Head, WholeSignal
from minitron.engine.parallel import sum_over_tensor_ranks
from tests.multirank.ranks import Layout, on_ranks

SEQUENCE, BATCH, HIDDEN, VOCAB = 8, 3, 24, 64
CASES = (("forward_kl", 1.0), ("reverse_kl", 1.0), ("forward_kl", 2.5))
PLUGIN = "modelopt.torch.distill.plugins.megatron"


def inputs():
    generator = torch.Generator().manual_seed(7)
    shapes = [(SEQUENCE, BATCH, HIDDEN), (VOCAB, HIDDEN)] * 2
    return [torch.randn(shape, generator=generator) for shape in shapes]


def theirs(hidden, weight, teacher, teacher_weight, kind, temperature, world):
    """(this rank's part of their loss, the whole of it): it is not multiplied by the temperature squared, and is for the caller to add up."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world.tp)
    loss = importlib.import_module(PLUGIN).LogitsKLLoss(config, temperature=temperature, reverse=kind == "reverse_kl")
    per_token, add_up, _ = loss(hidden @ weight.t(), teacher @ teacher_weight.t())
    assert add_up
    part = per_token.sum() * temperature**2
    return part, sum_over_tensor_ranks(part.detach(), world)


def ours(hidden, weight, teacher, teacher_weight, kind, temperature, world):
    """As `theirs`; each rank has the whole, and its gradients are of its part."""
    first, mask = world.tp_rank * len(weight), torch.ones(SEQUENCE * BATCH, dtype=torch.bool)
    signal, settings = WholeSignal(teacher.flatten(0, 1), Head(teacher_weight, first)), Distill(kind, temperature=temperature)
    total = linear_distillation(hidden.flatten(0, 1), Head(weight, first), signal, mask, world, settings).total
    return total, total.detach()


def battery(world):
    """For every case and side: (loss, gradient to the hidden states, to this rank's part of the head)."""
    student, head, teacher, teacher_head = inputs()
    rows = slice(world.tp_rank * VOCAB // world.tp, (world.tp_rank + 1) * VOCAB // world.tp)
    found = []
    for case in CASES:
        for side in (theirs, ours):
            hidden, weight = student.clone().requires_grad_(), head[rows].clone().requires_grad_()
            part, whole = side(hidden, weight, teacher, teacher_head[rows], *case, world)
            part.backward()
            found.append((whole, sum_over_tensor_ranks(hidden.grad, world), weight.grad))
    return list(zip(found[::2], found[1::2], strict=True))


@pytest.mark.multirank
@pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="nvidia-modelopt is not installed")
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(tp=4)], ids=str)
def test_losses_and_gradients_are_modelopts(layout):
    for rank in on_ranks(battery, layout):
        for case, (right, found) in zip(CASES, rank, strict=True):
            for mine, other in zip(found, right, strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda said, case=case: f"{case}: {said}")
