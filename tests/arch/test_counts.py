"""Parameter counts: published figures, and those of the models that `transformers` and Megatron build."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.arch.arch import Arch
from minitron.arch.axes import parameters
from minitron.arch.counts import costs, count
from minitron.arch.families import FAMILIES, from_hf, hf_names, to_hf
from minitron.arch.shards import shard_shape
from minitron.engine.model import rows, skeleton
from minitron.errors import RequestError
from tests.oracles.models import NEMOTRON, UNTIED, config_of
from tests.oracles.published import CONFIGS, PARAMETERS
from tests.oracles.samples import SAMPLES

SMOLLM2 = CONFIGS["SmolLM2-135M"]
NEWER = ("gated_linear_unit", "activation_func", "normalization", "layernorm_zero_centered_gamma")  # an arch.json may be older than these


def model_of(config):
    """The model that transformers builds, without memory."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))


@pytest.mark.parametrize("name", CONFIGS)
def test_published_models(name):
    """To the digits that are printed."""
    parameters = from_hf(CONFIGS[name], "x").num_parameters()
    digits, unit = PARAMETERS[name].split()
    assert f"{parameters / {'M': 1e6, 'B': 1e9}[unit]:.{len(digits.split('.')[1])}f}" == digits
    assert parameters == model_of(CONFIGS[name]).num_parameters()


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
        arch, theirs = from_hf(config, "x"), dict(model_of(config).named_parameters())
        assert arch.num_parameters() == sum(tensor.numel() for tensor in theirs.values())
        assert {name.format(layer=layer) for row, layer in parameters(arch) for name in hf_names(row, model_type)[0]} == set(theirs)
        model = skeleton(arch, alone, torch.float32)
        ours = {(row.name, layer): tuple(model.get_parameter(name).shape) for name, row, layer in rows(model)}
        assert ours == {(row.name, layer): shard_shape(row, arch, 1) for row, layer in parameters(arch)}
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


def test_an_architecture_survives_its_json_form():
    arch = from_hf({**SMOLLM2, "rope_parameters": {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}}, "x")
    assert Arch.from_dict(arch.to_dict()) == arch
    assert arch.rope_parameters == {"rope_type": "linear", "rope_theta": 5.0, "factor": 2.0}
    assert Arch.from_dict({key: value for key, value in arch.to_dict().items() if key not in NEWER}) == arch
    with pytest.raises(RequestError, match="arch: unknown sizes depth"):
        Arch.from_dict({**arch.to_dict(), "depth": 3})
    with pytest.raises(RequestError, match=r"arch: .*missing.*hidden_size"):
        Arch.from_dict({key: value for key, value in arch.to_dict().items() if key != "hidden_size"})
