"""Distillation loss from hidden states and head weights, in chunks of tokens, over vocabulary shards.

Neither model's [tokens, vocabulary] logits ever exist: a chunk's logits are made, turned into their part of the loss and of
the gradients, and dropped. The gradients are computed in the forward pass, which saves a second product with each head.

Per token, with z the logits over T (temperature) and lse their log-sum-exp, each mergeable over shards from its running
maximum and sum:  KL = sum p_t (z_t - z_s) - lse_t + lse_s,  dKL/dlogits_s = (p_s - p_t) / T, both times T squared.

Legend: T tokens, C tokens of one chunk, v live vocabulary rows of this rank, H and G hidden sizes of student and teacher.
"""

from __future__ import annotations

from typing import Any

import torch

from minitron import engine

Tensor = torch.Tensor


class Scratch:
    """Memory for one chunk's logits, used for every chunk and every call: fresh buffers of this size cost more in page faults than
    the arithmetic on them. Made on first use and again only when a size changes."""

    def __init__(self) -> None:
        self.products = self.head = torch.empty(0)
        self.floats: list[Tensor] = []

    def fit(self, chunk: int, head_vH: Tensor) -> None:
        """Hold [chunk, v] three times in fp32 and once in the head's type, and one head."""
        shape = (chunk, head_vH.shape[0])
        if self.products.shape == shape and self.head.shape == head_vH.shape and self.head.dtype == head_vH.dtype:
            return
        self.products = torch.empty(shape, dtype=head_vH.dtype, device=head_vH.device)
        self.floats = [torch.empty(shape, dtype=torch.float32, device=head_vH.device) for _ in range(3)]
        self.head = torch.empty_like(head_vH)

    def logits(self, index: int, hidden_CH: Tensor, head_vH: Tensor, temperature: float) -> Tensor:
        """One chunk's logits over the temperature, fp32 [C, v]."""
        product = torch.mm(hidden_CH, head_vH.t(), out=self.products[: len(hidden_CH)])
        logits_Cv = self.floats[index][: len(hidden_CH)].copy_(product)
        return logits_Cv if temperature == 1.0 else logits_Cv.div_(temperature)


class _LinearForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TH: Tensor, head_vH: Tensor, teacher_TG: Tensor, teacher_head_vG: Tensor, mask_T: Tensor,
                temperature: float, chunk_tokens: int, world: engine.World, scratch: Scratch) -> Tensor:  # fmt: skip
        grad_student_TH = torch.empty_like(student_TH)
        grad_head_vH = torch.empty(head_vH.shape, dtype=torch.float32, device=head_vH.device)
        loss = torch.zeros((), dtype=torch.float32, device=student_TH.device)
        scratch.fit(min(chunk_tokens, student_TH.shape[0]), head_vH)
        for start in range(0, student_TH.shape[0], chunk_tokens):
            here = slice(start, start + chunk_tokens)
            student_Cv = scratch.logits(0, student_TH[here], head_vH, temperature)
            teacher_Cv = scratch.logits(1, teacher_TG[here], teacher_head_vG, temperature)
            weight_C = mask_T[here].float() * temperature**2
            kl_C = _chunk(student_Cv, teacher_Cv, scratch.floats[2][: len(weight_C)], weight_C / temperature, world)
            loss += (kl_C * weight_C).sum()
            grad_Cv = scratch.products[: len(weight_C)].copy_(student_Cv)
            torch.mm(grad_Cv, head_vH, out=grad_student_TH[here])
            product_vH = torch.mm(grad_Cv.t(), student_TH[here], out=scratch.head)
            grad_head_vH = grad_head_vH.add_(product_vH) if start else grad_head_vH.copy_(product_vH)
        ctx.save_for_backward(grad_student_TH, grad_head_vH)
        ctx.head_dtype = head_vH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad_student_TH, grad_head_vH = ctx.saved_tensors
        # in place: nothing else sees these buffers, and a loss is differentiated once
        return grad_student_TH.mul_(grad_loss), grad_head_vH.mul_(grad_loss).to(ctx.head_dtype), *[None] * 7


def _chunk(student_Cv: Tensor, teacher_Cv: Tensor, spare_Cv: Tensor, scale_C: Tensor, world: engine.World) -> Tensor:
    """KL per token [C]. `student_Cv` becomes (p_s - p_t) * scale over this rank's vocabulary; the others are overwritten."""
    max_s_C, max_t_C = student_Cv.amax(dim=1), teacher_Cv.amax(dim=1)
    exp_t_Cv = torch.sub(teacher_Cv, max_t_C[:, None], out=spare_Cv).exp_()
    # a sum by torch.sum, which adds pairwise: a dot product over a whole vocabulary in fp32 would be off by some 1e-5
    cross_C = teacher_Cv.sub_(student_Cv).mul_(exp_t_Cv).sum(dim=1)
    exp_s_Cv = student_Cv.sub_(max_s_C[:, None]).exp_()
    mine = torch.stack([max_s_C, exp_s_Cv.sum(dim=1), max_t_C, exp_t_Cv.sum(dim=1), cross_C])
    max_s, sum_s, max_t, sum_t, cross = engine.all_ranks(mine, world).unbind(dim=1)  # each [ranks, C]
    top_s_C, top_t_C = max_s.amax(dim=0), max_t.amax(dim=0)
    scale_s, scale_t = (max_s - top_s_C).exp(), (max_t - top_t_C).exp()
    total_s_C, total_t_C = (sum_s * scale_s).sum(dim=0), (sum_t * scale_t).sum(dim=0)
    kl_C = (cross * scale_t).sum(dim=0) / total_t_C - (top_t_C + total_t_C.log()) + (top_s_C + total_s_C.log())
    factor_s_C, factor_t_C = (scale_C * (mine[i] - top).exp() / total for i, top, total in ((0, top_s_C, total_s_C), (2, top_t_C, total_t_C)))
    exp_s_Cv.mul_(factor_s_C[:, None]).addcmul_(exp_t_Cv, factor_t_C[:, None], value=-1.0)
    return kl_C


def linear_forward_kl(student_TH: Tensor, head_vH: Tensor, teacher_TG: Tensor, teacher_head_vG: Tensor, mask_T: Tensor, world: engine.World,
                      temperature: float = 1.0, chunk_tokens: int = 512, scratch: Scratch | None = None) -> Tensor:  # fmt: skip
    """Sum over the masked tokens of KL(teacher || student) times temperature squared: a scalar, the same on every tensor rank.

    Gradients flow to `student_TH` (this rank's part: the caller sums it over tensor ranks) and to `head_vH`, once. A caller
    with many microbatches keeps one `scratch`.
    """
    loss: Tensor = _LinearForwardKL.apply(
        student_TH, head_vH, teacher_TG, teacher_head_vG, mask_T, temperature, chunk_tokens, world, scratch or Scratch()
    )
    return loss
