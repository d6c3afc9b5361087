"""Weights that wait in host memory. Here the device is the CPU too, so that what moves is told by where the storage lies."""

import pytest
import torch

from minitron.engine.offload import HostWeights
from minitron.engine.schedule import forward_only
from minitron.engine.scoring import language_model_score
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.oracles.memory import LiveBytes
from tests.oracles.models import UNTIED, save_model, tokens_of


@pytest.fixture(params=[{}, UNTIED], ids=["tied", "untied"])
def model(request, alone, tmp_path):
    folder = save_model(tmp_path / "model", 1, **request.param)
    return load(open_folder(folder, "model.path"), alone, torch.float32).requires_grad_(False)


def places(model):
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_passes_of_an_offloaded_model_are_the_same_and_leave_it_at_home(model, alone):
    tokens = [tokens_of(61, 2, 9, seed) for seed in range(2)]
    windows = [(tokens_of(61, 2, 10), torch.tensor([True, False]))] * 2

    def passed():
        return forward_only(model, tokens, alone, lambda _, hidden: hidden), language_model_score(model, windows, alone).loss

    hidden, loss = passed()
    weights = [parameter.clone() for parameter in model.parameters()]
    model.offload(alone.device)
    home = places(model)
    for _ in range(2):
        again, same_loss = passed()
        assert all(map(torch.equal, hidden, again))
        assert same_loss == loss
        assert places(model) == home
    assert all(map(torch.equal, weights, model.parameters()))
    assert all(not p.requires_grad and p.grad is None and not hasattr(p, "main_grad") for p in model.parameters())


def test_the_device_holds_the_weights_inside_alone_even_after_an_error(model, alone):
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.offload(alone.device)
    home = places(model)
    with LiveBytes([]) as live:
        for _ in range(2):
            with pytest.raises(ValueError), model.on_device():
                inside = places(model)
                with model.on_device():
                    assert places(model) == inside
                assert places(model) == inside
                assert live.now == size
                raise ValueError
            assert live.now == 0
            assert places(model) == home
            assert not set(home) & set(inside)
    assert live.peak == size


def test_what_was_taken_on_the_device_outlives_the_block():
    parameter = torch.nn.Parameter(torch.arange(6.0))
    weights = HostWeights([parameter], torch.device("cpu"))
    with weights:
        taken = parameter.detach()[2:]
    assert taken.tolist() == [2, 3, 4, 5]
    assert taken.untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
