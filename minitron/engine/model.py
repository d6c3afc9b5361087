"""`Arch` -> Megatron's GPTModel, one shard of it. Built as a skeleton without memory; weights are put in place one by one.

Shapes: S sequence (a rank's part under sequence parallelism), B batch, H hidden.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import ModuleSpec, TransformerConfig, TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from minitron.arch.arch import Arch
from minitron.arch.axes import GATE_UP, PARAMETERS, Indices, Parameter
from minitron.arch.shards import padded, shard_shape
from minitron.engine.attention import Attention, Norm, Rotary
from minitron.engine.parallel import World
from minitron.errors import refuse

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROWS = {row.name: row for row in PARAMETERS} | {row.fused: row for row in PARAMETERS if row.fused}


class Model(GPTModel):
    """A GPTModel whose output is the last hidden states: losses take them and the head's weight, never [S, B, V] logits."""

    arch: Arch
    # where pruning over tensor ranks left an axis' units out of ascending order: "ffn.3" -> their original numbers, as they lie
    unit_order: dict[str, Indices]

    def _postprocess(self, hidden_states: torch.Tensor, **unused: Any) -> torch.Tensor:
        return hidden_states

    def setup_embeddings_and_output_layer(self) -> None:
        """Megatron's marks on embedding and head. It also copies a tied embedding to the last stage by an all-reduce;
        here both stages read their copy from the source, so a skeleton without memory can be built."""
        tied_over_stages = self.share_embeddings_and_output_weights and self.config.pipeline_model_parallel_size > 1
        if self.pre_process:
            self.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True
            self.embedding.word_embeddings.weight.shared_embedding = tied_over_stages
            # used twice in one backward pass: a kernel that adds into the gradient buffer must not overwrite the other use
            self.embedding.word_embeddings.weight.zero_out_wgrad = self.share_embeddings_and_output_weights and not tied_over_stages
        if self.post_process and self.output_layer.weight is not None:
            self.output_layer.weight.is_embedding_or_output_parameter = True
            # the copy of a tied embedding: counted once in the gradient norm, its gradient summed with the first stage's
            self.output_layer.weight.shared = self.output_layer.weight.shared_embedding = tied_over_stages

    def head_weight(self) -> torch.Tensor:
        """[V / tp, H] of the last stage: the output layer's, or the embedding's where they are tied."""
        if self.post_process and self.output_layer.weight is not None:
            return self.output_layer.weight
        return self.embedding.word_embeddings.weight


def transformer_config(arch: Arch, world: World, dtype: torch.dtype, spec: str) -> TransformerConfig:
    """Megatron's own settings for this architecture, layout and spec."""
    whole = padded(arch, world.tp)
    config = TransformerConfig(
        num_layers=whole.num_layers,
        hidden_size=whole.hidden_size,
        ffn_hidden_size=whole.ffn_hidden_size,
        num_attention_heads=whole.num_attention_heads,
        num_query_groups=whole.num_query_groups,
        kv_channels=whole.kv_channels,
        tensor_model_parallel_size=world.tp,
        pipeline_model_parallel_size=world.pp,
        sequence_parallel=world.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        normalization="RMSNorm",
        layernorm_epsilon=arch.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias,
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
    )
    config.rope_attention_factor = rope_factor(arch)
    return config


def rope_factor(arch: Arch) -> float:
    """What cos and sin are multiplied by (1 but for yarn and longrope)."""
    return Rotary(rope_settings(arch), torch.device("cpu")).inverse_frequencies(arch.max_position_embeddings)[1]


def rope_settings(arch: Arch) -> Any:
    """What transformers' rotary formulas read of a config (of a class that accepts every shape)."""
    from transformers import MistralConfig

    return MistralConfig(
        hidden_size=arch.hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_query_groups,
        head_dim=arch.kv_channels,
        max_position_embeddings=arch.max_position_embeddings,
        rope_parameters=json.loads(arch.rope),
    )


