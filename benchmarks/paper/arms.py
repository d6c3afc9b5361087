"""One arm with one seed: cut a student in memory, retrain it, measure it. Nothing is written; everything that seeds or arms share is made once.

Legend: B microbatch, S sequence, T = B x S tokens, H and G hidden sizes of student and teacher, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.paper.claims import ARMS, CURVE, Arm
from minitron import engine
from minitron.calibration import importance
from minitron.config.compose import compose
from minitron.config.schema import Distill
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.signal import LiveTeacher, NoTeacher, Signal, Teacher, WholeSignal, head_of
from minitron.distillation.step import distillation_loss, local_tokens
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.rounds import way
from minitron.pruning.target import target_arch
from minitron.session import Session
from minitron.stages import prune
from minitron.training import step_batches

Tensor = torch.Tensor
BOTH = Distill(cross_entropy=1.0)  # what is measured: KL to the teacher and the loss on the text
SHARED = ("source", "teacher_source", "teacher_world", "teacher", "data")  # of a session, by all arms


class Remembered:
    """A teacher that is asked about the same batches by one arm after another: its last hidden states stay in memory, by what they are of."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self.answers: dict[Any, list[Signal | None]] = {}

    def signals(self, step: Any, batches: Sequence[engine.Batch]) -> Sequence[Signal | None]:
        """As `Teacher` says; `step` may be whatever tells the batches apart."""
        if step not in self.answers:
            self.answers[step] = [*self.teacher.signals(0, batches)]
        return self.answers[step]


class Seed:
    """What the arms of one seed share: the scores of the whole model, and what the teacher says of the text in this order."""

    def __init__(self, opened: Session, settings: Sequence[str], number: int, held_out: Remembered) -> None:
        self.opened, self.settings, self.number, self.held_out = opened, settings, number, held_out
        self.teacher = Remembered(LiveTeacher(opened.teacher, opened.world))
        self.scores: dict[Any, dict[str, Tensor]] = {}
        self.scratch = Scratch()

    def run(self, name: str, parts: dict[str, tuple[str, ...]]) -> dict[str, Any]:
        """The figures of an arm. `parts`: the teacher's."""
        arm = ARMS[name]
        wall, processor = time.perf_counter(), time.process_time()
        settings = [*(one for part in arm.parts for one in parts[part]), *arm.settings]
        tokens = 0
        if arm.via is not None:
            first = self._session(parts[arm.via])
            model = self._cut(first)
            tokens += self._retrain(first, model, Arm(), {})
            opened = self._session(settings, arm.budget)
            model = self._cut_again(opened, model)
        else:
            opened = self._session(settings, arm.budget)
            model = self._cut(opened)
            if arm.init == "random":
                renew(model, opened.cfg.seed)
        found: dict[str, Any] = {"settings": settings, "params": model.arch.num_parameters(), "before": self._glance(opened, model)}
        curve = {"0.0": found["before"]["loss"]}
        if arm.budget:
            tokens += self._retrain(opened, model, arm, curve)
            found["after"] = self._measure(opened, model)
            curve[str(CURVE[-1])] = found["after"]["loss"]
        seconds = {"seconds": time.perf_counter() - wall, "processor_seconds": time.process_time() - processor}
        return {**found, "curve": curve, "tokens": tokens, **seconds}

    def _session(self, settings: Sequence[str], budget: float = 1.0) -> Session:
        """The open run with an arm's settings."""
        cfg = compose("compress", [*self.settings, *settings, f"seed={self.number}"])
        cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=max(1, round(cfg.train.steps * budget))))
        other = dataclasses.replace(self.opened, cfg=cfg)
        other.__dict__.update({name: self.opened.__dict__[name] for name in SHARED})
        return other

    def _cut(self, opened: Session) -> engine.Model:
        cfg, arch = opened.cfg, opened.source.arch
        if cfg.calibrate not in self.scores:
            self.scores[cfg.calibrate] = importance(opened, arch, opened.load_source, cfg.calibrate.skip_lengths)
        target = target_arch(arch, cfg.target, cfg.parallel)
        return prune.cut(opened, cfg.target, self.scores[cfg.calibrate], way(arch, target, cfg.target.rounds))[0]

    def _cut_again(self, opened: Session, model: engine.Model) -> engine.Model:
        cfg, arch = opened.cfg, model.arch
        scores = importance(opened, arch, lambda: model, cfg.calibrate.skip_lengths)
        target = target_arch(arch, cfg.target, cfg.parallel)
        return reslice(model, select(scores, arch, target, cfg.target.layers_by), target, opened.world)

    def _retrain(self, opened: Session, model: engine.Model, arm: Arm, curve: dict[str, float]) -> int:
        """Train the model, noting the loss at the shares of CURVE; returns how many tokens it saw."""
        cfg, world, samples = opened.cfg, opened.world, opened.training_samples
        teacher = NoTeacher() if cfg.distill.loss == "none" else self.teacher
        by_budget = Labelled(teacher, cfg.train.steps)  # an order depends on how many samples it is of
        if arm.logits is None:
            loss = distillation_loss(model, by_budget, cfg.distill, world, scratch=self.scratch)
        else:
            loss = loss_on_logits(model, by_budget, arm.logits, cfg.distill, world)
        trainer = engine.Trainer(model, cfg.train, world)
        stops = {round(cfg.train.steps * share): share for share in CURVE[1:-1]}
        while trainer.step < cfg.train.steps:
            batches = step_batches(samples, cfg, world, trainer.step)
            line = trainer.update(batches, loss(trainer.step, batches))
            trainer.step += 1
            if line["skipped"]:
                raise RuntimeError(f"step {trainer.step} was skipped: {line}")
            if trainer.step in stops:
                curve[str(stops[trainer.step])] = self._glance(opened, model)["loss"]
        trainer.close()
        return cfg.train.steps * cfg.train.global_batch_size * cfg.train.seq_length

    def _glance(self, opened: Session, model: engine.Model) -> dict[str, float]:
        """Of less held-out text, for what is measured on the way."""
        return losses(opened, model, self.held_out, "valid", opened.cfg.train.eval_tokens, self.scratch)

    def _measure(self, opened: Session, model: engine.Model) -> dict[str, Any]:
        """Of held-out text at the top, and of each text of eval.texts."""
        cfg = opened.cfg
        splits = {"": "valid", **{name: f"text_{name}" for name in cfg.eval.texts}}
        found = {name: losses(opened, model, self.held_out, split, cfg.eval.tokens, self.scratch) for name, split in splits.items()}
        return {**found.pop(""), "texts": found}


