"""The distillation loss by autograd in float64 over whole logits.

Legend: T tokens, V vocabulary, K teacher's largest tokens, B = K + 1 with all others together.
"""

import torch
from torch.nn.functional import cross_entropy, kl_div

from minitron.config.schema import Distill


def logits(hidden_TH, head_VH, scale=1.0, softcap=None):
    """[T, V] float64."""
    product = scale * (hidden_TH.double() @ head_VH.double().t())
    return product if softcap is None else softcap * torch.tanh(product / softcap)


def divergence(log_teacher, log_student, loss, beta):
    """Per token, from log-probabilities over tokens or buckets."""

    def kl(one, other):
        return kl_div(other, one, reduction="none", log_target=True).sum(-1)

    if loss == "jsd":
        mixture = (beta * log_teacher.exp() + (1 - beta) * log_student.exp()).log()
        return beta * kl(log_teacher, mixture) + (1 - beta) * kl(log_student, mixture)
    return kl(log_teacher, log_student) if loss == "forward_kl" else kl(log_student, log_teacher)


def buckets(log_probs_TV, tokens_TK):
    """Log-probabilities of the tokens, and of all others together: [T, B]."""
    others = log_probs_TV.scatter(1, tokens_TK, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs_TV.gather(1, tokens_TK), others], dim=1)


def reference(student_TV, teacher_TV, mask_T, settings: Distill, labels_T=None):
    """(total, sum of the divergences times temperature squared, sum of the cross-entropies) over masked tokens, from float64 logits."""
    log_student, log_teacher = ((tensor / settings.temperature).log_softmax(-1) for tensor in (student_TV, teacher_TV))
    if settings.top_k is not None:
        tokens = teacher_TV.topk(settings.top_k, dim=1).indices
        log_student, log_teacher = buckets(log_student, tokens), buckets(log_teacher, tokens)
    kd = (divergence(log_teacher, log_student, settings.loss, settings.beta) * mask_T).sum() * settings.temperature**2
    ce = (cross_entropy(student_TV, labels_T, reduction="none") * mask_T).sum() if settings.cross_entropy else torch.zeros(()).double()
    return kd + settings.cross_entropy * ce, kd, ce
