"""Layers by loss: how much worse the model predicts without each of them (arXiv 2407.14679, section 2.2; 2408.11796, section 3).

Legend: L layers of the whole model, S sequence, B batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from minitron import engine

Tensor = torch.Tensor


def losses_without(
    model: engine.Model,
    batches: Callable[[], Iterable[tuple[Tensor, Tensor]]],
    world: engine.World,
    at_a_time: int,
    advance: Callable[[int], None],
) -> Tensor:
    """Language-model loss without layers [i, i + at_a_time), for every i: [L - at_a_time + 1] in nats per token, on every rank.

    `batches()` starts over the (tokens [B, S + 1], valid [B]) of this replica; `advance(1)` is called after each pass over them.
    """
    losses = []
    for first in range(model.arch.num_layers - at_a_time + 1):
        with skipped(model, range(first, first + at_a_time)):
            losses.append(engine.language_model_score(model, batches(), world).loss)
        advance(1)
    return torch.tensor(losses)


@contextlib.contextmanager
def skipped(model: engine.Model, layers: range) -> Iterator[None]:
    """Inside the block the layers of this rank that are in `layers` pass on what comes in."""

    def pass_on(hidden_states: Tensor, *args: Any, context: Any = None, **kwargs: Any) -> tuple[Tensor, Any]:
        return hidden_states, context

    blocks = [block for number, block in model.blocks() if number in layers]
    for block in blocks:
        block.forward = pass_on  # on the object, in front of the class's own
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
