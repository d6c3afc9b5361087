"""Which spec a model is built from."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from minitron.arch.axes import PARAMETERS
from minitron.engine.specs import pick_spec
from minitron.errors import RequestError


def test_separate_documents_take_torch_s_modules(monkeypatch):
    """On a machine that has all that Transformer Engine needs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    world = SimpleNamespace(device=torch.device("cuda"))
    assert pick_spec("auto", world) == pick_spec("transformer_engine", world) == "transformer_engine"
    assert pick_spec("auto", world, separate_documents=True) == "torch"
    with pytest.raises(RequestError, match=r"^spec=transformer_engine: Transformer Engine's attention is not told of .*; use auto or torch$"):
        pick_spec("transformer_engine", world, separate_documents=True)


def test_softcaps_of_scores_take_torch_s_modules(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    world = SimpleNamespace(device=torch.device("cuda"))
    assert pick_spec("auto", world, softcap=True) == "torch"
    with pytest.raises(RequestError, match=r"^spec=transformer_engine: .* has no softcap on its scores; use auto or torch$"):
        pick_spec("transformer_engine", world, softcap=True)


def test_names_inside_fused_modules_are_those_that_megatron_turns_into_plain_ones():
    hooks = pytest.importorskip("megatron.core.post_training.modelopt.gpt.state_dict_hooks")
    fused = {row.fused.format(layer=3): row.name.format(layer=3) for row in PARAMETERS if row.fused}
    state = {name: plain for name, plain in fused.items()}
    hooks.mcore_gpt_load_te_state_dict_pre_hook(state, "", {}, True, [], [], [])
    assert state == {plain: plain for plain in fused.values()}
    assert len(state) == 4
