"""What a pass reads on its way to a GPU, on a machine that has none."""

import pytest
import torch

from minitron.engine.batch import to_device


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(3).expand(4, 3),
        torch.arange(4)[:, None].expand(4, 3),
        torch.ones(()).expand(5),
        torch.arange(20).view(4, 5)[:, :-1],
        torch.arange(12).view(4, 3).T,
        torch.arange(8)[::2],
        torch.arange(6).view(2, 3),
    ],
    ids=["rows once", "columns once", "one value", "a window", "transposed", "every other", "dense"],
)
def test_what_is_pinned_is_whole_and_dense(tensor, monkeypatch):
    """An expanded tensor can't be pinned, and a copy of one with gaps does not leave at once."""
    pinned, sent = [], []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device, non_blocking: sent.append((device, non_blocking)) or self)
    there = to_device(tensor, torch.device("cuda", 0))
    assert sent == [(torch.device("cuda", 0), True)] and pinned == [there]
    assert there.is_contiguous() and there.untyped_storage().nbytes() >= there.numel() * there.element_size()
    assert there.equal(tensor)


def test_on_a_cpu_nothing_is_pinned(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pytest.fail("pinned"))
    tensor = torch.arange(3).expand(4, 3)
    assert to_device(tensor, torch.device("cpu")) is tensor
