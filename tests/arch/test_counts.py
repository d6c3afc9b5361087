"""Parameter counts: published figures, and those of the models that `transformers` builds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.arch.arch import Arch
from minitron.arch.counts import count
from minitron.arch.families import from_hf, to_hf
from minitron.errors import RequestError
from tests.oracles.models import UNTIED, config_of

SMOLLM2 = {
    "model_type": "llama", "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA31_8B = {
    "model_type": "llama", "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip
MINITRON_4B_WIDTH = {**LLAMA31_8B, "hidden_size": 3072, "intermediate_size": 9216, "head_dim": 128}  # nvidia/Llama-3.1-Minitron-4B-Width-Base
MINITRON_4B_DEPTH = {**LLAMA31_8B, "num_hidden_layers": 16}  # nvidia/Llama-3.1-Minitron-4B-Depth-Base


def built(config):
    """The number of parameters of the model that transformers builds, without memory."""
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **settings))
    return model.num_parameters()


@pytest.mark.parametrize(("config", "parameters"), [(SMOLLM2, 134_515_008), (LLAMA31_8B, 8_030_261_248)], ids=["SmolLM2-135M", "Llama-3.1-8B"])
def test_published_models(config, parameters):
    assert from_hf(config, "x").num_parameters() == parameters == built(config)


@pytest.mark.parametrize(("config", "billions"), [(MINITRON_4B_WIDTH, 4.51), (MINITRON_4B_DEPTH, 4.54)], ids=["width", "depth"])
def test_published_minitrons(config, billions):
    parameters = from_hf(config, "x").num_parameters()
    assert round(parameters / 1e9, 2) == billions
    assert parameters == built(config)


@st.composite
def configs(draw):
    groups = draw(st.integers(1, 5))
    heads = groups * draw(st.integers(1, 4))
    biases = draw(st.booleans())
    model_type = "llama" if biases else draw(st.sampled_from(["llama", "mistral"]))
    hidden = draw(st.integers(1, 9)) * (heads if model_type == "llama" else 7)
    config = {
        "model_type": model_type, "num_hidden_layers": draw(st.integers(1, 4)), "hidden_size": hidden, "intermediate_size": draw(st.integers(1, 70)),
        "num_attention_heads": heads, "num_key_value_heads": groups, "head_dim": 2 * draw(st.integers(1, 9)), "vocab_size": draw(st.integers(2, 90)),
        "max_position_embeddings": 32, "tie_word_embeddings": draw(st.booleans()), "rms_norm_eps": 1e-5,
    }  # fmt: skip
    return config | ({"attention_bias": True, "mlp_bias": True} if biases else {}) | ({"sliding_window": None} if model_type == "mistral" else {})


@given(configs())
@settings(max_examples=40)
def test_any_shape_counts_what_transformers_builds(config):
    arch = from_hf(config, "x")
    assert arch.num_parameters() == built(config)
    assert from_hf(to_hf(arch, config), "x") == arch


@pytest.mark.parametrize("changes", [{}, UNTIED, {"head_dim": 14}, {"num_key_value_heads": 1}], ids=str)
def test_costs_of_a_forward_pass_are_those_that_torch_counts(changes):
    config, batch, length = config_of(**changes), 2, 10
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        cache = model(torch.zeros(batch, length, dtype=torch.long)).past_key_values
    costs = count(from_hf(config.to_dict(), "x"), length, bytes_per_element=4)
    assert costs.flops_per_token == counter.get_total_flops() / (batch * length)
    assert costs.parameters == model.num_parameters()
    assert costs.embedding_parameters == sum(tensor.numel() for name, tensor in model.named_parameters() if "embed" in name or "lm_head" in name)
    assert costs.kv_cache_bytes_per_token == sum(4 * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers) / (batch * length)


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
    with pytest.raises(RequestError, match="arch: unknown sizes depth"):
        Arch.from_dict({**arch.to_dict(), "depth": 3})
    with pytest.raises(RequestError, match=r"arch: .*missing.*hidden_size"):
        Arch.from_dict({key: value for key, value in arch.to_dict().items() if key != "hidden_size"})
