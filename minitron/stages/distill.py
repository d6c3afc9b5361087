"""`minitron distill`: retrain the pruned model from a teacher, co-located or cached, or with distill.loss=none on the text alone."""

from __future__ import annotations

import dataclasses

from minitron import engine
from minitron.config.schema import Config
from minitron.distillation.cache import Cache, CachedTeacher, names
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher, NoTeacher, Teacher
from minitron.distillation.step import distillation_loss
from minitron.reporting.console import progress, say
from minitron.reporting.wording import counted
from minitron.session import Session, session
from minitron.training import train
from minitron.weights.load import load_head


def run(cfg: Config) -> None:
    """Open the run and distil."""
    with session(cfg, "distill") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/checkpoints and metrics.jsonl; continues from the newest checkpoint."""
    cfg, world = opened.cfg, opened.world
    opened.training_samples  # noqa: B018 -- before the models: a text that can't be used is refused first
    given = given_teacher(opened)
    student = opened.load_pruned()
    opened.check_descent(given.cache.description.predictions() if isinstance(given, CachedTeacher) else None)
    hidden = HiddenLoss(student, opened.teacher, cfg.distill.hidden, cfg.train, world, cfg.seed) if cfg.distill.hidden.enabled else None
    teacher = given or teacher_of(opened, hidden.teacher_states if hidden else None)
    loss = distillation_loss(student, teacher, cfg.distill, world, hidden)
    opened.mark("distill", done=False)
    train(opened, student, loss, {"hidden": hidden} if hidden else {}, opened.teacher_source.arch if given is None else None)
    opened.mark("distill", done=True)
    if world.is_main:
        say(f"{opened.checkpoints.path(cfg.train.steps)}: the student after {counted(cfg.train.steps, 'step')}")


def given_teacher(opened: Session) -> Teacher | None:
    """What stands in a teacher's place, so that none is loaded (None: one is)."""
    if opened.cfg.distill.loss == "none":
        return NoTeacher()
    return None if opened.cfg.teacher.cache.folder is None else cached_teacher(opened)


def teacher_of(opened: Session, watch: engine.Watch | None) -> Teacher:
    """The live teacher as the student asks it: in the student's layout, where `watch` may follow its passes, or in one of its own."""
    model, its_world = opened.teacher, opened.teacher_world
    if its_world is opened.world:
        return LiveTeacher(model, opened.world, watch)
    return ForeignTeacher(model, its_world, Head(*load_head(opened.teacher_source, opened.world, opened.dtype)), opened.world)


def cached_teacher(opened: Session) -> CachedTeacher:
    """A cache in the teacher's place: all of it is read once and held against this run. Raises RequestError where it does not fit."""
    cfg, world, cache = opened.cfg, opened.world, fitting_cache(opened)
    with progress("check the cache", len(cache.needed(len(opened.training_samples))), cfg.logging.progress and world.is_main) as advance:
        cache.verify(opened.training_samples, world, advance)
    if world.is_main:
        held = cache.description.top_k
        kept = f"{cfg.teacher.cache.top_k} of the {held}" if cfg.teacher.cache.top_k < held else f"the {held}"
        say(f"no teacher is loaded: {kept} most probable tokens are read from {cache.folder}")
    return CachedTeacher(cache, cfg.teacher.cache.top_k, world)


def fitting_cache(opened: Session) -> Cache:
    """The cache that the run reads, held against teacher, text and settings by its manifest."""

    def look() -> Cache:
        cache = Cache.load(opened.cache_folder)
        cache.check(dataclasses.asdict(opened.cache_description()), names(opened.cfg))
        return cache

    return engine.on_main(opened.world, look)
