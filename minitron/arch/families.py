"""Hugging Face families as table rows: how a `config.json` maps to `Arch` and back, and what the tensors of the table are called and how they lie."""

import dataclasses
import functools
import re
from collections.abc import Callable

from minitron.arch.arch import Arch
from minitron.arch.axes import Parameter
from minitron.arch.family import Config, Family, by_own_names, rope_of
from minitron.arch.limits import check_values
from minitron.errors import RequestError

GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # names of one function
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
_EXPERTS = {"num_moe_experts": "num_experts", "moe_router_topk": "num_experts_per_tok", "moe_ffn_hidden_size": "moe_intermediate_size"}
_DEFAULTS = {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "vocab_size": 32000, "hidden_act": "silu"}
_PLAIN = {"hidden_act": ("silu",), "quantization_config": (None,)}
_BIASES = {"add_attention_bias": "attention_bias", "add_mlp_bias": "mlp_bias"}
_EVEN = "hidden_size must be a multiple of num_attention_heads"


def _divides(arch: Arch) -> bool:
    return arch.hidden_size % arch.num_attention_heads == 0


def _whole_heads(arch: Arch) -> bool:
    """Of classes that know no head_dim and no KV groups."""
    return arch.hidden_size == arch.num_attention_heads * arch.kv_channels and arch.num_query_groups == arch.num_attention_heads


def _by_layer(config: Config, window: int | None, slides: Callable[[int], bool]) -> Config:
    """How far layers see, from `layer_types`, or by `slides` where that is not given."""
    kinds = config.get("layer_types") or ["sliding_attention" if slides(n) else "full_attention" for n in range(config["num_hidden_layers"])]
    if unknown := sorted(set(kinds) - {"sliding_attention", "full_attention"}):
        raise RequestError(f"layer_types: {', '.join(map(repr, unknown))} is not supported; allowed: 'full_attention', 'sliding_attention'")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"sliding_window": window, "sliding": sliding} if window is not None and any(sliding) else {}


def _qwen(config: Config) -> Config:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    return _by_layer(config, window, lambda number: number >= config["max_window_layers"])


def _gemma2(config: Config) -> Config:
    return {
        "softmax_scale": config["query_pre_attn_scalar"] ** -0.5,
        "attention_softcap": config["attn_logit_softcapping"],
        "logit_softcap": config["final_logit_softcapping"],
        **_by_layer(config, config["sliding_window"], lambda number: number % 2 == 0),
    }


def _gemma3(config: Config) -> Config:
    """Layers that slide turn by another base, and are five of six unless the config says otherwise."""
    every = config.get("sliding_window_pattern") or 6
    local = (config.get("rope_parameters") or {}).get("sliding_attention") or {"rope_theta": config.get("rope_local_base_freq", 10000.0)}
    rope = rope_of({"rope_parameters": local}, False, ("default",))
    return {**_gemma2(config), **_by_layer(config, config["sliding_window"], lambda number: bool((number + 1) % every)), "sliding_rope": rope}


def _opt(config: Config) -> Config:
    projected = config.get("word_embed_proj_dim")
    if projected not in (None, config["hidden_size"]):
        raise RequestError(f"word_embed_proj_dim={projected!r} is not supported: it must be hidden_size={config['hidden_size']}")
    return {}


def _qwen_moe(config: Config) -> Config:
    """Which layers have experts, and whether the chosen ones' weights add up to one."""
    count, step, dense = config["num_hidden_layers"], config["decoder_sparse_step"], set(config["mlp_only_layers"] or ())
    if not isinstance(normed := config["norm_topk_prob"], bool):
        raise RequestError(f"norm_topk_prob={normed!r}: true or false is needed")
    return {"moe_layers": tuple(n not in dense and (n + 1) % step == 0 for n in range(count)), "moe_router_pre_softmax": not normed}


def _qwen2_moe(config: Config) -> Config:
    window = config["sliding_window"] if config["use_sliding_window"] else None
    return {**_qwen_moe(config), **_by_layer(config, window, lambda number: number % 2 == 0 and number < config["max_window_layers"])}


def _qwen3_moe(config: Config) -> Config:
    return {**_qwen_moe(config), "sliding_window": config["sliding_window"] if config["use_sliding_window"] else None}


LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    sizes=_SIZES,
    requires=_PLAIN,
    flags=_BIASES,
    defaults={**_DEFAULTS, "max_position_embeddings": 2048},
    # LlamaConfig refuses other widths although the model would run: head_dim is explicit
    expresses=_divides,
    limits=_EVEN,
    otherwise="mistral",
)
MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    sizes=_SIZES,
    requires=_PLAIN,
    defaults={**_DEFAULTS, "max_position_embeddings": 131072, "sliding_window": 4096, "num_key_value_heads": 8},
    further=lambda config: {"sliding_window": config["sliding_window"]},
    expresses=lambda arch: not arch.qkv_bias and not arch.mlp_bias,
    limits="there are no biases",
)
# Nemotron-4 and the Minitrons pruned from it (arXiv 2407.14679)
NEMOTRON = Family(
    model_type="nemotron",
    architecture="NemotronForCausalLM",
    sizes={**_SIZES, "layernorm_epsilon": "norm_eps"},
    requires={**_PLAIN, "hidden_act": ("relu2",)},
    flags=_BIASES,
    defaults={
        "tie_word_embeddings": False, "norm_eps": 1e-5, "vocab_size": 256000, "hidden_act": "relu2", "max_position_embeddings": 4096,
        "partial_rotary_factor": 0.5,
    },
    fixed={"gated_linear_unit": False, "activation_func": "squared_relu", "normalization": "LayerNorm", "layernorm_zero_centered_gamma": True},
    partial_rotary=True,
)  # fmt: skip
# Qwen2 and 2.5; a bias in QKV alone
QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    sizes=_SIZES,
    requires=_PLAIN,
    defaults={
        **_DEFAULTS, "vocab_size": 151936, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
        "max_window_layers": 28, "num_key_value_heads": 32,
    },
    fixed={"add_qkv_bias": True},
    further=_qwen,
    layer_types=True,
)  # fmt: skip
QWEN3 = dataclasses.replace(
    QWEN2,
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    flags={"add_attention_bias": "attention_bias"},
    defaults={**QWEN2.defaults, "head_dim": 128},
    fixed={"qk_layernorm": True},
)
_GEMMA = {"gated_linear_unit": True, "activation_func": "gelu_tanh", "layernorm_zero_centered_gamma": True, "scaled_embeddings": True}
GEMMA = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    sizes=_SIZES,
    # its first releases say "gelu", and transformers takes that for the tanh form
    requires={**_PLAIN, "hidden_act": (*GELU_TANH, "gelu"), "use_bidirectional_attention": (None, False)},
    flags={"add_attention_bias": "attention_bias"},
    defaults={**_DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
              "tie_word_embeddings": True, "num_key_value_heads": 16},
    fixed=_GEMMA,
)  # fmt: skip
GEMMA2 = dataclasses.replace(
    GEMMA,
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    requires={"hidden_activation": GELU_TANH, "quantization_config": (None,), "use_bidirectional_attention": (None, False)},
    defaults={
        **GEMMA.defaults, "num_key_value_heads": 4, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "sliding_window": 4096,
        "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
    },
    fixed={**_GEMMA, "post_norms": True},
    further=_gemma2,
    names={
        "self_attn.post_norm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "mlp.post_norm": "post_feedforward_layernorm",
    },
    expresses=_divides,
    limits=_EVEN,
    layer_types=True,
)  # fmt: skip
# the text models alone; the vision models nest this config in another
GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    architecture="Gemma3ForCausalLM",
    defaults={
        **GEMMA2.defaults, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1000000.0,
        "final_logit_softcapping": None, "attn_logit_softcapping": None,
    },
    fixed={**GEMMA2.fixed, "qk_layernorm": True},
    further=_gemma3,
    rope_types=("default", "linear"),  # those that leave cos and sin alone, as Megatron has one factor on them for all layers
)  # fmt: skip
# QKV in one tensor, heads of a kind together, and gate and up in another
PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    sizes=_SIZES,
    requires=_PLAIN,
    defaults={**_DEFAULTS, "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "original_max_position_embeddings": 4096,
              "partial_rotary_factor": 1.0, "sliding_window": None},
    further=lambda config: {"sliding_window": config["sliding_window"]},
    partial_rotary=True,
    rope_types=("default", "longrope"),
    # its class holds the length of longrope's lists against the width of a head that these two give
    expresses=lambda arch: arch.rope_parameters["rope_type"] == "default" or arch.hidden_size // arch.num_attention_heads == arch.kv_channels,
    limits="with longrope, hidden_size must be num_attention_heads times the width of a head",
    names={
        "self_attn.q_proj": "self_attn.qkv_proj",
        "self_attn.k_proj": "self_attn.qkv_proj",
        "self_attn.v_proj": "self_attn.qkv_proj",
        "mlp.gate_proj": "mlp.gate_up_proj",
        "mlp.up_proj": "mlp.gate_up_proj",
    },
)  # fmt: skip
# learned positions, biases everywhere, matrices the other way round
GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    sizes={
        "num_layers": "n_layer", "hidden_size": "n_embd", "ffn_hidden_size": "n_inner", "num_attention_heads": "n_head", "vocab_size": "vocab_size",
        "max_position_embeddings": "n_positions", "share_embeddings_and_output_weights": "tie_word_embeddings",
        "layernorm_epsilon": "layer_norm_epsilon",
    },
    requires={
        "activation_function": GELU_TANH, "quantization_config": (None,), "scale_attn_weights": (True,), "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,),
    },
    defaults={
        "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "layer_norm_epsilon": 1e-5,
        "n_inner": None, "activation_function": "gelu_new", "tie_word_embeddings": True, "scale_attn_weights": True, "add_cross_attention": False,
        "scale_attn_by_inverse_layer_idx": False,
    },
    fixed={"add_bias_linear": True, "gated_linear_unit": False, "activation_func": "gelu_tanh", "normalization": "LayerNorm", "position_offset": 0},
    further=lambda config: {"ffn_hidden_size": config["n_inner"] or 4 * config["n_embd"]},
    names={
        "model.layers": "transformer.h", "model.embed_tokens": "transformer.wte", "model.embed_positions": "transformer.wpe",
        "model.norm": "transformer.ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.q_proj": "attn.c_attn", "self_attn.k_proj": "attn.c_attn", "self_attn.v_proj": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj",
    },
    transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"),
    expresses=_whole_heads,
    limits="hidden_size must be num_attention_heads times the width of a head, which stays, and every head has keys and values of its own",
)  # fmt: skip
OPT = Family(
    model_type="opt",
    architecture="OPTForCausalLM",
    sizes={
        **{field: key for field, key in _SIZES.items() if field not in ("layernorm_epsilon", "num_query_groups", "kv_channels")},
        "ffn_hidden_size": "ffn_dim",
    },
    requires={
        "activation_function": ("relu",), "quantization_config": (None,), "do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,),
        "layer_norm_elementwise_affine": (True,),
    },
    flags={"add_bias_linear": "enable_bias"},
    defaults={
        "vocab_size": 50272, "max_position_embeddings": 2048, "activation_function": "relu", "tie_word_embeddings": True, "enable_bias": True,
        "do_layer_norm_before": True, "_remove_final_layer_norm": False, "layer_norm_elementwise_affine": True,
    },
    fixed={"gated_linear_unit": False, "activation_func": "relu", "normalization": "LayerNorm", "position_offset": 2},
    further=_opt,
    following={"word_embed_proj_dim": "hidden_size"},
    names={
        "model.": "model.decoder.", "model.norm": "model.decoder.final_layer_norm", "input_layernorm": "self_attn_layer_norm",
        "post_attention_layernorm": "final_layer_norm", "self_attn.o_proj": "self_attn.out_proj", "mlp.up_proj": "fc1", "mlp.down_proj": "fc2",
    },
    expresses=_whole_heads,
    limits=GPT2.limits,
)  # fmt: skip
# every block has experts, so the size of an MLP is that of an expert
MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    sizes={**_SIZES, **_EXPERTS, "num_moe_experts": "num_local_experts", "moe_ffn_hidden_size": "intermediate_size"},
    requires=_PLAIN,
    defaults={
        **_DEFAULTS, "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "rope_theta": 1000000.0, "sliding_window": None,
        "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    further=lambda config: {"sliding_window": config["sliding_window"]},
    names={"mlp.": "block_sparse_moe.", "gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    aliases={"num_experts": "num_local_experts"},
)  # fmt: skip
_QWEN_MOE = {
    **_DEFAULTS, "vocab_size": 151936, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False,
}  # fmt: skip
# Qwen1.5-MoE and Qwen2-MoE: an expert that all tokens go through beside those of the router
QWEN2_MOE = Family(
    model_type="qwen2_moe",
    architecture="Qwen2MoeForCausalLM",
    sizes={**_SIZES, **_EXPERTS, "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size"},
    requires=_PLAIN,
    flags={"add_qkv_bias": "qkv_bias"},
    defaults={
        **_QWEN_MOE, "num_key_value_heads": 16, "max_window_layers": 28, "qkv_bias": True,
        "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
    },
    fixed={"moe_shared_expert_gate": True},
    further=_qwen2_moe,
    layer_types=True,
    dense_layers=True,
)  # fmt: skip
QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    sizes={**_SIZES, **_EXPERTS},
    requires=_PLAIN,
    flags={"add_attention_bias": "attention_bias"},
    defaults={
        **_QWEN_MOE, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    fixed={"qk_layernorm": True},
    further=_qwen3_moe,
    dense_layers=True,
    aliases={"num_local_experts": "num_experts"},  # as transformers writes it
)  # fmt: skip
FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, NEMOTRON, QWEN2, QWEN3, GEMMA, GEMMA2, GEMMA3, PHI3, GPT2, OPT, MIXTRAL, QWEN2_MOE, QWEN3_MOE)
}


