"""Measuring importance inside an open run: what the verbs that measure share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from minitron import engine
from minitron.arch.arch import Arch
from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation import choices
from minitron.importance.depth import losses_without, sums_without
from minitron.importance.hooks import Probes
from minitron.importance.scores import LAYERS_CHOICES, LAYERS_LOSS, collect, magnitude_scores, random_scores
from minitron.reporting.console import progress
from minitron.session import Session

if TYPE_CHECKING:
    from minitron.data.corpus import Samples


def importance(
    opened: Session, arch: Arch, model: Callable[[], engine.Model], skip_lengths: Sequence[int], title: str = "calibrate", ask: bool = True
) -> dict[str, torch.Tensor]:
    """Scores of every unit of a model of these sizes, on every rank, by the criterion and on the text of the settings.

    `model` is called once the text is there, and only where weights are needed. `skip_lengths`: numbers of layers to leave
    out at a time, to see what is missed without them; `ask`: also of the answers to calibrate.choices. `title` is what the progress is called.
    """
    cfg, world = opened.cfg, opened.world
    if cfg.calibrate.criterion == "random":
        return random_scores(arch, cfg.seed)
    if cfg.calibrate.criterion == "magnitude":
        return magnitude_scores(model(), world)
    from minitron.data.corpus import Windows

    samples = Windows(opened.data.blend("calibration"), cfg.calibrate.seq_length, count=cfg.calibrate.samples, shuffle_seed=cfg.seed,
                      setting="calibrate.samples")  # fmt: skip
    return measure(model(), samples, opened, skip_lengths, title, ask)


def measure(model: engine.Model, samples: Samples, opened: Session, skip_lengths: Sequence[int], title: str, ask: bool) -> dict[str, torch.Tensor]:
    """Scores on every rank. Each sample is read by one data-parallel replica; replicas meet at the end, and in layers whose experts they share."""
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
    if skip_lengths:
        scores |= losses_by_depth(model, samples, opened, skip_lengths)
    if skip_lengths and ask and settings.choices is not None:
        scores |= accuracies_by_depth(model, opened, skip_lengths)
    return scores


def losses_by_depth(model: engine.Model, samples: Samples, opened: Session, skip_lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """The loss without every run of layers, on the first of the samples."""
    from minitron.data.corpus import eval_batches, num_eval_batches

    settings, world = opened.cfg.calibrate, opened.world
    first = [samples[i] for i in range(min(settings.skip_samples, len(samples)))]
    batches = eval_batches(first, micro_batch_size=settings.micro_batch_size, dp_rank=world.dp_rank, dp_size=world.dp)
    passes = num_eval_batches(first, settings.micro_batch_size, world.dp)
    with progress("layers by loss", passes, opened.cfg.logging.progress and world.is_main) as advance:
        losses = losses_without(model, batches, world, skip_lengths, advance)
    return {f"{LAYERS_LOSS}.{length}": values for length, values in losses.items()}


def accuracies_by_depth(model: engine.Model, opened: Session, skip_lengths: Sequence[int]) -> dict[str, torch.Tensor]:
    """The share of questions that the model answers rightly without every run of layers."""
    settings, world, tokenizer = opened.cfg.calibrate, opened.world, load_tokenizer(str(opened.source.folder))
    assert settings.choices is not None
    given = settings.choices
    questions, normalised = engine.on_main(world, lambda: choices.read(given, "calibrate.choices", settings.questions))
    asked = choices.requests(questions, tokenizer, model.arch.max_position_embeddings)
    ways = (2 * world.cp if world.cp > 1 else 1) * (world.tp if world.sequence_parallel else 1)
    batches = list(choices.microbatches(asked, settings.micro_batch_size * settings.seq_length, ways))[world.dp_rank :: world.dp]
    with progress("layers by choices", len(batches), opened.cfg.logging.progress and world.is_main) as advance:
        sums, _ = sums_without(model, batches, world, skip_lengths, len(asked), advance)
    accuracies = {length: choices.accuracy(losses_PN, questions, normalised) for length, losses_PN in sums.items()}
    return {f"{LAYERS_CHOICES}.{length}": values.float() for length, values in accuracies.items()}
