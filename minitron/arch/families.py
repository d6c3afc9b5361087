"""Hugging Face families as table rows: how a `config.json` maps to `Arch` and back. Parameter names are in `axes.py`."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from minitron.arch.arch import Arch
from minitron.errors import RequestError

# rotary kinds that transformers computes for this family; anything else is refused before weights are read
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. `sizes` maps Arch fields to config keys; `requires` lists keys with the only values that are supported; `fixed` are
    fields of Arch that no key says. `partial_rotary`: a head may be turned in part, by `partial_rotary_factor`.

    `expresses` says which shapes transformers' own class of this family accepts; where a pruned shape falls outside, it is
    written as the family `otherwise`, which must compute the same function from the same tensors.
    """

    model_type: str
    architecture: str
    sizes: dict[str, str]
    requires: dict[str, tuple[Any, ...]]
    defaults: dict[str, Any]
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    partial_rotary: bool = False
    expresses: Callable[[Arch], bool] = lambda arch: True
    otherwise: str | None = None


_SIZES = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "share_embeddings_and_output_weights": "tie_word_embeddings",
    "layernorm_epsilon": "rms_norm_eps",
}
# what transformers assumes where a config.json is silent
_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "vocab_size": 32000, "hidden_act": "silu"}
_PLAIN = {"hidden_act": ("silu",), "quantization_config": (None,)}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    sizes=_SIZES,
    requires=_PLAIN,
    defaults={**_DEFAULTS, "max_position_embeddings": 2048},
    # LlamaConfig refuses other widths although the model would run: head_dim is explicit
    expresses=lambda arch: arch.hidden_size % arch.num_attention_heads == 0,
    otherwise="mistral",
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    sizes=_SIZES,
    requires={**_PLAIN, "sliding_window": (None,)},
    defaults={**_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096},
    expresses=lambda arch: not (arch.add_bias_linear or arch.add_qkv_bias),
)
# Nemotron-4 and the Minitrons pruned from it (arXiv 2407.14679)
NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    sizes={**_SIZES, "layernorm_epsilon": "norm_eps"},
    requires={**_PLAIN, "hidden_act": ("relu2",)},
    defaults={
        "tie_word_embeddings": False, "norm_eps": 1e-5, "vocab_size": 256000, "hidden_act": "relu2", "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5,
    },
    fixed={"gated_linear_unit": False, "activation_func": "squared_relu", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    partial_rotary=True,
)  # fmt: skip
FAMILIES = {family.model_type: family for family in (LLAMA, MISTRAL, NEMOTRON)}


def from_hf(config: dict[str, Any], where: str) -> Arch:
    """Read an `Arch` from the content of a config.json.

    Raises RequestError, one line that starts with `where`, for an unknown family or a setting that can't be expressed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise RequestError(f"{where}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))}")
    family = FAMILIES[model_type]
    config = {**family.defaults, **config}
    for key, allowed in family.requires.items():
        if config.get(key) not in allowed:
            raise RequestError(f"{where}: {key}={config.get(key)!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise RequestError(f"{where}: {key}={config.get(key)!r}: a positive whole number is needed")
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    if bool(config.get("attention_bias")) != bool(config.get("mlp_bias")):
        raise RequestError(f"{where}: attention_bias={config.get('attention_bias')!r} without the same mlp_bias is not supported")
    values = {field: config[key] for field, key in family.sizes.items()}
    rope = _rope(config, where, family.partial_rotary)
    return Arch(family=model_type, rope=rope, add_bias_linear=bool(config.get("mlp_bias")), **family.fixed, **values)


def _rope(config: dict[str, Any], where: str, partial: bool) -> str:
    """One dict of rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in config:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    share = rope.get("partial_rotary_factor", 1.0)
    if not (isinstance(share, int | float) and 0 < share <= 1) or (share < 1 and not partial):
        allowed = "above 0, at most 1" if partial else "1.0"
        raise RequestError(f"{where}: partial_rotary_factor={share!r} is not supported; allowed: {allowed}")
    if rope["rope_type"] not in ROPE_TYPES:
        raise RequestError(f"{where}: rope_type {rope['rope_type']!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    return json.dumps(rope, sort_keys=True)


def written_as(arch: Arch) -> Family:
    """The family whose class loads this architecture: its own, or the equivalent one that accepts the shape.

    Raises RequestError where none does.
    """
    family = FAMILIES[arch.family]
    if arch.layers:
        raise RequestError(f"sizes that differ between layers can't be written for transformers: no {arch.family} model has them")
    if not family.expresses(arch) and family.otherwise is not None:
        family = FAMILIES[family.otherwise]
    if not family.expresses(arch):
        raise RequestError(
            f"hidden_size={arch.hidden_size}: transformers loads a {arch.family} model with biases only if this is a multiple of "
            f"num_attention_heads={arch.num_attention_heads}"
        )
    return family


def to_hf(arch: Arch, source: dict[str, Any]) -> dict[str, Any]:
    """The config.json of a model of this architecture: `source` (the original's content) with the sizes of `arch`."""
    family = written_as(arch)
    config = {**source, **{key: getattr(arch, field) for field, key in family.sizes.items()}}
    config.update(model_type=family.model_type, architectures=[family.architecture])
    if family.model_type != arch.family:
        # settings that the other class would read with another default of its own
        config.update({key: allowed[0] for key, allowed in family.requires.items() if key not in source})
    config.pop("quantization_config", None)
    return config
