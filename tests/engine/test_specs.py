"""Which spec a model is built from."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from minitron.arch.families import from_hf
from minitron.engine.specs import pick_spec
from minitron.errors import RequestError
from tests.oracles.models import config_of


def test_separate_documents_take_torch_s_modules(monkeypatch):
    """On a machine that has all that Transformer Engine needs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    arch, world = from_hf(config_of().to_dict(), "x"), SimpleNamespace(device=torch.device("cuda"))
    assert pick_spec("auto", arch, world) == pick_spec("transformer_engine", arch, world) == "transformer_engine"
    assert pick_spec("auto", arch, world, separate_documents=True) == "torch"
    with pytest.raises(RequestError, match=r"^spec=transformer_engine: Transformer Engine's attention is not told of .*; use auto or torch$"):
        pick_spec("transformer_engine", arch, world, separate_documents=True)
