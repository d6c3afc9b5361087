"""The fused loss beside nvidia-modelopt's on whole logits, where that is installed."""

import importlib

import pytest
import torch

from minitron.config.schema import Distill
from minitron.distillation.fused import linear_distillation
from minitron.distillation.signal import Head, WholeSignal
from minitron.engine.parallel import sum_over_tensor_ranks
from tests.multirank.ranks import Layout, on_ranks

SEQUENCE, BATCH, HIDDEN, VOCAB = 8, 3, 24, 64
PLUGIN = "modelopt.torch.distill.plugins.megatron"


def inputs():
    generator = torch.Generator().manual_seed(7)
    shapes = [(SEQUENCE, BATCH, HIDDEN), (VOCAB, HIDDEN)] * 2
    return [torch.randn(shape, generator=generator) for shape in shapes]


def both(world):
    """{(kind, temperature): for modelopt and for ours, (loss, gradient to the hidden states, to this rank's part of the head)}."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    loss_of = importlib.import_module(PLUGIN).LogitsKLLoss
    config = TransformerConfig(num_layers=1, hidden_size=HIDDEN, num_attention_heads=4, tensor_model_parallel_size=world.tp)
    student, head, teacher, teacher_head = inputs()
    rows = slice(world.tp_rank * VOCAB // world.tp, (world.tp_rank + 1) * VOCAB // world.tp)
    found = {}
    for kind, temperature in (("forward_kl", 1.0), ("reverse_kl", 1.0), ("forward_kl", 2.5)):
        results = []
        for side in ("modelopt", "ours"):
            hidden, weight = student.clone().requires_grad_(), head[rows].clone().requires_grad_()
            if side == "modelopt":
                made = loss_of(config, temperature=temperature, reverse=kind == "reverse_kl")(hidden @ weight.t(), teacher @ teacher_head[rows].t())
                per_token = made[0] if isinstance(made, tuple) else made
                total = per_token.sum()
                # every rank says its shard's part, unless they were added up for all
                total = sum_over_tensor_ranks(total, world) if isinstance(made, tuple) and made[1] else total
            else:
                signal, first = WholeSignal(teacher.flatten(0, 1), Head(teacher_head[rows], rows.start)), rows.start
                mask = torch.ones(SEQUENCE * BATCH, dtype=torch.bool)
                total = linear_distillation(
                    hidden.flatten(0, 1), Head(weight, first), signal, mask, world, Distill(kind, temperature=temperature)
                ).total
            total.backward()
            results.append((total.detach(), sum_over_tensor_ranks(hidden.grad, world), weight.grad))
        found[kind, temperature] = results
    return found
