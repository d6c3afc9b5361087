"""Distillation loss from hidden states and head weights, in chunks of tokens, over vocabulary shards.

Neither model's [tokens, vocabulary] logits ever exist: a chunk's logits are made, turned into their part of the loss and of
the gradients, and dropped. What happens to a chunk's rows is in `rows.py`.

Legend: T tokens, C tokens of one chunk, R some of them, v live vocabulary rows of this rank, H and G hidden sizes of student and teacher,
K tokens of a signal that knows just the largest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch

from minitron import engine
from minitron.config.schema import Distill
from minitron.distillation.rows import WHOLE, Buffers, Exchange, Gradient, Labels, Shard, bucketed, largest
from minitron.distillation.signal import Head, Signal, TopSignal

Tensor = torch.Tensor


class Losses(NamedTuple):
    """Sums over the masked tokens, scalars, the same on every tensor rank. Gradients flow through `total` alone."""

    total: Tensor  # kd + cross_entropy weight x ce
    kd: Tensor  # times temperature squared
    ce: Tensor  # nats at temperature 1, not weighted; 0 where the weight is


class Scratch:
    """Memory for one chunk's logits, used for every chunk and every call: fresh buffers of this size cost more in page faults than
    the arithmetic on them. Made on first use and again only when a size changes."""

    def __init__(self) -> None:
        self.fitted: tuple[int, torch.Size, torch.dtype, torch.device] = (0, torch.Size(), torch.float32, torch.device("cpu"))
        self.made: dict[str, Tensor] = {}

    def fit(self, chunk: int, head_vH: Tensor) -> None:
        """Have room for chunks of this size and heads of this shape and type."""
        like = (chunk, head_vH.shape, head_vH.dtype, head_vH.device)
        if self.fitted != like:
            self.fitted, self.made = like, {}

    def rows(self, name: str, count: int | None = None) -> Tensor:
        """[count, v] of the buffer of this name: fp32, or the head's type for "product"; all of the chunk, or an eighth for "spare"."""
        chunk, shape, dtype, device = self.fitted
        if name not in self.made:
            size = -(-chunk // 8) if name == "spare" else chunk
            self.made[name] = torch.empty(size, shape[0], dtype=dtype if name == "product" else torch.float32, device=device)
        return self.made[name][:count]

    def head(self) -> Tensor:
        """[v, H] in the head's type."""
        _, shape, dtype, device = self.fitted
        if "head" not in self.made:
            self.made["head"] = torch.empty(shape, dtype=dtype, device=device)
        return self.made["head"]

    def logits(self, name: str, hidden_CH: Tensor, head: Head) -> Tensor:
        """One chunk's logits, fp32 [C, v], with the digits of a product in fp32 also where the head has fewer: rounded to bf16 they would
        be wrong by some 1 % of a probability, and the largest tokens would be others."""
        out_Cv, weight_Hv = self.rows(name, len(hidden_CH)), head.weight_vH.t()
        if hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH, weight_Hv, out=out_Cv)
        elif hidden_CH.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):
            torch.ops.aten.mm.dtype_out(hidden_CH, weight_Hv, torch.float32, out=out_Cv)
        else:
            product_Cv = torch.mm(hidden_CH, weight_Hv, out=self.rows("product", len(hidden_CH)))
            # then what rounding took away, by the same product: it is summed in fp32 and rounded at the end
            out_Cv.copy_(product_Cv).add_(product_Cv.addmm_(hidden_CH, weight_Hv, beta=-1.0))
        if head.scale != 1.0:
            out_Cv.mul_(head.scale)
        return out_Cv if head.softcap is None else out_Cv.div_(head.softcap).tanh_().mul_(head.softcap)


