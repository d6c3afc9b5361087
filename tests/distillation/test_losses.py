"""The readable reference of the losses against torch's own divergence in float64, and its slopes against autograd."""

import pytest
import torch

from minitron.config.schema import Distill
from minitron.distillation.losses import DIVERGENCES, divergence, forward_kl
from tests.oracles import distillation


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergences_are_torchs_times_the_temperature_squared(kind, temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 33, generator=generator) for _ in range(2))
    settings = Distill(kind, beta=0.3, temperature=temperature)
    for token in range(7):
        row = slice(token, token + 1)
        expected = distillation.reference(student[row].double(), teacher[row].double(), torch.ones(1), settings)[0].item()
        assert divergence(student, teacher, kind, temperature, 0.3)[token].item() == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(divergence(teacher, teacher, kind, temperature, 0.3), torch.zeros(7), atol=1e-6)


def test_the_kinds_are_different_divergences():
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(7, 33, generator=generator) for _ in range(2))
    assert torch.equal(forward_kl(student, teacher, 2.0), divergence(student, teacher, "forward_kl", 2.0))
    torch.testing.assert_close(divergence(student, teacher, "reverse_kl"), divergence(teacher, student, "forward_kl"))
    torch.testing.assert_close(divergence(student, teacher, "jsd", beta=0.3), divergence(teacher, student, "jsd", beta=0.7))
    assert (forward_kl(student, teacher) - forward_kl(teacher, student)).abs().min() > 1e-3


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_slopes_are_autograds_but_for_what_changes_nothing(kind):
    """Through a softmax, where a multiple of the probabilities is no change."""
    generator = torch.Generator().manual_seed(2)
    student, teacher = (torch.randn(5, 9, generator=generator).double() for _ in range(2))
    student.requires_grad_()
    log_student, log_teacher = student.log_softmax(-1), teacher.log_softmax(-1)
    expected = torch.autograd.grad(DIVERGENCES[kind].value(log_teacher, log_student, 0.3).sum(), student, retain_graph=True)[0]
    slopes = DIVERGENCES[kind].slopes(log_teacher, log_student.detach(), 0.3)
    torch.testing.assert_close(torch.autograd.grad(log_student, student, slopes)[0], expected)


def test_a_class_without_probability_adds_nothing():
    log_teacher, log_student = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.75, 0.0]]).log()
    for kind, (value, slopes) in DIVERGENCES.items():
        both = (log_teacher, log_student), (log_teacher[:, :2], log_student[:, :2])
        torch.testing.assert_close(value(*both[0], 0.5), value(*both[1], 0.5))
        assert slopes(*both[0], 0.5).isfinite().all(), kind


def test_a_shift_of_all_logits_changes_nothing():
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    torch.testing.assert_close(forward_kl(student + 11, teacher - 5), forward_kl(student, teacher), rtol=1e-4, atol=1e-5)
