"""From a model and the settings `search` to the candidates: the architectures of the grid that lie within the budgets, and why the others fell. Pure.

Shapes: P points of the grid, A their sizes, X distinct blocks. A *target* is met from either side to within search.tolerance, a *limit* is not
exceeded (arXiv 2407.14679, section 2.4: every architecture within 5 % of a number of parameters).
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from minitron.arch.arch import Arch
from minitron.arch.counts import SCALES, scaled, totals
from minitron.arch.counts import costs as costs_of_one
from minitron.config.schema import TARGETS, Parallel, Search, Target
from minitron.errors import RequestError, refuse
from minitron.search.candidates import SIZES, Candidate, name_of
from minitron.search.grid import LAYERS, Mask, Sizes, dominated, impossible, points

Costs = dict[str, npt.NDArray[np.float64]]
Measure = Callable[[Sequence[Arch]], Sequence[float]]  # milliseconds of a forward pass of each
BYTES = {"bf16": 2, "fp32": 4}

# what a budget bounds, and how an amount of it is written
WORDS: dict[str, tuple[str, Callable[[float], str]]] = {
    "params": ("parameters", lambda amount: scaled(amount, 2)),
    "non_embedding_params": ("non-embedding parameters", lambda amount: scaled(amount, 2)),
    "active_params": ("active parameters", lambda amount: scaled(amount, 2)),
    "memory_gb": ("memory", lambda amount: f"{amount:.3g} GB"),
    "gflops_per_token": ("arithmetic", lambda amount: f"{amount:.3g} GFLOP per token"),
    "latency_ms": ("latency", lambda amount: f"{amount:.3g} ms"),
}


@dataclasses.dataclass(frozen=True)
class Found:
    """`grid`: points there were; `fell`: how many are no candidates, by the first reason in words; `candidates`: the others, largest first."""

    grid: int
    fell: dict[str, int]
    candidates: list[Candidate]


def check_free(target: Target, search: Search) -> None:
    """Refuse sizes that are given beside a budget, which is there to find them."""
    for name, value in target.sizes.items():
        fixed = f"; search.{name} takes the sizes to look at" if name in SIZES else ""
        raise refuse(f"target.{name}", value, f"must be null with search.{next(iter(search.budgets))}, which looks for the sizes{fixed}")


def find(arch: Arch, search: Search, parallel: Parallel, dtype: str, measure: Measure | None = None) -> Found:
    """The candidates of a search. `measure` tells latencies, asked once, of what is within all other budgets; search.latency_ms can't do without.

    Raises RequestError where there are none, or more than search.max_candidates.
    """
    points_PA = points(arch, search, parallel)
    fell: dict[str, int] = {}
    left = np.ones(len(points_PA), dtype=bool)
    reasons = impossible(arch, points_PA, parallel)
    for reason, (_, mask) in reasons.items():
        _drop(left, mask, reason, fell)
    if not left.any():
        reason = max(fell, key=lambda one: fell[one])
        name = reasons[reason][0]
        raise refuse(f"search.{name}", getattr(search, name), f"no architecture of the grid is possible: {told(fell)}")
    grid, points_PA = len(points_PA), points_PA[left]
    costs = costs_of(arch, points_PA, search, dtype)
    budgets, own = search.budgets, costs_of_one(arch, search.batch_size, search.seq_length, BYTES[dtype])
    left = within(points_PA, costs, {name: budget for name, budget in budgets.items() if name in costs}, search, fell, own)
    points_PA, costs = _rows(points_PA, costs, left)
    if measure is not None:
        costs["latency_ms"] = np.array(measure([shaped(arch, point) for point in points_PA]), dtype=np.float64)
        points_PA, costs = _rows(points_PA, costs, within(points_PA, costs, budgets, search, fell, own))
    elif "latency_ms" in budgets:
        raise refuse("search.latency_ms", search.latency_ms, "latency is measured by minitron search")
    if not search.keep_dominated:
        left = np.ones(len(points_PA), dtype=bool)
        _drop(left, dominated(points_PA), "dominated", fell)
        points_PA, costs = _rows(points_PA, costs, left)
    if len(points_PA) > search.max_candidates:
        raise _too_many(points_PA, search)
    order = np.lexsort((*points_PA.T[::-1], costs["params"]))[::-1]
    return Found(grid, fell, [_candidate(points_PA[n], {name: float(cost[n]) for name, cost in costs.items()}) for n in order])


def costs_of(arch: Arch, points_PA: Sizes, search: Search, dtype: str) -> Costs:
    """What each point costs, by name: [P] each. Exact: a cost is a line in the number of layers, so of each block shape two models are counted."""
    shapes_XA, which_P = np.unique(np.delete(points_PA, LAYERS, axis=1), axis=0, return_inverse=True)
    settings = (search.batch_size, search.seq_length, BYTES[dtype])
    counted = [[totals(shaped(arch, (layers, *shape)), *settings) for layers in (1, 2)] for shape in shapes_XA]
    more_P, which_P = points_PA[:, LAYERS] - 1, which_P.ravel()
    costs = {}
    for name in counted[0][0]:
        one, two = (np.array([pair[n][name] for pair in counted], dtype=np.int64)[which_P] for n in (0, 1))
        costs[name] = (one + (two - one) * more_P) / SCALES.get(name, 1)
    return costs


def shaped(arch: Arch, point: Sequence[int]) -> Arch:
    """The model cut to the sizes of a point."""
    return arch.replace(**dict(zip(SIZES, map(int, point), strict=True)))


def within(points_PA: Sizes, costs: Costs, budgets: dict[str, float], search: Search, fell: dict[str, int], own: dict[str, float]) -> Mask:
    """[P]: which points are within the budgets; the others are added to `fell`. `own`: what the model itself costs.

    Raises RequestError where none is, which names the nearest, or why there can be none.
    """
    left = np.ones(len(points_PA), dtype=bool)
    excess = {}
    for name, budget in budgets.items():
        words, amount = WORDS[name]
        slack = search.tolerance if name in TARGETS else 0.0
        off = costs[name] / budget - 1
        excess[name] = np.maximum((np.abs(off) if name in TARGETS else off) - slack, 0)
        _drop(left, (excess[name] > 0) & (off > 0), f"{words} above {amount(budget * (1 + slack))}", fell)
        _drop(left, (excess[name] > 0) & (off < 0), f"{words} below {amount(budget * (1 - slack))}", fell)
    if not left.any():
        together = np.stack(list(excess.values()))
        nearest = int(np.lexsort((together.sum(axis=0), together.max(axis=0)))[0])
        worst = list(budgets)[int(together[:, nearest].argmax())]
        if because := _never(worst, budgets, search, own):
            raise refuse(f"search.{worst}", _plain(budgets[worst]), because)
        advice = _finer(search, worst, both_sides=costs[worst].min() < budgets[worst] < costs[worst].max())
        raise _none_within(points_PA[nearest], {name: float(cost[nearest]) for name, cost in costs.items()}, worst, budgets, search, advice)
    return left


def _never(worst: str, budgets: dict[str, float], search: Search, own: dict[str, float]) -> str:
    """Why no grid whatever would meet a budget, empty where one might; `own`: what the model itself costs."""
    if worst in TARGETS and budgets[worst] > own[worst]:
        return f"the model itself has {WORDS[worst][1](own[worst])}: pruning can only make it smaller"
    other = {"params": "active_params", "active_params": "params"}.get(worst, "")
    if other in budgets and own["params"] == own["active_params"]:
        low, high = sorted((budgets[worst], budgets[other]))
        if low * (1 + search.tolerance) < high * (1 - search.tolerance):
            return f"contradicts search.{other}={_plain(budgets[other])}: in a model without experts all parameters are active"
    return ""


def _finer(search: Search, worst: str, both_sides: bool) -> str:
    """Which settings have more to look at, as far as the grid is of its own; `both_sides`: there are models above and below the budget."""
    own = {"hidden_multiple_of": search.hidden_size is None, "ffn_multiple_of": search.ffn_hidden_size is None and search.ffn_expansion is None}
    steps = [f"search.{name}={getattr(search, name)}" for name, applies in own.items() if applies]
    ways = [f"a smaller {' or '.join(steps)}, or a larger search.values={search.values}, makes the grid finer"] if steps else []
    ways += [] if both_sides else ["a list such as search.hidden_size=[...] makes it wider"]
    ways += [f"a larger search.tolerance={search.tolerance:g} takes more of it"] if worst in TARGETS and both_sides else []
    return "; ".join(ways)


def told(fell: dict[str, int]) -> str:
    """ "12 dominated, 3 parameters above 105.0 M", the most first."""
    return ", ".join(f"{number:,} {reason}" for reason, number in sorted(fell.items(), key=lambda item: -item[1]))


def _candidate(point: Sizes, costs: dict[str, float]) -> Candidate:
    sizes = dict(zip(SIZES, map(int, point), strict=True))
    return Candidate(name_of(sizes), sizes, costs)


def _rows(points_PA: Sizes, costs: Costs, left: Mask) -> tuple[Sizes, Costs]:
    """The points of a mask, with their costs."""
    return points_PA[left], {name: cost[left] for name, cost in costs.items()}


def _drop(left: Mask, mask: Mask, reason: str, fell: dict[str, int]) -> None:
    """Take those of `mask` out of `left`, and count them under the reason."""
    if number := int((left & mask).sum()):
        fell[reason] = fell.get(reason, 0) + number
    left &= ~mask


def _too_many(points_PA: Sizes, search: Search) -> RequestError:
    """The refusal of a grid that leaves more than anyone wants to train, with the axes that make it fine."""
    numbers = {name: len(np.unique(column)) for name, column in zip(SIZES, points_PA.T, strict=True)}
    fine = [f"search.{name} (now {number} sizes)" for name, number in sorted(numbers.items(), key=lambda item: -item[1]) if number > 1]
    coarser = f"shorter lists for {', '.join(fine)}, search.values below {search.values}"
    tighter = f", search.tolerance below {search.tolerance:g}" if any(name in TARGETS for name in search.budgets) else ""
    ways = f"fewer are left with {coarser}{tighter}; or raise search.max_candidates"
    return refuse("search.max_candidates", search.max_candidates, f"{len(points_PA)} candidates are left, more than that: {ways}")


def _none_within(point: Sizes, costs: dict[str, float], worst: str, budgets: dict[str, float], search: Search, advice: str) -> RequestError:
    """The refusal of budgets that nothing meets: which the architecture that is nearest to all violates most, and how it stands to the others."""

    def stands(name: str) -> str:
        off = costs[name] / budgets[name] - 1
        return f"{WORDS[name][1](costs[name])}, {100 * abs(off):.3g} % {'more' if off > 0 else 'less'}"

    sizes = ", ".join(f"{name}={size}" for name, size in zip(SIZES, map(int, point), strict=True))
    missed = f"no architecture of the grid {f'comes within {100 * search.tolerance:g} %' if worst in TARGETS else 'is within it'}"
    others = "; ".join(f"search.{name}={_plain(budgets[name])}: {stands(name)}" for name in budgets if name != worst)
    beside = (" and meets the other budgets", f" ({others})") if others else ("", "")
    return refuse(
        f"search.{worst}",
        _plain(budgets[worst]),
        f"{missed}{beside[0]}: the nearest, {sizes}, has {stands(worst)}{beside[1]}; {advice}".removesuffix("; "),
    )


def _plain(amount: float) -> float | int:
    return int(amount) if amount == int(amount) else amount
