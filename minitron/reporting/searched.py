"""The report's pictures of a search: losses against costs, their way over the rungs, and what each candidate keeps. Colours as in pictures.py.

Shapes tell what colours do: a dot goes on, a cross is out after that rung, the diamond is the chosen one.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minitron.reporting import standing
from minitron.reporting.drawing import LIGHT, bare, boxes, count_axis, draw, hint, name_points, spots
from minitron.reporting.pictures import CUT_SOFT, KEPT, KEPT_SOFT, MUTED, SMALL, Picture
from minitron.reporting.standing import HEADINGS, PARAMETERS, Standing
from minitron.reporting.wording import decimal, size
from minitron.search.candidates import Results

AXES = {  # cost -> how an axis calls it, and a caption: what the front has little of
    "params": ("parameters", "fewer parameters"),
    "non_embedding_params": ("parameters without embeddings", "fewer parameters"),
    "active_params": ("active parameters", "fewer active parameters"),
    "memory_gb": ("GB of weights and key/value cache", "less memory"),
    "gflops_per_token": ("GFLOP per token", "less arithmetic"),
    "latency_ms": ("milliseconds per forward pass", "less time"),
}
MOST_ROWS = 24  # candidates whose sizes are drawn; the table has them all
Points = list[tuple[Standing, float, float]]


def search_pictures(results: Results) -> tuple[list[Picture], list[Picture]]:
    """Those that what was measured so far suffices for: of losses against costs, and the others."""
    found = standing.standings(results)
    scatters = [scatter(results, found, cost) for cost in standing.costs_bound(results)]
    others = [rung_curves(results, found), sizes(results, found)]
    return [picture for picture in scatters if picture is not None], [picture for picture in others if picture is not None]


def points_of(results: Results, found: Sequence[Standing], cost: str, at: int) -> Points:
    """The candidates of a rung with a cost and a finite loss."""
    losses = standing.mean_losses(results.rungs[at])
    return [
        (one, one.candidate.costs[cost], losses[one.name])
        for one in found
        if cost in one.candidate.costs and math.isfinite(losses.get(one.name, math.nan))
    ]


def mark(axes: Axes, results: Results, one: Standing, at: int, x: float, y: float) -> None:
    """A candidate's mark on a rung, with its name to a pointer."""
    stays = standing.goes_on(results.rungs[at], one.name)
    style: dict[str, Any]
    if one.chosen:
        style = {"marker": "D", "color": KEPT, "markersize": 7.5, "markeredgecolor": LIGHT["panel"], "markeredgewidth": 1, "zorder": 5}
    elif stays:
        style = {"marker": "o", "color": KEPT_SOFT, "markersize": 6.5, "markeredgecolor": KEPT, "markeredgewidth": 1.2, "zorder": 4}
    else:
        style = {"marker": "x", "color": MUTED, "markersize": 5.5, "markeredgewidth": 1.5, "zorder": 3}
    (drawn,) = axes.plot(x, y, linestyle="none", **style)
    costs = ", ".join(f"{standing.cost_text(name, one)} {standing.COSTS[name][0]}" for name in standing.costs_bound(results))
    hint(drawn, f"{one.name}: {costs}, loss {decimal(y, 3)} {standing.when(results.rungs[at])}, {standing.outcome(results, one)}")


def scatter(results: Results, found: Sequence[Standing], cost: str) -> Picture | None:
    """A cost against the loss before training, on the first and on the last rung, each with its Pareto front; None while nothing was measured."""
    measured = {at: points for at in range(len(results.rungs)) if (points := points_of(results, found, cost, at))}
    if not measured:
        return None
    trained = [at for at in measured if results.rungs[at].steps]
    shown = {at: measured[at] for at in sorted({min(measured), *trained[:1], max(measured)})}
    axis, less = AXES[cost]

    def paint(figure: Figure) -> None:
        panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (at, points) in zip(panels, shown.items(), strict=True):
            scatter_panel(axes, results, at, points)
        panels[-1].xaxis.set_major_locator(MaxNLocator(6))
        if cost in PARAMETERS:
            count_axis(panels[-1], axis, max(x for points in shown.values() for _, x, _ in points))
        else:
            panels[-1].set_xlabel(axis)
        for axes, points in zip(panels, shown.values(), strict=True):
            edge = [points[number] for number in front_of(points)]
            name_best(axes, points, [one for one, *_ in edge], [[(x, y) for _, x, y in edge]])

    marks = f"Dot: went on. Cross: out.{' Diamond: chosen.' if results.chosen else ''}"
    caption = f"{marks} Dashed: the front, which nothing beats with {less}. Point at a mark for its name."
    return Picture(f"Loss against {axis}", caption, draw(f"scatter-{cost}", 50 + 165 * len(shown), paint))


