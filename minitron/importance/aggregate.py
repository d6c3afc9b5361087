"""Aggregation of activations into scores: over a sample's tokens first, then over samples (arXiv 2407.14679, section 2.2).

Every aggregation is built from sums, so a sequence or a batch spread over ranks is completed by adding. Pure functions.
Legend: B samples, U units, K sums that an aggregation needs.
"""

import dataclasses
import math
from collections.abc import Callable

import torch

Tensor = torch.Tensor
BLOCK, SMALL = 1 << 18, 1 << 21  # elements
TOKENS = 16  # that a compiled kernel sums in one step


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """`terms`: what is summed, stacked as K, each in memory of its own; `finish`: the K sums and the count to the aggregate."""

    terms: Callable[[Tensor], tuple[Tensor, ...]]
    finish: Callable[[Tensor, float], Tensor]


def exact(values: Tensor) -> torch.dtype:
    """What values are summed in: fp32, or their own type where that is wider."""
    return torch.promote_types(values.dtype, torch.float32)


def _variance(sums_KU: Tensor, count: float) -> Tensor:
    return (sums_KU[1] / count - (sums_KU[0] / count) ** 2).clamp_min(0.0)


AGGREGATIONS = {
    # abs is exact in any type, and cheaper in a narrow one
    "mean": Aggregation(lambda x: (x.abs().to(exact(x)),), lambda sums, count: sums[0] / count),
    "l2": Aggregation(lambda x: (x.to(exact(x)).square(),), lambda sums, count: sums[0].sqrt()),
    # in fp64: where the mean outweighs the spread, as in outlier channels, a difference of fp32 squares would be mostly rounding
    "var": Aggregation(lambda x: (x.to(torch.float64, copy=True), x.double().square()), _variance),
}


def in_blocks(values_SBU: Tensor) -> tuple[Tensor, ...]:
    """Parts along S whose temporaries stay in a core's cache, where whole ones would go through memory. A GPU takes all at once."""
    if values_SBU.is_cuda or values_SBU.numel() <= SMALL or torch.compiler.is_compiling():
        return (values_SBU,)
    return values_SBU.split(max(1, BLOCK // values_SBU[0].numel()))


def over_tokens(values_SBU: Tensor) -> Tensor:
    """Sums [B, U] over S. A compiled kernel for the CPU would go down whole columns, far apart in memory: it sums a few tokens at a time first."""
    if values_SBU.is_cuda or not torch.compiler.is_compiling():
        return values_SBU.sum(dim=0)
    return values_SBU.unflatten(0, (-1, math.gcd(len(values_SBU), TOKENS))).sum(dim=1).sum(dim=0)


def sequence_sums(values_SBU: Tensor, name: str) -> Tensor:
    """Sums [K, B, U] over the tokens at hand, in fp32 (the variance's in fp64) whatever the values' type."""
    first, *others = in_blocks(values_SBU)
    totals = AGGREGATIONS[name].terms(first)
    for block in others:
        for total, term in zip(totals, AGGREGATIONS[name].terms(block), strict=True):
            total[: len(term)] += term
    return torch.stack([over_tokens(total) for total in totals])


def finish_sequence(sums_KBU: Tensor, name: str, tokens: float) -> Tensor:
    """Per-sample aggregates [B, U] from completed sums over `tokens` tokens."""
    return AGGREGATIONS[name].finish(sums_KBU, tokens)


def batch_sums(samples_BU: Tensor, name: str) -> Tensor:
    """Sums [K, U] over samples, in float64: they are added over many microbatches and ranks in an order that differs by layout."""
    return torch.stack([term.sum(dim=0) for term in AGGREGATIONS[name].terms(samples_BU.double())])


def finish_batch(sums_KU: Tensor, name: str, samples: float) -> Tensor:
    """Scores [U] from completed sums over `samples` samples."""
    return AGGREGATIONS[name].finish(sums_KU, samples)
