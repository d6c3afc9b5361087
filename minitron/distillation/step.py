"""One distillation step on co-located models: the teacher's pass, then the loss of the student's pass.

Legend: B microbatch, S sequence, T = B x S tokens, H hidden size of the student.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from minitron import engine
from minitron.config.schema import Distill
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.signal import Teacher, head_of

Tensor = torch.Tensor
if TYPE_CHECKING:
    from minitron.distillation.hidden import HiddenLoss

    ForStep = Callable[[int, list[engine.Batch]], engine.StepLoss]


def distillation_loss(
    student: engine.Model,
    teacher: Teacher,
    settings: Distill,
    world: engine.World,
    hidden: HiddenLoss | None = None,
    scratch: Scratch | None = None,
) -> ForStep:
    """The trainer's `loss`: asks the teacher about a step's microbatches, then gives the student's loss of each.

    Forward KL of the whole next-token distributions, alone (arXiv 2407.14679, best practice 5), unless `settings` say otherwise;
    with their loss "none", and `NoTeacher`, the cross-entropy alone.
    `hidden` adds its loss; its `teacher_states` watch this teacher's passes. `scratch`: memory to work in, which losses that are made one after
    another may share (None: of its own).
    """
    scratch = scratch or Scratch()

    def for_step(step: int, batches: list[engine.Batch]) -> engine.StepLoss:
        signals = dict(enumerate(teacher.signals(step, batches)))

        def loss(number: int, hidden_SBH: Tensor) -> engine.LossParts:
            hidden_TH = engine.whole_sequence(hidden_SBH, world).flatten(0, 1)
            mask_T, labels_T = counted_mask(batches[number], world), local_tokens(batches[number].labels_BS, world)
            tokens = engine.to_device(mask_T.sum(dtype=torch.int), world.device)
            signal, head = signals.pop(number), head_of(student, world)  # freed as soon as it is used
            losses = linear_distillation(hidden_TH, head, signal, mask_T, world, settings, labels_T, scratch)
            parts = {"kd_loss": losses.kd} if settings.loss != "none" else {}
            parts |= {"ce_loss": losses.ce} if settings.cross_entropy > 0 else {}
            return losses.total, tokens, {"loss": losses.total.detach(), **parts, "tokens": tokens}

        if hidden is None:
            return engine.StepLoss(loss)
        hidden.start(batches)
        return engine.StepLoss(loss, hidden, hidden.sums, hidden.finish)

    return for_step


def counted_mask(batch: engine.Batch, world: engine.World) -> Tensor:
    """Which tokens of this rank's last hidden states count, bool [T], in their order; where the batch lies, in host memory."""
    counted_BS = torch.ones_like(batch.inputs_BS, dtype=torch.bool) if batch.counted_BS is None else batch.counted_BS
    return in_order(counted_BS, world)


def local_tokens(whole_BS: Tensor, world: engine.World) -> Tensor:
    """What is said of each token, [B, S] or [B, S, K], in the order of this rank's last hidden states: [T] or [T, K], on its device."""
    return engine.to_device(in_order(whole_BS, world), world.device)


def in_order(whole_BS: Tensor, world: engine.World) -> Tensor:
    """As `local_tokens`, where it lies."""
    return engine.local_part(whole_BS, world).transpose(0, 1).flatten(0, 1)
