"""The report's pictures: what was cut, what the scores say, how the losses went. Each is inline SVG with a caption.

Blue is what was kept, and the student; vermilion what was cut, and the pruned model before distillation; grey the teacher.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minitron.arch import Arch
from minitron.arch.axes import dim_size, parameters
from minitron.reporting.drawing import LIGHT, bare, boxes, draw, heat_key, heat_map, layer_ticks
from minitron.reporting.results import Evals, gap_on, measured, models_of, text_names
from minitron.reporting.runfiles import Arrays
from minitron.reporting.wording import decimal, percent, ranged, ratio, size, size_of

Floats = npt.NDArray[np.float64]
Units = npt.NDArray[np.int64]

MUTED, KEPT, KEPT_SOFT, CUT, CUT_SOFT = (LIGHT[role] for role in ("muted", "kept", "keptsoft", "cut", "cutsoft"))
FFN_BINS = 64  # columns of the ffn heat map; the neurons of one are averaged
CURVE_POINTS = 800  # points of a drawn curve: more could not be told apart
SMOOTHED = 40  # points from which on a curve is smoothed, see `smooth`
DOTS_SHOWN = 60  # dots of a drawn curve
SMALL = 9.5  # points
NAME_LETTERS = 28  # a longer name of a text is cut short in a picture; the tables have it whole


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
    for row, layer in parameters(arch):
        attention = "self_attention" in row.name or "input_layernorm" in row.name
        part = "attention" if attention else "MLP" if row.per_layer else "embedding and head"
        parts[part] += math.prod(dim_size(dim, arch.layer(layer)) for dim in row.dims)
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
    columns = (
        ("hidden", "hidden", "hidden_size", 1),
        ("heads", "heads.{}", "num_attention_heads", original.kv_channels),
        ("MLP neurons", "ffn.{}", "ffn_hidden_size", 1),
    )
    layers = original.num_layers
    total = sum(getattr(original, field) * width for _, _, field, width in columns)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        left = 0.0
        for name, key, field, width in columns:
            units, before, now = getattr(original, field), size_of(original, field), size_of(pruned, field)
            kept = np.array([len(keep[key.format(layer)]) if layer in keep["layers"] else 0 for layer in range(layers)]) * width
            row, height = np.arange(layers) + 0.14, np.full(layers, 0.72)
            axes.add_patch(boxes(np.stack([np.full(layers, left), row, kept, height], axis=1), KEPT))
            axes.add_patch(boxes(np.stack([left + kept, row, units * width - kept, height], axis=1), CUT_SOFT))
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


def importance_pictures(importance: Arrays, keep: Arrays | None, criterion: str | None = None) -> list[Picture]:
    """One picture per axis that has scores, two of layers that were also left out; `criterion` is what scores were measured by."""
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
    for axis, paint in (("ffn", ffn_map), ("heads", heads_map), ("groups", heads_map)):
        layers = [importance[f"{axis}.{layer}"].astype(float) for layer in range(len(importance)) if f"{axis}.{layer}" in importance]
        pruned = keep is None or any(len(keep[f"{axis}.{layer}"]) < len(layers[layer]) for layer in keep["layers"] if layers)
        if layers and (pruned or axis != "groups"):  # the heads' map tells all there is to tell about whole groups
            pictures.append(paint(axis, np.stack(layers), keep))
    return pictures


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


HEAD_TITLES = {"heads": ("Attention heads", "head"), "groups": ("KV groups", "KV group")}


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


# ---- training and evaluation ----


def series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[Floats, Floats]:
    """Cumulative tokens and the finite values of one metric, where it was logged."""
    found = [(line["tokens"], line[name]) for line in metrics if line.get(name) is not None and line.get("tokens") is not None]
    tokens, values = np.array(found, dtype=float).reshape(-1, 2).T
    return tokens[np.isfinite(values)], values[np.isfinite(values)]


def thin(x: Floats, y: Floats, points: int = CURVE_POINTS) -> tuple[Floats, Floats]:
    """At most `points` points, each the mean of a run of neighbours."""
    parts = np.array_split(np.arange(len(x)), min(points, len(x)) or 1)
    return np.array([x[part].mean() for part in parts if len(part)]), np.array([y[part].mean() for part in parts if len(part)])


def smooth(y: Floats) -> Floats:
    """Centred moving average over a twentieth of the curve, narrower towards the ends."""
    half = len(y) // SMOOTHED
    total = np.concatenate([[0.0], np.cumsum(y)])
    reach = np.minimum(half, np.minimum(np.arange(len(y)), np.arange(len(y))[::-1]))
    at = np.arange(len(y))
    means: Floats = (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
    return means


def tokens_axis(axes: Axes, last: float) -> None:
    """Label the x axis with tokens in the unit that suits their number."""
    scale, unit = next(((scale, unit) for scale, unit in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if last >= scale), (1.0, ""))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:g}")
    axes.set_xlabel(f"{unit}tokens")
    axes.set_xlim(0, last * 1.02 or 1)


# what of the total is drawn beside it where there is more than one part, and how: the parts count in nats, the hidden states' loss does not
NATS_PARTS = {"kd_loss": "-", "ce_loss": (0, (4, 2))}


def train_curve(metrics: Sequence[Mapping[str, Any]], name: str = "loss", told: str = "") -> Picture | None:
    """The loss that training minimises over tokens, its parts where it has several, the learning rate below; None if no loss was logged.

    `name` is what the loss is called at its axis, `told` what the caption says of it.
    """
    tokens, loss = series(metrics, "loss")
    if not len(tokens):
        return None
    distilled, hidden = len(series(metrics, "kd_loss")[0]) > 0, series(metrics, "hidden_loss")
    parts = {part: found for part in NATS_PARTS if len((found := series(metrics, part))[0]) and not np.array_equal(found[1], loss)}
    valid, rate = series(metrics, "valid_loss"), series(metrics, "lr")
    drawn = thin(tokens, loss)
    smoothed = smooth(drawn[1])
    is_smoother = len(smoothed) >= SMOOTHED

    def paint(figure: Figure) -> None:
        top, *middle, bottom = figure.subplots(2 + bool(len(hidden[0])), 1, sharex=True, height_ratios=(4, 1.5, 1) if len(hidden[0]) else (4, 1))
        top.grid(axis="y")
        top.plot(*drawn, color=KEPT_SOFT if is_smoother else KEPT, linewidth=1 if is_smoother else 1.8, label="loss" if parts else "training")
        if is_smoother:
            top.plot(drawn[0], smoothed, color=KEPT, linewidth=1.8, label="smoothed")
        for part, (at, values) in parts.items():
            at, values = thin(at, values)
            top.plot(at, smooth(values), color=MUTED, linewidth=1.3, linestyle=NATS_PARTS[part], label=part)
        if len(valid[0]) and not distilled:  # of a distillation it is another quantity, with a picture of its own
            top.plot(*thin(*valid, DOTS_SHOWN), "o", color=LIGHT["ink"], markersize=3, label="validation")
        top.set_ylabel("loss" if len(hidden[0]) else "loss (nats)" if parts else f"{name} (nats)")
        if len(top.lines) > 1:  # above the axes, where no curve is
            top.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(top.lines), borderaxespad=0, handlelength=1.4, columnspacing=1.1)
        for axes in middle:
            axes.grid(axis="y")
            axes.plot(*thin(*hidden), color=MUTED, linewidth=1.3)
            axes.set_ylabel("hidden")
        bottom.plot(*thin(*rate), color=MUTED, linewidth=1.2)
        bottom.set_ylabel("lr")
        peak = rate[1].max(initial=0.0)
        bottom.set_yticks([0, peak], ["0", f"{peak:.1e}".replace(".0e", "e").replace("e-0", "e−")])
        tokens_axis(bottom, tokens[-1])
        figure.align_ylabels()

    caption = f"From {decimal(loss[0], 3)} to {decimal(float(smoothed[-1]), 3)} over {size(tokens[-1])} tokens and {metrics[-1]['step']:,} steps."
    if skipped := metrics[-1].get("skipped_steps", sum(int(bool(line.get("skipped"))) for line in metrics)):
        caption += f" Skipped steps: {skipped}."
    title, height = "Distillation loss" if distilled else "Training loss", 330 if len(hidden[0]) else 270
    return Picture(title, f"{caption} {told}".strip(), draw("training", height, paint))


def validation_curve(metrics: Sequence[Mapping[str, Any]], evals: Evals) -> Picture | None:
    """The validation loss over tokens, with the levels of the models it started and learned from; None if none was logged."""
    tokens, loss = series(metrics, "valid_loss")
    if not len(tokens):
        return None
    *others, result = models_of(evals)
    losses = {key: evals.get(key, {}).get("loss") for key in others}
    levels = {key: value for key, value in losses.items() if value is not None and math.isfinite(value)}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="y")
        for key, color, above in (("pruned", CUT, 3), ("teacher", MUTED, -12), ("original", MUTED, 3)):
            if key in levels:
                axes.axhline(levels[key], color=color, linewidth=1.2, linestyle=(0, (4, 2)))
                axes.annotate(f"{key} {decimal(levels[key])}", (1, levels[key]), (0, above), xycoords=("axes fraction", "data"),
                              textcoords="offset points", ha="right", color=color)  # fmt: skip
        axes.plot(*thin(tokens, loss, DOTS_SHOWN), "-o", color=KEPT, linewidth=1.8, markersize=3)
        side = -14 if loss[-1] < loss[max(len(loss) - 2, 0)] else 7  # where the curve does not come from
        axes.annotate(f"{result} {decimal(loss[-1])}", (tokens[-1], loss[-1]), (0, side), textcoords="offset points", ha="right", color=KEPT)
        axes.margins(y=0.16)
        axes.set_ylabel("loss (nats per token)")
        tokens_axis(axes, tokens[-1])

    return Picture(
        "Validation loss", f"Next-token loss on held-out text; the lowest was {decimal(float(loss.min()), 3)}.", draw("validation", 270, paint)
    )


# colour, and points that the label lies above
DOTS = {"teacher": (MUTED, 9), "pruned": (CUT, 9), "student": (KEPT, -18), "original": (MUTED, 9), "trained": (KEPT, -18)}


def loss_dots(evals: Evals) -> Picture:
    """Every text's losses on one line each: how far pruning went from the teacher, and how far distillation came back."""
    texts = text_names(evals)
    losses = {text: {key: measured(evals, key, text).get("loss") for key in models_of(evals)} for text in texts}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.grid(axis="x")
        for at, text in enumerate(texts):
            found = {key: value for key, value in losses[text].items() if value is not None and math.isfinite(value)}
            if found:
                axes.plot([min(found.values()), max(found.values())], [at, at], color=LIGHT["rule"], linewidth=3, zorder=1)
            for key, value in found.items():
                color, above = DOTS[key]
                axes.plot(value, at, "o", color=color, markersize=8)
                axes.annotate(decimal(value), (value, at), (0, above), textcoords="offset points", ha="center", color=color)
            gap = gap_on(evals, text)
            name = text if len(text) <= NAME_LETTERS else f"{text[: NAME_LETTERS - 1]}…"
            label = name if gap is None else f"{name} · {percent(gap)} of the gap closed"
            axes.annotate(label, (0, at), (0, 26), xycoords=("axes fraction", "data"), textcoords="offset points", fontweight="bold")
        axes.set(ylim=(len(texts) - 0.5, -0.75), yticks=[], xlabel="loss (nats per token)")
        axes.margins(x=0.08)
        bare(axes)

    names = {MUTED: "Grey", CUT: "Orange", KEPT: "Blue"}
    caption = " ".join(f"{names[DOTS[key][0]]}: {key}." for key in models_of(evals)) + " Further left is better."
    return Picture("Loss on every text", caption, draw("losses", 60 + 75 * len(texts), paint))
