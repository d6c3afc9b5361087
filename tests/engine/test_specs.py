"""Which spec a model is built from."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from minitron.arch.axes import PARAMETERS
from minitron.arch.families import from_hf
from minitron.config.build import build
from minitron.config.schema import Config
from minitron.engine.specs import pick_spec
from minitron.errors import RequestError
from minitron.session import Session, check_models
from tests.oracles.models import config_of

LLAMA = from_hf(config_of().to_dict(), "x")


def rank(cp=1):
    return SimpleNamespace(device=torch.device("cuda"), cp=cp)


@pytest.fixture
def everything(monkeypatch):
    """A machine that has all that Transformer Engine needs."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


def test_separate_documents_take_torch_s_modules(everything):
    assert pick_spec("auto", rank(), LLAMA) == pick_spec("transformer_engine", rank(), LLAMA) == "transformer_engine"
    assert pick_spec("auto", rank(), LLAMA, separate_documents=True) == "torch"
    with pytest.raises(RequestError, match=r"^spec=transformer_engine: Transformer Engine's attention is not told of .*; use auto or torch$"):
        pick_spec("transformer_engine", rank(), LLAMA, separate_documents=True)


@pytest.mark.parametrize(
    ("kind", "cp", "said"),
    [
        ({"attention_softcap": 2.0}, 1, "Transformer Engine's attention has no softcap on its scores"),
        ({"sliding_window": 7}, 2, "Transformer Engine's attention has no sliding window over context ranks"),
        ({"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 8}, 1, "experts are of torch's modules alone here"),
    ],
    ids=["softcap", "window", "experts"],
)
def test_what_transformer_engine_s_spec_lacks_takes_torch_s_modules(kind, cp, said, everything):
    arch = LLAMA.replace(**kind)
    assert pick_spec("auto", rank(cp), LLAMA) == "transformer_engine" and pick_spec("auto", rank(cp), arch) == "torch"
    with pytest.raises(RequestError, match=rf"^spec=transformer_engine: {said}; use auto or torch$"):
        pick_spec("transformer_engine", rank(cp), arch)
    assert pick_spec("auto", rank(), LLAMA.replace(sliding_window=7)) == "transformer_engine"


def test_a_teacher_s_spec_is_of_its_own_kind(everything, monkeypatch, tmp_path):
    monkeypatch.setattr("minitron.session.load", lambda source, world, dtype, spec: SimpleNamespace(spec=spec, requires_grad_=lambda needed: None))
    monkeypatch.setattr("minitron.session.check_tokenizers", lambda *folders: None)
    wanted = {"teacher": {"path": "other"}, "data": {"train": "t.txt"}, "target": {"hidden_size": 24}}
    opened = Session(build(Config, wanted), "distill", rank(), tmp_path)
    student, teacher = (SimpleNamespace(arch=arch, folder=tmp_path) for arch in (LLAMA, LLAMA.replace(attention_softcap=2.0)))
    opened.__dict__ |= {"source": student, "teacher_source": teacher}
    assert (opened.spec(), opened.teacher.spec) == ("transformer_engine", "torch")
    check_models(opened)
    opened.cfg = build(Config, {**wanted, "spec": "transformer_engine"})
    with pytest.raises(RequestError, match="softcap"):
        check_models(opened)


def test_names_inside_fused_modules_are_those_that_megatron_turns_into_plain_ones():
    hooks = pytest.importorskip("megatron.core.post_training.modelopt.gpt.state_dict_hooks")
    fused = {row.fused.format(layer=3): row.name.format(layer=3) for row in PARAMETERS if row.fused}
    state = {name: plain for name, plain in fused.items()}
    hooks.mcore_gpt_load_te_state_dict_pre_hook(state, "", {}, True, [], [], [])
    assert state == {plain: plain for plain in fused.values()}
    assert len(state) == 4
