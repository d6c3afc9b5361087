"""The one visual style: colours by role for a light and a dark page, and matplotlib figures that become inline SVG in them.

A picture is drawn in the light colours; in its SVG each of them is then a CSS variable, so the page's scheme decides.
The hues (blue, vermilion, grey) stay apart for every kind of colour vision.
"""

import io
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.transforms import Bbox

Boxes = npt.NDArray[Any]  # [n, 4]: left, bottom, width, height
Points = Sequence[tuple[float, float]]

# role -> (light, dark)
COLORS = {
    "paper": ("#f7f6f3", "#121417"),
    "panel": ("#fffefd", "#1a1d21"),
    "ink": ("#1c2127", "#e6e8eb"),
    "muted": ("#5c646d", "#98a1ab"),
    "rule": ("#dedbd5", "#32373e"),
    "grid": ("#ebe9e4", "#282c32"),
    "kept": ("#1467a0", "#62b2e8"),
    "keptsoft": ("#b9d5e8", "#2a4f6b"),
    "cut": ("#cb4f0c", "#f28c52"),
    "cutsoft": ("#f6dcca", "#4d2f1f"),
}
HEAT_LEVELS = 9
_HEAT_ANCHORS = (("#edf3f7", "#6ba6cf", "#08304f"), ("#1f2a33", "#3579a8", "#d8effc"))  # low, middle, high


def _heat(anchors: tuple[str, ...]) -> list[str]:
    """`HEAT_LEVELS` colours from low to high, in equal steps between the anchors."""
    rgb = np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in anchors])
    at = np.linspace(0, len(anchors) - 1, HEAT_LEVELS)
    mixed = np.stack([np.interp(at, range(len(anchors)), channel) for channel in rgb.T], axis=1)
    return ["#" + "".join(f"{round(value):02x}" for value in color) for color in mixed]


COLORS |= {f"heat{level}": pair for level, pair in enumerate(zip(*map(_heat, _HEAT_ANCHORS), strict=True))}
LIGHT = {role: light for role, (light, _) in COLORS.items()}
DARK = {role: dark for role, (_, dark) in COLORS.items()}
_ROLES = {light: role for role, light in LIGHT.items()}

WIDTH = 400  # points; a phone shows a picture at about this size, so the text is readable there
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.facecolor": "none",
    "axes.labelsize": 10,
    "axes.labelcolor": LIGHT["muted"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": LIGHT["rule"],
    "ytick.color": LIGHT["rule"],
    "xtick.labelcolor": LIGHT["muted"],
    "ytick.labelcolor": LIGHT["muted"],
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,  # names come from files: a dollar sign is a dollar sign
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "minitron",
    "hatch.linewidth": 0.8,
}


