"""The one table: what each parameter's dims are made of, how it shards, its Hugging Face names; and the prunable axes.

Counting, probing, slicing, import and export read it; nothing else restates a layout. A dim is made of *units* of one
axis, and each unit contributes one run of rows per *part*: the fused QKV matrix, for one, is made of KV groups, and every
group contributes the rows of its query heads, of its key head and of its value head.
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitron.arch.arch import Arch

Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A prunable structure. `scope`: one kept set for the whole model, one per layer, or one per expert of a layer."""

    name: str
    size: str  # the field of Arch that counts its units
    scope: str  # "model" | "layer" | "expert"
    within: str | None  # units are ranked inside these groups, the same number kept in each
    probe: str  # where its activations are read
    meaning: str


AXES = {
    axis.name: axis
    for axis in (
        Axis("hidden", "hidden_size", "model", None, "outputs of every norm of the residual stream", "channels of the residual stream"),
        Axis("ffn", "ffn_hidden_size", "layer", None, "input of mlp.linear_fc2", "neurons of the MLP"),
        Axis("heads", "num_attention_heads", "layer", "groups", "input of self_attention.linear_proj", "query heads"),
        Axis("groups", "num_query_groups", "layer", None, "sum over its heads", "key/value heads with their query heads"),
        Axis("layers", "num_layers", "model", None, "input and output of the block", "transformer blocks"),
        Axis("experts", "num_moe_experts", "layer", None, "outputs of the experts, weighted by the router", "experts of a block"),
        Axis("expert_ffn", "moe_ffn_hidden_size", "expert", None, "input of an expert's linear_fc2", "neurons of an expert"),
        Axis("shared_ffn", "moe_shared_expert_intermediate_size", "layer", None, "input of mlp.shared_experts.linear_fc2",
             "neurons of the shared expert"),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Dim:
    """What one tensor dim is made of: units of `axis`, each contributing one run of rows per part.

    `parts` names the runs: "one" (a single row), "head" (kv_channels rows), "heads" (every query head of a group).
    `by` says which comes first in memory: "unit" (a unit's parts lie together) or "part" (a part's units lie together).
    """

    axis: str  # one of CUT, or of what no axis cuts: "vocab" | "channels" | "positions" | "gates"
    parts: tuple[str, ...] = ("one",)
    by: str = "unit"


HIDDEN, FFN, VOCAB, HEADS = Dim("hidden"), Dim("ffn"), Dim("vocab"), Dim("groups", ("heads",))
QKV = Dim("groups", ("heads", "head", "head"), by="unit")
GATE_UP = Dim("ffn", ("one", "one"), by="part")
CHANNELS, POSITIONS, GATES = Dim("channels"), Dim("positions"), Dim("gates")
EXPERTS, EXPERT_FFN, SHARED_FFN = Dim("experts"), Dim("expert_ffn"), Dim("shared_ffn")
EXPERT_GATE_UP, SHARED_GATE_UP = (Dim(axis, ("one", "one"), by="part") for axis in ("expert_ffn", "shared_ffn"))


@dataclasses.dataclass(frozen=True, order=True)
class At:
    """Which of the parameters of one row: that of this block and, in it, of this expert, both as numbered in the whole model; None where the
    row has no such number."""

    layer: int | None = None
    expert: int | None = None

    def named(self, template: str) -> str:
        """A name of the table with the numbers in their places."""
        return template.format(layer=self.layer, expert=self.expert)


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table. `hf` holds one name per part of the first dim, as Llama calls them, other families by `Family.names`;
    `{layer}` stands for the layer's number, `{expert}` for the expert's in it.

    `fused` is the name under Transformer Engine's fused modules where it differs; `when` is what of Arch must be true (or, with
    "not ", false) for the parameter to exist. Two rows may have one name, of which a block has one.
    """

    name: str
    dims: tuple[Dim, ...]
    tp_dim: int | None
    hf: tuple[str, ...]
    fused: str | None = None
    when: tuple[str, ...] = ()

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return "{layer}" in self.name

    @property
    def per_expert(self) -> bool:
        """Whether every expert of a layer has one."""
        return "{expert}" in self.name

    def exists(self, arch: Arch) -> bool:
        """Whether a model whose blocks are all alike, or the block whose sizes these are (`Arch.layer`), has it."""
        return all(not getattr(arch, c[4:]) if c.startswith("not ") else getattr(arch, c) for c in self.when)

    def blocks(self, arch: Arch) -> Iterator[tuple[int | None, Arch]]:
        """The blocks that have it, each with its sizes; outside the blocks (None, `arch`)."""
        for number in range(arch.num_layers) if self.per_layer else (None,):
            if self.exists(block := arch.layer(number)):
                yield number, block

    def copies(self, block: Arch) -> int:
        """How many of it such a block has: one, or one per expert."""
        return block.num_moe_experts or 0 if self.per_expert else 1

    def active(self, block: Arch) -> int:
        """How many of those one token makes use of."""
        return block.moe_router_topk or 0 if self.per_expert else 1

    def size(self, block: Arch) -> int:
        """Numbers of one of it, in a block of these sizes."""
        return math.prod(dim_size(dim, block) for dim in self.dims)


_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_Q, _K, _V, _O = (_HF + f"self_attn.{part}_proj." for part in "qkvo")
_GATE, _UP, _DOWN = (_HF + f"mlp.{part}_proj." for part in ("gate", "up", "down"))
_QKV_BIAS, _PROJ_BIAS, _BIAS, _NORM_BIAS = ("qkv_bias",), ("attention_bias",), ("mlp_bias",), ("norm_bias",)
_MLP, _MOE, _SHARED = ("not num_moe_experts",), ("num_moe_experts",), ("moe_shared_expert_intermediate_size",)
_GATED, _PLAIN = (*_MLP, "gated_linear_unit"), (*_MLP, "not gated_linear_unit")
_EXPERT, _HF_EXPERT = _LAYER + "mlp.experts.local_experts.{expert}.", _HF + "mlp.experts.{expert}."
_HF_SHARED = _HF + "mlp.shared_expert."

PARAMETERS = (
    Parameter("embedding.word_embeddings.weight", (VOCAB, HIDDEN), 0, ("model.embed_tokens.weight",)),
    Parameter("embedding.position_embeddings.weight", (POSITIONS, HIDDEN), None, ("model.embed_positions.weight",), when=("learned_positions",)),
    Parameter(_LAYER + "input_layernorm.weight", (HIDDEN,), None, (_HF + "input_layernorm.weight",),
              fused=_LAYER + "self_attention.linear_qkv.layer_norm_weight"),
    Parameter(_LAYER + "input_layernorm.bias", (HIDDEN,), None, (_HF + "input_layernorm.bias",),
              fused=_LAYER + "self_attention.linear_qkv.layer_norm_bias", when=_NORM_BIAS),
    Parameter(_LAYER + "self_attention.linear_qkv.weight", (QKV, HIDDEN), 0, (_Q + "weight", _K + "weight", _V + "weight")),
    Parameter(_LAYER + "self_attention.linear_qkv.bias", (QKV,), 0, (_Q + "bias", _K + "bias", _V + "bias"), when=_QKV_BIAS),
    Parameter(_LAYER + "self_attention.linear_proj.weight", (HIDDEN, HEADS), 1, (_O + "weight",)),
    Parameter(_LAYER + "self_attention.linear_proj.bias", (HIDDEN,), None, (_O + "bias",), when=_PROJ_BIAS),
    Parameter(_LAYER + "self_attention.q_layernorm.weight", (CHANNELS,), None, (_HF + "self_attn.q_norm.weight",), when=("qk_layernorm",)),
    Parameter(_LAYER + "self_attention.k_layernorm.weight", (CHANNELS,), None, (_HF + "self_attn.k_norm.weight",), when=("qk_layernorm",)),
    Parameter(_LAYER + "self_attention.linear_proj.post_norm.weight", (HIDDEN,), None, (_HF + "self_attn.post_norm.weight",), when=("post_norms",)),
    Parameter(_LAYER + "pre_mlp_layernorm.weight", (HIDDEN,), None, (_HF + "post_attention_layernorm.weight",),
              fused=_LAYER + "mlp.linear_fc1.layer_norm_weight"),
    Parameter(_LAYER + "pre_mlp_layernorm.bias", (HIDDEN,), None, (_HF + "post_attention_layernorm.bias",),
              fused=_LAYER + "mlp.linear_fc1.layer_norm_bias", when=_NORM_BIAS),
    Parameter(_LAYER + "mlp.linear_fc1.weight", (GATE_UP, HIDDEN), 0, (_GATE + "weight", _UP + "weight"), when=_GATED),
    Parameter(_LAYER + "mlp.linear_fc1.bias", (GATE_UP,), 0, (_GATE + "bias", _UP + "bias"), when=_BIAS + _GATED),
    Parameter(_LAYER + "mlp.linear_fc1.weight", (FFN, HIDDEN), 0, (_UP + "weight",), when=_PLAIN),
    Parameter(_LAYER + "mlp.linear_fc1.bias", (FFN,), 0, (_UP + "bias",), when=_BIAS + _PLAIN),
    Parameter(_LAYER + "mlp.linear_fc2.weight", (HIDDEN, FFN), 1, (_DOWN + "weight",), when=_MLP),
    Parameter(_LAYER + "mlp.linear_fc2.bias", (HIDDEN,), None, (_DOWN + "bias",), when=_BIAS + _MLP),
    Parameter(_LAYER + "mlp.linear_fc2.post_norm.weight", (HIDDEN,), None, (_HF + "mlp.post_norm.weight",), when=("post_norms", *_MLP)),
    Parameter(_LAYER + "mlp.router.weight", (EXPERTS, HIDDEN), None, (_HF + "mlp.gate.weight",), when=_MOE),
    Parameter(_EXPERT + "linear_fc1.weight", (EXPERT_GATE_UP, HIDDEN), 0,
              (_HF_EXPERT + "gate_proj.weight", _HF_EXPERT + "up_proj.weight"), when=_MOE),
    Parameter(_EXPERT + "linear_fc2.weight", (HIDDEN, EXPERT_FFN), 1, (_HF_EXPERT + "down_proj.weight",), when=_MOE),
    Parameter(_LAYER + "mlp.shared_experts.linear_fc1.weight", (SHARED_GATE_UP, HIDDEN), 0,
              (_HF_SHARED + "gate_proj.weight", _HF_SHARED + "up_proj.weight"), when=_SHARED),
    Parameter(_LAYER + "mlp.shared_experts.linear_fc2.weight", (HIDDEN, SHARED_FFN), 1, (_HF_SHARED + "down_proj.weight",), when=_SHARED),
    Parameter(_LAYER + "mlp.shared_experts.gate_weight", (GATES, HIDDEN), None, (_HF + "mlp.shared_expert_gate.weight",),
              when=("moe_shared_expert_gate",)),
    Parameter("decoder.final_layernorm.weight", (HIDDEN,), None, ("model.norm.weight",)),
    Parameter("decoder.final_layernorm.bias", (HIDDEN,), None, ("model.norm.bias",), when=_NORM_BIAS),
    Parameter("output_layer.weight", (VOCAB, HIDDEN), 0, ("lm_head.weight",), when=("not share_embeddings_and_output_weights",)),
)  # fmt: skip

_UNITS = {"hidden": "hidden_size", "ffn": "ffn_hidden_size", "groups": "num_query_groups", "vocab": "vocab_size",
          "channels": "kv_channels", "positions": "position_rows", "gates": "moe_shared_expert_gate",
          "experts": "num_moe_experts", "expert_ffn": "moe_ffn_hidden_size", "shared_ffn": "moe_shared_expert_intermediate_size"}  # fmt: skip
CUT = ("hidden", "ffn", "groups", "experts", "expert_ffn", "shared_ffn")  # the axes of dims that pruning makes smaller


def num_units(dim: Dim, arch: Arch) -> int:
    """How many units `dim` is made of in the unsharded model."""
    return int(getattr(arch, _UNITS[dim.axis]))


def part_sizes(dim: Dim, arch: Arch) -> tuple[int, ...]:
    """Rows that one unit contributes to each part of `dim`."""
    rows = {"one": 1, "head": arch.kv_channels, "heads": arch.heads_per_group * arch.kv_channels}
    return tuple(rows[part] for part in dim.parts)


def dim_size(dim: Dim, arch: Arch, units: int | None = None) -> int:
    """Rows of `dim` when it holds `units` units (all of them by default)."""
    return (num_units(dim, arch) if units is None else units) * sum(part_sizes(dim, arch))


def dim_rows(dim: Dim, arch: Arch, held: int, units: Indices, heads: Indices | None = None) -> Indices:
    """The rows of a dim that holds `held` units that make the same dim with only `units`, in that order.

    `heads` [len(units), k], for dims made of groups: the query heads (numbered inside their group) that each of `units`
    keeps. The result indexes the old dim and, read in order, is the new one.
    """
    sizes = part_sizes(dim, arch)
    blocks, offset = [], 0
    for part, size in zip(dim.parts, sizes, strict=True):
        starts = offset + units * sum(sizes) if dim.by == "unit" else offset * held + units * size
        inside = np.broadcast_to(np.arange(size), (len(units), size))
        if part == "heads" and heads is not None:
            inside = (heads[:, :, None] * arch.kv_channels + np.arange(arch.kv_channels)).reshape(len(units), heads.shape[1] * arch.kv_channels)
        blocks.append(starts[:, None] + inside)
        offset += size
    if dim.by == "unit":
        return np.concatenate(blocks, axis=1).reshape(-1)
    return np.concatenate([block.reshape(-1) for block in blocks])


def parameters(arch: Arch) -> Iterator[tuple[Parameter, At]]:
    """Every parameter of a model of this architecture, and which of its row it is."""
    for row in PARAMETERS:
        for number, block in row.blocks(arch):
            for expert in range(row.copies(block)) if row.per_expert else (None,):
                yield row, At(number, expert)


def count_parameters(arch: Arch) -> int:
    """Exact number of parameters of the unsharded, unpadded model."""
    return sum(row.copies(block) * row.size(block) for row in PARAMETERS for _, block in row.blocks(arch))


def count_active(arch: Arch) -> int:
    """The same without the experts that one token is not sent to."""
    return sum(row.active(block) * row.size(block) for row in PARAMETERS for _, block in row.blocks(arch))
