"""The tables of `minitron plan` about a training: memory of the ranks, what they send each other, time and cost, layouts that fit.

They are made of the content of plan.json alone (launching/launch.py writes it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.arch.counts import scaled
from minitron.reporting.console import fitting
from minitron.reporting.wording import ABSENT, counted, percent

Launch = Mapping[str, Any]
GIB, MOST_STAGES = 2**30, 4  # stages that have a column of their own

MEMORY = {
    "teacher": "teacher's weights", "student": "student's weights", "gradients": "gradients", "optimizer": "optimizer's state",
    "signals": "teacher's predictions", "activations": "activations", "loss": "fused loss", "working": "working memory",
    "communication": "communication", "copies": "copy of a checkpoint", "runtime": "CUDA and libraries",
}  # fmt: skip
SECONDS = {
    "student": "student's passes", "recompute": "made once more for the way back", "teacher": "teacher's passes", "loss": "heads and fused loss",
    "tensor": "between tensor ranks", "context": "between context ranks", "experts": "between expert ranks", "stages": "between stages",
    "waiting": "pipelines fill and empty",
    "relay": "teacher's states to the student's layout", "offload": "teacher's weights from the host", "replicas": "between replicas",
    "update": "optimizer's update",
}  # fmt: skip
GROUPS = {
    "tp": "tensor ranks",
    "cp": "context ranks",
    "dp": "replicas",
    "ep": "expert ranks",
    "edp": "replicas of experts",
    "pp": "stages",
    "ends": "first and last stage",
    "world": "all ranks",
}
LINKS = {"nvlink": "NVLink", "network": "network"}


def show_launch(launch: Launch, *, console: Console | None = None) -> None:
    """Print all of it; of several models their sums, of one every part."""
    console = console or Console()
    runs = launch["runs"]
    console.print(Text(machines_told(launch), style="bold"))
    if len(runs) == 1:
        for table in (memory_table(runs[0], launch), *_optional(traffic_table, runs[0], console), seconds_table(runs[0])):
            console.print(table)
    console.print(fitting((outcome_table(runs, left_out) for left_out in _narrower(("tokens/s", "TFLOP/s per GPU", "bubble", "tokens"))), console))
    console.print(Text(assumed_told(launch), style="dim"))
    if launch["layouts"] is not None:
        show_layouts(launch["layouts"], runs[0], launch["shown_layouts"], console)


def show_layouts(layouts: Launch, mine: Launch, count: int, console: Console) -> None:
    """The fastest of each tp, pp and vpp, that of the settings among them, and why others fell."""
    best = best_of_each(layouts["fitting"])
    kept = [row for row in layouts["fitting"] if row in best[:count] or is_mine(row, mine)]
    if kept:
        tables = (
            layouts_table(kept, mine, best, left_out)
            for left_out in _narrower(("TFLOP/s per GPU", "bubble", "tokens/day", "dp", "step", "recompute"))
        )
        console.print(fitting(tables, console))
    told = f"{counted(layouts['tried'], 'layout')} looked at, {len(layouts['fitting']):,} fit"
    console.print(Text(told + ("; why the others do not:" if layouts["fell"] else "")))
    for reason, number in sorted(layouts["fell"].items(), key=lambda item: -item[1]):
        console.print(Text(f"{number:>9,}  {reason}"))


def best_of_each(rows: Sequence[Launch]) -> list[Launch]:
    """Of layouts in order, the first of each tp, pp, vpp and ep: others differ in micro-batch, sequence parallelism or recompute alone."""
    found: dict[tuple[int, ...], Launch] = {}
    for row in rows:
        found.setdefault(tuple(row["layout"][name] for name in ("tp", "pp", "vpp", "ep")), row)
    return list(found.values())


def is_mine(row: Launch, mine: Launch) -> bool:
    """Whether a layout is that of the settings."""
    return bool(row["layout"] == mine["layout"])


def machines_told(launch: Launch) -> str:
    """GPUs and layout, in a line."""
    run, machine = launch["runs"][0], launch["machine"]
    where = f" in {counted(launch['nodes'], 'node')} of {machine['gpus_per_node']}" if launch["nodes"] else ""
    alike = all(other["layout"] == run["layout"] for other in launch["runs"])
    return f"on {run['gpus']:,} x {machine['gpu']}{where}" + (f": {layout_told(run['layout'])}" if alike else "")


def layout_told(layout: Launch) -> str:
    """A layout in words."""
    sizes = [f"{name} {layout[name]}" for name in ("tp", "pp", "vpp", "cp", "ep", "dp") if layout[name] > 1 or name in ("tp", "pp", "dp")]
    more = ["sp"] if layout["sp"] else []
    if any(layout[f"teacher_{name}"] != layout[name] for name in ("tp", "pp", "ep")):
        ep = f" ep {layout['teacher_ep']}" if max(layout["teacher_ep"], layout["ep"]) > 1 else ""
        more.append(f"teacher tp {layout['teacher_tp']} pp {layout['teacher_pp']}{ep}")
    batch = f"{layout['microbatches']} x micro-batch {layout['micro_batch_size']}"
    return ", ".join([*sizes, *more, batch, f"recompute {layout['recompute']}"])


def assumed_told(launch: Launch) -> str:
    """What the figures rest on."""
    assumed = launch["assumed"]
    share = f", {percent(assumed['efficiency'], 0)} of its peak (plan.efficiency)" if assumed["efficiency"] else " as measured (plan.tflops)"
    return f"an estimate: {assumed['tflops']:,.0f} TFLOP/s of a GPU in a model's passes{share}; without validations and checkpoints"


def memory_table(run: Launch, launch: Launch) -> Table:
    """Parts of a rank's memory, by stage."""
    stages = shown_stages(run["memory"])
    usable = launch["assumed"]["usable_gib"]
    table = _table(
        f"GiB of a rank, {usable:.1f} at most", [f"stage {stage['stage']}" if len(run["memory"]) > 1 else "every rank" for stage in stages]
    )
    for name in run["memory"][0]["parts"]:
        if any(stage["parts"][name] for stage in run["memory"]):
            table.add_row(MEMORY.get(name, name), *(_gib(stage["parts"][name]) for stage in stages))
    table.add_section()
    totals = (Text(_gib(stage["total"]), style="bold red" if stage["total"] / GIB > usable else "bold") for stage in stages)
    table.add_row(Text("together", style="bold"), *totals)
    if any(stage["host"] for stage in run["memory"]):
        table.add_row("in the host's memory", *(_gib(stage["host"]) for stage in stages))
    return table


