"""The table that `minitron plan` prints: the model, what is to become of it, and of a search why other sizes are not looked at."""

import functools
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.arch.counts import scaled
from minitron.reporting.console import fitting
from minitron.reporting.wording import ABSENT, counted, percent, ratio
from minitron.search.candidates import SIZES, Candidate, Plan

LEFT_OUT = ("KV", "non-embedding", "GFLOP/token", "memory", "share")  # columns that a narrow terminal goes without, the first one first
HEADINGS = dict(zip(SIZES, ("layers", "hidden", "MLP", "heads", "KV"), strict=True))


def show_plan(plan: Plan, *, console: Console | None = None) -> None:
    """Print the plan: a line for each model, then how many of the grid remain and why the others fell."""
    console = console or Console()
    console.print(fitting((_models(plan, LEFT_OUT[:count]) for count in range(len(LEFT_OUT) + 1)), console))
    if plan.grid is not None:
        others = "; why the others do not:" if plan.fell else ""
        console.print(Text(f"{len(plan.models):,} of {counted(plan.grid, 'architecture')} of the grid remain{others}"))
        for reason, number in sorted(plan.fell.items(), key=lambda item: -item[1]):
            console.print(Text(f"{number:>9,}  {reason}"))


def _size(name: str, model: Candidate) -> str:
    return f"{model.sizes[name]:,}"


def _models(plan: Plan, left_out: tuple[str, ...]) -> Table:
    columns: dict[str, Callable[[Candidate], str]] = {
        **{heading: functools.partial(_size, name) for name, heading in HEADINGS.items()},
        "params": lambda model: scaled(model.costs["params"], 2),
        "share": lambda model: percent(ratio(model.costs["params"], plan.original.costs["params"])),
        "non-embedding": lambda model: scaled(model.costs["non_embedding_params"], 2),
        "memory": lambda model: f"{model.costs['memory_gb']:.3g} GB",
        "GFLOP/token": lambda model: f"{model.costs['gflops_per_token']:.3g}",
        "latency": lambda model: f"{model.costs['latency_ms']:.3g} ms" if "latency_ms" in model.costs else ABSENT,
    }
    measured = any("latency_ms" in model.costs for model in plan.models)
    shown = {heading: write for heading, write in columns.items() if heading not in left_out and (measured or heading != "latency")}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in (plan.original, *plan.models):
        table.add_row(model.name, *(write(model) for write in shown.values()), end_section=model is plan.original)
    return table
