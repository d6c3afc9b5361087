"""What a measurement of generation says (speed.json): as rows, in words, on the console, as pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.reporting.console import fitting
from minitron.reporting.drawing import LIGHT, bare, draw
from minitron.reporting.pictures import KEPT, KEPT_SOFT, MUTED, Picture
from minitron.reporting.wording import ABSENT, counted, decimal

Found = Mapping[str, Any]
FASTER = "×"


class Spread(NamedTuple):
    """A median over turns, and the least and the greatest of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value at least."""
        return cls(median(values), min(values), max(values))

    def shown(self, write: Callable[[float], str], spread: bool) -> str:
        """ "31.2 (30.9..31.5)", or the median alone."""
        return write(self.median) + (f" ({write(self.least)}..{write(self.most)})" if spread else "")


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """One model under one load. `first` in seconds; `prefill` and `decode` in tokens per second over all sequences; `prefill_ratio` and
    `decode_ratio` against the first model in the same turns, which itself has none; bytes of memory, None where they can't be told."""

    engine: str
    load: str
    model: str
    first: Spread
    prefill: Spread
    decode: Spread
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    weights: int | None
    peak: int | None

    @property
    def faster(self) -> tuple[str, str]:
        """How many times as fast as the first model, prefill and decode; empty of the first."""
        ratios = [ratio and f"{FASTER}{ratio.median:.2f}" for ratio in (self.prefill_ratio, self.decode_ratio)]
        return ratios[0] or "", ratios[1] or ""


def load_name(load: Found) -> str:
    """1 sequence of 128 tokens, continued by 32: "1 x 128 + 32"."""
    return f"{load['batch_size']:,} x {load['prompt_length']:,} + {load['new_tokens']:,}"


def speeds(load: Found) -> tuple[list[float], list[float]]:
    """Tokens per second of every turn: of the prompts, and of those written after the first."""
    read, written = load["batch_size"] * load["prompt_length"], load["batch_size"] * (load["new_tokens"] - 1)
    return [read / seconds for seconds in load["first_seconds"]], [written / seconds for seconds in load["other_seconds"]]


def against(mine: Sequence[float], theirs: Sequence[float]) -> Spread:
    """How many times as fast, turn by turn."""
    return Spread.of([one / other for one, other in zip(mine, theirs, strict=True)])


def speed_rows(found: Found) -> list[SpeedRow]:
    """Every model under every load, load by load."""
    rows = []
    for engine, sides in found["engines"].items():
        for loads in zip(*(side["loads"] for side in sides.values()), strict=True):
            base_reads, base_writes = speeds(loads[0])
            for at, (name, load) in enumerate(zip(sides, loads, strict=True)):
                reads, writes = speeds(load)
                row = SpeedRow(
                    engine=engine,
                    load=load_name(load),
                    model=name,
                    first=Spread.of(load["first_seconds"]),
                    prefill=Spread.of(reads),
                    decode=Spread.of(writes),
                    prefill_ratio=against(reads, base_reads) if at else None,
                    decode_ratio=against(writes, base_writes) if at else None,
                    weights=sides[name]["weights_bytes"],
                    peak=load["peak_bytes"],
                )
                rows.append(row)
    return rows


def told(found: Found) -> str:
    """How it was measured, in words."""
    threads = f", {counted(found['threads'], 'thread')}" if found["threads"] else ""
    software = ", ".join(f"{name} {version}" for name, version in found["software"].items())
    turns = counted(found["repeats"], "turn")
    return (
        f"{found['dtype']} on {found['device']}{threads}; {software}. Medians of {turns} of each model in "
        "processes of their own, with the least and the greatest; greedy, with a key/value cache. B x P + N: B sequences of P tokens, continued by N"
    )


def memory_told(found: Found) -> str:
    """What the figures of memory are of, in words; empty where there are none."""
    rows = speed_rows(found)
    if all(row.peak is None for row in rows):
        return ""
    before = [side["before_bytes"] for sides in found["engines"].values() for side in sides.values() if side["before_bytes"] is not None]
    if not before:
        return "Memory: what torch allocated on the GPU at most"
    return f"Memory: what was resident of the process at most, of which {amount(max(before))} without any model"


def amount(count: float | None) -> str:
    """Bytes: "269 MB", "1.54 GB"."""
    if count is None:
        return ABSENT
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.0f} MB"


def milliseconds(seconds: float) -> str:
    """With three digits at least."""
    return f"{1e3 * seconds:,.{0 if seconds >= 0.1 else 1}f}"


def per_second(speed: float) -> str:
    """Tokens per second, with three digits at least."""
    return decimal(speed, 0 if speed >= 100 else 1)


# a column's heading -> what a row has there, with the least and the greatest or without them
COLUMNS: dict[str, Callable[[SpeedRow, bool], str]] = {
    "engine": lambda row, spread: row.engine,
    "load": lambda row, spread: row.load,
    "model": lambda row, spread: row.model,
    "first token, ms": lambda row, spread: row.first.shown(milliseconds, spread),
    "prefill tokens/s": lambda row, spread: row.prefill.shown(per_second, spread),
    "prefill ×": lambda row, spread: row.faster[0],
    "decode tokens/s": lambda row, spread: row.decode.shown(per_second, spread),
    "decode ×": lambda row, spread: row.faster[1],
    "weights": lambda row, spread: amount(row.weights),
    "memory": lambda row, spread: amount(row.peak),
}


