"""The loss without layers, the naive way: a full pass for each run of layers, whose blocks pass on what comes in."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from minitron.engine.model import Model
from minitron.engine.parallel import World
from minitron.engine.scoring import language_model_score

Tensor = torch.Tensor


def losses_by_full_passes(model: Model, batches: Callable[[], Iterable[tuple[Tensor, Tensor]]], world: World, length: int) -> Tensor:
    """[L - length + 1] in nats per token, on every rank; `batches()` starts over the (tokens [B, S + 1], valid [B]) of this replica."""
    losses = []
    for first in range(model.arch.num_layers - length + 1):
        with skipped(model, range(first, first + length)):
            losses.append(language_model_score(model, batches(), world).loss)
    return torch.tensor(losses)


@contextlib.contextmanager
def skipped(model: Model, layers: range) -> Iterator[None]:
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
