"""What Megatron builds a model from: its settings for an architecture and a layout, and the modules of a block.

Two specs: torch's modules, which run anywhere, and Transformer Engine's.
"""

import copy
import functools
import importlib.util
import json
import math
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from minitron.arch.arch import Arch
from minitron.arch.shards import held_experts, padded, stage_layers
from minitron.engine.attention import Attention, BlockAttention, Norm, NormedRowParallelLinear, PostNorm, Rotary
from minitron.engine.experts import expert_settings, expert_spec
from minitron.engine.parallel import World
from minitron.errors import refuse


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """max(x, 0)^2, as plain torch: Megatron's own asks for a compiler."""
    return torch.relu(x).square()


ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "squared_relu": squared_relu,
    "relu": torch.relu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
}


class BlockConfigs(TransformerConfig):
    """Megatron's settings, with other sizes for each block where `arch.layers` gives them, and what Megatron has no setting for."""

    blocks: tuple[Arch, ...] = ()
    add_attention_bias: bool = False
    attention_softcap: float | None = None
    weights_of_all: bool = False  # a router's weights are parts of a softmax over all experts
    post_norm: Any = None  # the norm of what either half of a block puts out

    def get_config_for_layer(self, layer_number: int) -> "BlockConfigs":
        """The settings of a block, counted from 1; Megatron asks where `heterogeneous_block_specs` is set."""
        # a copy and not `replace`: the latter would derive again what has been derived
        config, block = copy.copy(self), self.blocks[layer_number - 1]
        for name in ("ffn_hidden_size", "num_attention_heads", "num_query_groups"):
            setattr(config, name, getattr(block, name))
        return config


def transformer_config(arch: Arch, world: World, dtype: torch.dtype, spec: str, recompute: str = "none") -> BlockConfigs:
    """Megatron's own settings for this architecture, layout and spec; `recompute` as train.recompute says."""
    whole, _ = padded(arch, world.tp), held_experts(arch, world.ep, world.ep_rank)  # both refuse what does not divide
    config = BlockConfigs(
        num_layers=whole.num_layers,
        hidden_size=whole.hidden_size,
        ffn_hidden_size=whole.ffn_hidden_size,
        num_attention_heads=whole.num_attention_heads,
        num_query_groups=whole.num_query_groups,
        kv_channels=whole.kv_channels,
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        virtual_pipeline_model_parallel_size=world.vpp if world.vpp > 1 else None,
        pipeline_model_parallel_layout=pipeline_layout(arch, world),
        context_parallel_size=world.cp,
        expert_model_parallel_size=world.ep,
        **expert_settings(arch),
        sequence_parallel=world.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        normalization=arch.normalization,
        layernorm_zero_centered_gamma=arch.layernorm_zero_centered_gamma,
        layernorm_epsilon=arch.layernorm_epsilon,
        gated_linear_unit=arch.gated_linear_unit,
        activation_func=ACTIVATIONS[arch.activation_func],
        add_bias_linear=arch.mlp_bias,
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        softmax_scale=arch.softmax_scale,
        window_size=None if arch.sliding_window is None else (arch.sliding_window - 1, 0),
        window_attn_skip_freq=[int(slides) for slides in arch.sliding] or None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # a loss is the sum over its tokens, divided once by the count of the whole global batch
        calculate_per_token_loss=True,
        # a skeleton: Transformer Engine has its own way to leave parameters without memory
        use_cpu_initialization=spec == "torch",
        init_model_with_meta_device=spec != "torch",
        perform_initialization=False,
        # each of these needs apex or Transformer Engine, or forks a CUDA random state
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **recomputed(recompute, arch),
    )
    if world.vpp > 1 and world.device.type == "cuda":
        # each direction on a communicator of its own: with two stages, the previous and the next rank are one peer
        config.overlap_p2p_comm, config.batch_p2p_comm = True, False
    if (factor := rope_factor(arch)) != 1.0:  # Megatron makes its factor on cos and sin of these three: here, 1 + 0.1 x mscale x log(scaling)
        config.yarn_rotary_scaling_factor, config.yarn_mscale, config.yarn_mscale_all_dim = math.e, 10 * (factor - 1), 0.0
    config.add_attention_bias, config.attention_softcap = arch.attention_bias, arch.attention_softcap
    config.weights_of_all = arch.moe_router_pre_softmax
    config.post_norm = (Norm if spec == "torch" else transformer_engine_norm()) if arch.post_norms else None
    config.heterogeneous_block_specs = bool(arch.layers)
    config.blocks = tuple(padded(arch.layer(number), world.tp) for number in range(arch.num_layers))
    return config


