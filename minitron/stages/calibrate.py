"""`minitron calibrate`: measure how much every unit matters, by forward passes of the sharded model with hooks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

import minitron
from minitron import engine
from minitron.config.schema import Config
from minitron.importance.depth import losses_without
from minitron.importance.hooks import Probes
from minitron.importance.scores import FILE, LAYERS_LOSS, Scores, collect, magnitude_scores, provenance, random_scores
from minitron.reporting.console import progress, say
from minitron.reporting.wording import prepared
from minitron.session import Session, session

if TYPE_CHECKING:
    from minitron.data.corpus import Samples


def run(cfg: Config) -> None:
    """Open the run and calibrate."""
    with session(cfg, "calibrate") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/importance.safetensors: scores of every unit of every axis, free of layout."""
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
        if world.is_main:
            for name, _ in opened.data.splits["calibration"]:
                say(prepared(name, opened.data.parts[name]))
        data_hash = "-".join(opened.data.parts[name].sha256["bin"][:16] for name, _ in opened.data.splits["calibration"])
        tensors = measure(opened.load_source(), samples, opened)
    settings = {**dataclasses.asdict(cfg.calibrate), "seed": cfg.seed, "dtype": cfg.dtype}
    scores = Scores(tensors, provenance(opened.source.fingerprint(), data_hash, settings, minitron.__version__))
    opened.mark("calibrate", done=False)
    engine.on_main(world, lambda: scores.save(opened.folder / FILE))
    opened.mark("calibrate", done=True)
    if world.is_main:
        say(f"{opened.folder / FILE}: a score for every unit, by {cfg.calibrate.criterion}")


def measure(model: engine.Model, samples: Samples, opened: Session) -> dict[str, torch.Tensor]:
    """Scores on every rank. Each sample is read by one data-parallel replica; replicas meet once, at the end."""
    settings, world = opened.cfg.calibrate, opened.world
    mine = range(world.dp_rank, len(samples), world.dp)
    starts = range(0, len(mine), settings.micro_batch_size)
    microbatches = (torch.stack([samples[i][:-1] for i in mine[start : start + settings.micro_batch_size]]) for start in starts)
    probes = Probes(model, world, settings.seq_agg, settings.batch_agg, settings.seq_length, settings.compile)
    bar = progress("calibrate", len(mine), opened.cfg.logging.progress and world.is_main)
    with probes.attached(), bar as advance:
        for group in engine.in_passes(microbatches, world, lambda tokens_BS: tokens_BS.shape):
            engine.forward_only(model, group, world, watch=probes)
            advance(sum(map(len, group)))
    scores = collect(probes, world)
    if settings.skip_layers is not None:
        scores[LAYERS_LOSS] = measure_depth(model, samples, opened, settings.skip_layers)
    return scores


def measure_depth(model: engine.Model, samples: Samples, opened: Session, at_a_time: int) -> torch.Tensor:
    """The loss without every run of layers, on the first of the samples."""
    from minitron.data.corpus import eval_batches

    settings, world = opened.cfg.calibrate, opened.world
    first = [samples[i] for i in range(min(settings.skip_samples, len(samples)))]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return eval_batches(first, micro_batch_size=settings.micro_batch_size, dp_rank=world.dp_rank, dp_size=world.dp)

    runs = model.arch.num_layers - at_a_time + 1
    with progress("layers by loss", runs, opened.cfg.logging.progress and world.is_main) as advance:
        return losses_without(model, batches, world, at_a_time, advance)
