"""Aggregation of activations into scores: over a sample's tokens first, then over samples (arXiv 2407.14679, section 2.2).

Every aggregation is built from sums, so a sequence or a batch spread over ranks is completed by adding. Pure functions.
Legend: B samples, U units, K sums that an aggregation needs.
"""

import dataclasses
from collections.abc import Callable

import torch

Tensor = torch.Tensor
BLOCK_ELEMENTS = 1 << 17


@dataclasses.dataclass(frozen=True)
class Aggregation:
    """`terms`: what is summed, stacked as K; `finish`: the K sums and the count to the aggregate."""

    terms: Callable[[Tensor], tuple[Tensor, ...]]
    finish: Callable[[Tensor, float], Tensor]


def _variance(sums_KU: Tensor, count: float) -> Tensor:
    return (sums_KU[1] / count - (sums_KU[0] / count) ** 2).clamp_min(0.0)


AGGREGATIONS = {
    "mean": Aggregation(lambda x: (x.abs(),), lambda sums, count: sums[0] / count),
    "l2": Aggregation(lambda x: (x * x,), lambda sums, count: sums[0].sqrt()),
    # in fp64: where the mean outweighs the spread, as in outlier channels, a difference of fp32 squares would be mostly rounding
    "var": Aggregation(lambda x: (x.double(), x.double().square()), _variance),
}


def blocks(values: Tensor) -> tuple[Tensor, ...]:
    """The tokens of activations in pieces whose fp32 copies stay in a processor's cache, which halves what hooks cost there."""
    return (values,) if values.is_cuda else values.split(max(1, BLOCK_ELEMENTS // max(1, values[0].numel())))


def sequence_sums(values_SBU: Tensor, name: str) -> Tensor:
    """Sums [K, B, U] over the tokens at hand, in fp32 (the variance's in fp64) whatever the values' type."""
    totals: list[Tensor] = []
    for block in blocks(values_SBU):
        sums = [term.sum(dim=0) for term in AGGREGATIONS[name].terms(block.float())]
        totals = [total.add_(more) for total, more in zip(totals, sums, strict=True)] if totals else sums
    return torch.stack(totals)


def finish_sequence(sums_KBU: Tensor, name: str, tokens: float) -> Tensor:
    """Per-sample aggregates [B, U] from completed sums over `tokens` tokens."""
    return AGGREGATIONS[name].finish(sums_KBU, tokens)


def batch_sums(samples_BU: Tensor, name: str) -> Tensor:
    """Sums [K, U] over samples, in float64: they are added over many microbatches and ranks in an order that differs by layout."""
    return torch.stack([term.sum(dim=0) for term in AGGREGATIONS[name].terms(samples_BU.double())])


def finish_batch(sums_KU: Tensor, name: str, samples: float) -> Tensor:
    """Scores [U] from completed sums over `samples` samples."""
    return AGGREGATIONS[name].finish(sums_KU, samples)
