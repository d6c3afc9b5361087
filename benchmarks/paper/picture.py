"""A picture of the effects."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from benchmarks.paper.claims import MARGIN
from benchmarks.paper.verdicts import CONTRADICTED, REPRODUCED, UNRESOLVED
from minitron.reporting.drawing import LIGHT

COLORS = {REPRODUCED: LIGHT["kept"], UNRESOLVED: LIGHT["muted"], CONTRADICTED: LIGHT["cut"]}
TICKS = (-1, -0.1, -0.01, 0, 0.01, 0.1, 1)
STYLE: dict[Any, Any] = {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "minitron", "text.parse_math": False}


def drawn(results: Mapping[str, Any]) -> str:
    """SVG: each comparison in nats with its interval, coloured by its verdict; to the right of 0 is what the papers claim. The axis is linear within
    0.01 and logarithmic outside."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    entries = [row for row in results["rows"] if row["unit"] == "nats" and row["low"] is not None]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 0.8 + 0.24 * len(entries)), layout="constrained")
        figure.patch.set_facecolor("white")
        axes = figure.subplots()
        axes.set_xscale("symlog", linthresh=0.01, linscale=0.6)
        axes.axvspan(-MARGIN, MARGIN, color=LIGHT["grid"], lw=0, zorder=0)
        axes.axvline(0, color=LIGHT["muted"], lw=0.8, zorder=1)
        for at, one in enumerate(entries):
            color = COLORS[one["outcome"]]
            axes.plot([one["low"], one["high"]], [at, at], color=color, lw=2, solid_capstyle="butt")
            axes.plot(one["difference"], at, "o" if one["margin"] is None else "D", color=color, ms=5)
            if at and one["claim"] != entries[at - 1]["claim"]:
                axes.axhline(at - 0.5, color=LIGHT["grid"], lw=0.6, zorder=0)
        axes.set_yticks(range(len(entries)), [one["compared"] for one in entries])
        axes.set_ylim(len(entries) - 0.4, -0.6)
        axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        axes.minorticks_off()
        axes.tick_params(length=0, colors=LIGHT["ink"])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_xlabel("difference of held-out losses in nats (right of 0: as claimed), 95 %")
        handles = [Line2D([], [], color=color, marker="o", label=name) for name, color in COLORS.items()]
        figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"