@dataclasses.dataclass(frozen=True)
class Work:
    """What the loss of one microbatch is made of besides what gradients flow to."""

    head: Head
    signal: Signal | None
    mask_T: Tensor
    labels_T: Tensor | None
    settings: Distill
    world: engine.World
    scratch: Scratch

    def chunks(self) -> list[slice]:
        """The tokens of each chunk."""
        step = self.settings.chunk_tokens
        return [slice(start, start + step) for start in range(0, len(self.mask_T), step)]

    def values(self, student_TH: Tensor, gradients: Gradients | None) -> Losses:
        """The losses, chunk by chunk; where `gradients` are wanted, they are filled in the same pass."""
        settings, sums = self.settings, torch.zeros(2, dtype=torch.float64, device=student_TH.device)
        self.scratch.fit(min(settings.chunk_tokens, student_TH.shape[0]), self.head.weight_vH)
        for here in self.chunks():
            kd_C, ce_C, gradient = self._chunk(student_TH[here], here)
            mask_C = self.mask_T[here].double()
            sums += torch.stack([(kd_C * mask_C).sum() * settings.temperature**2, (ce_C * mask_C).sum()])
            if gradients is not None:
                gradients.add(here, student_TH[here], gradient(mask_C * gradients.factor), self)
        kd, ce = sums.unbind()
        return Losses(*(one.float() for one in (kd + settings.cross_entropy * ce, kd, ce)))

    def _chunk(self, student_CH: Tensor, here: slice) -> tuple[Tensor, Tensor, Gradient]:
        """(divergence per token, cross-entropy per token, what makes the gradient to the unscaled logits from a factor per token)."""
        settings, head, temperature = self.settings, self.head, self.settings.temperature
        student_Cv, spare_Rv, kept_Cv = self.scratch.logits("student", student_CH, head), self.scratch.rows("spare"), None
        if settings.cross_entropy > 0 or head.softcap is not None:
            kept_Cv = self.scratch.rows("kept", len(student_CH)).copy_(student_Cv)
        labels = None
        if settings.cross_entropy > 0:
            assert kept_Cv is not None and self.labels_T is not None, "cross-entropy needs labels"
            labels = Labels(kept_Cv, Shard.of(self.labels_T[here][:, None], head.first, student_Cv.shape[1]), spare_Rv)
        exchange = Exchange(self.world, labels.local() if labels else [])
        kd_C, kd_gradient = self._divergence(student_Cv, spare_Rv, here, exchange)
        ce_C = labels.losses(exchange.ridden_rEC) if labels else torch.zeros_like(kd_C)

        def gradient(factor_C: Tensor) -> Tensor:
            grad_Cv = kd_gradient(factor_C * temperature * head.scale)  # of logits / T, and of a loss times T squared
            if labels is not None:
                labels.add_gradient(grad_Cv, factor_C * settings.cross_entropy * head.scale)
            if kept_Cv is not None and head.softcap is not None:  # the slope of softcap x tanh
                grad_Cv.mul_(kept_Cv.div_(head.softcap).square_().neg_().add_(1.0))
            return grad_Cv

        return kd_C, ce_C, gradient

    def _divergence(self, student_Cv: Tensor, spare_Rv: Tensor, here: slice, exchange: Exchange) -> tuple[Tensor, Gradient]:
        settings, first = self.settings, self.head.first
        if settings.temperature != 1.0:
            student_Cv.div_(settings.temperature)
        if self.signal is None:
            exchange.last()  # for what rides with it
            return student_Cv.new_zeros(len(student_Cv), dtype=torch.float64), lambda scale_C: student_Cv.zero_()
        if isinstance(self.signal, TopSignal):
            log_probs_CB = torch.cat([self.signal.log_probs_TK[here], self.signal.tail_T[here, None]], dim=1)
            return bucketed(settings.loss, student_Cv, settings.beta, first, self.signal.tokens_TK[here], log_probs_CB, exchange)
        teacher_Cv = self.scratch.logits("teacher", self.signal.hidden_TG[here], self.signal.head)
        if settings.temperature != 1.0:
            teacher_Cv.div_(settings.temperature)
        if settings.top_k is None:
            return WHOLE[settings.loss](Buffers(student_Cv, teacher_Cv, spare_Rv), settings.beta, exchange)
        tokens_CK, known_CK = largest(teacher_Cv, first, settings.top_k, exchange)
        return bucketed(settings.loss, student_Cv, settings.beta, first, tokens_CK, (known_CK, teacher_Cv), exchange)


