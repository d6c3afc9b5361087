"""Divergences of one chunk's rows of logits over vocabulary shards: value per token, and the gradient to the student's logits.

Each function makes its statistics from this rank's shard, lets the tensor ranks exchange a few numbers per token, and returns the
value together with a function that writes the gradient over the chunk's buffers, for those who want it. What is as wide as the
vocabulary is fp32, what is a few numbers per token is float64: differences of large logarithms would cost digits.

Legend: C tokens of one chunk, R some of them, v live vocabulary rows of this rank, K a teacher's largest tokens, B = K + 1 buckets: those,
and the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from minitron import engine
from minitron.distillation.losses import DIVERGENCES

Tensor = torch.Tensor
Gradient = Callable[[Tensor], Tensor]  # scale per token [C] -> gradient to the logits times it [C, v], in the memory of the student's


class Exchange:
    """What the tensor ranks tell each other about a chunk: statistics per token, in one collective. `riders` travel with the last one."""

    def __init__(self, world: engine.World, riders: list[Tensor]) -> None:
        self.world, self.riders = world, riders
        self.ridden_rEC = torch.empty(0)

    def early(self, *mine_C: Tensor) -> Tensor:
        """[ranks, len(mine_C), C] of every rank's, float64."""
        return engine.all_ranks(torch.stack([one_C.double() for one_C in mine_C]), self.world)

    def last(self, *mine_C: Tensor) -> Tensor:
        """As `early`, and the riders with it."""
        everyone_rEC = self.early(*mine_C, *self.riders)
        self.ridden_rEC = everyone_rEC[:, len(mine_C) :]
        return everyone_rEC[:, : len(mine_C)]


