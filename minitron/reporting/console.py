"""What a run prints: progress, the banner of a stage, its outcome, the table at the end. Plain lines where stdout is not a terminal.

Numbers are never cut: where a terminal is too narrow for all of a bar or a table, what matters least is left out.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from minitron.reporting import standing
from minitron.reporting.results import HELD_OUT, RESULTS, STUDENT, Evals, Row, TaskRow, models_of, rows, task_rows, windows_told
from minitron.reporting.standing import Standing
from minitron.reporting.wording import clock, counted, decimal, measurement, percent, size
from minitron.search.candidates import Results, Rung

Advance = Callable[..., None]
Count = Callable[[str, int, int, float | None], None]
PLAIN_LINES = 10  # lines that a progress prints at least where there is no terminal,
PLAIN_SECONDS = 30.0  # and the longest that it says nothing while turns are done
BAR_LEAST = 10  # characters
UNBOUNDED = 10_000  # characters: wider than anything here
# columns of the table that a narrow terminal goes without, the first one first
LEFT_OUT = ("per word", "tokens/s", "params", "perplexity", "gap closed")


def say(text: str, *, console: Console | None = None) -> None:
    """One line about what a stage found or made, in the log at once."""
    (console or Console()).out(f"  {text}", highlight=False)


def field_text(fields: Mapping[str, Any], width: int = UNBOUNDED) -> str:
    """The numbers beside a bar: {"loss": 3.21, "tokens/s": 1234.5} -> "loss 3.21 · tokens/s 1,234", broken between two of them after `width`."""
    lines: list[str] = []
    for name, value in fields.items():
        text = f"{name} {_short(value)}"
        if lines and len(lines[-1]) + len(text) + 3 <= width:
            lines[-1] += f" · {text}"
        else:
            lines.append(text)
    return "\n".join(lines)


def natural_width(shown: RenderableType, console: Console) -> int:
    """Characters that a table needs to be shown without a break or a cut."""
    return Measurement.get(console, console.options.update(max_width=UNBOUNDED), shown).maximum


def fitting(tables: Iterable[Table], console: Console) -> Table:
    """The first of `tables`, which get narrower, that the console has room for; the last where none has."""
    table = Table()
    for table in tables:
        if natural_width(table, console) <= console.width:
            break
    return table


def _short(value: Any) -> str:
    """Four significant digits; large numbers whole, with their thousands separated."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:#.4g}"


@contextlib.contextmanager
def progress(description: str, total: int, enabled: bool, *, start: int = 0, console: Console | None = None) -> Iterator[Advance]:
    """Show how far a loop of `total` turns has come, `start` of them done before. Yields `advance(n=1, **fields)`.

    Fields (loss=...) stay beside the bar until they change. On a terminal it is a bar, elsewhere a plain line for every tenth
    that is done and at the first turn after `PLAIN_SECONDS` without one; nothing at all if not `enabled` (as on every rank but one).
    """
    console = console or Console()
    if not enabled:
        yield lambda n=1, **fields: None
    elif console.is_terminal:
        with _bar(description, total, start, console) as advance:
            yield advance
    else:
        yield _plain_lines(description, total, start, console)


@contextlib.contextmanager
def counter(description: str, enabled: bool, *, every: float = 5.0, console: Console | None = None) -> Iterator[Count]:
    """For work whose length is known roughly or not at all: yields `count(what, documents, tokens, share)`, the last one in [0, 1] or None.

    On a terminal it is a bar for each `what`, elsewhere a line when `what` is new, then every `every` seconds; nothing at all if not `enabled`.
    """
    console = console or Console()
    if not enabled:
        yield lambda what, documents, tokens, share: None
    elif console.is_terminal:
        with _CountBar(console) as bar:
            yield functools.partial(bar.count, description)
    else:
        yield _count_lines(description, every, console)


def _count_lines(description: str, every: float, console: Console) -> Count:
    said: dict[str, float] = {}
    paces: dict[str, _Pace] = {}

    def count(what: str, documents: int, tokens: int, share: float | None) -> None:
        now = time.monotonic()
        pace = _pace(paces, what, _Pace(now, tokens, share))
        if documents and now - said.get(what, -every) >= every:
            said[what] = now
            line = f"{description} {what}: {counted(documents, 'document')}, {counted(tokens, 'token')}"
            fields = {"tokens/s": pace.speed(now, tokens), "ETA": clock(left) if (left := pace.left(now, share)) is not None else None}
            if share is not None:
                line += f", {share:.0%} of the text"
            told = field_text({name: value for name, value in fields.items() if value is not None})
            console.out(line + (f" {told}" if told else ""), highlight=False)

    return count


