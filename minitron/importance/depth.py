"""Layers by what the model predicts without them (arXiv 2407.14679, section 2.2; 2408.11796, section 3).

Legend: L layers of the whole model, S sequence, B batch, P runs of layers, R rows of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from minitron import engine

Tensor = torch.Tensor


def runs_of(num_layers: int, length: int) -> list[range]:
    """Every run of `length` layers: L - length + 1 of them."""
    return [range(first, first + length) for first in range(num_layers - length + 1)]


def losses_without(
    model: engine.Model,
    batches: Iterable[tuple[Tensor, Tensor]],
    world: engine.World,
    lengths: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> dict[int, Tensor]:
    """Language-model loss without layers [i, i + length), for every i and each of `lengths`: [L - length + 1] in nats per token, on every rank.

    One walk through the layers for all of them. `batches`: (tokens [B, S + 1], valid [B]) of this replica; `advance` is told how many are done.
    """

    def windows() -> Iterator[engine.Scored]:
        for tokens_BT, valid_B in batches:
            counted_BS = valid_B[:, None].expand(-1, tokens_BT.size(1) - 1)
            yield engine.Scored(tokens_BT, counted_BS, torch.zeros_like(valid_B, dtype=torch.int64))

    sums, counts_R = sums_without(model, windows(), world, lengths, 1, advance)
    return {length: (sums_PR[:, 0] / counts_R[0].clamp(min=1)).float() for length, sums_PR in sums.items()}


def sums_without(
    model: engine.Model,
    batches: Iterable[engine.Scored],
    world: engine.World,
    lengths: Sequence[int],
    rows: int,
    advance: Callable[[int], None] | None = None,
) -> tuple[dict[int, Tensor], Tensor]:
    """As `engine.losses_without`, of every run of each of `lengths`: sums [L - length + 1, R] by length, and counts [R], on the CPU."""
    runs = {length: runs_of(model.arch.num_layers, length) for length in lengths}
    sums_PR, counts_R = engine.losses_without(model, batches, world, [run for some in runs.values() for run in some], rows, advance)
    return dict(zip(runs, sums_PR.cpu().split([len(some) for some in runs.values()]), strict=True)), counts_R.cpu()