def front_of(points: Points) -> list[int]:
    """Which of them are on the Pareto front."""
    return standing.front((x, y) for _, x, y in points)


def scatter_panel(axes: Axes, results: Results, at: int, points: Points) -> None:
    """One rung's candidates and their front."""
    edge = [points[number] for number in front_of(points)]
    axes.grid()
    axes.plot([x for _, x, _ in edge], [y for *_, y in edge], color=KEPT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
    for one, x, y in points:
        mark(axes, results, one, at, x, y)
    axes.margins(0.12, 0.16)
    axes.set_title(standing.when(results.rungs[at]), loc="left", fontsize=10, fontweight="bold")
    axes.set_ylabel("loss (nats)")
    axes.yaxis.set_major_locator(MaxNLocator(5))


def name_best(axes: Axes, points: Points, best: Sequence[Standing], lines: Sequence[Sequence[tuple[float, float]]]) -> None:
    """Names of the chosen one and, where there is room beside the points and `lines`, of the `best` others."""
    taken = spots(axes, [(x, y) for _, x, y in points], lines)
    styles = {True: {"color": KEPT, "fontweight": "bold"}, False: {"color": LIGHT["ink"]}}
    for chosen, style in styles.items():
        names = [(one.name, x, y) for one, x, y in points if one.chosen is chosen and (chosen or one in best)]
        name_points(axes, names, taken, fontsize=SMALL, **style)


def rung_curves(results: Results, found: Sequence[Standing]) -> Picture | None:
    """Every candidate's loss over the tokens of its distillation, those that fell faded; None before any distillation."""
    trained = [at for at, rung in enumerate(results.rungs) if rung.steps]
    ways = {one.name: [(float(results.rungs[at].tokens), loss) for at in trained if (loss := one.losses[at]) is not None] for one in found}
    drawn = [one for one in found if any(math.isfinite(loss) for _, loss in ways[one.name])]
    if not drawn:
        return None

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.set_xscale("log")
        for one in drawn:
            rung_curve(axes, results, one, ways[one.name])
        axes.margins(0.08, 0.1)
        axes.set_ylabel("loss (nats per token)")
        count_axis(axes, "tokens of distillation (log)", results.rungs[trained[-1]].tokens, digits=3)
        axes.set_xticks([results.rungs[at].tokens for at in trained])
        axes.minorticks_off()
        ends = [(one, *way[-1]) for one in drawn if math.isfinite((way := ways[one.name])[-1][1])]
        name_best(axes, ends, [one for one in drawn if one.fell is None], [*ways.values()])

    before = [loss for one in found for at, loss in enumerate(one.losses) if at not in trained and loss is not None and math.isfinite(loss)]
    so_far = "" if results.chosen else " so far"
    parts = {
        "Held-out loss rung by rung. Faded, ending in a cross: out.": True,
        "Diamonds: the chosen one.": results.chosen is not None,
        "Strokes: from seed to seed.": any(len(losses) > 1 for at in trained for losses in results.rungs[at].losses.values()),
        f"Before training the losses were {decimal(min(before, default=0))} to {decimal(max(before, default=0))}.": bool(before),
        f"{len(found) - len(drawn)} of {len(found)} candidates were not distilled{so_far}.": len(drawn) < len(found),
    }
    return Picture("Rungs", " ".join(part for part, applies in parts.items() if applies), draw("rungs", 300, paint))


def rung_curve(axes: Axes, results: Results, one: Standing, way: Sequence[tuple[float, float]]) -> None:
    """One candidate's line, with a mark where it ends, and on every rung if it is the chosen one."""
    color, width, above = (KEPT, 2.4, 4) if one.chosen else (KEPT, 1.2, 3) if one.fell is None else (MUTED, 1, 2)
    (line,) = axes.plot(*zip(*way, strict=True), color=color, linewidth=width, alpha=None if one.fell is None else 0.55, zorder=above)
    rungs = [(at, rung) for at, rung in enumerate(results.rungs) if rung.steps and one.name in rung.losses]
    hint(line, f"{one.name}: {', '.join(f'{decimal(loss, 3)} {standing.when(rung)}' for (_, loss), (_, rung) in zip(way, rungs, strict=True))}")
    for (x, y), (at, rung) in zip(way, rungs, strict=True):
        if len(rung.losses[one.name]) > 1:
            axes.vlines(x, min(rung.losses[one.name]), max(rung.losses[one.name]), color=color, linewidth=0.9, zorder=above)
        if at == one.last or one.chosen:
            mark(axes, results, one, at, x, y)


def sizes(results: Results, found: Sequence[Standing]) -> Picture | None:
    """What each candidate keeps of every axis that differs, and of the parameters: bars beside each other, the candidates by how they stand."""
    fields = standing.varied(results)
    if not found or not fields:
        return None
    shown = found[:MOST_ROWS]
    original = {field: getattr(results.original, field) for field in fields}
    columns = [(HEADINGS[field], float(original[field]), [float(one.candidate.sizes[field]) for one in shown]) for field in fields]
    if all("params" in one.candidate.costs for one in shown):
        columns.append(("params", float(results.original.num_parameters()), [one.candidate.costs["params"] for one in shown]))
    gap = 0.03

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        width = (1 + gap) / len(columns) - gap
        rows = np.arange(len(shown))
        for number, (heading, whole, values) in enumerate(columns):
            left = number * (width + gap)
            share = np.minimum(np.array(values) / whole, 1.0) * width
            ones = np.ones(len(shown))
            axes.add_patch(boxes(np.stack([left + share, rows + 0.46, width - share, 0.42 * ones], axis=1), CUT_SOFT))
            axes.add_patch(boxes(np.stack([ones * left, rows + 0.46, share, 0.42 * ones], axis=1), KEPT_SOFT))
            write = size if heading == "params" else lambda value: f"{value:,.0f}"
            axes.annotate(heading, (left, 0), (0, 17), textcoords="offset points", fontweight="bold", annotation_clip=False)
            axes.annotate(f"of {write(whole)}", (left, 0), (0, 5), textcoords="offset points", fontsize=SMALL, color=MUTED, annotation_clip=False)
            for row, value in enumerate(values):
                axes.text(left + 0.012, row + 0.68, write(value), va="center", fontsize=SMALL)
        for row, one in enumerate(shown):
            if one.chosen:
                axes.plot(-0.022, row + 0.24, "D", color=KEPT, markersize=5, clip_on=False)
            axes.text(0, row + 0.24, one.name, va="center", fontsize=SMALL, fontweight="bold" if one.chosen else "normal")
            loss = "" if one.loss is None else f"{decimal(one.loss, 3)} {standing.when(results.rungs[one.last])}"
            axes.text(1, row + 0.24, loss, va="center", ha="right", fontsize=SMALL, color=MUTED)
        axes.set(xlim=(0, 1), ylim=(len(shown), -0.15), xticks=[], yticks=[])
        bare(axes)

    rest = f" The best {len(shown)} of {len(found)}; the table has all." if len(found) > len(shown) else ""
    order = "By how far each came, then by its loss there. " if results.rungs else ""
    caption = f"{order}Blue: the share of the original that is kept.{rest}"
    return Picture("What each candidate keeps", caption, draw("candidates", 50 + 31 * len(shown), paint))
