"""Parameter counts: published figures, and those of the models that `transformers` and Megatron build."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from minitron.arch.arch import Arch
from minitron.arch.axes import At, count_active, parameters
from minitron.arch.counts import costs, count
from minitron.arch.families import FAMILIES, from_hf, hf_names, to_hf
from minitron.arch.shards import shard_shape
from minitron.engine.model import rows, skeleton
from minitron.errors import RequestError
from tests.oracles.models import NEMOTRON, UNTIED, config_of
from tests.oracles.published import ACTIVE, CONFIGS, PARAMETERS
from tests.oracles.samples import SAMPLES

SMOLLM2 = CONFIGS["SmolLM2-135M"]
NEWER = ("gated_linear_unit", "activation_func", "normalization", "layernorm_zero_centered_gamma")  # an arch.json may be older than these


def model_of(config):
    """The model that transformers builds, without memory."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


def on_disk(model):
    """The names by which transformers saves a model's tensors: those of experts, which it holds in one, lie apart. (Every parameter once.)"""
    tensors = {name: torch.empty(tensor.shape) for name, tensor in model.named_parameters()}
    return revert_weight_conversion(model, tensors)


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models(name):
    """To the digits that are printed."""
    arch = from_hf(CONFIGS[name], "x")
    digits, unit = PARAMETERS[name].split()
    assert f"{arch.num_parameters() / {'M': 1e6, 'B': 1e9}[unit]:.{len(digits.split('.')[1])}f}" == digits
    assert count_active(arch) == (pytest.approx(ACTIVE[name], abs=0.06e9) if name in ACTIVE else arch.num_parameters())
    assert arch.num_parameters() == model_of(CONFIGS[name]).num_parameters()


@st.composite
def configs(draw, model_type):
    """Any shape that transformers' class of this family accepts, and what one of its samples has beside sizes."""
    names = FAMILIES[model_type].sizes
    groups, width = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 9))
    heads = groups * (draw(st.integers(1, 4)) if "num_query_groups" in names else 1)
    hidden = draw(st.integers(1, 9)) * (heads if model_type in ("llama", "gemma2", "gemma3_text") else 7)
    sizes = {
        "num_layers": draw(st.integers(1, 2)), "hidden_size": hidden if "kv_channels" in names else heads * width,
        "ffn_hidden_size": draw(st.integers(1, 70)), "num_attention_heads": heads, "num_query_groups": groups, "kv_channels": width,
        "vocab_size": draw(st.integers(2, 90)), "max_position_embeddings": 32, "layernorm_epsilon": 1e-4,
        "share_embeddings_and_output_weights": draw(st.booleans()),
        "num_moe_experts": draw(st.integers(3, 5)), "moe_router_topk": draw(st.integers(1, 3)), "moe_ffn_hidden_size": draw(st.integers(1, 30)),
        "moe_shared_expert_intermediate_size": draw(st.integers(1, 30)),
    }  # fmt: skip
    config = {"model_type": model_type, "pad_token_id": None, **{key: sizes[field] for field, key in names.items()}}
    beside = draw(st.sampled_from(list(SAMPLES[model_type].values())))
    config |= {key: value for key, value in beside.items() if key not in (*config, "layer_types", "rope_parameters")}
    return config | ({"partial_rotary_factor": draw(st.sampled_from([0.25, 0.5, 1.0]))} if model_type == "nemotron" else {})


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_any_shape_is_what_transformers_and_megatron_build(model_type, alone):
    """The table's count, names and shapes, of 60 random shapes."""
    tried = []

    @given(configs(model_type))
    @settings(max_examples=60, derandomize=True, database=None)
    def holds(config):
        arch, theirs = from_hf(config, "x"), model_of(config)
        assert arch.num_parameters() == theirs.num_parameters()
        assert {at.named(name) for row, at in parameters(arch) for name in hf_names(row, model_type)[0]} == set(on_disk(theirs))
        model = skeleton(arch, alone, torch.float32)
        ours = {(row.name, at): tuple(model.get_parameter(name).shape) for name, row, at in rows(model)}
        assert ours == {(row.name, at): shard_shape(row, arch, 1) for row, at in parameters(arch)}
        assert arch.num_parameters() == sum(math.prod(shape) for shape in ours.values())
        assert from_hf(to_hf(arch, config), "x") == arch
        tried.append(arch.share_embeddings_and_output_weights)

    holds()
    assert len(tried) >= 60
    assert set(tried) == {True, False}