class Buffers(NamedTuple):
    """One chunk's memory in fp32: both models' logits over the temperature, [C, v], and some rows without content, [R, v]. All are overwritten."""

    student_Cv: Tensor
    teacher_Cv: Tensor
    spare_Rv: Tensor

    def by_rows(self, action: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> list[Tensor]:
        """`action(student, teacher, spare)` on R rows after the other; the numbers per token that it returns, of the whole chunk."""
        rows = len(self.spare_Rv)
        pairs = zip(self.student_Cv.split(rows), self.teacher_Cv.split(rows), strict=True)
        parts = [action(student_Rv, teacher_Rv, self.spare_Rv[: len(student_Rv)]) for student_Rv, teacher_Rv in pairs]
        return [torch.cat(of_all) for of_all in zip(*parts, strict=True)]


def exponentials(logits_Cv: Tensor, out_Cv: Tensor) -> tuple[Tensor, Tensor]:
    """`out_Cv` becomes exp(logits - their maximum); returns the maximum and the log-sum-exp over this shard, float64 [C] each.

    Logits of -inf are left out; a row of nothing else has a log-sum-exp of -inf.
    """
    max_C = logits_Cv.amax(dim=1).clamp_(min=torch.finfo(torch.float32).min)
    # a sum by torch.sum, which adds pairwise: a dot product over a whole vocabulary in fp32 would be off by some 1e-5
    sum_C = torch.sub(logits_Cv, max_C[:, None], out=out_Cv).exp_().sum(dim=1)
    return max_C.double(), max_C.double() + sum_C.double().log()


def _column(of_C: Tensor) -> Tensor:
    return of_C.float()[:, None]


def _whole_lse(lse_rC: Tensor) -> Tensor:
    return torch.logsumexp(lse_rC, dim=0)


def _forward_kl(chunk: Buffers, beta: float, exchange: Exchange) -> tuple[Tensor, Gradient]:
    """KL(teacher || student) = sum p_t (z_t - z_s) - lse_t + lse_s; its gradient is p_s - p_t."""

    def local(student_Rv: Tensor, teacher_Rv: Tensor, exp_t_Rv: Tensor) -> tuple[Tensor, ...]:
        of_teacher = exponentials(teacher_Rv, exp_t_Rv)
        cross_R = teacher_Rv.sub_(student_Rv).mul_(exp_t_Rv).sum(dim=1)
        teacher_Rv.copy_(exp_t_Rv)
        return *exponentials(student_Rv, student_Rv), *of_teacher, cross_R.double()

    max_s_C, mine_s_C, max_t_C, mine_t_C, cross_C = chunk.by_rows(local)
    all_s, all_t, means = exchange.last(mine_s_C, mine_t_C, cross_C * (max_t_C - mine_t_C).exp()).unbind(dim=1)
    lse_s_C, lse_t_C = _whole_lse(all_s), _whole_lse(all_t)

    def gradient(scale_C: Tensor) -> Tensor:
        factor_s, factor_t = (_column(scale_C * (top - lse).exp()) for top, lse in ((max_s_C, lse_s_C), (max_t_C, lse_t_C)))
        return chunk.student_Cv.mul_(factor_s).addcmul_(chunk.teacher_Cv, factor_t, value=-1.0)

    return (means * (all_t - lse_t_C).exp()).sum(dim=0) - lse_t_C + lse_s_C, gradient


def _reverse_kl(chunk: Buffers, beta: float, exchange: Exchange) -> tuple[Tensor, Gradient]:
    """KL(student || teacher) = sum p_s d - lse_s + lse_t with d = z_s - z_t; its gradient is p_s (d - sum p_s d)."""

    def local(student_Rv: Tensor, teacher_Rv: Tensor, spare_Rv: Tensor) -> tuple[Tensor, ...]:
        _, mine_t_R = exponentials(teacher_Rv, spare_Rv)
        apart_Rv = torch.sub(student_Rv, teacher_Rv, out=teacher_Rv)
        of_student = exponentials(student_Rv, student_Rv)
        return *of_student, mine_t_R, torch.mul(student_Rv, apart_Rv, out=spare_Rv).sum(dim=1).double()

    max_s_C, mine_s_C, mine_t_C, cross_C = chunk.by_rows(local)
    all_s, all_t, means = exchange.last(mine_s_C, mine_t_C, cross_C * (max_s_C - mine_s_C).exp()).unbind(dim=1)
    lse_s_C, lse_t_C = _whole_lse(all_s), _whole_lse(all_t)
    mean_C = (means * (all_s - lse_s_C).exp()).sum(dim=0)

    def gradient(scale_C: Tensor) -> Tensor:
        apart_Cv = chunk.teacher_Cv.sub_(_column(mean_C))
        return chunk.student_Cv.mul_(apart_Cv).mul_(_column(scale_C * (max_s_C - lse_s_C).exp()))

    return mean_C - lse_s_C + lse_t_C, gradient


def _jsd(chunk: Buffers, beta: float, exchange: Exchange) -> tuple[Tensor, Gradient]:
    """sum m (beta x_t log x_t + (1 - beta) x_s log x_s) with x = p / m, m = beta p_t + (1 - beta) p_s; with g = (1 - beta) p_s log x_s its
    gradient is g - p_s sum g. The mixture needs both normalisers first, so there are two collectives."""
    (max_s_C, mine_s_C), (max_t_C, mine_t_C) = (exponentials(logits_Cv, logits_Cv) for logits_Cv in chunk[:2])
    all_s, all_t = exchange.early(mine_s_C, mine_t_C).unbind(dim=1)
    chunk.student_Cv.mul_(_column((max_s_C - _whole_lse(all_s)).exp()))
    chunk.teacher_Cv.mul_(_column((max_t_C - _whole_lse(all_t)).exp()))

    def local(p_s_Rv: Tensor, p_t_Rv: Tensor, mixture_Rv: Tensor) -> tuple[Tensor, ...]:
        torch.mul(p_t_Rv, beta, out=mixture_Rv).add_(p_s_Rv, alpha=1.0 - beta).clamp_(min=torch.finfo(torch.float32).tiny)
        x_t_Rv = p_t_Rv.div_(mixture_Rv)
        from_t_R = torch.special.xlogy(x_t_Rv, x_t_Rv, out=x_t_Rv).mul_(mixture_Rv).sum(dim=1)
        x_s_Rv = torch.div(p_s_Rv, mixture_Rv, out=p_t_Rv)
        return from_t_R, torch.special.xlogy(p_s_Rv, x_s_Rv, out=x_s_Rv).sum(dim=1)

    from_t_C, from_s_C = exchange.last(*chunk.by_rows(local)).sum(dim=0)

    def gradient(scale_C: Tensor) -> Tensor:
        terms_Cv = torch.addcmul(chunk.teacher_Cv, chunk.student_Cv, _column(from_s_C), value=-1.0, out=chunk.student_Cv)
        return terms_Cv.mul_(_column((1.0 - beta) * scale_C))

    return beta * from_t_C + (1.0 - beta) * from_s_C, gradient


WHOLE = {"forward_kl": _forward_kl, "reverse_kl": _reverse_kl, "jsd": _jsd}


class Shard(NamedTuple):
    """Where tokens of the whole vocabulary, by their numbers [C, n], lie in this rank's rows: `inside` [C, n], and `at` a row, 0 where it is
    not inside."""

    inside: Tensor
    at: Tensor

    @classmethod
    def of(cls, tokens: Tensor, first: int, rows: int) -> Shard:
        inside = (tokens >= first) & (tokens < first + rows)
        return cls(inside, torch.where(inside, tokens - first, 0))

    def read(self, from_Cv: Tensor) -> Tensor:
        """The values of those inside, 0 for the others."""
        return torch.where(self.inside, from_Cv.gather(1, self.at), 0.0)

    def add(self, to_Cv: Tensor, values: Tensor) -> Tensor:
        """Add `values` to those inside, in place."""
        return to_Cv.scatter_add_(1, self.at, torch.where(self.inside, values, 0.0).to(to_Cv.dtype))

    def leave_out(self, of_Cv: Tensor) -> Tensor:
        """Make those inside -inf, in place."""
        return of_Cv.scatter_reduce_(1, self.at, torch.where(self.inside, -torch.inf, torch.inf).to(of_Cv.dtype), "amin")


class Labels:
    """Cross-entropy of one token each, from a chunk's logits at temperature 1 [C, v]: `local` travels, `losses` has what came back."""

    def __init__(self, logits_Cv: Tensor, shard: Shard, spare_Rv: Tensor) -> None:
        self.logits_Cv, self.shard, self.spare_Rv = logits_Cv, shard, spare_Rv
        self.lse_C = torch.empty(0)

    def local(self) -> list[Tensor]:
        """The log-sum-exp over this shard, and the label's logit where it is inside."""
        parts = [exponentials(part_Rv, self.spare_Rv[: len(part_Rv)])[1] for part_Rv in self.logits_Cv.split(len(self.spare_Rv))]
        return [torch.cat(parts), self.shard.read(self.logits_Cv)[:, 0]]

    def losses(self, everyone_rEC: Tensor) -> Tensor:
        """Nats per token [C], from every rank's `local`."""
        self.lse_C = _whole_lse(everyone_rEC[:, 0])
        return self.lse_C - everyone_rEC[:, 1].sum(dim=0)

    def gradient(self, weight_C: Tensor) -> Tensor:
        """The gradient to the logits times a weight per token, in the memory of the logits."""
        self.logits_Cv.sub_(_column(self.lse_C)).exp_().mul_(_column(weight_C))
        return self.shard.add(self.logits_Cv, -weight_C[:, None])

    def add_gradient(self, to_Cv: Tensor, weight_C: Tensor) -> None:
        """Add the gradient to the logits times a weight per token, in place."""
        rows = len(self.spare_Rv)
        for part_Rv, to_Rv, lse_R1, weight_R1 in zip(
            self.logits_Cv.split(rows), to_Cv.split(rows), _column(self.lse_C).split(rows), _column(weight_C).split(rows), strict=True
        ):
            to_Rv.addcmul_(torch.sub(part_Rv, lse_R1, out=self.spare_Rv[: len(part_Rv)]).exp_(), weight_R1)
        self.shard.add(to_Cv, -weight_C[:, None])


def largest(teacher_Cv: Tensor, first: int, count: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """(numbers int64 [C, K], logits float64 [C, K]) of the `count` largest tokens over all shards; the same on every rank."""
    here = min(count, teacher_Cv.shape[1])
    found = teacher_Cv.topk(here, dim=1)
    candidates = exchange.early(*_filled(found.values, count), *_filled(found.indices + first, count))
    logits_CN, tokens_CN = (candidates[:, half].flatten(0, 1).t() for half in (slice(None, count), slice(count, None)))
    top = logits_CN.topk(count, dim=1)
    return tokens_CN.gather(1, top.indices).long(), top.values


def _filled(values_Cn: Tensor, count: int) -> tuple[Tensor, ...]:
    """Columns, as many as `count`: ranks with fewer tokens than that fill up with what is never chosen."""
    return torch.nn.functional.pad(values_Cn.double(), (0, count - values_Cn.shape[1]), value=-torch.inf).unbind(dim=1)


def bucketed(kind: str, student_Cv: Tensor, beta: float, first: int, tokens_CK: Tensor, teacher: tuple[Tensor, Tensor] | Tensor,
             exchange: Exchange) -> tuple[Tensor, Gradient]:  # fmt: skip
    """A divergence between K tokens and the rest, of both models. `teacher`: its log-probabilities [C, B], or its logits as [C, K] of the
    tokens and [C, v] of this rank, which are overwritten.

    With w the slopes by the student's log-probabilities and q these probabilities, a bucket's gradient is g = w - q sum w; inside the
    last one it is spread like the student's own distribution there.
    """
    shard = Shard.of(tokens_CK, first, student_Cv.shape[1])
    chosen_CK = shard.read(student_Cv).double()
    max_C, others_C = exponentials(shard.leave_out(student_Cv), student_Cv)
    mine = [others_C, *chosen_CK.unbind(dim=1)]
    if isinstance(teacher, Tensor):
        everyone = exchange.last(*mine)
        log_teacher_CB = teacher.double()
    else:
        known_CK, teacher_Cv = teacher
        everyone = exchange.last(*mine, exponentials(shard.leave_out(teacher_Cv), teacher_Cv)[1])
        log_teacher_CB = torch.cat([known_CK, _whole_lse(everyone[:, -1])[:, None]], dim=1).log_softmax(dim=1)
    rest_C = _whole_lse(everyone[:, 0])
    chosen_KC = everyone[:, 1 : 1 + tokens_CK.shape[1]].sum(dim=0)  # each is inside one rank's shard, and 0 elsewhere
    log_student_CB = torch.cat([chosen_KC, rest_C[None]]).t().log_softmax(dim=1)

    def gradient(scale_C: Tensor) -> Tensor:
        slopes_CB = DIVERGENCES[kind].slopes(log_teacher_CB, log_student_CB, beta)
        by_bucket_CB = (slopes_CB - log_student_CB.exp() * slopes_CB.sum(dim=1, keepdim=True)) * scale_C[:, None]
        share_C = torch.where(rest_C > -torch.inf, by_bucket_CB[:, -1] * (max_C - rest_C).exp(), 0.0)
        return shard.add(student_Cv.mul_(_column(share_C)), by_bucket_CB[:, :-1])

    return DIVERGENCES[kind].value(log_teacher_CB, log_student_CB, beta), gradient
