"""A small training run: a random student learns from a random teacher."""

import dataclasses

import torch

from minitron.config.schema import Distill, Hidden, Train
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.trainer import Task, Trainer, fit
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.oracles.models import tokens_of

SIZES = {"steps": 6, "global_batch_size": 4, "micro_batch_size": 2, "seq_length": 12, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2}
SETTINGS = Train(**SIZES, save_interval=2, eval_interval=4, eval_tokens=1)


class Run:
    """A trainer, what feeds it, and the lines that it reported."""

    def __init__(self, world, folder, settings=SETTINGS, dtype=torch.float32, hidden=None):
        self.world, self.settings = world, settings
        student, teacher = (load(open_folder(folder, "model.path"), world, dtype, recompute=how) for how in (settings.recompute, "none"))
        with torch.no_grad():
            for name, parameter in student.named_parameters():  # the student starts beside its teacher
                parameter.mul_(0.8 if "mlp" in name else 1.2)
        teacher.requires_grad_(False)
        extra = HiddenLoss(student, teacher, Hidden(enabled=True, **hidden), settings, world, seed=7) if hidden is not None else None
        self.trainer = Trainer(student, settings, world, {"hidden": extra} if extra else {})
        self.lines, self.validations = [], 0
        loss = distillation_loss(student, LiveTeacher(teacher, world, extra.teacher_states if extra else None), Distill(), world, extra)
        self.task = Task(microbatches=self.microbatches, loss=loss, validate=self.validate, report=self.lines.append)

    def step(self):
        """One step that works, so that there is a state of the optimizer."""
        batch = self.microbatches(self.trainer.step)
        line = self.trainer.update(batch, self.task.loss(self.trainer.step, batch))
        self.trainer.step += 1
        return line

    def microbatches(self, step):
        tokens = tokens_of(61, self.settings.global_batch_size, self.settings.seq_length + 1, seed=step)
        return [Batch(part) for part in tokens[self.world.dp_rank :: self.world.dp].split(self.settings.micro_batch_size)]

    def validate(self):
        self.validations += 1
        return {"valid_loss": float(self.validations)}

    def fit(self, folder, stop_after=None, **changes):
        """Train into `folder`, asking to stop after a step; returns this, for its lines."""
        task = dataclasses.replace(self.task, **changes)
        fit(self.trainer, task, Checkpoints(folder, in_background=True), lambda: self.trainer.step == stop_after)
        return self