@dataclasses.dataclass(frozen=True)
class _Pace:
    """Speed of work that began, in this process, at `time` with `tokens` and `share` of it done."""

    time: float
    tokens: int
    share: float | None

    def speed(self, now: float, tokens: int) -> float | None:
        """Tokens per second; None before there is any."""
        return (tokens - self.tokens) / (now - self.time) if now > self.time else None

    def left(self, now: float, share: float | None) -> float | None:
        """Seconds to the end; None where that can't be told."""
        done = (share or 0.0) - (self.share or 0.0)
        return (now - self.time) * (1 - share) / done if share is not None and done > 0 else None


def _pace(paces: dict[str, _Pace], what: str, here: _Pace) -> _Pace:
    """The pace of `what`, from when its share is known on: what a restart passes over before goes faster than the rest."""
    if what not in paces or (paces[what].share is None and here.share is not None):
        paces[what] = here
    return paces[what]


class _CountBar(Progress):
    """A bar for each part of a work, with what was counted below it; it runs to and fro while nobody knows how far the work has come."""

    def __init__(self, console: Console) -> None:
        self.paces: dict[str, _Pace] = {}
        self.bars: dict[str, TaskID] = {}
        share = TaskProgressColumn("{task.percentage:>3.0f} %", style="bold")
        super().__init__(TextColumn("[bold]{task.description}"), BarColumn(None, complete_style="blue", finished_style="blue"), share,
                         TimeElapsedColumn(), console=console, expand=True, refresh_per_second=4)  # fmt: skip

    def count(self, description: str, what: str, documents: int, tokens: int, share: float | None) -> None:
        """Show how far `what` has come."""
        now = time.monotonic()
        if what not in self.bars:
            self.bars[what] = self.add_task(escape(f"{description} {what}"), total=None, numbers="")
        pace = _pace(self.paces, what, _Pace(now, tokens, share))
        left = pace.left(now, share)
        fields = {"documents": documents, "tokens": tokens, "tokens/s": pace.speed(now, tokens), "ETA": None if left is None else clock(left)}
        numbers = field_text({name: value for name, value in fields.items() if value is not None}, self.console.width - 2)
        self.update(self.bars[what], total=None if share is None else 1.0, completed=share or 0.0, numbers=numbers)

    def get_renderables(self) -> Iterator[RenderableType]:
        """The bars, then the numbers of the last one, which is the one that moves."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks[-1:]:
            yield Text("\n".join(f"  {line}" for line in task.fields["numbers"].split("\n")), style="dim")


class _Bar(Progress):
    """One task; its numbers have lines of their own, so that the bar keeps its length on a narrow terminal."""

    def __init__(self, console: Console) -> None:
        self.terminal = console  # Progress has one of its own, but asks for what it shows before it is there
        name, self.bar = TextColumn("[bold]{task.description}"), BarColumn(None, complete_style="blue", finished_style="blue")
        share, count = TaskProgressColumn("{task.percentage:>3.0f} %", style="bold"), MofNCompleteColumn()
        elapsed, remaining = TimeElapsedColumn(), (TextColumn("ETA", style="dim"), TimeRemainingColumn())
        self.layouts: tuple[tuple[ProgressColumn, ...], ...] = (
            (name, self.bar, share, count, elapsed, *remaining),
            (name, self.bar, share, count, *remaining),
            (name, self.bar, share, *remaining),
            (name, self.bar, share),
            (name, share),
        )
        # the time to come is told from the turns of the last hour: of large models a step alone takes more than rich's own half a minute
        super().__init__(*self.layouts[0], console=console, expand=True, refresh_per_second=4, speed_estimate_period=3600)

    def get_renderables(self) -> Iterator[RenderableType]:
        """Asked for anew at every refresh, so it follows a terminal that changes its width."""
        self.columns = next((layout for layout in self.layouts if self._least_width(layout) <= self.terminal.width), self.layouts[-1])
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["numbers"]:
                numbers = field_text(task.fields["numbers"], self.terminal.width - 2)
                yield Text("\n".join(f"  {line}" for line in numbers.split("\n")), style="dim")

    def _least_width(self, layout: tuple[ProgressColumn, ...]) -> int:
        """Characters that these columns need, `BAR_LEAST` of them for the bar, which by itself takes any width."""
        self.columns = tuple(column for column in layout if column is not self.bar)
        return natural_width(self.make_tasks_table(self.tasks), self.terminal) + (BAR_LEAST + 1) * (self.bar in layout)


@contextlib.contextmanager
def _bar(description: str, total: int, start: int, console: Console) -> Iterator[Advance]:
    shown: dict[str, Any] = {}
    with _Bar(console) as bar:
        task = bar.add_task(escape(description), total=total, completed=start, numbers={})

        def advance(n: int = 1, **fields: Any) -> None:
            shown.update(fields)
            bar.update(task, advance=n, numbers={**shown})  # a copy: the bar is drawn by a thread of its own

        yield advance


def _plain_lines(description: str, total: int, start: int, console: Console) -> Advance:
    """`advance` that prints a line whenever another tenth of what there is to do is done, or the last line is `PLAIN_SECONDS` old."""
    said = began = time.monotonic()
    done, shown = start, {}

    def advance(n: int = 1, **fields: Any) -> None:
        nonlocal done, said
        before, done, now = done, done + n, time.monotonic()
        shown.update(fields)
        todo = max(total - start, 1)
        same_tenth = (done - start) * PLAIN_LINES // todo == (before - start) * PLAIN_LINES // todo
        if same_tenth and now - said < PLAIN_SECONDS:
            return
        said, elapsed = now, now - began
        remaining = elapsed / (done - start) * max(total - done, 0)
        line = f"{description} {done:,}/{total:,} ({done * 100 // max(total, 1)} %) elapsed {clock(elapsed)} ETA {clock(remaining)}"
        console.out(line + (f" {field_text(shown)}" if shown else ""), highlight=False)

    return advance


def stage_banner(n: int, total: int, name: str, detail: str = "", *, console: Console | None = None) -> None:
    """Announce stage `n` of `total`: its name and, in a few words, what it is about to do."""
    console = console or Console()
    if console.is_terminal:
        title = Text.assemble((f"{n}/{total} ", "dim"), (name, "bold blue"), f"  {detail}" if detail else "")
        console.print()
        console.print(Rule(title, align="left", style="dim"))
    else:
        console.out(f"[{n}/{total}] {name}" + (f": {detail}" if detail else ""), highlight=False)


def final_table(evals: Evals, notes: Mapping[str, str] | None = None, *, console: Console | None = None) -> None:
    """Print every model on every text, the tasks if there are any, and `notes` (what: where) below."""
    console = console or Console()
    console.print()
    if found := rows(evals):
        names = max(10, console.width // 7)
        console.print(fitting((_losses(found, LEFT_OUT[:count], names) for count in range(len(LEFT_OUT) + 1)), console))
        if told := windows_told(evals):
            console.print(Text(f" perplexity of {told}", style="dim"))
    if tasks := task_rows(evals):
        console.print()
        console.print(fitting((_tasks(tasks, models_of(evals), error) for error in (True, False)), console))
    for what, where in (notes or {}).items():
        console.print(Text.assemble((f" {what:<8} ", "dim"), where), soft_wrap=True, highlight=False)


def _losses(found: list[Row], left_out: tuple[str, ...], names: int) -> Table:
    """The table without the columns `left_out`; names of texts are folded after `names` characters."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("text", overflow="fold", max_width=names)
    table.add_column("model", no_wrap=True)
    columns: dict[str, Callable[[Row], str]] = {
        "params": lambda row: size(row.parameters),
        "loss": lambda row: decimal(row.loss, 3),
        "perplexity": lambda row: decimal(row.perplexity),
        "per word": lambda row: decimal(row.word_perplexity),
        "gap closed": lambda row: percent(row.gap_closed) if row.model == STUDENT else "",
        "tokens/s": lambda row: decimal(row.tokens_per_second, 0) if row.text == HELD_OUT else "",
    }
    if all(row.word_perplexity is None for row in found):
        del columns["per word"]
    shown = [(heading, write) for heading, write in columns.items() if heading not in left_out]
    for heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in found:
        first = row.text != previous
        if first and previous is not None:
            table.add_section()
        numbers = [Text(write(row)) for _, write in shown]
        table.add_row(Text(row.text if first else ""), Text(row.model), *numbers, style="bold" if row.model in RESULTS else None)
        previous = row.text
    return table


