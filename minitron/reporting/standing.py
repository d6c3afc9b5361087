"""What a search says, as rows. Pure: the console's tables, the report's and its pictures are made of the same rows."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from minitron.config.schema import TARGETS as PARAMETERS
from minitron.reporting.wording import clock, counted, decimal, percent, ratio, size
from minitron.search.candidates import SIZES, Candidate, Results, Rung
from minitron.search.ladder import mean_losses, ranking

HEADINGS = dict(zip(SIZES, ("layers", "hidden", "MLP", "heads", "KV groups"), strict=True))
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {  # by the names of the budgets: what a reader sees, and how it is written
    "params": ("params", size),
    "non_embedding_params": ("non-embedding", size),
    "active_params": ("active", size),
    "memory_gb": ("memory", lambda value: f"{value:,.3g} GB"),
    "gflops_per_token": ("GFLOP/token", lambda value: f"{value:,.3g}"),
    "latency_ms": ("latency", lambda value: f"{value:,.4g} ms"),
}


@dataclasses.dataclass(frozen=True)
class Standing:
    """One candidate's way. `losses` (mean over the seeds, nats per token) and `ranks` (1 is the least loss) have an entry for every rung,
    None where it was not measured; `fell`: the rung after which it did not go on."""

    candidate: Candidate
    losses: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    fell: int | None
    chosen: bool

    @property
    def name(self) -> str:
        """The candidate's."""
        return self.candidate.name

    @property
    def last(self) -> int:
        """The last rung that it was measured on, -1 if none."""
        return max((at for at, loss in enumerate(self.losses) if loss is not None), default=-1)

    @property
    def loss(self) -> float | None:
        """The loss on that rung."""
        return self.losses[self.last] if self.last >= 0 else None


def standings(results: Results) -> list[Standing]:
    """Every candidate: the chosen one first, then by how far it came and by its loss there, those not yet measured last."""
    means, ranks = [mean_losses(rung) for rung in results.rungs], [ranking(rung) for rung in results.rungs]
    found = [
        Standing(
            candidate,
            tuple(losses.get(candidate.name) for losses in means),
            tuple(order.index(candidate.name) + 1 if candidate.name in order else None for order in ranks),
            next((at for at, rung in enumerate(results.rungs) if candidate.name in rung.losses and not goes_on(rung, candidate.name)), None),
            candidate.name == results.chosen,
        )
        for candidate in results.candidates
    ]
    return sorted(found, key=lambda one: (not one.chosen, -one.last, one.ranks[one.last] or 0 if one.last >= 0 else 0))


def goes_on(rung: Rung, name: str) -> bool:
    """Whether a candidate stays after a rung; until it is decided all do."""
    return not rung.stayed or name in rung.stayed


def when(rung: Rung) -> str:
    """A rung in words."""
    return f"after {counted(rung.steps, 'step')}" if rung.steps else "before training"


def outcome(results: Results, one: Standing) -> str:
    """What became of a candidate, in words."""
    if one.chosen:
        return "chosen"
    if one.fell is not None:
        return f"out {when(results.rungs[one.fell])}"
    return "waits" if one.last < 0 else "in" if results.chosen is None else "stayed to the end"


def best_so_far(results: Results) -> Standing | None:
    """The chosen one, or that with the least loss on the last rung that was decided (the first one while none was)."""
    decided = [rung for rung in results.rungs if rung.stayed] or results.rungs[:1]
    leaders = ranking(decided[-1])[:1] if decided else []
    best = results.chosen or next(iter(leaders), None)
    return next((one for one in standings(results) if one.name == best), None)


def front(points: Iterable[tuple[float, float]]) -> list[int]:
    """Which of the points (cost, loss) no other one is at least as good as in both, by growing cost."""
    best, found = math.inf, []
    for _, loss, at in sorted((cost, loss, at) for at, (cost, loss) in enumerate(points)):
        if loss < best:
            best = loss
            found.append(at)
    return found


def varied(results: Results) -> list[str]:
    """The sizes that not every candidate has as the original has them."""
    return [field for field in SIZES if any(one.sizes[field] != getattr(results.original, field) for one in results.candidates)]


def unvaried(results: Results) -> str:
    """The other sizes in words."""
    same = [f"{HEADINGS[field]} {getattr(results.original, field):,}" for field in SIZES if field not in varied(results)]
    return f"Every candidate keeps {', '.join(same)}." if same and results.candidates else ""


def costs_of(results: Results) -> list[str]:
    """The costs that candidates have, in the order of COSTS; equal columns once: where all parameters are active, those are no news."""
    found = [name for name in COSTS if any(name in one.costs for one in results.candidates)]
    if all(one.costs.get("active_params") == one.costs.get("params") for one in results.candidates):
        found = [name for name in found if name != "active_params"]
    return found


