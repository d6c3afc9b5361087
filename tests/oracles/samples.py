"""Of every family a few random tiny models of odd shape: what each row of `arch.families.FAMILIES` is tried with."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from minitron.arch.families import FAMILIES
from minitron.config.schema import Target
from tests.oracles.models import randomise

SIZES = {
    "num_layers": 5, "hidden_size": 48, "ffn_hidden_size": 36, "num_attention_heads": 6, "num_query_groups": 3, "kv_channels": 10, "vocab_size": 61,
    "max_position_embeddings": 64, "share_embeddings_and_output_weights": True, "layernorm_epsilon": 1e-4,
    "num_moe_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 18, "moe_shared_expert_intermediate_size": 30,
}  # fmt: skip
WINDOW = 7  # shorter than the texts
UNTIED = {"tie_word_embeddings": False}
_LONGROPE = {
    "rope_type": "longrope", "rope_theta": 500.0, "short_factor": [1.0, 1.1, 1.3], "long_factor": [1.0, 2.0, 4.0], "partial_rotary_factor": 0.6,
}  # fmt: skip

# a family's models, by what they have beside SIZES, in the words of its config.json
SAMPLES: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "tied": {},
        "attention_bias": {"attention_bias": True, **UNTIED},
        "mlp_bias": {"mlp_bias": True},
        "biases": {"attention_bias": True, "mlp_bias": True, **UNTIED},
    },
    "mistral": {"nemo": {"sliding_window": None, "hidden_size": 50, **UNTIED}, "sliding": {"sliding_window": WINDOW}},
    "nemotron": {
        "tied": {},
        "attention_bias": {"attention_bias": True, **UNTIED},
        "mlp_bias": {"mlp_bias": True, "hidden_size": 50},
    },
    "qwen2": {
        "tied": {"hidden_size": 50},
        "sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2, **UNTIED},
    },
    "qwen3": {
        "tied": {"hidden_size": 50},
        "sliding": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3, "attention_bias": True, **UNTIED},
    },
    "gemma": {"tied": {"hidden_size": 50}, "biases": {"attention_bias": True, **UNTIED}},
    "gemma2": {
        "softcaps": {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 4.0},
        "biases": {
            "sliding_window": WINDOW, "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention", "full_attention"], **UNTIED,
        },
    },
    "gemma3_text": {
        "tied": {"sliding_window": WINDOW, "query_pre_attn_scalar": 20, "sliding_window_pattern": 3},
        "biases": {
            "sliding_window": WINDOW, "final_logit_softcapping": 4.0, "attention_bias": True, **UNTIED,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            },
        },
    },
    "phi3": {
        "tied": {"hidden_size": 50},
        "sliding": {"sliding_window": WINDOW, "rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.6}, **UNTIED},
        "longrope": {"hidden_size": 60, "original_max_position_embeddings": 8, "rope_parameters": _LONGROPE},
    },
    "gpt2": {"tied": {"n_inner": None}, "untied": UNTIED},
    "opt": {"tied": {}, "no_biases": {"enable_bias": False, **UNTIED}},
    "mixtral": {"tied": {"hidden_size": 50}, "sliding": {"sliding_window": WINDOW, "num_experts_per_tok": 3, **UNTIED}},
    "qwen2_moe": {
        "normed": {"hidden_size": 42, "norm_topk_prob": True, "qkv_bias": False, "num_experts_per_tok": 3},
        "mixed": {"decoder_sparse_step": 2, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3, **UNTIED},
    },
    "qwen3_moe": {
        "one_expert": {"norm_topk_prob": True, "num_experts_per_tok": 1, "use_sliding_window": True, "sliding_window": WINDOW},
        "mixed": {"mlp_only_layers": [1, 3], "hidden_size": 50, "attention_bias": True, **UNTIED},
    },
}  # fmt: skip
# sizes to prune to, each along an axis, and all of them together
TARGETS = {
    "hidden": {"hidden_size": 35},
    "ffn": {"ffn_hidden_size": 18},
    "heads": {"num_attention_heads": 3},
    "groups": {"num_query_groups": 2},
    "layers": {"num_layers": 4},
    "all": {"hidden_size": 30, "ffn_hidden_size": 6, "num_query_groups": 2, "num_attention_heads": 2, "num_layers": 4},
}
# of classes whose hidden size is that of all heads, which have keys and values of their own
_TIED_TO_HEADS = {
    "hidden and groups": {"hidden_size": 40, "num_query_groups": 5},
    "ffn": TARGETS["ffn"],
    "layers": TARGETS["layers"],
    "all": {"hidden_size": 24, "num_query_groups": 3, "ffn_hidden_size": 6, "num_layers": 4},
}
# and of those that ask for a multiple of the heads
_MULTIPLES = {**TARGETS, "hidden": {"hidden_size": 30}}
OWN_TARGETS = {"gpt2": _TIED_TO_HEADS, "opt": _TIED_TO_HEADS, "gemma2": _MULTIPLES, "gemma3_text": _MULTIPLES}
OWN_TARGETS_OF_SAMPLE = {
    # a class of no other family has these biases, so the width is a multiple of the heads
    "llama.attention_bias": _MULTIPLES, "llama.mlp_bias": _MULTIPLES, "llama.biases": _MULTIPLES,
    "phi3.longrope": {name: sizes for name, sizes in TARGETS.items() if name in ("ffn", "layers")} | {
        "hidden and heads": {"hidden_size": 30, "num_attention_heads": 3},
    },
}  # fmt: skip


def names() -> list[str]:
    """Every sample, as family.sample."""
    return [f"{family}.{sample}" for family, samples in SAMPLES.items() for sample in samples]


def targets_of(name: str) -> dict[str, Target]:
    """What a sample is pruned to."""
    family = name.split(".")[0]
    return {axis: Target(**sizes) for axis, sizes in OWN_TARGETS_OF_SAMPLE.get(name, OWN_TARGETS.get(family, TARGETS)).items()}


def config_of(name: str) -> PreTrainedConfig:
    """A sample's configuration, of its family's own class; with a token for padding its embedding would learn nothing."""
    model_type, sample = name.split(".")
    sizes = {key: SIZES[field] for field, key in FAMILIES[model_type].sizes.items()}
    return AutoConfig.for_model(model_type, **{**sizes, "pad_token_id": None, **SAMPLES[model_type][sample]})


def save_samples(root: Path, seed: int = 0, wanted: list[str] | None = None) -> dict[str, Path]:
    """A random model of every sample, or of those wanted, in a folder of its own."""
    folders = {}
    for number, name in enumerate(wanted or names()):
        folders[name] = root / name
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32)
        randomise(model, seed + number).save_pretrained(folders[name])
    return folders
