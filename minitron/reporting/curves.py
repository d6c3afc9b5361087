"""The report's pictures of a training and of an evaluation: how the losses went, where they ended. Colours as in pictures.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from minitron.reporting.drawing import LIGHT, bare, count_axis, draw
from minitron.reporting.pictures import CUT, KEPT, KEPT_SOFT, MUTED, Floats, Picture
from minitron.reporting.results import Evals, gap_on, measured, models_of, text_names
from minitron.reporting.wording import decimal, percent, size

CURVE_POINTS = 800  # points of a drawn curve: more could not be told apart
SMOOTHED = 40  # points from which on a curve is smoothed, see `smooth`
DOTS_SHOWN = 60  # dots of a drawn curve
NAME_LETTERS = 28  # a longer name of a text is cut short in a picture; the tables have it whole


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
        bottom.set_xlim(0, tokens[-1] * 1.02 or 1)
        count_axis(bottom, "tokens", tokens[-1])
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
        axes.set_xlim(0, tokens[-1] * 1.02 or 1)
        count_axis(axes, "tokens", tokens[-1])

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
