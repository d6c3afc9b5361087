"""One distillation step on co-located models: the teacher's pass, then the loss of the student's pass.

Legend: B microbatch, S sequence, T = B x S tokens, H and G hidden sizes of student and teacher.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from minitron import engine
from minitron.config.schema import Distill
from minitron.distillation.fused import Scratch, linear_forward_kl

Tensor = torch.Tensor


def teacher_signal(teacher: engine.Model, microbatches_BS: list[Tensor], world: engine.World) -> list[Tensor]:
    """The teacher's last hidden states [T, G] of every microbatch, kept on the last stage only; its logits are never made."""
    return engine.forward_only(
        teacher, [tokens[:, :-1] for tokens in microbatches_BS], world, lambda _, hidden_SBG: engine.whole_sequence(hidden_SBG, world).flatten(0, 1)
    )


def distillation_loss(
    student: engine.Model, teacher: engine.Model, settings: Distill, world: engine.World
) -> Callable[[list[Tensor]], Callable[[int, Tensor], engine.LossParts]]:
    """The trainer's `loss`: runs the teacher over a step's microbatches, then gives the student's loss of each.

    Forward KL of the whole next-token distributions, alone (arXiv 2407.14679, best practice 5).
    """

    scratch = Scratch()

    def for_step(microbatches_BS: list[Tensor]) -> Callable[[int, Tensor], engine.LossParts]:
        signals_TG = teacher_signal(teacher, microbatches_BS, world)

        def loss(number: int, hidden_SBH: Tensor) -> engine.LossParts:
            hidden_TH = engine.whole_sequence(hidden_SBH, world).flatten(0, 1)
            head_vH, _ = engine.live_head(student, world)
            teacher_head_vG, _ = engine.live_head(teacher, world)
            mask_T = torch.ones(hidden_TH.shape[0], dtype=torch.bool, device=hidden_TH.device)
            total = linear_forward_kl(
                hidden_TH, head_vH, signals_TG[number], teacher_head_vG.detach(), mask_T, world, settings.temperature, settings.chunk_tokens, scratch
            )
            signals_TG[number] = signals_TG[number][:0]  # freed as soon as it is used
            tokens = mask_T.sum(dtype=torch.int)
            return total, tokens, {"loss": total.detach(), "kd_loss": total.detach(), "tokens": tokens}

        return loss

    return for_step