class Gradients:
    """Gradients of the total times `factor`, as they grow: to the student's hidden states, in their type, and to the head, in fp32."""

    def __init__(self, student_TH: Tensor, head_vH: Tensor, factor: Tensor | float = 1.0) -> None:
        self.factor = factor
        self.student_TH = torch.empty_like(student_TH)
        self.head_vH = torch.zeros(head_vH.shape, dtype=torch.float32, device=head_vH.device)

    def add(self, here: slice, student_CH: Tensor, grad_Cv: Tensor, work: Work) -> None:
        """Take in a chunk, from the gradient to its logits."""
        weight_vH, scratch = work.head.weight_vH, work.scratch
        if weight_vH.dtype == torch.float32:
            torch.mm(grad_Cv, weight_vH, out=self.student_TH[here])
            self.head_vH.addmm_(grad_Cv.t(), student_CH)
            return
        narrow_Cv = scratch.rows("product", len(grad_Cv)).copy_(grad_Cv)
        torch.mm(narrow_Cv, weight_vH, out=self.student_TH[here])
        self.head_vH.add_(torch.mm(narrow_Cv.t(), student_CH, out=scratch.head()))


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student_TH: Tensor, head_vH: Tensor, work: Work) -> tuple[Tensor, Tensor, Tensor]:
        ctx.work, now = work, work.settings.gradients == "forward" and any(ctx.needs_input_grad[:2])
        gradients = Gradients(student_TH, head_vH) if now else None
        losses = work.values(student_TH, gradients)
        ctx.save_for_backward(*((gradients.student_TH, gradients.head_vH) if gradients else (student_TH, head_vH)))
        ctx.mark_non_differentiable(losses.kd, losses.ce)
        return losses.total, losses.kd, losses.ce

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        if work.settings.gradients == "forward":
            # in place: nothing else sees these buffers, and a loss is differentiated once
            student_TH, head_vH = (saved.mul_(grad_total) for saved in ctx.saved_tensors)
        else:
            student_TH, head_vH = ctx.saved_tensors
            gradients = Gradients(student_TH, head_vH, grad_total)
            work.values(student_TH, gradients)
            student_TH, head_vH = gradients.student_TH, gradients.head_vH
        return student_TH, head_vH.to(work.head.weight_vH.dtype), None


def linear_distillation(student_TH: Tensor, head: Head, signal: Signal | None, mask_T: Tensor, world: engine.World,
                        settings: Distill, labels_T: Tensor | None = None, scratch: Scratch | None = None) -> Losses:  # fmt: skip
    """Sums over the masked tokens of `settings.loss` between teacher and student (arXiv 2407.14679, section 2.4) times temperature squared, plus
    `settings.cross_entropy` times the cross-entropy of `labels_T`: int64 [T], numbers of the whole vocabulary, which only this needs.

    Without a signal there is the cross-entropy alone. With `settings.top_k`, or a signal that has no more, the distributions are K tokens and one
    bucket for all others. Gradients flow to `student_TH` (this rank's part: the caller sums it over tensor ranks) and to `head.weight_vH`, once.
    With `settings.gradients` "forward" they are made in the forward pass, which saves a second product with each head; with "recompute" the
    backward pass goes over the chunks again, and until then nothing but the arguments is held. A caller with many microbatches keeps one
    `scratch`.
    """
    work = Work(dataclasses.replace(head, weight_vH=head.weight_vH.detach()), signal, mask_T, labels_T, settings, world, scratch or Scratch())
    return Losses(*_LinearDistillation.apply(student_TH, head.weight_vH, work))
