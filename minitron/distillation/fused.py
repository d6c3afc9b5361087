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
from minitron.distillation.signal import Head, Signal, TopSignal, WholeSignal

Tensor = torch.Tensor


SPARE, NUMBERS = 32, 32  # tokens to two spare rows, and to the memory of one row for their numbers: log-sum-exps, means, factors


class Losses(NamedTuple):
    """Sums over the masked tokens, scalars, the same on every tensor rank. Gradients flow through `total` alone."""

    total: Tensor  # kd + cross_entropy weight x ce
    kd: Tensor  # times temperature squared
    ce: Tensor  # nats at temperature 1, not weighted; 0 where the weight is


def fp32_products(tensor: Tensor) -> bool:
    """Whether products of matrices like this one, of a narrower type, may be asked for in fp32, as they are summed."""
    return tensor.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out")


class Scratch:
    """Memory for one chunk, used for every chunk and every call: fresh buffers of this size cost more in page faults than the arithmetic on
    them. Made on first use and again only where it must grow."""

    def __init__(self) -> None:
        self.memory = self.spare_Rv = torch.empty(0)
        self.buffers: list[Tensor] = []

    def divide(self, count: int, rows: int, spare: int, head_vH: Tensor) -> None:
        """Have `count` buffers [rows, v] and behind them spare rows [spare, v], for heads of this shape; all fp32, all without content."""
        vocab, device = len(head_vH), head_vH.device
        size = (count * rows + spare) * vocab
        if len(self.memory) < size or self.memory.device != device:
            self.memory = torch.empty(size, device=device)
        *self.buffers, self.spare_Rv = self.memory[:size].view(-1, vocab).split([rows] * count + [spare])

    def logits(self, number: int, hidden_CH: Tensor, head: Head) -> Tensor:
        """One chunk's logits, fp32 [C, v], in the buffer of this number; with the digits of a product in fp32 also where the head has fewer:
        rounded to bf16 they would be wrong by some 1 % of a probability, and the largest tokens would be others."""
        out_Cv, weight_Hv = self.buffers[number][: len(hidden_CH)], head.weight_vH.t()
        if hidden_CH.dtype == torch.float32:
            torch.mm(hidden_CH, weight_Hv, out=out_Cv)
        elif fp32_products(hidden_CH):
            torch.ops.aten.mm.dtype_out(hidden_CH, weight_Hv, torch.float32, out=out_Cv)
        else:
            # the product, then what rounding took away, by the same product: it is summed in fp32 and rounded at the end. Both lie in the
            # memory of what they add up to, and reach it row group by row group
            high_Cv, low_Cv = out_Cv.view(hidden_CH.dtype).chunk(2, dim=1)
            torch.addmm(torch.mm(hidden_CH, weight_Hv, out=high_Cv), hidden_CH, weight_Hv, beta=-1.0, out=low_Cv)
            wide_high_Rv, wide_low_Rv = self.spare_Rv.chunk(2)
            rows = len(wide_low_Rv)
            for high_Rv, low_Rv, out_Rv in zip(high_Cv.split(rows), low_Cv.split(rows), out_Cv.split(rows), strict=True):
                torch.add(wide_high_Rv[: len(out_Rv)].copy_(high_Rv), wide_low_Rv[: len(out_Rv)].copy_(low_Rv), out=out_Rv)
        if head.scale != 1.0:
            out_Cv.mul_(head.scale)
        return out_Cv if head.softcap is None else out_Cv.div_(head.softcap).tanh_().mul_(head.softcap)

    def narrowed(self, wide: Tensor, dtype: torch.dtype) -> Tensor:
        """These numbers in a narrower type, at the beginning of the memory that they had: by way of the spare rows, as what is read and
        what is written must not overlap."""
        if wide.dtype == dtype:
            return wide
        source, room = wide.view(-1), self.spare_Rv.view(-1).view(dtype)
        target = source.view(dtype)[: len(source)]
        for wide_part, narrow_part in zip(source.split(len(room)), target.split(len(room)), strict=True):
            narrow_part.copy_(room[: len(wide_part)].copy_(wide_part))
        return target.view(wide.shape)


