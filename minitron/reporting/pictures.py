"""The report's pictures: what was cut, and what the scores say. Each is inline SVG with a caption.

Blue is what was kept, and the student; vermilion what was cut, and the pruned model before distillation; grey the teacher.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from minitron.arch import Arch
from minitron.arch.axes import PARAMETERS
from minitron.reporting.drawing import LIGHT, bare, boxes, draw, heat_key, heat_map, layer_ticks
from minitron.reporting.runfiles import Arrays
from minitron.reporting.wording import decimal, percent, ranged, ratio, size, size_of

Floats = npt.NDArray[np.float64]
Units = npt.NDArray[np.int64]

MUTED, KEPT, KEPT_SOFT, CUT, CUT_SOFT = (LIGHT[role] for role in ("muted", "kept", "keptsoft", "cut", "cutsoft"))
FFN_BINS = 64  # columns of the ffn heat map; the neurons of one are averaged
SMALL = 9.5  # points


@dataclasses.dataclass(frozen=True)
class Picture:
    """`svg` is safe markup; title and caption are plain text, not yet escaped."""

    title: str
    caption: str
    svg: str


# ---- architecture ----


def part_parameters(arch: Arch) -> dict[str, int]:
    """Parameters by part of the model; a block's norms are counted with what they feed."""
    parts = {"embedding and head": 0, "attention": 0, "MLP": 0}
    for row in PARAMETERS:
        attention = "self_attention" in row.name or "input_layernorm" in row.name
        part = "attention" if attention else "MLP" if row.per_layer else "embedding and head"
        parts[part] += sum(row.copies(block) * row.size(block) for _, block in row.blocks(arch))
    return parts


def parameter_bars(original: Arch, pruned: Arch) -> Picture:
    """Where the parameters are and where they went."""
    before, after = part_parameters(original), part_parameters(pruned)
    longest = max(before.values())

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for at, (part, count) in enumerate(before.items()):
            axes.barh(at, count, height=0.42, color=CUT_SOFT)
            axes.barh(at, after[part], height=0.42, color=KEPT)
            axes.text(0, at - 0.31, part, va="bottom", fontweight="bold")
            axes.text(longest, at - 0.31, f"{size(count)} → {size(after[part])}", ha="right", va="bottom", color=MUTED)
        axes.set(xlim=(0, longest), ylim=(len(before) - 0.7, -0.75), xticks=[], yticks=[])
        bare(axes)

    kept = percent(ratio(sum(after.values()), sum(before.values())))
    return Picture("Parameters by part", f"Blue: kept. Faint orange: cut. {kept} of the parameters remain.", draw("parts", 170, paint))


def blueprint(original: Arch, pruned: Arch, keep: Arrays) -> Picture:
    """The whole model to scale: one row per layer, one bar per axis, the kept length solid and the cut length pale."""
    columns = [("hidden", "hidden", "hidden_size", 1), ("heads", "heads.{}", "num_attention_heads", original.kv_channels)]
    if original.has_dense_blocks:
        columns.append(("MLP neurons", "ffn.{}", "ffn_hidden_size", 1))
    if original.num_moe_experts is not None:  # as long as all their neurons together
        columns.append(("experts", "expert_ffn.{}", "num_moe_experts", original.moe_ffn_hidden_size or 0))
    layers = original.num_layers
    total = sum(getattr(original, field) * width for _, _, field, width in columns)
    lacking = {"ffn_hidden_size": [original.routes(layer) for layer in range(layers)]}
    lacking["num_moe_experts"] = [not routes for routes in lacking["ffn_hidden_size"]]

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        left = 0.0
        for name, key, field, width in columns:
            units, before, now = getattr(original, field), size_of(original, field), size_of(pruned, field)
            units_kept = [keep.get(key.format(layer)) if layer in keep["layers"] else None for layer in range(layers)]
            counts = [0 if found is None else found.size for found in units_kept]
            kept = np.array(counts) * (1 if key == "expert_ffn.{}" else width)
            whole = np.where(lacking.get(field, [False] * layers), 0, units * width)
            row, height = np.arange(layers) + 0.14, np.full(layers, 0.72)
            axes.add_patch(boxes(np.stack([np.full(layers, left), row, kept, height], axis=1), KEPT))
            axes.add_patch(boxes(np.stack([left + kept, row, whole - kept, height], axis=1), CUT_SOFT))
            label = f"{before} → {now}" if now != before else f"{before}, all kept"
            axes.annotate(name, (left, 0), (0, 15), textcoords="offset points", fontweight="bold", annotation_clip=False)
            axes.annotate(label, (left, 0), (0, 3), textcoords="offset points", fontsize=SMALL, color=MUTED, annotation_clip=False)
            left += units * width + 0.05 * total
        axes.set(xlim=(0, left - 0.05 * total), xticks=[])
        layer_ticks(axes, layers)
        bare(axes)

    dropped = layers - len(keep["layers"])
    depth = f"{dropped} of {layers} layers dropped" if dropped else f"all {layers} layers kept"
    caption = f"One row per layer, lengths to scale; {depth}. Blue: kept. Faint orange: cut."
    return Picture("Blueprint", caption, draw("blueprint", 530, paint))