@functools.cache
def hf_names(row: Parameter, model_type: str) -> tuple[tuple[str, ...], bool]:
    """What the parts of a row are called in this family, `{layer}` in place of the layer's number, and whether they lie transposed. Parts of one
    name lie in one tensor, in their order."""
    family = FAMILIES[model_type]
    # the longest piece first, where one begins with another
    pieces = "|".join(map(re.escape, sorted(family.names, key=len, reverse=True)))
    names = tuple(re.sub(pieces, lambda found: family.names[found[0]], name) if pieces else name for name in row.hf)
    return names, names[0].endswith(family.transposed)


def _missing(config: Config) -> str:
    """What of a config that no row reads stands in the way, as far as its words tell."""
    experts = next((key for key in ("num_local_experts", "num_experts", "n_routed_experts") if config.get(key)), None)
    if experts is not None:
        known = ", ".join(sorted(name for name, family in FAMILIES.items() if "num_moe_experts" in family.sizes))
        return f"; {experts}={config[experts]!r}: of models with experts, {known} have rows"
    if isinstance(config.get("text_config"), dict):
        return f"; the text model in its text_config is {config['text_config'].get('model_type')!r}: only text models on their own are read"
    return "; docs/guide.md (A family) says how to add a row: it needs the config's keys, the tensors' names and what its layers compute otherwise"


