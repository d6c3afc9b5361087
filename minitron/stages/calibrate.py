"""`minitron calibrate`: measure how much every unit matters, by forward passes of the sharded model with hooks."""

from __future__ import annotations

import dataclasses

import minitron
from minitron import engine
from minitron.calibration import importance
from minitron.config.schema import Config
from minitron.importance.scores import FILE, Scores, provenance
from minitron.reporting.console import say
from minitron.reporting.wording import prepared
from minitron.session import Session, session


def run(cfg: Config) -> None:
    """Open the run and calibrate."""
    with session(cfg, "calibrate") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/importance.safetensors: scores of every unit of every axis, free of layout."""
    cfg, world = opened.cfg, opened.world
    data_hash = "none"
    if cfg.calibrate.criterion == "activation":
        names = [name for name, _ in opened.data.splits["calibration"]]
        if world.is_main:
            for name in names:
                say(prepared(name, opened.data.parts[name]))
        data_hash = "-".join(opened.data.parts[name].sha256["bin"][:16] for name in names)
    tensors = importance(opened, opened.source.arch, opened.load_source, cfg.calibrate.skip_lengths)
    settings = {**dataclasses.asdict(cfg.calibrate), "seed": cfg.seed, "dtype": cfg.dtype}
    scores = Scores(tensors, provenance(opened.source.fingerprint(), data_hash, settings, minitron.__version__))
    opened.mark("calibrate", done=False)
    engine.on_main(world, lambda: scores.save(opened.folder / FILE))
    opened.mark("calibrate", done=True)
    if world.is_main:
        say(f"{opened.folder / FILE}: a score for every unit, by {cfg.calibrate.criterion}")
