"""Divergences between a teacher's and a student's distribution, on plain log-probabilities: the readable reference of what the fused
versions compute, and what they use where a distribution is small.

Legend: T tokens, V classes: a vocabulary, or K tokens and a bucket for all others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Divergence(NamedTuple):
    """A divergence of log-probabilities (teacher, student, beta): its value per token, and its slopes by the student's log-probabilities.

    Slopes may leave out any multiple of the student's probabilities: their sum is always one, so it is no change of the value.
    """

    value: Callable[[Tensor, Tensor, float], Tensor]
    slopes: Callable[[Tensor, Tensor, float], Tensor]


def _mean(log_weight: Tensor, *log_terms: Tensor) -> Tensor:
    """Terms of a mean: exp(log_weight) x the difference of the others; nothing where there is no weight."""
    weight = log_weight.exp()
    return torch.where(weight > 0, weight * (log_terms[0] - log_terms[1]), 0.0)


def _mixture(teacher_TV: Tensor, student_TV: Tensor, beta: float) -> Tensor:
    # new_full and not new_tensor: that would copy a number to a GPU, and wait until it is there
    ours, theirs = (teacher_TV.new_full((), share).log() for share in (beta, 1.0 - beta))
    return torch.logaddexp(teacher_TV + ours, student_TV + theirs)


def _jsd(teacher_TV: Tensor, student_TV: Tensor, beta: float) -> Tensor:
    mixture_TV = _mixture(teacher_TV, student_TV, beta)
    from_teacher, from_student = (_mean(one, one, mixture_TV).sum(dim=-1) for one in (teacher_TV, student_TV))
    return beta * from_teacher + (1.0 - beta) * from_student


def _jsd_slopes(teacher_TV: Tensor, student_TV: Tensor, beta: float) -> Tensor:
    return (1.0 - beta) * _mean(student_TV, student_TV, _mixture(teacher_TV, student_TV, beta))


DIVERGENCES = {
    # KL(teacher || student)
    "forward_kl": Divergence(
        lambda teacher, student, beta: _mean(teacher, teacher, student).sum(dim=-1),
        lambda teacher, student, beta: -teacher.exp(),
    ),
    # KL(student || teacher)
    "reverse_kl": Divergence(
        lambda teacher, student, beta: _mean(student, student, teacher).sum(dim=-1),
        lambda teacher, student, beta: _mean(student, student, teacher),
    ),
    # beta KL(teacher || m) + (1 - beta) KL(student || m), m = beta teacher + (1 - beta) student
    "jsd": Divergence(_jsd, _jsd_slopes),
}


def divergence(student_TV: Tensor, teacher_TV: Tensor, kind: str = "forward_kl", temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """A divergence of two whole distributions, given as logits, per token [T], in nats, times temperature squared.

    Forward KL is the paper's L_logits (arXiv 2407.14679, section 2.4). The square keeps the gradient's size as the temperature
    grows (Hinton et al., arXiv 1503.02531). `kind`: of DIVERGENCES; `beta`, the teacher's share of the mixture, is for "jsd" alone.
    """
    student = torch.log_softmax(student_TV.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_TV.float() / temperature, dim=-1)
    return DIVERGENCES[kind].value(teacher, student, beta) * temperature**2


def forward_kl(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token [T], as `divergence` says."""
    return divergence(student_TV, teacher_TV, "forward_kl", temperature)
