"""`Arch` -> Megatron's GPTModel, one rank's part of it. Built as a skeleton without memory; weights are put in place one by one.

Shapes: S sequence (a rank's part under sequence and context parallelism), B batch, H hidden.
"""

import contextlib
import functools
import re
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer import TransformerConfig

from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, POSITIONS, At, Dim, Indices, Parameter
from minitron.arch.shards import padded, shard_shape
from minitron.engine.attention import Rotary, sequence_part
from minitron.engine.experts import whole_tokens
from minitron.engine.offload import HostWeights
from minitron.engine.parallel import World, inside
from minitron.engine.specs import SPECS, rope_settings, transformer_config

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Chunk(GPTModel):
    """The layers of one pipeline stage. The last stage puts out hidden states: losses take them and the head's weight, never [S, B, V] logits."""

    def angles(self, seq_length: int) -> torch.Tensor | None:
        """Rotary angles of this rank's part of a sequence; None where positions are learned."""
        return self.rotary_pos_emb(seq_length) if self.position_embedding_type == "rope" else None

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


class Model(torch.nn.ModuleList):
    """A rank's part of a model: one chunk, or one per virtual stage. Parameters are named after their chunk: "0.decoder.layers.3...."."""

    def __init__(self, chunks: list[Chunk], arch: Arch) -> None:
        super().__init__(chunks)
        self.arch = arch
        # where pruning over tensor ranks left an axis' units out of ascending order: "ffn.3" -> their original numbers, as they lie; of units that
        # each expert has, a row per expert
        self.unit_order: dict[str, Indices] = {}
        self.host: HostWeights | None = None

    def order(self, dim: Dim, at: At) -> Indices | None:
        """The original numbers of the units of a dim of one parameter, as they lie over the tensor ranks; None where that is ascending."""
        order = self.unit_order.get(f"{dim.axis}.{at.layer}")
        return order[at.expert] if order is not None and order.ndim == 2 else order

    def offload(self, device: torch.device) -> None:
        """From here on the weights, which nothing may change any more, lie in host memory but while `on_device` holds them on the device."""
        self.host = HostWeights(self.parameters(), device)

    def on_device(self) -> contextlib.AbstractContextManager[Any]:
        """The weights are where the model computes inside this block; passes enter it by themselves, around several it saves copies."""
        return self.host or contextlib.nullcontext()

    @property
    def config(self) -> TransformerConfig:
        """Megatron's settings, which the chunks share."""
        config: TransformerConfig = self.chunks[0].config
        return config

    @property
    def chunks(self) -> list[Any]:
        """This rank's chunks, in the order of the layers."""
        return list(self)

    def blocks(self) -> Iterator[tuple[int, Any]]:
        """This rank's transformer blocks with their numbers in the whole model."""
        for chunk in self.chunks:
            for block in chunk.decoder.layers:
                yield block.layer_number - 1, block

    def head_weight(self) -> torch.Tensor:
        """[V / tp, H] of the last stage: the output layer's, or the embedding's where they are tied."""
        last = self.chunks[-1]
        own: torch.Tensor | None = last.output_layer.weight if last.post_process else None
        return last.embedding.word_embeddings.weight if own is None else own


def skeleton(arch: Arch, world: World, dtype: torch.dtype, spec: str = "torch", recompute: str = "none") -> Model:
    """This rank's part of the model without memory: every parameter lies on the meta device until it is put in place."""
    config = transformer_config(arch, world, dtype, spec, recompute)
    chunks = []
    for number in range(world.vpp):
        vp_stage = number if world.vpp > 1 else None
        with torch.device("meta"), inside(world):
            chunk = Chunk(
                config,
                SPECS[spec](config, vp_stage),
                vocab_size=padded(arch, world.tp).vocab_size,
                max_sequence_length=arch.position_rows,
                pre_process=world.is_first_stage and number == 0,
                post_process=world.is_last_stage and number == world.vpp - 1,
                share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
                position_embedding_type="learned_absolute" if arch.learned_positions else "rope",
                pg_collection=world.groups,
                vp_stage=vp_stage,
            )
        if not arch.learned_positions:
            chunk.rotary_pos_emb = Rotary(rope_settings(arch), world.device, world.cp, world.cp_rank)
        if chunk.pre_process:
            if arch.learned_positions:
                chunk.embedding.register_forward_pre_hook(functools.partial(numbered, arch, world), with_kwargs=True)
            if arch.scaled_embeddings:
                chunk.embedding.register_forward_hook(scaled)
        chunks.append(chunk)
    model = Model(chunks, arch)
    for number, block in model.blocks():
        if arch.routes(number) and world.tp > 1 and not world.sequence_parallel:
            whole_tokens(block.mlp, world.groups)
        if arch.sliding_rope and arch.slides(number):
            block.self_attention.rotary = Rotary(rope_settings(arch, sliding=True), world.device, world.cp, world.cp_rank)
    return model


