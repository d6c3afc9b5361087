"""Distillation losses on plain logits: the readable reference of what the fused versions compute.

Legend: T tokens, V vocabulary.
"""

import torch

Tensor = torch.Tensor


def forward_kl(student_TV: Tensor, teacher_TV: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per token [T], in nats, times temperature squared (arXiv 2407.14679, section 2.4, L_logits).

    The square keeps the gradient's size as the temperature grows (Hinton et al., arXiv 1503.02531).
    """
    student = torch.log_softmax(student_TV.float() / temperature, dim=-1)
    teacher = torch.log_softmax(teacher_TV.float() / temperature, dim=-1)
    return (teacher.exp() * (teacher - student)).sum(dim=-1) * temperature**2
