"""`minitron train`: the model of model.path itself, whole, on the next token of the text.

Teacher correction (arXiv 2408.11796): a teacher that never saw the text to distil on is a worse teacher for it, so it is
fine-tuned on that text first. Its folder, from `minitron export`, is then model.path or teacher.path of a compression.
"""

from __future__ import annotations

from minitron.config.schema import Config, Distill
from minitron.distillation.signal import NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.reporting.console import say
from minitron.reporting.wording import counted
from minitron.session import Session, session
from minitron.training import train

NEXT_TOKEN = Distill(loss="none", cross_entropy=1.0)


def run(cfg: Config) -> None:
    """Open the run and train."""
    with session(cfg, "train") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/checkpoints and metrics.jsonl; continues from the newest checkpoint."""
    opened.training_samples  # noqa: B018 -- before the model: a text that can't be used is refused first
    opened.check_descent()
    model = opened.load_whole()
    opened.mark("train", done=False)
    train(opened, model, distillation_loss(model, NoTeacher(), NEXT_TOKEN, opened.world), {})
    opened.mark("train", done=True)
    if opened.world.is_main:
        steps = opened.cfg.train.steps
        say(f"{opened.checkpoints.path(steps)}: the model after {counted(steps, 'step')}; minitron export makes a folder of it")
