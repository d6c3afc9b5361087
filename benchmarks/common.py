"""What every benchmark does: read its arguments, show one table with the machine it was made on, write both as JSON."""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from minitron.files import write_json
from minitron.hardware import cpu_model

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parents[1]
LOAD = os.getloadavg()[0]  # before the benchmark itself makes any
THREADS = os.environ.get("OMP_NUM_THREADS")  # as it was called, whatever it sets for processes of its own


def arguments(description: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share; a script adds its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table here too")
    return parser


def test_data() -> Path:
    """The folder that MINITRON_TEST_DATA names."""
    return Path(os.environ.get("MINITRON_TEST_DATA") or ROOT.parent / "shared" / "data").resolve()


def wikitext() -> list[str]:
    """The setting that adds WikiText-2's raw test split, where MINITRON_TEST_DATA has it."""
    file = test_data() / "text" / "wikitext2_test.joined.txt"
    return [f'eval.texts.wikitext2="{file}"'] if file.is_file() else []


def hub() -> list[str]:
    """The setting that names the data sets of benchmark tasks, where MINITRON_TEST_DATA has some."""
    folder = test_data() / "hub"
    return [f'eval.task_data="{folder}"'] if folder.is_dir() else []


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(LOAD, 2),
        **{package: metadata.version(package) for package in ("torch", "megatron-core", "transformers")},
    }


def seconds(action: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Median of how long an action takes, what it queued on a GPU included."""
    found = []
    for _ in range(repeats):
        settle(device)
        started = time.perf_counter()
        action()
        settle(device)
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def settle(device: torch.device) -> None:
    """Wait for what is queued on a GPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)


def matmul_rate(dtype: torch.dtype, device: torch.device, repeats: int = 20) -> float:
    """FLOP/s of the product of two square matrices that keep the device busy: what anything made of products can reach at most here."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    for _ in range(3):
        torch.mm(a, b, out=out)
    return 2 * size**3 / seconds(lambda: torch.mm(a, b, out=out), device, repeats)


def publish(title: str, columns: Mapping[str, str], rows: Sequence[Sequence[Any]], notes: Sequence[str], json_file: Path | None) -> None:
    """Print the table and what has to be said with it; write JSON to `json_file`, from which tables.py makes those of the documents.
    `columns`: heading -> format of its values, "" for text that may be wrapped."""
    table = Table(title=title, title_justify="left", caption="\n".join(notes), caption_justify="left")
    for name, form in columns.items():
        table.add_column(name, justify="left" if form in ("", "<") else "right", no_wrap=bool(form))
    for row in rows:
        table.add_row(*("–" if value is None else format(value, form) for value, form in zip(row, columns.values(), strict=True)))
    start = origin(title)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    console.print(" · ".join(f"{name} {value}" for name, value in start["machine"].items() if value is not None), style="dim", highlight=False)
    if json_file is not None:
        entries = [dict(zip(columns, row, strict=True)) for row in rows]
        write_json(json_file, start | {"columns": dict(columns), "rows": entries, "notes": list(notes)})


def command() -> str:
    """The command line that this process was started with, from the repository's root, without --json."""
    words = sys.argv[1:]
    if "--json" in words:
        at = words.index("--json")
        words = words[:at] + words[at + 2 :]
    script = Path(sys.argv[0]).resolve()
    name = str(script.relative_to(ROOT) if script.is_relative_to(ROOT) else script.name)
    called = ["-m", name.removesuffix("/__main__.py").replace("/", ".")] if script.name == "__main__.py" else [name]
    return shlex.join([*([f"OMP_NUM_THREADS={THREADS}"] if THREADS else []), ".venv/bin/python", *called, *words])


def origin(title: str) -> dict[str, Any]:
    """What a file of docs/results opens with: its title, the command that made it, the day, the machine."""
    today = datetime.datetime.now(datetime.timezone.utc).date()
    return {"title": title, "command": command(), "date": today.isoformat(), "machine": machine()}