def torch_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Blocks of plain torch modules, every norm a module of its own, so that a plain hook sees what it puts out."""
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(linear_qkv=ColumnParallelLinear, core_attention=Attention, linear_proj=RowParallelLinear),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=Norm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=Norm)


def transformer_engine_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """Blocks of Transformer Engine's fused modules (a GPU and the package are needed)."""
    from megatron.core.extensions.transformer_engine import TENorm
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    layer = get_gpt_layer_with_transformer_engine_spec()
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=TENorm)


SPECS = {"torch": torch_spec, "transformer_engine": transformer_engine_spec}


def pick_spec(setting: str, arch: Arch, world: World) -> str:
    """The spec to train and evaluate with: `auto` takes Transformer Engine's where a GPU and the package are present.

    Raises RequestError where Transformer Engine is asked for and can't be had. Calibration and pruning always use torch's.
    """
    reason = None
    if world.device.type != "cuda":
        reason = "Transformer Engine needs a GPU"
    elif importlib.util.find_spec("transformer_engine") is None:
        reason = "the package transformer-engine is not installed"
    elif rope_factor(arch) != 1.0:
        reason = "Transformer Engine's attention can't take the factor that this rope_type puts on the angles"
    if setting == "transformer_engine" and reason is not None:
        raise refuse("spec", setting, f"{reason}; use auto or torch")
    return "torch" if setting == "torch" or reason is not None else "transformer_engine"


def skeleton(arch: Arch, world: World, dtype: torch.dtype, spec: str = "torch") -> Model:
    """This rank's shard of the model without memory: every parameter lies on the meta device until it is put in place."""
    if arch.num_layers % world.pp:
        raise refuse("parallel.pp", world.pp, f"must divide the number of layers, {arch.num_layers}")
    config = transformer_config(arch, world, dtype, spec)
    with torch.device("meta"):
        model = Model(
            config,
            SPECS[spec](config),
            vocab_size=padded(arch, world.tp).vocab_size,
            max_sequence_length=arch.max_position_embeddings,
            pre_process=world.is_first_stage,
            post_process=world.is_last_stage,
            share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            pg_collection=world.groups,
        )
    model.rotary_pos_emb = Rotary(rope_settings(arch), world.device)
    model.arch, model.unit_order = arch, {}
    return model


def table_row(name: str, model: Model) -> tuple[Parameter, int | None]:
    """The row of the table, and the layer's number in the whole model, of a parameter's local name."""
    if name == "output_layer.weight" and model.arch.share_embeddings_and_output_weights:
        return ROWS["embedding.word_embeddings.weight"], None  # the last stage's copy of a tied embedding
    match = re.match(r"decoder\.layers\.(\d+)\.(.*)", name)
    if match is None:
        return ROWS[name], None
    layer = model.decoder.layers[int(match.group(1))].layer_number - 1
    return ROWS[f"decoder.layers.{{layer}}.{match.group(2)}"], layer


def rows(model: Model) -> Iterator[tuple[str, Parameter, int | None]]:
    """(local name, row of the table, layer's number in the whole model) of every parameter this rank holds."""
    for name, _ in list(model.named_parameters()):
        yield (name, *table_row(name, model))


def put(model: Model, name: str, row: Parameter, tensor: torch.Tensor) -> None:
    """Set a parameter of this shard. Shape and type are asserted; marks that Megatron set on the skeleton are kept."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, attribute)
    expected = shard_shape(row, model.arch, model.config.tensor_model_parallel_size)
    assert tuple(tensor.shape) == expected == tuple(old.shape), f"{name}: {tuple(tensor.shape)}, expected {expected}"
    new = torch.nn.Parameter(tensor)
    new.__dict__.update(old.__dict__)
    # Megatron sets these while it initialises; without them its gradient norm would count one tensor rank's shards only
    for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        new.__dict__.pop(mark, None)
    if row.tp_dim is not None:
        set_tensor_model_parallel_attributes(new, True, row.tp_dim, 2 if row.dims[0] == GATE_UP else 1)
    else:  # every tensor rank holds it and, under sequence parallelism, sees a part of the sequence: its gradient is summed over them
        new.__dict__["sequence_parallel"] = model.config.sequence_parallel
    setattr(owner, attribute, new)
