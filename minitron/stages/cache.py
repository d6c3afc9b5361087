"""`minitron cache`: run the teacher once over the training samples and keep its most probable tokens, for trainings without it."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import torch

from minitron import engine
from minitron.config.schema import Config, TeacherCache
from minitron.distillation import cache
from minitron.distillation.fused import Scratch
from minitron.distillation.signal import TopSignal, head_of
from minitron.distillation.topk import top_signal
from minitron.errors import RequestError
from minitron.record import locked, own
from minitron.reporting.console import progress, say
from minitron.reporting.wording import counted, decimal, size
from minitron.session import Session, session


def run(cfg: Config) -> None:
    """Open the run and cache."""
    with session(cfg, "cache") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes teacher.cache.folder, by default run.dir/cache; files that are there are not made again."""
    with contextlib.ExitStack() as held:  # the folder may be another run's, too

        def take() -> None:
            own(opened.cache_folder, "teacher.cache.folder", "a cache's", cache.holds_others)
            held.enter_context(locked(opened.cache_folder, "teacher.cache.folder"))

        engine.main_only(opened.world, take)
        opened.data  # noqa: B018 -- before the model: a text that is too short is refused first
        fill(opened.cache_folder, opened.cache_description(), opened)


def fill(folder: Path, description: cache.Description, opened: Session) -> None:
    """Make what the folder lacks."""
    cfg, world, names = opened.cfg, opened.world, cache.names(opened.cfg)
    description = engine.on_main(world, lambda: as_begun(folder, description))
    todo = engine.on_main(world, lambda: cache.missing(folder, description, names))
    files = len(description.firsts())
    if world.is_main and len(todo) < files:
        done = f"{files - len(todo):,} of {counted(files, 'file')} {'was' if files == 1 else 'were'} made before"
        say(done + ("" if todo else ": nothing is left to do"))
    if todo:
        make(todo, description, folder, opened)
    made = engine.on_main(world, lambda: cache.finish(folder, description, names) if todo else cache.Cache.load(folder))
    if world.is_main:
        tokens = description.samples * description.seq_length
        per_token = f"{size(made.bytes)}B, {decimal(made.bytes / tokens, 1)} bytes per token"
        say(f"{folder}: the {cfg.teacher.cache.top_k} most probable tokens at each of {size(tokens)} tokens, {per_token}")
        top_k = "" if description.top_k == TeacherCache().top_k else f" teacher.cache.top_k={description.top_k}"
        say(f"minitron distill reads it with teacher.cache.folder={folder}{top_k}")


def as_begun(folder: Path, description: cache.Description) -> cache.Description:
    """A cache that was finished before is mended with as many samples per file as it has: they decide nothing of what it holds."""
    if not (folder / cache.MANIFEST).is_file():
        return description
    return dataclasses.replace(description, samples_per_file=cache.Cache.load(folder).description.samples_per_file)


def make(todo: list[int], description: cache.Description, folder: Path, opened: Session) -> None:
    """The files that begin with these samples: each replica makes its own, side by side."""
    world, model, samples = opened.teacher_world, opened.teacher, opened.training_samples
    with progress("cache", len(todo), opened.cfg.logging.progress and world.is_main) as advance, model.on_device():
        for start in range(0, len(todo), world.dp):
            side_by_side = todo[start : start + world.dp]
            failure = None
            first = side_by_side[world.dp_rank] if world.dp_rank < len(side_by_side) else None
            rows = range(0) if first is None else description.rows(first)  # a replica without any passes along with those that share its experts
            signals = predictions(model, rows, opened)
            try:
                if first is not None and signals:
                    cache.write(folder, description, first, map(samples.__getitem__, rows), signals)
            except RequestError as error:
                failure = str(error)
            engine.refuse_together(failure, world)
            advance(len(side_by_side))


def predictions(model: engine.Model, rows: range, opened: Session) -> list[TopSignal]:
    """Of each sample, whole, on the one rank of a replica that writes; nothing elsewhere."""
    settings, world = opened.cfg, opened.teacher_world
    scratch = Scratch()
    writes = world.is_last_stage and world.tp_rank == 0 and world.cp_rank == 0

    def collect(number: int, hidden_SBG: torch.Tensor) -> list[TopSignal]:
        hidden_SBG = engine.whole_sequence(hidden_SBG, world)
        head = head_of(model, world)
        found = top_signal(hidden_SBG.flatten(0, 1), head, settings.teacher.cache.top_k, settings.distill.temperature, world,
                           settings.distill.chunk_tokens, scratch)  # fmt: skip
        parts = (found.tokens_TK, found.log_probs_TK, found.tail_T)
        whole = [engine.whole_positions(part.unflatten(0, hidden_SBG.shape[:2]), world).cpu().unbind(1) for part in parts]
        return [TopSignal(*of_sample) for of_sample in zip(*whole, strict=True)] if writes else []

    size = settings.train.micro_batch_size
    batches = (opened.training_samples.batch(rows[start : start + size]) for start in range(0, len(rows), size))
    signals: list[TopSignal] = []
    for group in engine.in_passes(batches, world, lambda batch: batch.tokens_BT.shape):
        inputs_BS, documents_BS = [batch.inputs_BS for batch in group], [batch.documents_BS for batch in group]
        for found in engine.forward_only(model, inputs_BS, world, collect, documents_BS=documents_BS):
            signals += found
    return signals
