"""A sweep: which runs it is made of (`sweep.json`), and one table that compares them, while they run too."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.files import as_written, read_object, write_json
from minitron.reporting.console import fitting
from minitron.reporting.results import MODELS, WHOLE, gap_closed, models_of
from minitron.reporting.runfiles import RECORD, read_run
from minitron.reporting.speed import values
from minitron.reporting.wording import ABSENT, clock, decimal, percent, size

FILE = "sweep.json"
LEFT_OUT = ("time", "loss as cut", "tokens", "gap closed", "params", "step")  # columns that a narrow terminal goes without, the first one first


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run: the settings by which it differs, and what it came to. Losses are on the held-out text, in nats per token."""

    name: str
    chosen: dict[str, str]
    state: str
    params: int | None = None
    step: int | None = None
    steps: int | None = None
    tokens: float | None = None
    seconds: float | None = None
    pruned_loss: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    gap: float | None = None


def write_sweep(folder: Path, runs: Mapping[str, Mapping[str, str]]) -> None:
    """Write run.dir/sweep.json: the runs, by the names of their folders, each with the settings by which it differs. Earlier ones stay."""
    write_json(folder / FILE, {"runs": {**read_sweep(folder), **runs}})


def read_sweep(folder: Path) -> dict[str, dict[str, str]]:
    """Inverse of `write_sweep`; nothing where the folder is no sweep's."""
    if not (folder / FILE).is_file():
        return {}
    with as_written(folder / FILE):
        return dict(read_object(folder / FILE)["runs"])


def entry(folder: Path, chosen: dict[str, str]) -> Entry:
    """What one run came to so far."""
    if not (folder / RECORD).is_file():
        return Entry(folder.name, chosen, "not begun")
    run, record = read_run(folder), read_object(folder / RECORD, of_objects=True)
    evals: Mapping[str, Any] = run.evals or {}
    result, before = (evals.get(name, {}) for name in reversed(models_of(evals)[-2:]))
    losses = [evals.get(name, {}).get("loss") for name in MODELS]
    last, shape, seconds = run.metrics[-1] if run.metrics else {}, run.pruned or run.original, values(run.metrics, "step_seconds")
    return Entry(
        name=folder.name, chosen=chosen, state=state(record), params=result.get("params", shape.num_parameters() if shape else None),
        step=last.get("step"), steps=run.setting("train.steps"), tokens=last.get("tokens"),
        seconds=fmean(seconds) * last["step"] if seconds else None, pruned_loss=before.get("loss"),
        loss=result.get("loss", last.get("valid_loss")), perplexity=result.get("perplexity"),
        gap=None if WHOLE[0] in evals else gap_closed(*losses),
    )  # fmt: skip


def state(record: Mapping[str, Any]) -> str:
    """How far a run is: the last stage that was begun."""
    if record.get("export", {}).get("done") and record.get("evaluate", {}).get("done"):
        return "done"
    stages = [*record.items()]
    return f"{stages[-1][0]} {'done' if stages[-1][1].get('done') else 'not finished'}" if stages else "begun"


def show_sweep(folder: Path, console: Console | None = None) -> None:
    """Print a line for each run of a sweep, those with the least loss first, and where their folders are."""
    console = console or Console()
    found = [entry(folder / name, chosen) for name, chosen in read_sweep(folder).items()]
    found.sort(key=lambda one: (one.loss is None, one.loss or 0.0))
    console.print()
    console.print(fitting((_table(found, LEFT_OUT[:count]) for count in range(len(LEFT_OUT) + 1)), console))
    console.print(
        Text(f" each in a folder of {folder}; loss and perplexity on the held-out text of the run's own evaluation", style="dim"), soft_wrap=True
    )


def _setting(key: str, one: Entry) -> str:
    return one.chosen.get(key, ABSENT)


def _table(found: Sequence[Entry], left_out: Sequence[str]) -> Table:
    # a run of one swept setting is called by its value alone, where that is a name: it is not said twice
    settings = [key for key in dict.fromkeys(key for one in found for key in one.chosen) if any(_setting(key, one) != one.name for one in found)]
    columns: dict[str, Callable[[Entry], str]] = {
        **{key: functools.partial(_setting, key) for key in settings},
        "params": lambda one: size(one.params),
        "step": lambda one: ABSENT if one.step is None else f"{one.step:,}" + ("" if one.step == one.steps else f" of {one.steps:,}"),
        "tokens": lambda one: size(one.tokens),
        "time": lambda one: ABSENT if one.seconds is None else clock(one.seconds),
        "loss as cut": lambda one: decimal(one.pruned_loss, 3),
        "loss": lambda one: decimal(one.loss, 3),
        "perplexity": lambda one: decimal(one.perplexity),
        "gap closed": lambda one: percent(one.gap),
        "state": lambda one: one.state,
    }
    shown = {heading: write for heading, write in columns.items() if heading not in left_out}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("run", overflow="fold")
    for heading in shown:
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=heading not in settings)
    for one in found:
        table.add_row(Text(one.name), *(Text(write(one)) for write in shown.values()))
    return table