def recomputed(recompute: str, arch: Arch) -> dict[str, Any]:
    """train.recompute in Megatron's words. An MLP with biases is left out of `selective`: Megatron's checkpoint of it would give out a bias, which
    is a parameter, as something that it computed, and the process ends in the backward pass."""
    halves = ["core_attn", *([] if arch.mlp_bias else ["mlp"]), *(["moe"] if arch.num_moe_experts is not None else [])]
    words: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": halves},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }
    return words[recompute]


def pipeline_layout(arch: Arch, world: World) -> list[list[str]] | None:
    """What each stage, in the order of the layers, is made of, in Megatron's words."""
    if world.pp == 1:
        return None
    stages = [["decoder"] * len(layers) for layers in stage_layers(arch.num_layers, world.pp * world.vpp)]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return stages


def rope_factor(arch: Arch) -> float:
    """What cos and sin are multiplied by (1 but for yarn and longrope, which no family has in some of its layers alone)."""
    return Rotary(rope_settings(arch), torch.device("cpu")).inverse_frequencies(arch.max_position_embeddings)[1]


def rope_settings(arch: Arch, sliding: bool = False) -> Any:
    """What transformers' rotary formulas read of a config (of a class that accepts every shape); `sliding`: of the layers with a sliding window."""
    from transformers import MistralConfig

    return MistralConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.kv_channels,
        max_position_embeddings=arch.max_position_embeddings,
        rope_parameters=json.loads(arch.sliding_rope if sliding else arch.rope),
    )


def torch_spec(config: BlockConfigs, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Blocks of plain torch modules, every norm a module of its own, so that a plain hook sees what it puts out."""
    last = NormedRowParallelLinear if config.post_norm else RowParallelLinear
    of_heads = Norm if config.qk_layernorm else None
    mlps = {False: ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=last)), True: expert_spec()}
    kinds = {
        routes: ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=Norm,
                self_attention=ModuleSpec(
                    module=BlockAttention,
                    params={"attn_mask_type": AttnMaskType.causal},
                    submodules=SelfAttentionSubmodules(
                        linear_qkv=ColumnParallelLinear, core_attention=Attention, linear_proj=last, q_layernorm=of_heads, k_layernorm=of_heads
                    ),
                ),
                self_attn_bda=get_bias_dropout_add,
                pre_mlp_layernorm=Norm,
                mlp=mlp,
                mlp_bda=get_bias_dropout_add,
            ),
        )
        for routes, mlp in mlps.items()
    }
    first = get_transformer_layer_offset(config, vp_stage)
    blocks = config.blocks[first : first + get_num_layers_to_build(config, vp_stage)]
    return TransformerBlockSubmodules(layer_specs=[kinds[block.num_moe_experts is not None] for block in blocks], layer_norm=Norm)


def transformer_engine_norm() -> Any:
    """Transformer Engine's norm of the kind that the settings say."""
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def transformer_engine_spec(config: BlockConfigs, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Blocks of Transformer Engine's fused modules (a GPU and the package are needed)."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    attention, mlp = layer.submodules.self_attention, layer.submodules.mlp
    attention.module = BlockAttention
    if config.post_norm:
        from megatron.core.extensions.transformer_engine import TERowParallelLinear

        normed = type("NormedTERowParallelLinear", (PostNorm, TERowParallelLinear), {})
        attention.submodules.linear_proj = mlp.submodules.linear_fc2 = normed
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=transformer_engine_norm())


SPECS = {"torch": torch_spec, "transformer_engine": transformer_engine_spec}


def pick_spec(setting: str, world: World, arch: Arch, separate_documents: bool = False) -> str:
    """The spec to train and evaluate a model with: `auto` takes Transformer Engine's where a GPU and the package are present and it can do what is
    asked, of this model at this layout.

    Raises RequestError where Transformer Engine is asked for and can't be had. Calibration and pruning always use torch's.
    """
    reason = None
    if world.device.type != "cuda":
        reason = "Transformer Engine needs a GPU"
    elif importlib.util.find_spec("transformer_engine") is None:
        reason = "the package transformer-engine is not installed"
    elif separate_documents:
        reason = "Transformer Engine's attention is not told of the documents of data.separate_documents=true"
    elif arch.num_moe_experts is not None:
        reason = "experts are of torch's modules alone here"
    elif arch.attention_softcap is not None:
        reason = "Transformer Engine's attention has no softcap on its scores"
    elif world.cp > 1 and arch.sliding_window is not None:
        reason = "Transformer Engine's attention has no sliding window over context ranks"
    if setting == "transformer_engine" and reason is not None:
        raise refuse("spec", setting, f"{reason}; use auto or torch")
    return "torch" if setting == "torch" or reason is not None else "transformer_engine"
