"""Training inside an open run: what every verb that trains shares."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minitron import engine
from minitron.arch.counts import training_flops
from minitron.config.schema import Config
from minitron.reporting.console import progress, say
from minitron.reporting.tracking import Tracker
from minitron.session import Session, stop_on_signal

if TYPE_CHECKING:
    from minitron.arch import Arch
    from minitron.data.corpus import TrainingSamples

# figures of a step -> what they are beside the bar: the losses are different quantities
SHOWN = {"kd_loss": "distillation loss", "ce_loss": "next-token loss", "tokens_per_second": "tokens/s", "valid_loss": "held-out next-token loss",
         "skipped_steps": "steps skipped"}  # fmt: skip


def train(
    opened: Session,
    model: engine.Model,
    loss: Callable[[int, list[engine.Batch]], engine.StepLoss],
    extras: dict[str, engine.Extra],
    teacher: Arch | None = None,
) -> None:
    """Train to the last step, from the newest checkpoint where there is one. Writes run.dir/checkpoints and metrics.jsonl.

    `teacher`: a model whose forward passes are part of every step.
    """
    cfg, world, samples = opened.cfg, opened.world, opened.training_samples
    trainer = engine.Trainer(model, cfg.train, world, extras)
    opened.checkpoints.resume(trainer)
    if world.is_main and trainer.step:
        todo = "nothing is left to do" if trainer.step == cfg.train.steps else "goes on from there"
        say(f"{trainer.step:,} of {cfg.train.steps:,} steps were done before: {todo}")
    with _metrics(opened, trainer.step) as report, stop_on_signal(world) as stop_requested:
        task = engine.Task(
            microbatches=lambda step: step_batches(samples, cfg, world, step),
            loss=loss,
            validate=lambda: {"valid_loss": held_out_loss(opened, model, cfg.train.eval_tokens, "train.eval_tokens")},
            report=report,
            source=lambda step: sources(opened, step),
            flops_per_token=training_flops(model.arch, cfg.train.seq_length, teacher),
            peak_tflops=cfg.logging.peak_tflops or engine.device_peak(world.device, cfg.dtype),
        )
        engine.fit(trainer, task, opened.checkpoints, stop_requested)
    trainer.close()


def step_batches(samples: TrainingSamples, cfg: Config, world: engine.World, step: int) -> list[engine.Batch]:
    """This rank's microbatches of a step: the global batch holds the same samples whatever the split."""
    from minitron.data.corpus import batches

    count = cfg.train.global_batch_size // (cfg.train.micro_batch_size * world.dp)
    stream = batches(samples, start=step * cfg.train.global_batch_size, micro_batch_size=cfg.train.micro_batch_size, num_microbatches=count,
                     dp_rank=world.dp_rank, dp_size=world.dp)  # fmt: skip
    return [next(stream) for _ in range(count)]


def sources(opened: Session, step: int) -> str:
    """The texts that a step's samples are taken from."""
    size, data = opened.cfg.train.global_batch_size, opened.data
    parts = sorted({*opened.training_samples.part_of[step * size : (step + 1) * size].tolist()})
    return " and ".join(data.parts[data.splits["train"][part][0]].source for part in parts)


def held_out_loss(opened: Session, model: engine.Model, tokens: int, setting: str) -> float:
    """The model's language-model loss on so many tokens of held-out text; `setting` says where the number comes from."""
    from minitron.data.corpus import Windows, eval_batches

    train, world = opened.cfg.train, opened.world
    windows = Windows(opened.data.blend("valid"), train.seq_length, limit_tokens=tokens, setting=setting)
    stream = eval_batches(windows, micro_batch_size=train.micro_batch_size, dp_rank=world.dp_rank, dp_size=world.dp)
    return engine.language_model_score(model, stream, world).loss


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
        verb = "train" if self.opened.verb == "train" else "distill"
        self.bar = progress(verb, cfg.train.steps, cfg.logging.progress and main, start=self.start_step)
        advance = self.bar.__enter__()

        def report(line: dict[str, Any]) -> None:
            if self.tracker is not None and (line["step"] % cfg.logging.interval == 0 or "valid_loss" in line):
                self.tracker.log(line)
            advance(1, **{name: line[key] for key, name in SHOWN.items() if line.get(key)})  # nothing is told of steps that were not skipped

        return report

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self.bar.__exit__(kind, error, traceback)
        if self.tracker is not None:
            self.tracker.__exit__(kind, error, traceback)
