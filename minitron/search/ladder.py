"""The ladder of a search: who goes on from a rung, how much of the order holds from one rung to the next, and when it has settled. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from minitron.config.schema import Config
from minitron.search.candidates import Rung


def trial(cfg: Config, number: int = 0) -> Config:
    """The settings by which a candidate is distilled: those of a distillation that ends with the last rung, on another order of the data for each
    `number` (search.seeds). Raises RequestError where the training's settings don't fit so few steps."""
    return dataclasses.replace(cfg, seed=cfg.seed + number, train=dataclasses.replace(cfg.train, steps=cfg.search.rungs[-1]))


def mean_losses(rung: Rung) -> dict[str, float]:
    """The mean over the seeds, by candidate; of those that were measured with none yet, nothing."""
    return {name: fmean(losses) for name, losses in rung.losses.items() if losses}


def ranking(rung: Rung) -> list[str]:
    """The candidates of a rung, least loss first; of equals the one that was measured first. Losses that are not finite come last."""
    losses = mean_losses(rung)
    return sorted(losses, key=lambda name: (not math.isfinite(losses[name]), losses[name] if math.isfinite(losses[name]) else 0.0))


def survivors(count: int, share: float) -> int:
    """How many of `count` go on: the share, rounded up, but two of them at least, as one alone is not compared with anything."""
    return min(count, max(2, math.ceil(share * count - 1e-9)))  # 0.1 x 30 is a little more than 3


def kendall_tau(one: Mapping[str, float], other: Mapping[str, float]) -> float | None:
    """Kendall's rank correlation (tau-b) between two sets of losses, over the names in both; None where less than two are, or where all of
    one side are equal.

    (pairs in the same order - pairs in the opposite one) / sqrt(pairs not tied in the one x pairs not tied in the other)
    """
    pairs = [*itertools.combinations([name for name in one if name in other], 2)]
    signs = [(sign(one[a], one[b]), sign(other[a], other[b])) for a, b in pairs]
    untied = [sum(side != 0 for side in sides) for sides in zip(*signs, strict=True)]
    return sum(a * b for a, b in signs) / math.sqrt(math.prod(untied)) if untied and all(untied) else None


def sign(one: float, other: float) -> int:
    """Which is larger."""
    return (one > other) - (one < other)


def tau_between_seeds(losses: Mapping[str, Sequence[float]]) -> float | None:
    """The mean of Kendall's tau over all pairs of seeds; None with one seed, or where none can be told."""
    seeds = [dict(zip(losses, column, strict=True)) for column in zip(*losses.values(), strict=True)]
    found = [tau for one, other in itertools.combinations(seeds, 2) if (tau := kendall_tau(one, other)) is not None]
    return fmean(found) if found else None


def has_settled(rungs: Sequence[Rung], times: int) -> bool:
    """Whether all that were on the last rung came in one and the same order at each of the last `times` rungs of distillation.

    0: never. Losses before any training do not count: they say little of the order after it (arXiv 2407.14679, best practice 9).
    """
    last = [rung for rung in rungs if rung.steps][-times:] if times else []
    if not times or len(last) < times:
        return False
    orders = [[name for name in ranking(rung) if name in last[-1].losses] for rung in last]
    return all(order == orders[-1] for order in orders)
