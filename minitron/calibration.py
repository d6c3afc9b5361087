"""Measuring importance inside an open run: what the verbs that measure share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from minitron import engine
from minitron.arch.arch import Arch
from minitron.importance.depth import losses_without
from minitron.importance.hooks import Probes
from minitron.importance.scores import LAYERS_LOSS, collect, magnitude_scores, random_scores
from minitron.reporting.console import progress
from minitron.session import Session

if TYPE_CHECKING:
    from minitron.data.corpus import Samples


def importance(
    opened: Session, arch: Arch, model: Callable[[], engine.Model], skip_layers: int | None, title: str = "calibrate"
) -> dict[str, torch.Tensor]:
    """Scores of every unit of a model of these sizes, on every rank, by the criterion and on the text of the settings.

    `model` is called once the text is there, and only where weights are needed. `title` is what the progress is called.
    """
    cfg, world = opened.cfg, opened.world
    if cfg.calibrate.criterion == "random":
        return random_scores(arch, cfg.seed)
    if cfg.calibrate.criterion == "magnitude":
        return magnitude_scores(model(), world)
    from minitron.data.corpus import Windows

    samples = Windows(opened.data.blend("calibration"), cfg.calibrate.seq_length, count=cfg.calibrate.samples, shuffle_seed=cfg.seed,
                      setting="calibrate.samples")  # fmt: skip
    return measure(model(), samples, opened, skip_layers, title)


def measure(model: engine.Model, samples: Samples, opened: Session, skip_layers: int | None, title: str) -> dict[str, torch.Tensor]:
    """Scores on every rank. Each sample is read by one data-parallel replica; replicas meet once, at the end."""
    settings, world = opened.cfg.calibrate, opened.world
    mine = range(world.dp_rank, len(samples), world.dp)
    starts = range(0, len(mine), settings.micro_batch_size)
    microbatches = (torch.stack([samples[i][:-1] for i in mine[start : start + settings.micro_batch_size]]) for start in starts)
    probes = Probes(model, world, settings.seq_agg, settings.batch_agg, settings.seq_length, settings.compile)
    bar = progress(title, len(mine), opened.cfg.logging.progress and world.is_main)
    with probes.attached(), bar as advance:
        for group in engine.in_passes(microbatches, world, lambda tokens_BS: tokens_BS.shape):
            engine.forward_only(model, group, world, watch=probes)
            advance(sum(map(len, group)))
    scores = collect(probes, world)
    if skip_layers is not None:
        scores[LAYERS_LOSS] = measure_depth(model, samples, opened, skip_layers)
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