def shown_stages(stages: Sequence[Launch]) -> list[Launch]:
    """All, or of many the first, the fullest and the last."""
    if len(stages) <= MOST_STAGES:
        return list(stages)
    fullest = max(stages, key=lambda stage: stage["total"])
    return [stage for stage in stages if stage in (stages[0], fullest, stages[-1])]


def traffic_table(run: Launch, left_out: Sequence[str]) -> Table:
    """What a rank sends in a step, by kind: that of the stage that sends most."""
    columns: dict[str, Callable[[Launch], str]] = {
        "operation": lambda one: one["operation"],
        "ranks": lambda one: f"{one['ranks']} {GROUPS[one['group']]}",
        "link": lambda one: LINKS[one["link"]],
        "calls": lambda one: f"{one['calls']:,}",
        "GB sent": lambda one: f"{one['sent'] / 1e9:,.3g}" if one["sent"] < 1e12 else f"{one['sent'] / 1e9:,.0f}",
        "takes": lambda one: duration(one["seconds"]),
    }
    shown = {heading: write for heading, write in columns.items() if heading not in left_out}
    table = _table("a rank's traffic in a step", list(shown), left=("operation", "ranks", "link"))
    for one in run["traffic"]:
        table.add_row(one["what"], *(write(one) for write in shown.values()))
    return table


def seconds_table(run: Launch) -> Table:
    """What a step is made of, as the slowest stage sees it."""
    table = _table("a step", ["takes", "share"])
    for name, seconds in run["seconds"].items():
        if seconds:
            table.add_row(SECONDS.get(name, name), duration(seconds), percent(seconds / run["step_seconds"]))
    return table