def speed_table(found: Found, left_out: Sequence[str] = (), spread: bool = True) -> tuple[list[str], int, list[list[str]]]:
    """Headings, how many of them are of texts, and cells, without the columns `left_out`; a load is named where it changes."""
    rows = speed_rows(found)
    needless = [*left_out, *(["engine"] if len(found["engines"]) == 1 else [])]
    columns = {name: write for name, write in COLUMNS.items() if name not in needless}
    texts = [*columns].index("model") + 1
    lines, before = [], [""] * texts
    for row in rows:
        cells = [write(row, spread) for write in columns.values()]
        repeated = cells[: texts - 1] == before[: texts - 1]
        lines.append([""] * (texts - 1) + cells[texts - 1 :] if repeated else cells)
        before = cells
    return [*columns], texts, lines


def show_speed(found: Found, *, console: Console | None = None) -> None:
    """Print how fast each model generates under each load; a narrow console goes without the spreads, then without what matters least."""
    console = console or Console()
    order = ("weights", "prefill tokens/s", "prefill ×", "first token, ms", "memory")
    fewer = [(True, ()), *((False, order[:count]) for count in range(len(order) + 1))]
    console.print()
    console.print(fitting((_printed(*speed_table(found, left_out, spread)) for spread, left_out in fewer), console))
    for text in filter(None, (told(found), memory_told(found))):
        console.print(Text(f" {text}", style="dim"))


def _printed(head: list[str], texts: int, lines: list[list[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for at, name in enumerate(head):
        table.add_column(name if at < texts else name.replace(" ", "\n"), justify="left" if at < texts else "right", no_wrap=True)
    for cells in lines:
        table.add_row(*map(Text, cells))
    return table


# ---- pictures ----


def speed_pictures(found: Found) -> list[Picture]:
    """Of every engine the speeds and, where it is known, the memory."""
    pictures = []
    for engine in found["engines"]:
        rows = [row for row in speed_rows(found) if row.engine == engine]
        pictures.append(speed_bars(engine, rows))
        if all(row.peak is not None and row.weights is not None for row in rows):
            pictures.append(memory_bars(engine, rows))
    return pictures


def colors(rows: Sequence[SpeedRow]) -> dict[str, str]:
    """The first model is grey, the last one blue."""
    names = list(dict.fromkeys(row.model for row in rows))
    return {name: KEPT if name == names[-1] else MUTED for name in names}


def places(axes: Axes, rows: Sequence[SpeedRow]) -> list[float]:
    """Where each row's bar is, the loads one below another, which are named."""
    at, before, found = 0.0, "", []
    for row in rows:
        at += 0.0 if row.load == before else 0.75
        if row.load != before:
            axes.annotate(row.load, (0, at - 0.45), (0, 2), textcoords="offset points", va="bottom", color=MUTED)
        found.append(at)
        at, before = at + 0.9, row.load
    axes.set(ylim=(at - 0.3, -0.35), yticks=[], xticks=[])
    bare(axes)
    return found


def speed_bars(engine: str, rows: Sequence[SpeedRow]) -> Picture:
    """Tokens per second of prompts and of what is written, with the least and the greatest."""
    panels: dict[str, Callable[[SpeedRow], Spread]] = {"prefill, tokens/s": lambda row: row.prefill, "decode, tokens/s": lambda row: row.decode}
    color = colors(rows)

    def paint(figure: Figure) -> None:
        for axes, (title, value) in zip(figure.subplots(len(panels), 1), panels.items(), strict=True):
            axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
            for at, row in zip(places(axes, rows), rows, strict=True):
                found = value(row)
                axes.barh(at, found.median, height=0.72, color=color[row.model])
                axes.plot([found.least, found.most], [at, at], color=LIGHT["ink"], linewidth=1.2)
                axes.annotate(per_second(found.median), (max(found.most, found.median), at), (5, 0), textcoords="offset points", va="center")
            axes.set_xlim(0, 1.16 * max(value(row).most for row in rows))

    names = " ".join(f"{'Blue' if shade == KEPT else 'Grey'}: {name}." for name, shade in color.items())
    caption = f"{names} Line: from the slowest turn to the fastest. B x P + N: B sequences of P tokens, continued by N."
    return Picture(f"Speed, {engine}", caption, draw(f"speed-{engine}", 70 + 34 * len(rows) + 20 * loads_in(rows), paint))


def memory_bars(engine: str, rows: Sequence[SpeedRow]) -> Picture:
    """The most memory while writing, and the weights' part of it."""
    soft = {KEPT: KEPT_SOFT, MUTED: LIGHT["rule"]}
    color = colors(rows)

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for at, row in zip(places(axes, rows), rows, strict=True):
            assert row.peak is not None and row.weights is not None
            axes.barh(at, row.peak, height=0.72, color=soft[color[row.model]])
            axes.barh(at, min(row.weights, row.peak), height=0.72, color=color[row.model])
            axes.annotate(amount(row.peak), (row.peak, at), (5, 0), textcoords="offset points", va="center")
        axes.set_xlim(0, 1.2 * max(row.peak or 0 for row in rows))

    names = " ".join(f"{'Blue' if shade == KEPT else 'Grey'}: {name}." for name, shade in color.items())
    caption = f"{names} The most while it writes; solid: the weights' share."
    return Picture(f"Memory, {engine}", caption, draw(f"speed-memory-{engine}", 20 + 17 * len(rows) + 20 * loads_in(rows), paint))


def loads_in(rows: Sequence[SpeedRow]) -> int:
    """How many different ones."""
    return len({row.load for row in rows})
