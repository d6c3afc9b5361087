"""What a run came to so far, in a few lines: from the files of its folder alone, while it runs, after a crash, at its end."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron.data.pieces import ENDING
from minitron.engine.verified import fault
from minitron.reporting.console import final_table
from minitron.reporting.generation import show_speed
from minitron.reporting.report import REPORT, model_name
from minitron.reporting.runfiles import RunFiles, read_run
from minitron.reporting.speed import speed, values
from minitron.reporting.standing import search_told
from minitron.reporting.wording import ABSENT, changes, clock, counted, percent, ratio, size

RECENT = 100  # lines of metrics that tell how fast a run is now


@dataclasses.dataclass(frozen=True)
class Kept:
    """A checkpoint that is there: its step, its files' bytes, and what is wrong with them, if anything is, as far as their lengths tell."""

    step: int
    bytes: int
    fault: str | None = None


def kept_checkpoints(folder: Path) -> list[Kept]:
    """The checkpoints of a training, by step; one that is removed while this looks is left out. Reads no file but their markers."""
    found = []
    for path in folder.glob("step_*"):
        if match := re.fullmatch(r"step_(\d+)", path.name):
            try:
                length = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            except FileNotFoundError:
                continue
            wrong = fault(path, contents=False)
            if path.is_dir():
                found.append(Kept(int(match.group(1)), length, wrong and wrong.removeprefix(f"{path}/")))
    return sorted(found, key=lambda one: one.step)


def stage_states(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """What became of every stage that was begun, in words. `record`: the content of stages.json."""
    states = {name: _state(entry) for name, entry in record.items()}
    pieces = len([*(folder / "data").glob(f"*.{ENDING}/*.safetensors")])
    if not pieces:
        return states
    return {"data": f"{states.pop('data', 'begun')}; {counted(pieces, 'piece')} of text under way", **states}


def _state(entry: Mapping[str, Any]) -> str:
    """What became of one, and of which checkpoint it is."""
    if not entry.get("done"):
        return "not finished"
    read = entry.get("inputs", {}).get("checkpoint")
    told = {None: "done", "None": "done, before any training", "best": "done, of the best checkpoint"}
    return told[read] if read in told else f"done, of step {int(read):,}"


def summarise(run: RunFiles, stages: Mapping[str, str], at_work: str | None, checkpoints: list[Kept]) -> list[tuple[str, str]]:
    """The summary's lines as (what, its figures). `stages`: what became of each that was begun; `at_work`: whoever works in the folder now."""
    return [
        ("model", model_name(run)),
        ("stages", " · ".join(f"{name} {state}" for name, state in stages.items()) or "none was begun"),
        *([("at work", at_work)] if at_work else []),
        *_sizes(run),
        *([("search", search_told(run.search))] if run.search else []),
        *_training(run),
        *_checkpoints(run.metrics, checkpoints),
    ]


def _sizes(run: RunFiles) -> list[tuple[str, str]]:
    if run.original is None or run.pruned is None:
        return []
    before, after = run.original.num_parameters(), run.pruned.num_parameters()
    return [
        ("parameters", f"{size(before)} -> {size(after)} ({percent(ratio(after, before))} kept)"),
        ("sizes", ", ".join(changes(run.original, run.pruned)) or "no size is smaller than the original's"),
    ]


def _training(run: RunFiles) -> list[tuple[str, str]]:
    if not run.metrics:
        return []
    last, steps = run.metrics[-1], run.setting("train.steps")
    seconds = values(run.metrics, "step_seconds")
    left = max((steps or 0) - last["step"], 0)
    time = f"{clock(fmean(seconds) * last['step'])} in steps" if seconds else ABSENT
    if seconds and left:
        time += f", about {clock(fmean(seconds[-RECENT:]) * left)} to come"
    skipped = last.get("skipped_steps", sum(bool(line.get("skipped")) for line in run.metrics))
    return [
        ("training", f"step {last['step']:,}" + (f" of {steps:,} ({percent(last['step'] / steps, 0)})" if steps else "")),
        ("tokens", size(last.get("tokens"))),
        ("time", time),
        ("speed", speed(run.metrics)),
        ("loss", _course(run.metrics, "loss")),
        ("held-out loss", _course(run.metrics, "valid_loss")),
        ("skipped", counted(skipped, "step")),
    ]


def _course(metrics: list[dict[str, Any]], name: str) -> str:
    """The first, the last and the least value of a loss, with their steps."""
    found = [(line[name], line["step"]) for line in metrics if line.get(name) is not None]
    named = {"first": found[:1], "last": found[-1:], "best": sorted(found)[:1]}
    return ", ".join(f"{which} {value:.4g} (step {step:,})" for which, ends in named.items() for value, step in ends) or ABSENT


def _checkpoints(metrics: list[dict[str, Any]], checkpoints: list[Kept]) -> list[tuple[str, str]]:
    """Those that are there, and which of them has the best held-out loss."""
    if not checkpoints:
        return [("checkpoints", "none")] if metrics else []
    losses = {line["step"]: line["valid_loss"] for line in metrics if line.get("valid_loss") is not None}
    best = min((one.step for one in checkpoints if one.step in losses and not one.fault), key=lambda step: losses[step], default=None)
    remarks = [f", damaged: {one.fault}" if one.fault else ", the best of them" if one.step == best else "" for one in checkpoints]
    return [("checkpoints", ", ".join(f"step {one.step:,} ({size(one.bytes)}B{remark})" for one, remark in zip(checkpoints, remarks, strict=True)))]


def show_summary(run_dir: Path, stages: Mapping[str, str], at_work: str | None, console: Console | None = None) -> None:
    """Print the summary of a run's folder, and its evaluation where there is one. Raises RequestError for a broken file."""
    console, run = console or Console(), read_run(run_dir)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for what, figures in summarise(run, stages, at_work, kept_checkpoints(run.path / "checkpoints")):
        table.add_row(what, Text(figures))
    console.print(table)
    page = run.path / REPORT
    notes = {"report": str(page) if page.exists() else f"none yet: minitron report run.dir={run.path} makes it"}
    final_table(run.evals or {}, notes | ({"model": str(run.path / "hf")} if run.exported else {}), console=console)
    if run.speed is not None:
        show_speed(run.speed, console=console)