def chunk_shape(chunk_tokens: int, tokens: int, keeps: bool, whole: bool, wide: bool) -> tuple[int, int, int]:
    """(buffers, rows of each, spare rows) of the scratch: fp32, as wide as this rank's vocabulary. `keeps` as `Work.keeps`; `whole`: a
    teacher's logits are made too; `wide`: the head is fp32.

    Two fp32 buffers of `chunk_tokens` rows are what there is, for all that a chunk takes: its buffers, the spare rows, and a few numbers
    per token. So it has somewhat fewer tokens, and two thirds of them where there are three buffers.
    """
    # a narrower type needs a second one for the gradient to the logits, in that type
    count, spare, left = max(1 + keeps + whole, 1 if wide else 2), 2 * -(-chunk_tokens // SPARE), -(-chunk_tokens // NUMBERS)
    return count, max(1, min((2 * chunk_tokens - spare - left) // count, chunk_tokens, tokens)), spare


@dataclasses.dataclass(frozen=True)
class Work:
    """What the loss of one microbatch is made of besides what gradients flow to."""

    head: Head
    signal: Signal | None
    mask_T: Tensor
    host_mask_T: Tensor  # the same in host memory
    labels_T: Tensor | None
    settings: Distill
    world: engine.World
    scratch: Scratch

    @property
    def keeps(self) -> bool:
        """Whether the logits are still needed when a gradient is written over them."""
        return (self.settings.cross_entropy > 0 and self.signal is not None) or self.head.softcap is not None

    def divide(self) -> int:
        """Divide the scratch for these settings; returns the tokens of a chunk, which must not depend on this rank's vocabulary."""
        head_vH = self.head.weight_vH
        count, rows, spare = chunk_shape(
            self.settings.chunk_tokens, len(self.mask_T), self.keeps, isinstance(self.signal, WholeSignal), head_vH.dtype == torch.float32
        )
        self.scratch.divide(count, max(rows, -(-head_vH.shape[1] // len(head_vH))), spare, head_vH)  # a row of a head fits in any case
        return rows

    def values(self, student_TH: Tensor, gradients: Gradients | None) -> Losses:
        """The losses, chunk by chunk; where `gradients` are wanted, they are filled in the same pass."""
        settings, sums = self.settings, torch.zeros(2, dtype=torch.float64, device=student_TH.device)
        step = self.divide()
        for start in range(0, len(self.mask_T), step):
            here = slice(start, start + step)
            kd_C, ce_C, gradient = self._chunk(student_TH[here], here)
            kd, ce = (torch.where(self.mask_T[here], one_C, 0.0).sum() for one_C in (kd_C, ce_C))
            sums += torch.stack([kd * settings.temperature**2, ce])
            if gradients is not None:
                grad_Cv = gradient(self.mask_T[here] * gradients.factor)
                left_out_R = (~self.host_mask_T[here]).nonzero()[:, 0]
                if len(left_out_R):  # not by the factor of 0 alone: what such a token has may be no number
                    grad_Cv.index_fill_(0, engine.to_device(left_out_R, grad_Cv.device), 0.0)
                gradients.add(here, student_TH[here], self.mask_T[here], grad_Cv, self)
        kd, ce = sums.unbind()
        return Losses(*(one.float() for one in (kd + settings.cross_entropy * ce, kd, ce)))

    def _chunk(self, student_CH: Tensor, here: slice) -> tuple[Tensor, Tensor, Gradient]:
        """(divergence per token, cross-entropy per token, what makes the gradient to the unscaled logits from a factor per token)."""
        settings, head, temperature = self.settings, self.head, self.settings.temperature
        student_Cv, spare_Rv, kept_Cv = self.scratch.logits(0, student_CH, head), self.scratch.spare_Rv, None
        if self.keeps:
            kept_Cv = self.scratch.buffers[1][: len(student_CH)].copy_(student_Cv)
        labels = None
        if settings.cross_entropy > 0:
            assert self.labels_T is not None, "cross-entropy needs labels"
            logits_Cv = student_Cv if self.signal is None or kept_Cv is None else kept_Cv
            labels = Labels(logits_Cv, Shard.of(self.labels_T[here][:, None], head.first, student_Cv.shape[1]), spare_Rv)
        exchange = Exchange(self.world, labels.local() if labels else [])
        kd_C, kd_gradient = self._divergence(student_Cv, spare_Rv, here, exchange)
        ce_C = labels.losses(exchange.ridden_rEC) if labels else torch.zeros_like(kd_C)

        def gradient(factor_C: Tensor) -> Tensor:
            label_factor_C = factor_C * settings.cross_entropy * head.scale
            if labels is not None and self.signal is None:
                grad_Cv = labels.gradient(label_factor_C)
            else:
                grad_Cv = kd_gradient(factor_C * temperature * head.scale)  # of logits / T, and of a loss times T squared
                if labels is not None:
                    labels.add_gradient(grad_Cv, label_factor_C)
            if kept_Cv is not None and head.softcap is not None:  # the slope of softcap x tanh
                grad_Cv.mul_(kept_Cv.div_(head.softcap).square_().neg_().add_(1.0))
            return grad_Cv

        return kd_C, ce_C, gradient

    def _divergence(self, student_Cv: Tensor, spare_Rv: Tensor, here: slice, exchange: Exchange) -> tuple[Tensor, Gradient]:
        settings, first = self.settings, self.head.first
        if self.signal is None:
            exchange.last()  # for what rides with it
            return student_Cv.new_zeros(len(student_Cv), dtype=torch.float64), lambda scale_C: student_Cv.zero_()
        if settings.temperature != 1.0:
            student_Cv.div_(settings.temperature)
        if isinstance(self.signal, TopSignal):
            log_probs_CB = torch.cat([self.signal.log_probs_TK[here], self.signal.tail_T[here, None]], dim=1)
            return bucketed(settings.loss, student_Cv, settings.beta, first, self.signal.tokens_TK[here], log_probs_CB, exchange)
        teacher_Cv = self.scratch.logits(-1, self.signal.hidden_TG[here], self.signal.head)
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

    def add(self, here: slice, student_CH: Tensor, mask_C: Tensor, grad_Cv: Tensor, work: Work) -> None:
        """Take in a chunk, from the gradient to its logits, which lies in the first buffer and is 0 where nothing counts; the other buffers
        are free."""
        weight_vH, out_CH = work.head.weight_vH, self.student_TH[here]
        # until its own product, the chunk's part of the gradient is room for hidden states that are zeros where nothing counts
        student_CH = torch.where(mask_C[:, None], student_CH, student_CH.new_zeros(()), out=out_CH)
        if weight_vH.dtype == torch.float32:
            self.head_vH.addmm_(grad_Cv.t(), student_CH)
        else:
            wide, (free, room) = work.scratch.buffers[0].view(-1), work.scratch.buffers[1].view(-1).view(weight_vH.dtype).chunk(2)
            grad_Cv = free[: grad_Cv.numel()].view(grad_Cv.shape).copy_(grad_Cv)
            vocab, hidden = self.head_vH.shape
            whole = fp32_products(grad_Cv)
            blocks = -(-vocab // (len(wide if whole else room) // hidden))
            for columns_Cw, sum_wH in zip(grad_Cv.tensor_split(blocks, dim=1), self.head_vH.tensor_split(blocks), strict=True):
                wide_wH = wide[: sum_wH.numel()].view(sum_wH.shape)
                if whole:
                    torch.ops.aten.mm.dtype_out(columns_Cw.t(), student_CH, torch.float32, out=wide_wH)
                else:  # to fp32 before it is added: a sum of two types would make itself a copy of this size
                    wide_wH.copy_(torch.mm(columns_Cw.t(), student_CH, out=room[: sum_wH.numel()].view(sum_wH.shape)))
                sum_wH.add_(wide_wH)
        torch.mm(grad_Cv, weight_vH, out=out_CH)


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
        return student_TH, work.scratch.narrowed(head_vH, work.head.weight_vH.dtype), None


def linear_distillation(student_TH: Tensor, head: Head, signal: Signal | None, mask_T: Tensor, world: engine.World,
                        settings: Distill, labels_T: Tensor | None = None, scratch: Scratch | None = None) -> Losses:  # fmt: skip
    """Sums over the masked tokens of `settings.loss` between teacher and student (arXiv 2407.14679, section 2.4) times temperature squared, plus
    `settings.cross_entropy` times the cross-entropy of `labels_T`: int64 [T], numbers of the whole vocabulary, which only this needs.

    Without a signal there is the cross-entropy alone. With `settings.top_k`, or a signal that has no more, the distributions are K tokens and one
    bucket for all others. Gradients flow to `student_TH` (this rank's part: the caller sums it over tensor ranks) and to `head.weight_vH`, once.
    With `settings.gradients` "forward" they are made in the forward pass, which saves a second product with each head; with "recompute" the
    backward pass goes over the chunks again, and until then nothing but the arguments is held. A caller with many microbatches keeps one
    `scratch`. `mask_T`: bool [T], best in host memory: one that lies on a GPU is waited for.
    """
    frozen, masks = dataclasses.replace(head, weight_vH=head.weight_vH.detach()), (engine.to_device(mask_T, student_TH.device), mask_T.cpu())
    work = Work(frozen, signal, *masks, labels_T, settings, world, scratch or Scratch())
    return Losses(*_LinearDistillation.apply(student_TH, head.weight_vH, work))
