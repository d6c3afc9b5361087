"""What a config.json may say: read as `transformers` reads it, or refused in one line."""

import json

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from minitron.arch.families import FAMILIES, from_hf, to_hf
from minitron.arch.family import ROPE_TYPES
from minitron.errors import RequestError
from tests.oracles.published import CONFIGS

PLAIN = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4}

# sizes that fit every family's defaults of the others
FEWEST = {"num_hidden_layers": 3, "hidden_size": 64, "intermediate_size": 40, "num_attention_heads": 32, "n_layer": 3, "n_embd": 64, "n_head": 32,
          "ffn_dim": 40}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"model_type": "bloom"},
            "'bloom' is not supported; supported: gemma, .*qwen3_moe; docs/guide.md .A family. says how to add a row",
        ),
        (
            {"model_type": "deepseek_v3", "n_routed_experts": 8},
            "'deepseek_v3' is not supported; .*; n_routed_experts=8: of models with experts, mixtral, qwen2_moe, qwen3_moe have rows",
        ),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
            "the text model in its text_config is 'gemma3_text': only text",
        ),
        ({"model_type": None}, "model_type None is not supported"),
        ({"model_type": ["llama"]}, "model_type .* is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; allowed: 'silu'"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config={'bits': 4} is not supported; allowed: None"),
        ({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 0}, "sliding_window=0: a positive number is needed"),
        ({"model_type": "mistral", "num_key_value_heads": 4, "sliding_window": 12.5}, "sliding_window=12.5: a positive number is needed"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 2}, "layer_types: 'chunked_attention' is not supported; allowed: 'full_att"),
        ({"model_type": "gemma2", "layer_types": ["sliding_attention"] * 3}, "sliding: said of 3 layers, and num_layers=2"),
        ({"model_type": "gemma2", "hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported; allowed: 'gelu_pytorch_tanh', "),
        ({"model_type": "gemma2", "final_logit_softcapping": "30"}, "logit_softcap='30': a positive number is needed"),
        (
            {"model_type": "gemma3_text", "use_bidirectional_attention": True},
            "use_bidirectional_attention=True is not supported",
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
            "rope_type 'yarn' is not supported; supported: default",
        ),
        ({"model_type": "gemma2", "query_pre_attn_scalar": "x"}, "a setting of gemma2 is of the wrong kind: "),
        ({"model_type": "gemma2", "layer_types": 3}, "a setting of gemma2 is of the wrong kind: "),
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, "rope_type 'su' is not supported; supported: default, longrope"),
        ({"model_type": "gpt2", "n_layer": 2, "n_embd": 0}, "n_embd=0: a positive whole number is needed"),
        ({"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not supported; allowed: False"),
        ({"model_type": "opt", "ffn_dim": 8, "do_layer_norm_before": False}, "do_layer_norm_before=False is not supported; allowed: True"),
        ({"model_type": "opt", "ffn_dim": 8, "word_embed_proj_dim": 16}, "word_embed_proj_dim=16 is not supported: it must be hidden_size=32"),
        ({"hidden_size": None}, "hidden_size=None: a positive whole number is needed"),
        ({"hidden_size": 0}, "hidden_size=0: a positive whole number is needed"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2': a positive whole number is needed"),
        ({"intermediate_size": -3}, "intermediate_size=-3: a positive whole number is needed"),
        ({"num_attention_heads": None}, "num_attention_heads=None: a positive whole number is needed"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_query_groups=3"),
        ({"num_key_value_heads": 0}, "num_key_value_heads=0: a positive whole number is needed"),
        ({"rope_parameters": {"rope_type": "spiral"}}, "rope_type 'spiral' is not supported; supported: default, linear"),
        ({"rope_scaling": {"type": "spiral", "factor": 2.0}}, "rope_type 'spiral' is not supported"),
        ({"head_dim": "8"}, "head_dim='8': a positive whole number is needed"),
        ({"model_type": "nemotron", "hidden_act": "silu"}, "hidden_act='silu' is not supported; allowed: 'relu2'"),
        ({"model_type": "nemotron", "partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 is not supported; allowed: above 0, at most 1"),
        ({"model_type": "nemotron", "partial_rotary_factor": None}, "partial_rotary_factor=None is not supported"),
        ({"model_type": "nemotron", "rope_parameters": {"partial_rotary_factor": 0}}, "partial_rotary_factor=0 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported; allowed: 1.0"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not supported; allowed: 1.0"),
        ({"model_type": "mixtral", "num_local_experts": 0}, "num_local_experts=0: a positive whole number is needed"),
        ({"model_type": "mixtral", "num_local_experts": 1 << 40}, "num_local_experts=1099511627776: at most 16,384 is allowed"),
        ({"model_type": "mixtral", "num_key_value_heads": 2, "num_experts_per_tok": 9}, "moe_router_topk=9: at most num_moe_experts=8"),
        ({"model_type": "qwen3_moe", "num_experts": 0}, "num_experts=0: a positive whole number is needed"),
        ({"model_type": "qwen3_moe", "num_local_experts": "8"}, "num_experts='8': a positive whole number is needed"),
        ({"model_type": "qwen3_moe", "moe_intermediate_size": True}, "moe_intermediate_size=True: a positive whole number is needed"),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "a setting of qwen3_moe is of the wrong kind: "),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "a setting of qwen3_moe is of the wrong kind: "),
        ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob=1: true or false is needed"),
        ({"model_type": "qwen2_moe", "shared_expert_intermediate_size": -1}, "shared_expert_intermediate_size=-1: a positive whole number is needed"),
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
        *CONFIGS.values(),
        *({"model_type": model_type, **FEWEST} for model_type in FAMILIES),
    ],
    ids=str,
)
def test_defaults_are_those_of_transformers(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs, arch = AutoConfig.from_pretrained(tmp_path), from_hf(config, "x")
    family = FAMILIES[config["model_type"]]
    for field, key in family.sizes.items():
        wanted = getattr(theirs, key, None)
        assert getattr(arch, field) == (wanted if wanted is not None else IMPLIED[field](theirs)), field
    assert (arch.add_bias_linear or arch.add_mlp_bias) == bool(getattr(theirs, "mlp_bias", "mlp_bias" not in family.flags.values() and arch.mlp_bias))
    assert all(getattr(theirs, key, allowed[0]) in allowed for key, allowed in family.requires.items())
    if not arch.learned_positions:
        rope = theirs.rope_parameters.get("full_attention", theirs.rope_parameters)
        assert arch.rope_parameters == {key: value for key, value in rope.items() if key != "type"}
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * arch.num_layers
    window = getattr(theirs, "sliding_window", None)
    assert [arch.slides(number) for number in range(arch.num_layers)] == [window is not None and kind == "sliding_attention" for kind in kinds]
    if any(map(arch.slides, range(arch.num_layers))):
        assert arch.sliding_window == window
    for field, key in {"attention_softcap": "attn_logit_softcapping", "logit_softcap": "final_logit_softcapping"}.items():
        assert getattr(arch, field) == getattr(theirs, key, None), field


IMPLIED = {
    "kv_channels": lambda config: config.hidden_size // config.num_attention_heads,
    "num_query_groups": lambda config: config.num_attention_heads,
    "ffn_hidden_size": lambda config: 4 * config.hidden_size,
}


@pytest.mark.parametrize("kind", ROPE_TYPES)
def test_every_rotary_kind_passes_through_unchanged(kind):
    lists = {"short_factor": [1.0], "long_factor": [1.0]}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    rope = {"rope_type": kind, "rope_theta": 3.0, "factor": 2.0, **lists, **llama3}
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
    with pytest.raises(
        RequestError,
        match=r"^hidden_size=30, num_attention_heads=4, .*: transformers loads no such llama model: .*, or there are no biases$",
    ):
        to_hf(biased.replace(hidden_size=30), {})