# what a training comes to, under the headings of the tables that show some of it
FIGURES: dict[str, Callable[[Launch], str]] = {
    "GiB": lambda run: _gib(run["peak_bytes"]),
    "bubble": lambda run: percent(run["bubble"]),
    "TFLOP/s per GPU": lambda run: f"{run['tflop_per_second_per_gpu']:,.0f}",
    "step": lambda run: duration(run["step_seconds"]),
    "tokens/s": lambda run: scaled(run["tokens_per_second"]),
    "tokens/day": lambda run: scaled(run["tokens_per_day"]),
    "tokens": lambda run: scaled(run["tokens"]),
    "days": lambda run: _days(run["days"]),
    "GPU hours": lambda run: f"{run['gpu_hours']:,.4g}" if run["gpu_hours"] < 1000 else f"{run['gpu_hours']:,.0f}",
    "cost": lambda run: ABSENT if run["cost"] is None else f"{run['cost']:,.0f}",
}


def outcome_table(runs: Sequence[Launch], left_out: Sequence[str]) -> Table:
    """What each training comes to, and all together."""
    without = {*left_out, *(["cost"] if all(run["cost"] is None for run in runs) else [])}
    shown = {heading: write for heading, write in FIGURES.items() if heading not in without}
    table = _table("training", list(shown))
    for run in runs:
        table.add_row(run["name"], *(write(run) for write in shown.values()))
    if len(runs) > 1:
        table.add_section()
        sums = {"days": _days(sum(run["days"] for run in runs)), "GPU hours": f"{sum(run['gpu_hours'] for run in runs):,.0f}",
                "tokens": scaled(sum(run["tokens"] for run in runs)), "cost": f"{sum(run['cost'] or 0 for run in runs):,.0f}"}  # fmt: skip
        table.add_row("together", *(sums.get(heading, "") for heading in shown))
    return table


def layouts_table(kept: Sequence[Launch], mine: Launch, best: Sequence[Launch], left_out: Sequence[str]) -> Table:
    """Layouts by speed, with their places among the best; the one of the settings is bold, and may have no place."""
    columns: dict[str, Callable[[Launch], str]] = {
        **{name: (lambda row, name=name: str(row["layout"][name])) for name in ("tp", "pp", "vpp", "ep", "dp")},  # type: ignore[misc]
        "sp": lambda row: "yes" if row["layout"]["sp"] else "no",
        "micro-batch": lambda row: str(row["layout"]["micro_batch_size"]),
        "recompute": lambda row: str(row["layout"]["recompute"]),
        **{heading: FIGURES[heading] for heading in ("GiB", "bubble", "TFLOP/s per GPU", "step", "tokens/day", "days")},
    }
    without = {*left_out, *(["ep"] if all(row["layout"]["ep"] == 1 for row in kept) else [])}
    shown = {heading: write for heading, write in columns.items() if heading not in without}
    table = _table("layouts that fit", list(shown))
    for row in kept:
        here = is_mine(row, mine)
        place = [f"{best.index(row) + 1}."] if row in best else []
        table.add_row(" ".join([*place, *(["as set"] if here else [])]), *(write(row) for write in shown.values()), style="bold" if here else None)
    return table


def duration(seconds: float) -> str:
    """Three digits of seconds or milliseconds."""
    if seconds >= 100:
        return f"{seconds:,.0f} s"
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _days(days: float) -> str:
    return f"{days:,.1f}" if days >= 0.1 else f"{days:.2g}"


def _gib(count: float) -> str:
    return f"{count / GIB:,.1f}" if count >= GIB / 10 or not count else f"{count / GIB:.2g}"


def _table(title: str, headings: Sequence[str], left: Sequence[str] = ()) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column(title, no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="left" if heading in left else "right", no_wrap=True)
    return table


def _narrower(order: Sequence[str]) -> list[Sequence[str]]:
    """What to leave out: nothing, the first, the first two, ..."""
    return [order[:count] for count in range(len(order) + 1)]


def _optional(table: Callable[[Launch, Sequence[str]], Table], run: Launch, console: Console) -> list[Table]:
    """The widest of a traffic table that there is room for; none where nothing is sent."""
    return [fitting((table(run, left_out) for left_out in _narrower(("calls", "link", "ranks"))), console)] if run["traffic"] else []
