"""What a config.json may say: read as `transformers` reads it, or refused in one line."""

import json

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from minitron.arch.families import ROPE_TYPES, from_hf, to_hf
from minitron.errors import RequestError
from tests.oracles.published import CONFIGS

PLAIN = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported: llama, mistral, nemotron"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; allowed: 'silu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4} is not supported; allowed: None"),
        ({"model_type": "mistral", "sliding_window": 128}, "sliding_window=128 is not supported; allowed: None"),
        ({"model_type": "mistral"}, "sliding_window=4096 is not supported; allowed: None"),
        ({"hidden_size": None}, "hidden_size=None: a positive whole number is needed"),
        ({"hidden_size": 0}, "hidden_size=0: a positive whole number is needed"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2': a positive whole number is needed"),
        ({"intermediate_size": -3}, "intermediate_size=-3: a positive whole number is needed"),
        ({"num_attention_heads": None}, "num_attention_heads=None: a positive whole number is needed"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_query_groups=3"),
        ({"num_key_value_heads": 0}, "num_query_groups=0: a positive whole number is needed"),
        ({"attention_bias": True}, "attention_bias=True without the same mlp_bias is not supported"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported; supported: default, linear"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type 'spiral' is not supported"),
        ({"head_dim": "8"}, "kv_channels='8': a positive whole number is needed"),
        ({"model_type": "nemotron", "hidden_act": "silu"}, "hidden_act='silu' is not supported; allowed: 'relu2'"),
        ({"model_type": "nemotron", "partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 is not supported; allowed: above 0, at most 1"),
        ({"model_type": "nemotron", "partial_rotary_factor": None}, "partial_rotary_factor=None is not supported"),
        ({"model_type": "nemotron", "rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor=0 is not supported"),
        ({"model_type": "nemotron", "attention_bias": True}, "attention_bias=True without the same mlp_bias is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; allowed: 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported; allowed: 1.0"),
        ({"vocab_size": 10.5}, "vocab_size=10.5: a positive whole number is needed"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_expressed_is_refused_in_one_line(change, said):
    with pytest.raises(RequestError, match=said) as refusal:
        from_hf({**PLAIN, **change}, "model.path=x: config.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "config",
    [
        PLAIN,
        {**PLAIN, "num_key_value_heads": None, "head_dim": None},
        {**PLAIN, "num_key_value_heads": 2, "head_dim": 10, "tie_word_embeddings": True, "rms_norm_eps": 1e-4},
        {**PLAIN, "rope_theta": 7.0},
        {**PLAIN, "rope_theta": 7.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {**PLAIN, "rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {**PLAIN, "rope_parameters": {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}},
        {**PLAIN, "model_type": "mistral", "sliding_window": None, "num_key_value_heads": 2},
        {**PLAIN, "attention_bias": True, "mlp_bias": True},
        {**PLAIN, "partial_rotary_factor": 1.0},
        {**PLAIN, "model_type": "nemotron", "num_key_value_heads": 2},
        {**PLAIN, "model_type": "nemotron", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3},
        {
            **PLAIN,
            "model_type": "nemotron",
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.2},
            "partial_rotary_factor": 0.3,
        },
        CONFIGS["Minitron-8B"],
        CONFIGS["Minitron-4B"],
    ],
    ids=str,
)
def test_defaults_are_those_of_transformers(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, arch = AutoConfig.from_pretrained(tmp_path), from_hf(config, "x")
    for field, key in {
        "num_layers": "num_hidden_layers", "hidden_size": "hidden_size", "ffn_hidden_size": "intermediate_size",
        "num_attention_heads": "num_attention_heads", "num_query_groups": "num_key_value_heads", "vocab_size": "vocab_size",
        "max_position_embeddings": "max_position_embeddings", "share_embeddings_and_output_weights": "tie_word_embeddings",
        "layernorm_epsilon": "norm_eps" if config["model_type"] == "nemotron" else "rms_norm_eps",
    }.items():  # fmt: skip
        assert getattr(arch, field) == getattr(theirs, key), field
    assert arch.rope_parameters == {key: value for key, value in theirs.rope_parameters.items() if key != "type"}
    assert arch.kv_channels == (theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert arch.add_bias_linear == bool(getattr(theirs, "mlp_bias", False))


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_rotary_kind_passes_through_unchanged(kind):
    rope = {"rope_type": kind, "rope_theta": 3.0, "factor": 2.0}
    config = {**PLAIN, "rope_parameters": rope}
    arch = from_hf(config, "x")
    assert arch.rope_parameters == rope
    assert to_hf(arch, config)["rope_parameters"] == rope


def test_a_shape_that_llama_refuses_is_written_as_mistral():
    pruned = from_hf({**PLAIN, "head_dim": 8}, "x").replace(hidden_size=30)
    with pytest.raises(Exception, match="hidden size"):
        LlamaConfig(hidden_size=30, num_attention_heads=4)
    written = to_hf(pruned, {**PLAIN, "torch_dtype": "float32"})
    assert (written["model_type"], written["architectures"], written["sliding_window"]) == ("mistral", ["MistralForCausalLM"], None)
    assert MistralConfig(**written).hidden_size == 30
    again = from_hf(written, "x")
    assert again == pruned.replace(family="mistral")


def test_a_shape_that_no_class_of_transformers_loads_is_refused():
    biased = from_hf({**PLAIN, "attention_bias": True, "mlp_bias": True}, "x")
    assert to_hf(biased, {})["model_type"] == "llama"
    with pytest.raises(RequestError, match=r"hidden_size=30: .*only if this is a multiple of num_attention_heads=4"):
        to_hf(biased.replace(hidden_size=30), {})
