"""The table that `minitron plan` prints: the model, what is to become of it, and of a search why other sizes are not looked at."""

import functools
from collections.abc import Callable, Collection, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.arch.arch import Arch
from minitron.arch.counts import scaled
from minitron.reporting import standing
from minitron.reporting.console import fitting
from minitron.reporting.launch import show_launch
from minitron.reporting.standing import COSTS, PARAMETERS
from minitron.reporting.wording import ABSENT, counted, percent, ratio
from minitron.search.candidates import Candidate, Plan

# columns that a narrow terminal goes without, the first one first; candidates have their sizes in their names
LEFT_OUT = ("KV", "non-embedding", "GFLOP/token", "memory", "share", "heads", "MLP", "hidden", "layers")
BUDGETED = {heading: name for name, (heading, _) in COSTS.items()}
HEADINGS = {**standing.HEADINGS, "num_query_groups": "KV"}  # narrower


def show_plan(plan: Plan, asked: Collection[str] = (), *, console: Console | None = None) -> None:
    """Print the plan: a line for each model, then how many of the grid remain and why the others fell, then what training takes.

    Costs that are `asked` for, by the names of the budgets, have a column however narrow the terminal is.
    """
    console = console or Console()
    order = [heading for heading in LEFT_OUT if BUDGETED.get(heading) not in asked]
    if not asked:
        order = order[: order.index("heads")]
    tables = {count: _models(plan, order[:count], asked) for count in range(len(order) + 1)}
    shown = fitting(tables.values(), console)
    console.print(shown)
    for name, shape in {plan.original.name: plan.arch, **plan.shapes}.items():
        if shape.num_moe_experts is not None:
            console.print(Text(f"{name}: {experts_told(shape)}"))
    if left_out := order[: next(count for count, table in tables.items() if table is shown)]:
        console.print(Text(f"a wider terminal also shows {', '.join(left_out)}", style="dim"))
    if plan.grid is not None:
        others = "; why the others do not:" if plan.fell else ""
        console.print(Text(f"{len(plan.models):,} of {counted(plan.grid, 'architecture')} of the grid remain{others}"))
        for reason, number in sorted(plan.fell.items(), key=lambda item: -item[1]):
            console.print(Text(f"{number:>9,}  {reason}"))
    if plan.launch is not None:
        show_launch(plan.launch, console=console)


def _size(name: str, model: Candidate) -> str:
    return f"{model.sizes[name]:,}"


def _cost(name: str, model: Candidate) -> str:
    if name not in model.costs:
        return ABSENT
    amount = model.costs[name]
    return scaled(amount, 2) if name in PARAMETERS else COSTS[name][1](amount)  # as many digits as published counts have


def experts_told(arch: Arch) -> str:
    """A model's experts, in words."""
    blocks = sum(map(arch.routes, range(arch.num_layers)))
    where = "each block" if blocks == arch.num_layers else f"{blocks:,} of the {arch.num_layers:,} blocks"
    shared = arch.moe_shared_expert_intermediate_size
    beside = f", and a shared one of {shared:,}" if shared is not None else ""
    return (
        f"{arch.num_moe_experts:,} experts of {arch.moe_ffn_hidden_size:,} neurons in {where}, {arch.moe_router_topk:,} of them for a token{beside}"
    )


def sparse(model: Candidate) -> bool:
    """Whether a token makes use of a part of the parameters alone."""
    return model.costs.get("active_params", 0) < model.costs["params"]


def _models(plan: Plan, left_out: Sequence[str], asked: Collection[str]) -> Table:
    costs = {heading: functools.partial(_cost, name) for heading, name in BUDGETED.items()}
    columns: dict[str, Callable[[Candidate], str]] = {
        **{heading: functools.partial(_size, name) for name, heading in HEADINGS.items()},
        "params": costs["params"],
        "share": lambda model: percent(ratio(model.costs["params"], plan.original.costs["params"])),
        **costs,
    }
    where = {
        "latency": any("latency_ms" in model.costs for model in plan.models),
        "active": "active_params" in asked or any(sparse(model) for model in (plan.original, *plan.models)),
        "MLP": plan.arch.has_dense_blocks,
    }
    shown = {heading: write for heading, write in columns.items() if heading not in left_out and where.get(heading, True)}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("model", no_wrap=True)
    for heading in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for model in (plan.original, *plan.models):
        table.add_row(model.name, *(write(model) for write in shown.values()), end_section=model is plan.original)
    return table