# ---- importance ----

HEAD_TITLES = {"heads": ("Attention heads", "head"), "groups": ("KV groups", "KV group"), "experts": ("Experts", "expert")}


def importance_pictures(importance: Arrays, keep: Arrays | None, criterion: str | None = None) -> list[Picture]:
    """A picture per axis that has scores, two of layers that were also left out, one of units by layer; `criterion`: what scores were measured by."""
    pictures = []
    kept = keep or {}
    if "hidden" in importance:
        pictures.append(hidden_curve(importance["hidden"].astype(float), kept.get("hidden")))
    if "layers.bi" in importance:
        pictures.append(layer_bars(importance["layers.bi"].astype(float), kept.get("layers"), criterion))
    skipped = sorted((-len(importance[name]), kind, name) for name in importance for kind in WITHOUT if name.startswith(kind))
    if "layers.bi" in importance and skipped:
        runs = [without_layers(kind, importance[name].astype(float), len(importance["layers.bi"]), kept.get("layers")) for _, kind, name in skipped]
        pictures = [*pictures[-1:], *runs, *pictures[:-1]]  # those of layers side by side
    if by_layer := {axis: found for axis in LAYER_LINES if len(found := layer_means(importance, axis))}:
        pictures.append(score_by_layer(by_layer, kept.get("layers")))
    for axis, paint in (("ffn", ffn_map), ("heads", heads_map), ("groups", heads_map), ("experts", heads_map)):
        # where blocks have an MLP or experts there is a row for each, so neither is drawn of a model that has both
        numbers = [int(name.split(".")[1]) for name in importance if name.startswith(("ffn.", "heads.", "groups.", "experts."))]
        names = [f"{axis}.{layer}" for layer in range(max(numbers, default=-1) + 1)]
        layers = [importance[name].astype(float) for name in names if name in importance]
        if len(layers) < len(names) and axis in ("ffn", "experts"):
            continue
        pruned = keep is None or any(len(keep[f"{axis}.{layer}"]) < len(layers[layer]) for layer in keep["layers"] if layers)
        if layers and (pruned or axis != "groups"):  # the heads' map tells all there is to tell about whole groups
            pictures.append(paint(axis, np.stack(layers), keep))
    return pictures


def layer_means(importance: Arrays, axis: str) -> Floats:
    """The mean score of an axis' units in every layer [layers]; empty where it has none."""
    layers = itertools.takewhile(lambda name: name in importance, (f"{axis}.{layer}" for layer in itertools.count()))
    return np.array([importance[name].astype(float).mean() for name in layers])


# how an axis' line is drawn: its name, colour, dashes and mark; the scores of KV groups are sums of their heads'
LAYER_LINES = {
    "ffn": ("MLP neurons", KEPT, "-", "o"),
    "heads": ("attention heads", LIGHT["ink"], (0, (4, 2)), "s"),
}


def score_by_layer(means: Mapping[str, Floats], kept: Units | None) -> Picture:
    """The mean score of every axis in every layer, against its mean over the layers: how much the layers differ, which no other picture tells."""
    layers = max(map(len, means.values()))
    dropped = np.setdiff1d(np.arange(layers), kept) if kept is not None else np.array([], dtype=int)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        for layer in dropped:
            axes.axvspan(layer - 0.5, layer + 0.5, facecolor=CUT_SOFT, edgecolor=CUT, hatch="////", linewidth=0)
        for axis, found in means.items():
            name, color, dashes, marker = LAYER_LINES[axis]
            shares = np.where(found > 0, found, np.nan) / (found.mean() or 1.0)
            axes.plot(np.arange(len(found)), shares, color=color, linestyle=dashes, marker=marker, markersize=3.5, linewidth=1.3, label=name)
        axes.set(xlim=(-0.6, layers - 0.4), yscale="log", xlabel="layer", ylabel="× mean of the layers (log)")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        low, high = axes.get_ylim()
        ticks = [tick for tick in 2.0 ** np.arange(-12, 13) if low <= tick <= high]
        axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(means), borderaxespad=0, handlelength=2.2, columnspacing=1.1)

    hatched = f" Hatched, dropped: {', '.join(map(str, dropped))}." if len(dropped) else ""
    caption = f"Mean score of a layer's units, relative to the mean of all layers; an axis' units are ranked within each layer.{hatched}"
    return Picture("Scores by layer", caption, draw("by-layer", 240, paint))


