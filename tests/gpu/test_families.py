"""One GPU: every family by Transformer Engine's modules, against those of torch."""

import importlib.util

import pytest
import torch

from minitron.config.schema import Parallel
from minitron.engine.parallel import world
from minitron.engine.specs import pick_spec
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.oracles.models import tokens_of
from tests.oracles.samples import save_samples
from tests.oracles.sharded import whole_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="Transformer Engine is not installed"),
]


def test_both_specs_compute_the_same(tmp_path):
    differences = {}
    with world(Parallel(), "cuda", 1) as here:
        for name, folder in save_samples(tmp_path).items():
            source = open_folder(folder, "model.path")
            if pick_spec("auto", here, source.arch) == "transformer_engine":
                found = [
                    whole_logits(load(source, here, torch.bfloat16, spec), tokens_of(61, 2, 24), here) for spec in ("torch", "transformer_engine")
                ]
                differences[name] = ((found[0] - found[1]).norm() / found[0].norm()).item()
    assert {name: difference for name, difference in differences.items() if not difference < 0.05} == {}