@pytest.mark.parametrize("changes", [{}, UNTIED, {"head_dim": 14}, {"num_key_value_heads": 1}, {**NEMOTRON, "hidden_size": 50}], ids=str)
def test_costs_of_a_forward_pass_are_those_that_torch_counts(changes):
    config, batch, length = config_of(**changes), 2, 10
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        cache = model(torch.zeros(batch, length, dtype=torch.long)).past_key_values
    arch = from_hf(config.to_dict(), "x")
    counted = count(arch, length, bytes_per_element=4)
    embeddings = sum(tensor.numel() for name, tensor in model.named_parameters() if "embed" in name or "lm_head" in name)
    cached = sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)
    assert counted.flops_per_token == counter.get_total_flops() / (batch * length)
    assert counted.parameters == model.num_parameters()
    assert counted.embedding_parameters == embeddings
    assert counted.kv_cache_bytes_per_token == cached / (batch * length)
    assert costs(arch, batch, length, 4) == {
        "params": model.num_parameters(),
        "non_embedding_params": model.num_parameters() - embeddings,
        "active_params": model.num_parameters(),
        "memory_gb": (4 * model.num_parameters() + cached) / 1e9,
        "gflops_per_token": counter.get_total_flops() / (batch * length) / 1e9,
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 0}, "num_layers=0: a positive whole number is needed"),
        ({"hidden_size": True}, "hidden_size=True: a positive whole number is needed"),
        ({"ffn_hidden_size": 1.5}, "ffn_hidden_size=1.5: a positive whole number is needed"),
        ({"num_query_groups": 2}, "num_attention_heads=9: must be a multiple of num_query_groups=2"),
    ],
)
def test_sizes_that_no_model_has(change, said):
    with pytest.raises(RequestError, match=said):
        from_hf(SMOLLM2, "x").replace(**change)


MIXED = {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 6, "moe_shared_expert_intermediate_size": 5,
         "moe_layers": (True, False, True)}  # fmt: skip


def test_blocks_with_and_without_experts():
    """Each is a block of an architecture of its own kind, and which of them stay decides what a shallower model is."""
    plain = from_hf({**SMOLLM2, "num_hidden_layers": 3}, "x")
    arch = plain.replace(**MIXED)
    assert [arch.routes(number) for number in range(3)] == [True, False, True]
    assert arch.layer(1) == plain and arch.layer(0) == arch.layer(2) == arch.replace(moe_layers=())
    assert arch.of_layers([1, 2]).moe_layers == (False, True) and arch.of_layers([0, 2]) == plain.replace(
        **{**MIXED, "num_layers": 2, "moe_layers": ()}
    )
    assert arch.replace(num_layers=5).moe_layers == (True, False, True, True, False)
    assert arch.of_layers([1]).num_parameters() == plain.replace(num_layers=1).num_parameters() == count_active(arch.of_layers([1]))
    assert arch.num_parameters() - count_active(arch) == 2 * 2 * 3 * 6 * 576
    assert Arch.from_dict(arch.to_dict()) == arch
    found = [(row.name, at) for row, at in parameters(arch) if row.per_expert]
    assert found[:5] == [(found[0][0], At(0, expert)) for expert in range(4)] + [(found[0][0], At(2, 0))] and len(found) == 2 * 2 * 4


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"moe_router_topk": 5}, "moe_router_topk=5: at most num_moe_experts=4"),
        ({"moe_router_topk": None}, "num_moe_experts: num_moe_experts, moe_router_topk and moe_ffn_hidden_size are needed together"),
        ({"num_moe_experts": 0}, "num_moe_experts=0: a positive whole number is needed"),
        ({"moe_layers": (True,)}, "moe_layers: said of 1 layers, and num_layers=3"),
        ({"num_moe_experts": None, "moe_router_topk": None, "moe_ffn_hidden_size": None}, "moe_layers, .*: num_moe_experts is needed with them"),
        ({"moe_shared_expert_intermediate_size": None, "moe_shared_expert_gate": True}, "moe_shared_expert_gate=True: moe_shared_expert_inter"),
    ],
)
def test_experts_that_no_model_has(change, said):
    with pytest.raises(RequestError, match=said):
        from_hf({**SMOLLM2, "num_hidden_layers": 3}, "x").replace(**{**MIXED, **change})


def test_an_architecture_survives_its_json_form():
    arch = from_hf({**SMOLLM2, "rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}}, "x")
    assert Arch.from_dict(arch.to_dict()) == arch
    assert arch.rope_parameters == {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}
    assert Arch.from_dict({key: value for key, value in arch.to_dict().items() if key not in NEWER}) == arch
    with pytest.raises(RequestError, match="arch: unknown sizes depth"):
        Arch.from_dict({**arch.to_dict(), "depth": 3})
    with pytest.raises(RequestError, match=r"arch: .*missing.*hidden_size"):
        Arch.from_dict({key: value for key, value in arch.to_dict().items() if key != "hidden_size"})