def hidden_curve(scores: Floats, kept: Units | None) -> Picture:
    """Scores of the residual stream's channels from the highest to the lowest, with the line where they were cut."""
    ordered = np.sort(scores)[::-1]
    rank, cut = np.arange(1, len(ordered) + 1), len(ordered) if kept is None else len(kept)
    log = bool(ordered[-1] > 0 and ordered[0] > 20 * ordered[-1])
    low = ordered[-1] * 0.8 if log else 0.0

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for part, line, fill in ((slice(0, cut), KEPT, KEPT_SOFT), (slice(max(cut - 1, 0), None), CUT, CUT_SOFT)):
            axes.fill_between(rank[part], ordered[part], low, color=fill, linewidth=0)
            axes.plot(rank[part], ordered[part], color=line, linewidth=1.6)
        if cut < len(ordered):
            axes.axvline(cut + 0.5, color=CUT, linewidth=1, linestyle=(0, (3, 2)))
            for text, color, offset, side in ((f"{cut:,} kept", KEPT, -5, "right"), (f"{len(ordered) - cut:,} cut", CUT, 5, "left")):
                axes.annotate(
                    text, (cut + 0.5, 1), (offset, -10), xycoords=("data", "axes fraction"), textcoords="offset points", ha=side, color=color
                )
        axes.set(
            xlim=(0.5, len(ordered) + 0.5), yscale="log" if log else "linear", xlabel="channel, by rank", ylabel="score (log)" if log else "score"
        )
        axes.set_ylim(bottom=low)
        if log:
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if ordered[0] > 1000 * ordered[-1] else (1.0, 2.0, 5.0)))
            axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    share = "" if kept is None else " All were kept."
    if kept is not None and cut < len(scores):
        share = f" The kept channels hold {percent(ratio(float(scores[kept].sum()), float(scores.sum())))} of the total score."
    return Picture("Hidden channels", f"Every channel of the residual stream, highest score first.{share}", draw("hidden", 220, paint))


LAYER_SCORES = {"activation": ("Block Importance", "How much each block turns the residual stream: 1 − cosine of its input and output.")}