def draw(name: str, height: float, painter: Callable[[Figure], None]) -> str:
    """Paint a figure of `WIDTH` x `height` points and return it as SVG markup; `name` keeps its ids apart on a page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        figure.patch.set_alpha(0)
        painter(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), name)


def _inline(svg: str, name: str) -> str:
    """The `<svg>` element alone: ids made unique to `name`, colours by role, the page's font, no fixed size."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path.group()).replace("\n", ""), svg)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'\b(fill|stroke)="(#[0-9a-f]{6})"', r'style="\1: \2"', svg)  # a hatch's background
    svg = re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})", lambda found: _colored(*found.groups()), svg)
    svg = re.sub(r'font-family: [^;"]*;|transform="rotate\(-0 [^"]*"', "", svg)
    svg = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'<svg ([^>]*?)height="[^"]*"', r'<svg \1aria-hidden="true"', svg, count=1)
    svg = re.sub(rf'<g id="{name}-{_HINT}([^"]*)">', r"<g><title>\1</title>", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _colored(attribute: str, color: str) -> str:
    """A style declaration whose colour follows the page where it is one of the palette."""
    return f"{attribute}: var(--{_ROLES[color]})" if color in _ROLES else f"{attribute}: {color}"


def bare(axes: Axes) -> None:
    """Leave nothing of the frame: for drawings whose marks speak for themselves."""
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def boxes(boxes: Boxes, color: str, **style: Any) -> PathPatch:
    """Many rectangles as one shape: small in the file, and without seams between neighbours."""
    left, bottom, width, height = np.asarray(boxes, dtype=float).reshape(-1, 4).T
    right, top = left + width, bottom + height
    corners = np.stack([left, bottom, right, bottom, right, top, left, top, left, bottom], axis=1)
    codes = np.tile([Outline.MOVETO, *[Outline.LINETO] * 3, Outline.CLOSEPOLY], len(left))
    return PathPatch(Outline(corners.reshape(-1, 2), codes), **{"facecolor": color, "linewidth": 0, **style})


def layer_ticks(axes: Axes, num_layers: int) -> None:
    """Layers downwards, the first on top, with a few round labels at the left."""
    axes.set_ylim(num_layers, 0)
    at = np.arange(0, num_layers, max(1, round(num_layers / 30) * 5 if num_layers > 6 else 1))
    axes.set_yticks(at + 0.5, [str(layer) for layer in at])
    axes.set_ylabel("layer")


def heat_map(axes: Axes, values: npt.NDArray[np.float64], low: float, high: float) -> None:
    """Fill `axes` with one cell per value [layers, columns], the first layer on top, in steps from pale (low) to deep (high)."""
    step = np.clip((values - low) / ((high - low) or 1.0) * HEAT_LEVELS, 0, HEAT_LEVELS - 1)
    step = np.nan_to_num(step).astype(int)
    for level in range(HEAT_LEVELS):
        layers, columns = np.nonzero(step == level)
        ones = np.ones_like(layers)
        axes.add_patch(boxes(np.stack([columns, layers, ones, ones], axis=1), LIGHT[f"heat{level}"]))
    axes.set_xlim(0, values.shape[1])
    layer_ticks(axes, values.shape[0])
    bare(axes)


def heat_key(axes: Axes, low: str, high: str) -> None:
    """The scale of a heat map, a small bar above its right end."""
    key = axes.inset_axes((0.5, 1.025, 0.5, 0.035))
    for level in range(HEAT_LEVELS):
        key.add_patch(boxes(np.array([[level, 0, 1, 1]]), LIGHT[f"heat{level}"]))
    key.set_xlim(-6, HEAT_LEVELS + 6)
    key.set_xticks([])
    key.set_yticks([])
    key.patch.set_alpha(0)
    bare(key)
    key.text(-0.4, 0.45, low, ha="right", va="center", fontsize=9.5, color=LIGHT["muted"])
    key.text(HEAT_LEVELS + 0.4, 0.45, high, ha="left", va="center", fontsize=9.5, color=LIGHT["muted"])


_COUNTS = ((1e9, "billion "), (1e6, "million "), (1e3, "thousand "))


def count_axis(axes: Axes, what: str, largest: float, digits: int = 6) -> None:
    """Label the x axis with a count in the unit that suits its largest value, "million tokens", to so many significant digits."""
    scale, unit = next(((scale, unit) for scale, unit in _COUNTS if largest >= scale), (1.0, ""))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / scale:.{digits}g}")
    axes.set_xlabel(f"{unit}{what}")


_HINT = "hint:"


def hint(artist: Artist, text: str) -> None:
    """What a reader sees while pointing at a mark."""
    artist.set_gid(_HINT + text)


# where a name may stand beside its point: points to the right and up, and which of its sides is there
_SIDES = (
    (7, 0, "left", "center"), (-7, 0, "right", "center"), (0, 7, "center", "bottom"), (0, -7, "center", "top"),
    (10, 8, "right", "bottom"), (10, -8, "right", "top"), (-10, 8, "left", "bottom"), (-10, -8, "left", "top"),
    (6, 6, "left", "bottom"), (-6, 6, "right", "bottom"), (6, -6, "left", "top"), (-6, -6, "right", "top"),
)  # fmt: skip


def name_points(axes: Axes, names: Sequence[tuple[str, float, float]], taken: list[Bbox], **style: Any) -> None:
    """Write names beside their points, in front of nothing in `taken`, which each of them then is; one that finds no room is left out."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    page = figure.bbox.padded(-2)
    for name, x, y in names:
        for right, up, ha, va in _SIDES:
            written = axes.annotate(name, (x, y), (right, up), textcoords="offset points", ha=ha, va=va, in_layout=False, **style)
            box = written.get_window_extent()
            inside = axes.bbox.x0 < box.x0 and box.x1 < page.x1 and axes.bbox.y0 < box.y0 and box.y1 < axes.bbox.y1 + 5
            if inside and not box.count_overlaps(taken):
                taken.append(box)
                break
            written.remove()


def spots(axes: Axes, points: Points, lines: Sequence[Points] = ()) -> list[Bbox]:
    """The room that marks at points and lines through points take, once the figure is laid out, which this does."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in axes.transData.transform(points)]
    for line in lines:
        for start, end in itertools.pairwise(axes.transData.transform(line) if len(line) else ()):
            for x, y in np.linspace(start, end, 2 + int(np.nan_to_num(np.abs(end - start).sum())) // 6):
                taken.append(Bbox.from_bounds(x - 2, y - 2, 4, 4))
    return taken
