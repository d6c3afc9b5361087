"""The teacher inside an open run: whatever stands in its place, and what its students are trained with, one or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from minitron import engine
from minitron.distillation.cache import Cache, CachedTeacher, names
from minitron.distillation.hidden import HiddenLoss, TeacherStates
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher, NoTeacher, Signal, Teacher
from minitron.reporting.console import progress, say
from minitron.session import Session
from minitron.weights.load import load_head


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
    head = Head(*load_head(opened.teacher_source, opened.world, opened.dtype), softcap=model.arch.logit_softcap)
    return ForeignTeacher(model, its_world, head, opened.world)


def hidden_loss(opened: Session, student: engine.Model) -> HiddenLoss | None:
    """The student's loss between hidden states, where it has one; its `teacher_states` are to watch the teacher's passes."""
    cfg = opened.cfg
    return HiddenLoss(student, opened.teacher, cfg.distill.hidden, cfg.train, opened.world, cfg.seed) if cfg.distill.hidden.enabled else None


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


class Watches:
    """Several that follow the same passes."""

    def __init__(self) -> None:
        self.all: list[TeacherStates] = []

    def begin(self, microbatch: int | None) -> None:
        """As `engine.Watch` says."""
        for watch in self.all:
            watch.begin(microbatch)

    def end(self, microbatch: int) -> None:
        """As `engine.Watch` says."""
        for watch in self.all:
            watch.end(microbatch)


class SharedTeacher:
    """A teacher that several students ask about the same batches, one after another: it is run for the first of them, and its answer stays until
    `forget`, which belongs after each step. What of its inside the students compare is theirs to keep: each of `watches` follows the one run.

    Held are a step's last hidden states of this rank, or what was read of a cache.
    """

    def __init__(self, opened: Session, given: Teacher | None = None) -> None:
        self.watches = Watches()
        self.teacher = given or teacher_of(opened, self.watches)
        self.step: int | None = None
        self.answer: Sequence[Signal | None] = ()

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> Sequence[Signal | None]:
        """As `Teacher` says."""
        if step != self.step:
            self.forget()
            self.answer = self.teacher.signals(step, batches)
            self.step = step
        return self.answer

    def forget(self) -> None:
        """The step is over for all students."""
        self.step, self.answer = None, ()