def from_hf(config: Config, where: str) -> Arch:
    """Read an `Arch` from the content of a config.json.

    Raises RequestError, one line that starts with `where`, for an unknown family or a setting that can't be expressed.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise RequestError(f"{where}: model_type {model_type!r} is not supported; supported: {known}{_missing(config)}")
    family = FAMILIES[model_type]
    config = {**family.defaults, **by_own_names(family, config)}
    check_values(config, family.sizes, where)
    for key, allowed in family.requires.items():
        if config.get(key) not in allowed:
            raise RequestError(f"{where}: {key}={config.get(key)!r} is not supported; allowed: {', '.join(map(repr, allowed))}")
    for field in ("hidden_size", "num_attention_heads", "num_layers", "ffn_hidden_size"):
        key = family.sizes[field]
        if not (isinstance(config.get(key), int) and config[key] > 0) and not (config.get(key) is None and key in family.defaults):
            raise RequestError(f"{where}: {key}={config.get(key)!r}: a positive whole number is needed")
    given = {field: config[key] for field, key in family.sizes.items() if config.get(key) is not None}
    heads = given["num_attention_heads"]
    implied = {"num_query_groups": heads, "kv_channels": given["hidden_size"] // heads}
    biases = {field: bool(config.get(key)) for field, key in family.flags.items()}
    if biases.get("add_attention_bias") and biases.get("add_mlp_bias"):
        biases = {"add_bias_linear": True}
    try:
        rope = {} if "position_offset" in family.fixed else {"rope": rope_of(config, family.partial_rotary, family.rope_types)}
        further = family.further(config)
    except RequestError as error:
        raise RequestError(f"{where}: {error}") from error
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise RequestError(f"{where}: a setting of {model_type} is of the wrong kind: {error}") from error
    return Arch(family=model_type, **{**implied, **given, **biases, **rope, **family.fixed, **further})


def written_as(arch: Arch) -> Family:
    """The family whose class loads this architecture: its own, or the equivalent one that accepts the shape.

    Raises RequestError where none does.
    """
    family = FAMILIES[arch.family]
    if arch.layers:
        raise RequestError(f"sizes that differ between layers can't be written for transformers: no {arch.family} model has them")
    if family.expresses(arch):
        return family
    if family.otherwise is not None and FAMILIES[family.otherwise].expresses(arch):
        return FAMILIES[family.otherwise]
    but = f", or {FAMILIES[family.otherwise].limits}" if family.otherwise is not None else ""
    raise RequestError(
        f"hidden_size={arch.hidden_size}, num_attention_heads={arch.num_attention_heads}, num_query_groups={arch.num_query_groups}: "
        f"transformers loads no such {arch.family} model: {family.limits}{but}"
    )


def to_hf(arch: Arch, source: Config) -> Config:
    """The config.json of a model of this architecture: `source` (the original's content) with the sizes of `arch`."""
    family = written_as(arch)
    keys = [*family.sizes.items(), *((field, key) for key, field in family.following.items())]
    config = {**by_own_names(family, source), **{key: getattr(arch, field) for field, key in keys}}
    config.update(model_type=family.model_type, architectures=[family.architecture])
    if family.layer_types:
        config["layer_types"] = ["sliding_attention" if arch.slides(number) else "full_attention" for number in range(arch.num_layers)]
    if family.dense_layers:
        config.update(mlp_only_layers=[number for number in range(arch.num_layers) if not arch.routes(number)], decoder_sparse_step=1)
    if family.model_type != arch.family:
        # settings that the other class would read with another default of its own
        config.update({key: allowed[0] for key, allowed in family.requires.items() if key not in source})
        config["sliding_window"] = arch.sliding_window
    config.pop("quantization_config", None)
    return config