class Labelled:
    """A remembered teacher whose steps are told apart from those of trainings of other lengths."""

    def __init__(self, teacher: Remembered | NoTeacher, label: int) -> None:
        self.teacher, self.label = teacher, label

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> Sequence[Signal | None]:
        """As `Teacher` says."""
        return self.teacher.signals((self.label, step), batches)  # type: ignore[arg-type]


def losses(opened: Session, model: engine.Model, teacher: Remembered, split: str, tokens: int, scratch: Scratch) -> dict[str, float]:
    """{"loss": next-token loss, "kl": forward KL to the teacher}, in nats per token, over windows of a prepared text that don't overlap."""
    from minitron.data.corpus import Windows, eval_batches

    cfg, world = opened.cfg, opened.world
    windows = Windows(opened.data.blend(split), cfg.eval.seq_length or cfg.train.seq_length, limit_tokens=tokens)
    stream = eval_batches(windows, micro_batch_size=cfg.eval.micro_batch_size, dp_rank=world.dp_rank, dp_size=world.dp)
    sums = torch.zeros(3, dtype=torch.float64)
    for number, (tokens_BT, valid_B) in enumerate(stream):
        batch = engine.Batch(tokens_BT)
        (signal,) = teacher.signals((split, tokens, number), [batch])
        mask_T = local_tokens(valid_B[:, None].expand_as(batch.labels_BS), world)

        def collect(_: int, hidden_SBH: Tensor, batch: engine.Batch = batch, signal: Any = signal, mask_T: Tensor = mask_T) -> Tensor:
            labels_T, head = local_tokens(batch.labels_BS, world), head_of(model, world)
            found = linear_distillation(hidden_SBH.flatten(0, 1), head, signal, mask_T, world, BOTH, labels_T, scratch)
            return torch.stack([found.ce, found.kd, mask_T.sum()]).double().cpu()

        sums += engine.forward_only(model, [batch.inputs_BS], world, collect)[0]
    ce, kd, count = sums.tolist()
    return {"loss": ce / count, "kl": kd / count}


def renew(model: engine.Model, seed: int) -> None:
    """Weights as a Llama has before any training: matrices with a deviation of 0.02, norms of ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.empty(parameter.shape).normal_(std=0.02, generator=generator) if parameter.dim() > 1 else torch.ones(parameter.shape)
            parameter.copy_(drawn)


# of student's and teacher's logits [T, V]: a loss per token
LOGITS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda student_TV, teacher_TV: (student_TV - teacher_TV).square().mean(dim=-1),
    "cosine": lambda student_TV, teacher_TV: 1.0 - torch.cosine_similarity(student_TV, teacher_TV, dim=-1),
}


def loss_on_logits(
    student: engine.Model, teacher: Any, kind: str, settings: Distill, world: engine.World
) -> Callable[[int, list[engine.Batch]], engine.StepLoss]:
    """As `distillation_loss`, with one of LOGITS in the place of the divergence; all logits of a microbatch are in memory."""

    def logits(hidden_T: Tensor, head: Any) -> Tensor:
        return torch.nn.functional.linear(hidden_T.float(), head.weight_vH.float()) * head.scale

    def for_step(step: int, batches: list[engine.Batch]) -> engine.StepLoss:
        signals = teacher.signals(step, batches)

        def last(number: int, hidden_SBH: Tensor) -> engine.LossParts:
            signal = signals[number]
            assert isinstance(signal, WholeSignal)
            student_TV, teacher_TV = logits(hidden_SBH.flatten(0, 1), head_of(student, world)), logits(signal.hidden_TG, signal.head)
            labels_T = local_tokens(batches[number].labels_BS, world)
            ce = torch.nn.functional.cross_entropy(student_TV, labels_T, reduction="sum")
            total = LOGITS[kind](student_TV, teacher_TV).sum() + settings.cross_entropy * ce
            tokens = torch.tensor(len(labels_T), dtype=torch.int, device=total.device)
            return total, tokens, {"loss": total.detach(), "tokens": tokens}

        return engine.StepLoss(last)

    return for_step