def _tasks(tasks: list[TaskRow], models: tuple[str, ...], error: bool) -> Table:
    """Values side by side, with their standard errors where there is room for them."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    for heading in (*models, "retained"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in tasks:
        values = (measurement(value, error) for value in row.values)
        table.add_row(Text("" if row.task == previous else row.name), Text(row.metric), *values, percent(row.retained))
        previous = row.task
    return table


# ---- a search ----

Columns = dict[str, Callable[[Standing], str]]


def show_candidates(results: Results, *, console: Console | None = None) -> None:
    """Print every candidate with its sizes and costs, and how many of the grid are none and why."""
    console = console or Console()
    sizes, costs = _sizes(results), _costs(standing.costs_of(results))
    _print_candidates(sizes | costs, standing.standings(results), [*[*reversed(costs)][:-1], *reversed(sizes)], console)
    _print_told([("", text) for text in (standing.unvaried(results), f"{standing.grid_told(results)}.") if text], console)


def show_rung(results: Results, at: int = -1, *, console: Console | None = None) -> None:
    """Print one rung of a search: the candidates that were on it, the best first, their losses (of every seed, and the mean), and who goes on."""
    console, rung = console or Console(), results.rungs[at]
    place = {name: number for number, name in enumerate(standing.ranking(rung))}
    found = sorted((one for one in standing.standings(results) if one.name in place), key=lambda one: place[one.name])
    seeds = max((len(losses) for losses in rung.losses.values()), default=0)
    by_seed = {f"seed {seed + 1}": functools.partial(_loss_of_seed, rung, seed) for seed in range(seeds if seeds > 1 else 0)}
    verdicts = {True: "stays" if rung.stayed else "", False: "out"}
    last: Columns = {
        "mean" if by_seed else "loss": lambda one: decimal(standing.mean_losses(rung)[one.name], 4),
        "": lambda one: "chosen" if one.chosen else verdicts[standing.goes_on(rung, one.name)],
    }
    sizes, costs = _sizes(results), _costs(standing.costs_bound(results))
    console.print(Text(f" {standing.when(rung)}" + (f", {size(rung.tokens)} tokens each" if rung.tokens else ""), style="bold"))
    left_out = [*reversed(by_seed), *[*reversed(costs)][:-1], *reversed(sizes), *costs]
    _print_candidates(sizes | costs | by_seed | last, found, left_out, console, dim=lambda one: not standing.goes_on(rung, one.name))
    _print_told([("", f"{told}.") for told in [standing.stability([rung])] if told], console)


def show_search(results: Results, *, console: Console | None = None) -> None:
    """Print what a search came to: every candidate with its losses rung by rung and what became of it, the chosen one, how sure that is, its cost."""
    console = console or Console()
    losses = {
        f"{rung.steps:,}\nsteps" if rung.steps else "untrained": functools.partial(_loss_on_rung, at, digits=3)
        for at, rung in enumerate(results.rungs)
    }
    last: Columns = {
        "": lambda one: standing.outcome(results, one).partition(" ")[0],
        " ": lambda one: standing.outcome(results, one).partition(" ")[2],
    }
    sizes, costs = _sizes(results), _costs(standing.costs_bound(results))
    # sizes are in the names too, and where the losses end tells when one was out
    left_out = [*[*reversed(costs)][:-1], *reversed(sizes), *[*last][1:], *costs, *losses]
    found = standing.standings(results)
    _print_candidates(sizes | costs | losses | last, found, left_out, console, dim=lambda one: one.fell is not None)
    _print_told(standing.told(results), console)


def _print_told(lines: Iterable[tuple[str, str]], console: Console) -> None:
    """What (where it has a name) and its figures, which are wrapped beside it."""
    lines = [*lines]
    table = Table.grid(padding=(0, 2 if any(what for what, _ in lines) else 0), pad_edge=True)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, told in lines:
        table.add_row(what, Text(told))
    console.print(table)


def _loss_of_seed(rung: Rung, seed: int, one: Standing) -> str:
    return "".join(decimal(loss, 4) for loss in rung.losses[one.name][seed : seed + 1])


def _loss_on_rung(at: int, one: Standing, digits: int) -> str:
    loss = one.losses[at]
    return "" if loss is None else decimal(loss, digits)


def _sizes(results: Results) -> Columns:
    """Columns of the sizes that differ."""
    return {standing.HEADINGS[field]: functools.partial(standing.size_text, field) for field in standing.varied(results)}


def _costs(names: list[str]) -> Columns:
    """Columns of these costs."""
    return {standing.COSTS[name][0]: functools.partial(standing.cost_text, name) for name in names}


def _print_candidates(
    columns: Columns, found: list[Standing], left_out: Iterable[str], console: Console, dim: Callable[[Standing], bool] = lambda one: False
) -> None:
    """A row for each of `found`; where the console is too narrow it goes without the columns `left_out`, the first one first."""
    order = [heading for heading in left_out if heading in columns]

    def table(shown: Columns) -> Table:
        made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
        made.add_column("candidate", overflow="fold")
        for heading in shown:
            made.add_column(heading, justify="right" if heading.strip() else "left", no_wrap=True)
        for one in found:
            style = "bold" if one.chosen else "dim" if dim(one) else None
            made.add_row(Text(one.name), *(Text(write(one)) for write in shown.values()), style=style)
        return made

    fewer = ({heading: write for heading, write in columns.items() if heading not in order[:count]} for count in range(len(order) + 1))
    console.print(fitting(map(table, fewer), console))