def costs_bound(results: Results) -> list[str]:
    """Those of them that the search had budgets for, and the parameters."""
    return [name for name in costs_of(results) if name == "params" or results.settings.get(name) is not None]


def size_text(field: str, one: Standing) -> str:
    """A candidate's size as it is written."""
    return f"{one.candidate.sizes[field]:,}"


def cost_text(name: str, one: Standing) -> str:
    """A candidate's cost as it is written, empty where it was not counted."""
    costs = one.candidate.costs
    return COSTS[name][1](costs[name]) if name in costs else ""


def grid_told(results: Results) -> str:
    """How many points of the grid are candidates, and why the others are not."""
    why = "; ".join(f"{reason}: {count:,}" for reason, count in results.fell.items() if count)
    return f"{counted(len(results.candidates), 'candidate')} of {counted(results.grid, 'point')} of the grid" + (
        f"; the others: {why}" if why else ""
    )


def steps_taken(results: Results) -> tuple[int, int]:
    """Steps of distillation that were taken, over all candidates and seeds; and what those that began would take to the last rung reached."""
    trained = [rung for rung in results.rungs if rung.steps]
    names = {name: len(losses) for rung in reversed(trained) for name, losses in rung.losses.items()}
    taken = sum(seeds * max(rung.steps for rung in trained if name in rung.losses) for name, seeds in names.items())
    return taken, sum(names.values()) * max((rung.steps for rung in trained), default=0)


def stability(rungs: list[Rung]) -> str:
    """Kendall's tau of every rung with the one before and between its seeds, in words; empty where none is known."""
    figures = {"with the rung before": [rung.tau for rung in rungs], "between seeds": [rung.seed_tau for rung in rungs]}
    known = {between: [decimal(tau) for tau in taus if tau is not None] for between, taus in figures.items()}
    found = "; ".join(f"{', '.join(taus)} {between}" for between, taus in known.items() if taus)
    return f"Kendall's tau {found}" if found else ""


def told(results: Results) -> list[tuple[str, str]]:
    """What a search came to so far, as (what, its figures)."""
    taken, alone = steps_taken(results)
    best, stable = best_so_far(results), stability(results.rungs)
    cost = f"{counted(taken, 'step')} in {clock(sum(rung.seconds for rung in results.rungs))}"
    saved = f", {percent(ratio(taken, alone), 0)} of the steps that all of them would take that far" if taken < alone else ""
    settled = "; the order of the last ones had settled" if results.settled else ""
    return [
        *([("chosen" if best.chosen else "best yet", described(results, best)), ("its rank", ranks_told(results, best))] if best else []),
        *([("order", stable + settled)] if stable else []),
        *([("cost", cost + saved)] if results.rungs else []),
        ("grid", grid_told(results)),
    ]


def described(results: Results, one: Standing) -> str:
    """A candidate by its name, its parameters and the sizes that candidates differ in."""
    sizes = [f"{HEADINGS[field]} {size_text(field, one)}" for field in varied(results)]
    costs = [
        f"{cost_text(name, one)} {COSTS[name][0]}" if name in PARAMETERS else f"{COSTS[name][0]} {cost_text(name, one)}"
        for name in costs_bound(results)
    ]
    return f"{one.name}: {', '.join([*sizes, *costs])}"


def ranks_told(results: Results, one: Standing) -> str:
    """Where a candidate stood from rung to rung."""
    ranks = zip(one.ranks, results.rungs, strict=True)
    return ", ".join(f"{rank} of {len(rung.losses)} {when(rung)}" for rank, rung in ranks if rank is not None)


def search_told(results: Results) -> str:
    """How far a search has come, in a line: its candidates, the rung it stands on, the chosen one or the best so far."""
    parts = [counted(len(results.candidates), "candidate")]
    if results.rungs and results.chosen is None:
        rung, place = results.rungs[-1], sum(bool(rung.steps) for rung in results.rungs)
        on = f"rung {place} of {len(results.settings.get('rungs', []))}, {when(rung)}" if rung.steps else when(rung)
        parts.append(f"{on} ({counted(len(rung.losses), 'candidate')} measured)")
    if best := best_so_far(results):
        loss = f"{decimal(best.loss, 4)} {when(results.rungs[best.last])}" if best.loss is not None else ""
        parts.append(f"{'chosen' if best.chosen else 'best so far'}: {described(results, best)}, loss {loss}")
    return "; ".join(parts if results.rungs else [*parts, "none was measured yet"])
