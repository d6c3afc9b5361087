"""`minitron speed`: how fast the exported student and its teacher generate, with plain `transformers`, and how much memory they take."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

from minitron import engine
from minitron.config.schema import Config
from minitron.evaluation.speed import Place, measure, turns
from minitron.files import write_json, write_text
from minitron.hardware import cpu_model
from minitron.reporting.card import CARD, with_speed
from minitron.reporting.console import progress
from minitron.reporting.generation import show_speed
from minitron.reporting.results import MODELS, WHOLE
from minitron.reporting.runfiles import SPEED
from minitron.session import Session, need, session


def run(cfg: Config) -> None:
    """Open the run and measure."""
    with session(cfg, "speed") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/speed.json and what it says into the model card of run.dir/hf. The models are loaded on rank 0's device."""
    world, names = opened.world, WHOLE if engine.on_main(opened.world, opened.is_whole) else MODELS
    student = engine.on_main(world, lambda: need(opened.folder / "hf" / "config.json", "export").parent)
    models = {names[0]: opened.teacher_source.folder, names[-1]: student}
    release(opened)
    opened.mark("speed", done=False)

    def look() -> None:
        gpu = world.device.type == "cuda"
        settings, place = opened.cfg.speed, Place(str(world.device), engine.gpu_name(world.device) if gpu else cpu_model(), opened.cfg.dtype)
        total = len(models) * turns(settings, place.device)
        with progress("generate", total, opened.cfg.logging.progress) as advance:
            found = measure(models, settings, place, advance, lambda found: write_json(opened.folder / SPEED, found))
        write_card(student / CARD, found)
        show_speed(found)

    engine.on_main(world, look)
    opened.mark("speed", done=True)


def release(opened: Session) -> None:
    """Give back the memory of the teacher that an earlier stage loaded: here it is loaded elsewhere."""
    vars(opened).pop("teacher", None)
    gc.collect()
    engine.give_back(opened.world.device)


def write_card(file: Path, found: dict[str, Any]) -> None:
    """Put the speeds into a model card, where there is one."""
    if file.exists():
        write_text(file, with_speed(file.read_text(encoding="utf-8"), found))
