"""The readable reference of the losses against torch's own divergence in float64."""

import pytest
import torch

from minitron.distillation.losses import forward_kl


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_forward_kl_is_torchs_divergence_times_the_temperature_squared(temperature):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(7, 33, generator=generator) for _ in range(2))
    log_student, log_teacher = ((logits.double() / temperature).log_softmax(-1) for logits in (student, teacher))
    expected = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    torch.testing.assert_close(forward_kl(student, teacher, temperature).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.allclose(forward_kl(teacher, teacher, temperature), torch.zeros(7), atol=1e-6)
    assert (forward_kl(student, teacher, temperature) - forward_kl(teacher, student, temperature)).abs().min() > 1e-3


def test_a_shift_of_all_logits_changes_nothing():
    student, teacher = torch.randn(5, 9), torch.randn(5, 9)
    torch.testing.assert_close(forward_kl(student + 11, teacher - 5), forward_kl(student, teacher), rtol=1e-4, atol=1e-5)
