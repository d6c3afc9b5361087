"""`minitron distill`: retrain the pruned model from the co-located teacher."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from minitron import engine
from minitron.config.schema import Config
from minitron.distillation.cache import Cache, CachedTeacher
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher, Teacher
from minitron.distillation.step import distillation_loss
from minitron.reporting.console import progress, say
from minitron.reporting.tracking import Tracker
from minitron.reporting.wording import counted
from minitron.session import Session, session, stop_on_signal
from minitron.weights.load import load_head

if TYPE_CHECKING:
    from minitron.data.corpus import TrainingSamples

# figures of a step -> what they are beside the bar: the two losses are different quantities
SHOWN = {"loss": "distillation loss", "tokens_per_second": "tokens/s", "valid_loss": "held-out next-token loss"}


def run(cfg: Config) -> None:
    """Open the run and distil."""
    with session(cfg, "distill") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/checkpoints and metrics.jsonl; continues from the newest checkpoint."""
    opened.mark("distill", done=False)
    cfg, world = opened.cfg, opened.world
    opened.data  # noqa: B018 -- before the models: a text that is too short is refused first
    samples = opened.training_samples
    cached = None if cfg.teacher.cache.folder is None else cached_teacher(opened)
    student = opened.load_pruned()
    opened.check_descent()
    hidden = HiddenLoss(student, opened.teacher, cfg.distill.hidden, cfg.train, world, cfg.seed) if cfg.distill.hidden.enabled else None
    teacher = cached or teacher_of(opened, hidden.teacher_states if hidden else None)
    loss = distillation_loss(student, teacher, cfg.distill, world, hidden)
    trainer = engine.Trainer(student, cfg.train, world, {"hidden": hidden} if hidden else {})
    opened.checkpoints.resume(trainer)
    if world.is_main and trainer.step:
        todo = "nothing is left to do" if trainer.step == cfg.train.steps else "goes on from there"
        say(f"{trainer.step:,} of {cfg.train.steps:,} steps were done before: {todo}")
    with _metrics(opened, trainer.step) as report, stop_on_signal(world) as stop_requested:
        task = engine.Task(
            microbatches=lambda step: step_batches(samples, cfg, world, step), loss=loss, validate=lambda: validate(opened, student), report=report
        )
        engine.fit(trainer, task, opened.checkpoints, stop_requested)
    trainer.close()
    opened.mark("distill", done=True)
    if world.is_main:
        say(f"{opened.checkpoints.path(trainer.step)}: the student after {counted(trainer.step, 'step')}")


def teacher_of(opened: Session, watch: engine.Watch | None) -> Teacher:
    """The live teacher as the student asks it: in the student's layout, where `watch` may follow its passes, or in one of its own."""
    model, its_world = opened.teacher, opened.teacher_world
    if its_world is opened.world:
        return LiveTeacher(model, opened.world, watch)
    return ForeignTeacher(model, its_world, Head(*load_head(opened.teacher_source, opened.world, opened.dtype)), opened.world)


def cached_teacher(opened: Session) -> CachedTeacher:
    """A cache in the teacher's place: all of it is read once and held against this run. Raises RequestError where it does not fit."""
    cfg, world, wanted = opened.cfg, opened.world, opened.cache_description()

    def look() -> Cache:
        cache = Cache.load(opened.cache_folder)
        cache.check(wanted)
        return cache

    cache = engine.on_main(world, look)
    with progress("check the cache", len(cache.needed(wanted.samples)), cfg.logging.progress and world.is_main) as advance:
        cache.verify(opened.training_samples, world, advance)
    if world.is_main:
        held = cache.description.top_k
        kept = f"{cfg.teacher.cache.top_k} of the {held}" if cfg.teacher.cache.top_k < held else f"the {held}"
        say(f"no teacher is loaded: {kept} most probable tokens are read from {cache.folder}")
    return CachedTeacher(cache, cfg.teacher.cache.top_k, world)


def step_batches(samples: TrainingSamples, cfg: Config, world: engine.World, step: int) -> list[engine.Batch]:
    """This rank's microbatches of a step: the global batch holds the same samples whatever the split."""
    from minitron.data.corpus import batches

    count = cfg.train.global_batch_size // (cfg.train.micro_batch_size * world.dp)
    stream = batches(samples, start=step * cfg.train.global_batch_size, micro_batch_size=cfg.train.micro_batch_size, num_microbatches=count,
                     dp_rank=world.dp_rank, dp_size=world.dp)  # fmt: skip
    return [next(stream) for _ in range(count)]


def validate(opened: Session, student: engine.Model) -> dict[str, float]:
    """The student's language-model loss on held-out text."""
    from minitron.data.corpus import Windows, eval_batches

    train, world = opened.cfg.train, opened.world
    windows = Windows(opened.data.blend("valid"), train.seq_length, limit_tokens=train.eval_tokens, setting="train.eval_tokens")
    stream = eval_batches(windows, micro_batch_size=train.micro_batch_size, dp_rank=world.dp_rank, dp_size=world.dp)
    return {"valid_loss": engine.language_model_score(student, stream, world).loss}


class _metrics:
    """metrics.jsonl and the progress bar, on rank 0."""

    def __init__(self, opened: Session, start_step: int) -> None:
        self.opened, self.start_step = opened, start_step
        self.tracker: Tracker | None = None

    def __enter__(self) -> Any:
        cfg = self.opened.cfg
        main = self.opened.world.is_main
        self.tracker = engine.main_only(
            self.opened.world,
            lambda: Tracker(self.opened.folder, start_step=self.start_step, logging=cfg.logging, config=dataclasses.asdict(cfg)),
        )
        self.bar = progress("distill", cfg.train.steps, cfg.logging.progress and main, start=self.start_step)
        advance = self.bar.__enter__()

        def report(line: dict[str, Any]) -> None:
            if self.tracker is not None and (line["step"] % cfg.logging.interval == 0 or "valid_loss" in line):
                self.tracker.log(line)
            advance(1, **{name: line[key] for key, name in SHOWN.items() if key in line})

        return report

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.bar.__exit__(kind, error, traceback)
        if self.tracker is not None:
            self.tracker.__exit__(kind, error, traceback)