def numbered(arch: Arch, world: World, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What an embedding with learned positions is called with: the tokens of this context rank's part, and the rows of their positions."""
    tokens_BS = kwargs["input_ids"]
    whole_W = torch.arange(tokens_BS.size(1) * world.cp, device=tokens_BS.device) + (arch.position_offset or 0)
    # what is read fits into the table, as checks.py sees to; the padding behind it, which nothing sees, may not
    whole_W = whole_W.clamp(max=arch.position_rows - 1)
    return args, {**kwargs, "position_ids": sequence_part(whole_W, 0, world.cp, world.cp_rank).expand_as(tokens_BS)}


def scaled(module: Any, args: tuple[Any, ...], embedded_SBH: torch.Tensor) -> torch.Tensor:
    """Embeddings times the square root of their width, which is rounded to their type as transformers does."""
    # a number in host memory: to a GPU it goes with the kernel, where a tensor there would be copied first and waited for
    return embedded_SBH * torch.tensor(embedded_SBH.size(-1) ** 0.5, dtype=embedded_SBH.dtype)


@functools.cache
def rows_by_name(block: Arch) -> dict[str, Parameter]:
    """The rows of a block of these sizes, and those outside the blocks, by both of their names."""
    mine = [row for row in PARAMETERS if row.exists(block)]
    return {row.name: row for row in mine} | {row.fused: row for row in mine if row.fused}


def table_row(name: str, model: Model) -> tuple[Parameter, At]:
    """The row of the table of a parameter's local name, and which of it that is in the whole model."""
    arch = model.arch
    chunk, _, name = name.partition(".")
    if name == "output_layer.weight" and arch.share_embeddings_and_output_weights:
        return rows_by_name(arch)["embedding.word_embeddings.weight"], At()  # the last stage's copy of a tied embedding
    match = re.match(r"(decoder\.layers\.)(\d+)(\..*?local_experts\.|\.)(?:(\d+)\.)?(.*)", name)
    if match is None:
        return rows_by_name(arch)[name], At()
    block, local = model.chunks[int(chunk)].decoder.layers[int(match[2])], match[4]
    layer = block.layer_number - 1
    expert = None if local is None else block.mlp.local_expert_indices[int(local)]
    return rows_by_name(arch.layer(layer))[f"{match[1]}{{layer}}{match[3]}{'' if local is None else '{expert}.'}{match[5]}"], At(layer, expert)


def rows(model: Model) -> Iterator[tuple[str, Parameter, At]]:
    """(local name, row of the table, which of it in the whole model) of every parameter this rank holds."""
    for name, _ in list(model.named_parameters()):
        yield (name, *table_row(name, model))


def is_copy(name: str, model: Model) -> bool:
    """Whether a parameter is the last stage's copy of a tied embedding, which the first stage holds as well."""
    return name.endswith(".output_layer.weight") and model.arch.share_embeddings_and_output_weights


def put(model: Model, name: str, row: Parameter, at: At, tensor: torch.Tensor) -> None:
    """Set a parameter of this rank. Shape is asserted; marks that Megatron set on the skeleton are kept."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    old = getattr(owner, attribute)
    expected = shard_shape(row, model.arch.layer(at.layer), model.config.tensor_model_parallel_size)
    assert tuple(tensor.shape) == expected == tuple(old.shape), f"{name}: {tuple(tensor.shape)}, expected {expected}"
    new = torch.nn.Parameter(tensor)
    new.__dict__.update(old.__dict__)
    # Megatron sets these while it initialises; without them its gradient norm would count one tensor rank's shards only
    for mark in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        new.__dict__.pop(mark, None)
    if row.tp_dim is not None:
        set_tensor_model_parallel_attributes(new, True, row.tp_dim, 2 if row.dims[0].by == "part" else 1)
    elif row.dims[0] != POSITIONS:  # every tensor rank holds it and, under sequence parallelism, sees a part of the sequence: its gradient is
        new.__dict__["sequence_parallel"] = model.config.sequence_parallel  # summed over them (positions are looked up before it is divided)
    if row.per_expert:  # its gradient is not every replica's: an optimizer of its own, the same over any number of expert ranks
        new.__dict__["allreduce"] = False
    setattr(owner, attribute, new)
