"""A chain of models, from the runs that made them: `family.json`, and the table of all of them."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.files import as_written, read_object, write_json
from minitron.reporting.console import fitting
from minitron.reporting.wording import decimal, percent, ratio, size

FILE = "family.json"
LEFT_OUT = ("perplexity", "taught by", "cut from", "share")  # columns that a narrow terminal goes without, the first one first


@dataclasses.dataclass(frozen=True)
class Member:
    """One model of a chain. Losses are on the held-out text of its own run, in nats per token; None where there is none."""

    name: str
    path: str
    params: int | None
    pruned_loss: float | None = None
    loss: float | None = None
    perplexity: float | None = None
    cut_from: str = ""
    taught_by: str = ""


def member(name: str, run: Path, cut_from: str, taught_by: str) -> Member | None:
    """The model that a run made; None where it is not done with it."""
    record = read_object(run / "stages.json", of_objects=True) if (run / "stages.json").exists() else {}
    if not all(record.get(stage, {}).get("done") for stage in ("evaluate", "export")):
        return None
    evals = read_object(run / "eval.json")
    with as_written(run / "eval.json"):
        student, pruned = evals["student"], evals["pruned"]
        return Member(name, str(run / "hf"), student["params"], pruned["loss"], student["loss"], student["perplexity"], cut_from, taught_by)


def original(path: str, run: Path, taught_itself: bool) -> Member:
    """The model that the first run cut; its losses are known where it was that run's teacher."""
    evals: Mapping[str, Any] = read_object(run / "eval.json") if taught_itself else {}
    teacher = evals.get("teacher", {})
    params = teacher.get("params")
    return Member("original", path, params, None, teacher.get("loss"), teacher.get("perplexity"))


def write_family(folder: Path, members: Sequence[Member]) -> None:
    """Write run.dir/family.json."""
    write_json(folder / FILE, {"models": [dataclasses.asdict(one) for one in members]})


def read_family(folder: Path) -> list[Member]:
    """Inverse of `write_family`; nothing where the folder is no chain's."""
    if not (folder / FILE).is_file():
        return []
    with as_written(folder / FILE):
        return [Member(**one) for one in read_object(folder / FILE)["models"]]


def show_family(folder: Path, console: Console | None = None) -> None:
    """Print every model that is finished, and where its run is."""
    console, found = console or Console(), read_family(folder)
    console.print()
    console.print(fitting((_table(found, LEFT_OUT[:count]) for count in range(len(LEFT_OUT) + 1)), console))
    width = max(len(one.name) for one in found)
    for one in found[1:]:
        run = Path(one.path).parent
        console.print(Text.assemble((f" {one.name:<{width}} ", "dim"), f"{run}: {run / 'report.html'}, {one.path}"), soft_wrap=True, highlight=False)


def _table(found: list[Member], left_out: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    largest = found[0].params if found else None
    columns: dict[str, Callable[[Member], str]] = {
        "params": lambda one: size(one.params),
        "share": lambda one: percent(ratio(one.params, largest)),
        "loss as cut": lambda one: decimal(one.pruned_loss, 3) if one.cut_from else "",
        "loss": lambda one: decimal(one.loss, 3),
        "perplexity": lambda one: decimal(one.perplexity),
        "cut from": lambda one: one.cut_from,
        "taught by": lambda one: one.taught_by,
    }
    shown = [(heading, write) for heading, write in columns.items() if heading not in left_out]
    table.add_column("model", no_wrap=True)
    for heading, _ in shown:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in found:
        table.add_row(Text(one.name), *(Text(write(one)) for _, write in shown))
    return table
