"""One GPU: a teacher whose weights wait in host memory."""

import gc

import pytest
import torch

from minitron.config.schema import Parallel
from minitron.engine.parallel import world
from minitron.engine.schedule import forward_only
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.oracles.models import UNTIED, save_model, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]


def test_weights_are_on_the_gpu_during_passes_alone(tmp_path):
    folder = save_model(tmp_path / "model", 1, hidden_size=512, intermediate_size=1024, **UNTIED)
    with world(Parallel(), "cuda", 1) as here:
        model = load(open_folder(folder, "model.path"), here, torch.bfloat16).requires_grad_(False)
        size = sum(parameter.nbytes for parameter in model.parameters())
        tokens = [tokens_of(61, 2, 32, seed) for seed in range(2)]
        before = forward_only(model, tokens, here, lambda _, hidden: hidden)
        there = torch.cuda.memory_allocated()
        model.offload(here.device)
        gc.collect()
        assert there - torch.cuda.memory_allocated() >= size
        assert all(parameter.device.type == "cpu" and parameter.is_pinned() for parameter in model.parameters())
        for _ in range(3):
            after = forward_only(model, tokens, here, lambda _, hidden: hidden)
            assert all(map(torch.equal, before, after))
            del after
            assert there - torch.cuda.memory_allocated() >= size
        with model.on_device():
            assert all(parameter.is_cuda for parameter in model.parameters())
