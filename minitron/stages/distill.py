"""`minitron distill`: retrain the pruned model from a teacher, co-located or cached, or with distill.loss=none on the text alone."""

from __future__ import annotations

from minitron.config.schema import Config
from minitron.distillation.cache import CachedTeacher
from minitron.distillation.step import distillation_loss
from minitron.reporting.console import say
from minitron.reporting.wording import counted
from minitron.session import Session, session
from minitron.teaching import given_teacher, hidden_loss, teacher_of
from minitron.training import train


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
    hidden = hidden_loss(opened, student)
    teacher = given or teacher_of(opened, hidden.teacher_states if hidden else None)
    loss = distillation_loss(student, teacher, cfg.distill, world, hidden)
    opened.mark("distill", done=False)
    train(opened, student, loss, {"hidden": hidden} if hidden else {}, opened.teacher_source.arch if given is None else None)
    opened.mark("distill", done=True)
    if world.is_main:
        say(f"{opened.checkpoints.path(cfg.train.steps)}: the student after {counted(cfg.train.steps, 'step')}")