def layer_bars(scores: Floats, kept: Units | None, criterion: str | None) -> Picture:
    """Score of every layer, the dropped ones marked."""
    at = np.arange(len(scores))
    dropped = np.zeros(len(scores), dtype=bool) if kept is None else ~np.isin(at, kept)
    label, meaning = LAYER_SCORES.get(criterion or "", ("score", "Score of each block."))

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.bar(at[~dropped], scores[~dropped], width=0.72, color=KEPT)
        axes.bar(at[dropped], scores[dropped], width=0.72, color=CUT_SOFT, edgecolor=CUT, hatch="////", linewidth=0.8)
        axes.set(xlim=(-0.6, len(scores) - 0.4), xlabel="layer", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    which = ", ".join(map(str, at[dropped]))
    outcome = f" Hatched, dropped: {which}." if dropped.any() else " No layer was dropped." if kept is not None else ""
    return Picture("Layers", meaning + outcome, draw("layers", 220, paint))


# what was measured without runs of layers: of its picture the title, the caption, the axis, the run that matters least
WITHOUT: dict[str, tuple[str, str, str, str, Callable[[Floats], Any]]] = {
    "layers.loss": ("Loss without", "Next-token loss without", "the lowest", "loss (nats per token)", np.nanargmin),
    "layers.choices": ("Answers without", "Share of questions answered rightly without", "the highest", "right answers", np.nanargmax),
}


def without_layers(kind: str, values: Floats, layers: int, kept: Units | None) -> Picture:
    """What was measured [runs] without every run of neighbouring layers, by the run's first layer; those that were dropped are crosses."""
    title, meaning, best, axis, least_missed = WITHOUT[kind]
    first, length = np.arange(len(values)), layers - len(values) + 1
    stays = np.ones(layers, dtype=bool) if kept is None else np.isin(np.arange(layers), kept)
    dropped = np.array([not stays[at : at + length].any() for at in first], dtype=bool)
    known = np.isfinite(values)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        axes.plot(first[known], values[known], color=KEPT_SOFT, linewidth=1.2)
        axes.plot(first[known & ~dropped], values[known & ~dropped], "o", color=KEPT, markersize=4.5)
        axes.plot(first[known & dropped], values[known & dropped], "x", color=CUT, markersize=6, markeredgewidth=1.8)
        label = "layer left out" if length == 1 else f"first of the {length} layers left out"
        axes.set(xlim=(-0.6, layers - 0.4), xlabel=label, ylabel=axis)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    what = "a layer" if length == 1 else f"{length} layers in a row"
    told = f"{meaning} {what}"
    if known.any():
        at = int(least_missed(np.where(known, values, np.nan)))
        told += f"; {best}, {decimal(float(values[at]), 3)}, without {f'layer {at}' if length == 1 else f'layers {at} to {at + length - 1}'}"
    cross = " Cross: dropped." if dropped.any() else ""
    return Picture(f"{title} {what}", f"{told}.{cross}", draw(f"without-{kind.split('.')[1]}-{length}", 220, paint))


def relative(scores: Floats) -> tuple[Floats, float, float]:
    """Scores [layers, units] as log2 of their ratio to their layer's mean, and the range that a heat map shows."""
    with np.errstate(divide="ignore", invalid="ignore"):
        values = np.log2(scores / scores.mean(axis=1, keepdims=True))
    finite = values[np.isfinite(values)]
    low, high = np.percentile(finite, (2, 98)) if len(finite) else (0.0, 1.0)
    return values, float(low), float(high)


def ffn_map(axis: str, scores: Floats, keep: Arrays | None) -> Picture:
    """MLP neurons of every layer, sorted by score, with the line where each layer was cut."""
    layers, neurons = scores.shape
    ordered = -np.sort(-scores, axis=1)
    edges = np.linspace(0, neurons, min(FFN_BINS, neurons) + 1).astype(int)
    binned = np.stack([ordered[:, start:end].mean(axis=1) for start, end in itertools.pairwise(edges)], axis=1)
    values, low, high = relative(binned)
    counts = {layer: len(keep[f"{axis}.{layer}"]) for layer in keep["layers"]} if keep else {}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        heat_map(axes, values, low, high)
        mark_dropped(axes, layers, binned.shape[1], keep)
        for layer, count in counts.items():
            if count < neurons:
                for color, width in ((LIGHT["panel"], 4), (CUT, 2)):
                    axes.vlines(count / neurons * binned.shape[1], layer, layer + 1, color=color, linewidth=width)
        shares = np.linspace(0, 1, 5)
        axes.set_xticks(shares * binned.shape[1], [f"{round(share * neurons):,}" for share in shares])
        axes.set_xlabel("neuron, by rank within its layer")
        heat_key(axes, f"{2**low:.2g}×", f"{2**high:.2g}× mean")

    where = sorted(set(counts.values()))
    line = f" Line: the cut after {ranged(where[0], where[-1])}." if where and where[0] < neurons else ""
    return Picture("MLP neurons", f"Score relative to the layer's mean, highest first.{line}", draw(axis, 300, paint))


def heads_map(axis: str, scores: Floats, keep: Arrays | None) -> Picture:
    """Heads (or KV groups) of every layer, each kept one with a dot, each cut one with a cross."""
    layers, units = scores.shape
    values, low, high = relative(scores)
    title, unit = HEAD_TITLES[axis]
    kept = {layer: set(keep[f"{axis}.{layer}"].tolist()) for layer in keep["layers"].tolist()} if keep else {}
    cut = np.array([(layer, at) for layer, units_kept in kept.items() for at in range(units) if at not in units_kept]).reshape(-1, 2)
    dots = np.array([(layer, at) for layer, units_kept in kept.items() for at in sorted(units_kept)]).reshape(-1, 2)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        heat_map(axes, values, low, high)
        mark_dropped(axes, layers, units, keep)
        if len(cut):
            small = np.clip(180 / max(layers, units), 1.5, 6)
            axes.plot(
                dots[:, 1] + 0.5,
                dots[:, 0] + 0.5,
                "o",
                color=LIGHT["panel"],
                markeredgecolor=LIGHT["ink"],
                markeredgewidth=0.6,
                markersize=small * 0.7,
            )
            for color, width in ((LIGHT["panel"], 3.4), (CUT, 1.6)):  # a light rim keeps the cross apart from every cell
                axes.plot(cut[:, 1] + 0.5, cut[:, 0] + 0.5, "x", color=color, markeredgewidth=width, markersize=small)
        at = np.arange(0, units, max(1, math.ceil(units / 16)))
        axes.set_xticks(at + 0.5, [str(number) for number in at])
        axes.set_xlabel(unit)
        heat_key(axes, f"{2**low:.2g}×", f"{2**high:.2g}× mean")

    marks = " Dot: kept. Cross: cut." if len(cut) else f" Every {unit} of the kept layers was kept." if keep else ""
    return Picture(title, f"Score relative to the layer's mean.{marks}", draw(axis, 300, paint))


def mark_dropped(axes: Axes, layers: int, columns: int, keep: Arrays | None) -> None:
    """Cover the rows of a heat map whose layers were dropped."""
    if keep:
        rows = np.setdiff1d(np.arange(layers), keep["layers"])
        covers = np.stack([np.zeros_like(rows), rows, np.full_like(rows, columns), np.ones_like(rows)], axis=1)
        axes.add_patch(boxes(covers, CUT_SOFT, edgecolor=CUT, hatch="////"))
