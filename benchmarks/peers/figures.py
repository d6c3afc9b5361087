"""What is made of the figures: intervals, differences, the table of docs/results.md. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.views import cell, markdown
from minitron.arch.arch import Arch
from minitron.pruning.keep import Keep

OURS = "ours"


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and half of its 95 % interval by Student's t (None of one value)."""
    from scipy.stats import t

    count = len(values)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    return statistics.fmean(values), half


def shown(values: Sequence[float]) -> str:
    """Mean and interval in a cell."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def after(arm: Mapping[str, Any], text: str) -> dict[str, float]:
    """Losses of the distilled model by seed."""
    return {seed: losses[text] for seed, losses in arm["distilled"].items()}


def above(arm: Mapping[str, Any], ours: Mapping[str, Any], text: str) -> list[float]:
    """How far an arm's losses are above ours, seed by seed: both read the same tokens in the same order."""
    mine, theirs = after(ours, text), after(arm, text)
    return [theirs[seed] - mine[seed] for seed in sorted(mine.keys() & theirs.keys())]


def table(found: Mapping[str, Any]) -> str:
    """The ways, best first after distillation; those that were not distilled come last, by their loss as cut."""
    texts, source, ours = found["texts"], found["source"], found["arms"].get(OURS)
    first = next(iter(texts))

    def order(arm: Mapping[str, Any]) -> tuple[bool, float]:
        losses = after(arm, first).values()
        return not losses, statistics.fmean(losses) if losses else arm["as_cut"][first]

    lines = [["nothing cut", source["shape"], millions(source), *(f"{source[text]:.3f}" for text in texts), *[""] * (2 * len(texts) + 1)]]
    for arm in sorted(found["arms"].values(), key=order):
        differences = {text: above(arm, ours, text) if ours and arm is not ours else [] for text in texts}
        name = f"**{arm['title']}**" if arm is ours else arm["title"]
        cells = [name, arm["shape"], millions(arm), *(f"{arm['as_cut'][text]:.3f}" for text in texts)]
        cells += [*(shown([*after(arm, text).values()]) for text in texts), *map(shown, differences.values()), str(len(arm["distilled"]) or "")]
        lines.append(cells)
    stages = [f"{stage}, {name}" for stage in ("as cut", "distilled", "above ours") for name in texts.values()]
    return markdown(["way", "layers, width, MLP, heads", "parameters", *stages, "seeds"], lines)


def millions(entry: Mapping[str, Any]) -> str:
    """Parameters."""
    return f"{entry['params'] / 1e6:.1f} M"


def shape_of(arch: Arch) -> str:
    """The sizes in a cell."""
    return f"{arch.num_layers}, {arch.hidden_size}, {arch.ffn_hidden_size}, {arch.num_attention_heads}"


def common(one: Keep, other: Keep) -> dict[str, list[int]]:
    """By axis: how many units both keep, of how many; then the same of the layer that agrees least. Of layers that only one keeps nothing counts."""
    both = sorted({*map(int, one.layers)} & {*map(int, other.layers)})
    sets = {"layers": [(one.layers, other.layers)], "hidden": [(one.hidden, other.hidden)]}
    sets |= {axis: [(getattr(one, axis)[layer], getattr(other, axis)[layer]) for layer in both] for axis in ("ffn", "heads", "groups")}
    found = {}
    for axis, pairs in sets.items():
        shared = [len(np.intersect1d(*pair)) for pair in pairs]
        sizes = [len(pair[0]) for pair in pairs]
        least = min(range(len(pairs)), key=lambda number: shared[number] / sizes[number])
        found[axis] = [sum(shared), sum(sizes), shared[least], sizes[least]]
    return found


def overlap_table(found: Mapping[str, Any]) -> str:
    """Kept sets of modelopt's formula beside ours."""
    lines = [
        [axis, f"{shared:,}", f"{size:,}", cell(shared / size, ".1%"), f"{least:,} of {of:,}"]
        for axis, (shared, size, least, of) in found["overlap"]["axes"].items()
    ]
    return markdown(["axis", "kept by both", "of", "share", "in the layer that agrees least"], lines)
