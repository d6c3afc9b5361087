"""What a run prints: progress, the banner of a stage, the table at the end. Plain lines where stdout is not a terminal."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from rich import box
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from minitron.reporting.results import ABSENT, Evals, Row, decimal, percent, rows, size, task_rows

Advance = Callable[..., None]
PLAIN_LINES = 10  # lines that a progress prints where there is no terminal
_LABELS = {"tokens_per_second": "tokens/s", "kd_loss": "kd loss", "grad_norm": "grad norm", "valid_loss": "valid loss"}


def field_text(fields: Mapping[str, Any]) -> str:
    """The numbers beside a bar: {"loss": 3.21, "tokens_per_second": 1234.5} -> "loss 3.21 · tokens/s 1,234"."""
    return " · ".join(f"{_LABELS.get(name, name)} {_short(value)}" for name, value in fields.items())


def _short(value: Any) -> str:
    """Four significant digits; large numbers whole, with their thousands separated."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,.0f}" if isinstance(value, int) or 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextlib.contextmanager
def progress(description: str, total: int, enabled: bool, *, start: int = 0, console: Console | None = None) -> Iterator[Advance]:
    """Show how far a loop of `total` turns has come, `start` of them done before. Yields `advance(n=1, **fields)`.

    Fields (loss=..., tokens_per_second=...) stay beside the bar until they change. On a terminal it is a bar, elsewhere
    about ten plain lines; nothing at all if not `enabled` (as on every rank but one).
    """
    console = console or Console()
    if not enabled:
        yield lambda n=1, **fields: None
    elif console.is_terminal:
        with _bar(description, total, start, console) as advance:
            yield advance
    else:
        yield _plain_lines(description, total, start, console)


def counter(description: str, enabled: bool, *, every: float = 5.0, console: Console | None = None) -> Callable[[str, int, int], None]:
    """For work whose length nobody knows: `count(what, documents, tokens)` prints a line every `every` seconds."""
    console = console or Console()
    said = time.monotonic()

    def count(what: str, documents: int, tokens: int) -> None:
        nonlocal said
        if enabled and time.monotonic() - said > every:
            said = time.monotonic()
            console.out(f"{description} {what}: {documents:,} documents, {tokens:,} tokens", highlight=False)

    return count


class _Bar(Progress):
    """One task; its numbers have a line of their own, so that the bar keeps its length on a narrow terminal."""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["numbers"]:
                yield Text(f"  {task.fields['numbers']}", style="dim", no_wrap=True, overflow="ellipsis")


@contextlib.contextmanager
def _bar(description: str, total: int, start: int, console: Console) -> Iterator[Advance]:
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=None, complete_style="blue", finished_style="blue"),
        TaskProgressColumn("{task.percentage:>3.0f} %", style="bold"),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA", style="dim"),
        TimeRemainingColumn(),
    )
    shown: dict[str, Any] = {}
    with _Bar(*columns, console=console, expand=True, refresh_per_second=4) as bar:
        task = bar.add_task(escape(description), total=total, completed=start, numbers="")

        def advance(n: int = 1, **fields: Any) -> None:
            shown.update(fields)
            bar.update(task, advance=n, numbers=field_text(shown))

        yield advance


def _plain_lines(description: str, total: int, start: int, console: Console) -> Advance:
    """`advance` that prints a line whenever another tenth of what there is to do is done."""
    began, done, shown = time.monotonic(), start, {}

    def advance(n: int = 1, **fields: Any) -> None:
        nonlocal done
        before, done = done, done + n
        shown.update(fields)
        todo = max(total - start, 1)
        if (done - start) * PLAIN_LINES // todo == (before - start) * PLAIN_LINES // todo:
            return
        elapsed = time.monotonic() - began
        remaining = elapsed / (done - start) * max(total - done, 0)
        line = f"{description} {done:,}/{total:,} ({done * 100 // max(total, 1)} %) elapsed {_clock(elapsed)} ETA {_clock(remaining)}"
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
        console.print(_losses(found))
    if tasks := task_rows(evals):
        console.print(_tasks(tasks))
    for what, where in (notes or {}).items():
        console.print(Text.assemble((f" {what:<8} ", "dim"), where), soft_wrap=True, highlight=False)


def _losses(found: list[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("text", overflow="fold")
    table.add_column("model", no_wrap=True)
    for heading in ("params", "loss", "perplexity", "gap closed", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    previous = None
    for row in found:
        first = row.text != previous
        if first and previous is not None:
            table.add_section()
        table.add_row(
            Text(row.text if first else ""),
            Text(row.model),
            size(row.parameters),
            decimal(row.loss, 3),
            decimal(row.perplexity),
            Text(percent(row.gap_closed) if row.model == "distilled" else ""),
            decimal(row.tokens_per_second, 0),
            style="bold" if row.model == "distilled" else None,
        )
        previous = row.text
    return table


def _tasks(tasks: list[tuple[str, list[float | None]]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    for heading in ("teacher", "pruned", "distilled"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, values in tasks:
        table.add_row(Text(name), *(ABSENT if value is None else f"{value:.4g}" for value in values))
    return table
