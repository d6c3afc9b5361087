"""`minitron calibrate`: measure how much every unit matters, by forward passes of the sharded model with hooks."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

import minitron
from minitron import engine
from minitron.config.schema import Config
from minitron.errors import refuse
from minitron.importance.hooks import Probes
from minitron.importance.scores import FILE, Scores, collect, magnitude_scores, provenance, random_scores
from minitron.reporting.console import progress
from minitron.session import Session, session

if TYPE_CHECKING:
    from minitron.data.corpus import Samples


def run(cfg: Config) -> None:
    """Open the run and calibrate."""
    with session(cfg, "calibrate") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/importance.safetensors: scores of every unit of every axis, free of layout."""
    opened.mark("calibrate", done=False)
    cfg, world = opened.cfg, opened.world
    data_hash = "none"
    if cfg.calibrate.criterion == "random":
        tensors = random_scores(opened.source.arch, cfg.seed)
    elif cfg.calibrate.criterion == "magnitude":
        tensors = magnitude_scores(opened.load_source(), world)
    else:
        from minitron.data.corpus import Windows

        samples = Windows(opened.data.blend("calibration"), cfg.calibrate.seq_length, count=cfg.calibrate.samples, shuffle_seed=cfg.seed,
                          setting="calibrate.samples")  # fmt: skip
        data_hash = "-".join(opened.data.parts[name].sha256["bin"][:16] for name, _ in opened.data.splits["calibration"])
        tensors = measure(opened.load_source(), samples, opened)
    if world.is_main:
        settings = {**dataclasses.asdict(cfg.calibrate), "seed": cfg.seed, "dtype": cfg.dtype}
        Scores(tensors, provenance(opened.source.fingerprint(), data_hash, settings, minitron.__version__)).save(opened.folder / FILE)
    opened.mark("calibrate", done=True)


def measure(model: engine.Model, samples: Samples, opened: Session) -> dict[str, torch.Tensor]:
    """Scores on every rank. Each sample is read by one data-parallel replica; replicas meet once, at the end."""
    settings, world = opened.cfg.calibrate, opened.world
    if settings.samples < world.dp:
        raise refuse("calibrate.samples", settings.samples, f"at least one per data-parallel replica, {world.dp}, is needed")
    mine = range(world.dp_rank, len(samples), world.dp)
    probes = Probes(model, world, settings.seq_agg, settings.batch_agg)
    bar = progress("calibrate", len(mine), opened.cfg.logging.progress and world.is_main)
    with probes.attached(), bar as advance:
        for start in range(0, len(mine), settings.micro_batch_size):
            tokens_BS = torch.stack([samples[i][:-1] for i in mine[start : start + settings.micro_batch_size]])
            engine.forward_only(model, [tokens_BS], world, after=lambda: probes.finish_microbatch(settings.seq_length))
            advance(len(tokens_BS))
    return collect(probes, world)
