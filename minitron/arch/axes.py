"""The one table: what each parameter's dims are made of, how it shards, its Hugging Face names; and the prunable axes.

Counting, probing, slicing, import and export read it; nothing else restates a layout. A dim is made of *units* of one
axis, and each unit contributes one run of rows per *part*: the fused QKV matrix, for one, is made of KV groups, and every
group contributes the rows of its query heads, of its key head and of its value head.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from minitron.arch.arch import Arch

Indices = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Axis:
    """A prunable structure. `scope`: one kept set for the whole model, or one per layer."""

    name: str
    size: str  # the field of Arch that counts its units
    scope: str  # "model" | "layer"
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
    )
}


@dataclasses.dataclass(frozen=True)
class Dim:
    """What one tensor dim is made of: units of `axis`, each contributing one run of rows per part.

    `parts` names the runs: "one" (a single row), "head" (kv_channels rows), "heads" (every query head of a group).
    `by` says which comes first in memory: "unit" (a unit's parts lie together) or "part" (a part's units lie together).
    """

    axis: str  # "hidden" | "ffn" | "groups", or of what no axis cuts: "vocab" | "channels" | "positions"
    parts: tuple[str, ...] = ("one",)
    by: str = "unit"


HIDDEN, FFN, VOCAB, HEADS = Dim("hidden"), Dim("ffn"), Dim("vocab"), Dim("groups", ("heads",))
QKV = Dim("groups", ("heads", "head", "head"), by="unit")
GATE_UP = Dim("ffn", ("one", "one"), by="part")
CHANNELS, POSITIONS = Dim("channels"), Dim("positions")


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One row of the table. `hf` holds one name per part of the first dim, as Llama calls them, other families by `Family.names`;
    `{layer}` stands for the layer's number.

    `fused` is the name under Transformer Engine's fused modules where it differs; `when` is what of Arch must be true (or, with
    "not ", false) for the parameter to exist. Two rows may have one name, of which a model has one.
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

    def exists(self, arch: Arch) -> bool:
        """Whether a model of this architecture has it."""
        return all(not getattr(arch, c[4:]) if c.startswith("not ") else getattr(arch, c) for c in self.when)


_LAYER, _HF = "decoder.layers.{layer}.", "model.layers.{layer}."
_Q, _K, _V, _O = (_HF + f"self_attn.{part}_proj." for part in "qkvo")
_GATE, _UP, _DOWN = (_HF + f"mlp.{part}_proj." for part in ("gate", "up", "down"))
_QKV_BIAS, _PROJ_BIAS, _BIAS, _NORM_BIAS = ("qkv_bias",), ("attention_bias",), ("mlp_bias",), ("norm_bias",)
_GATED, _PLAIN = ("gated_linear_unit",), ("not gated_linear_unit",)

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
    Parameter(_LAYER + "mlp.linear_fc2.weight", (HIDDEN, FFN), 1, (_DOWN + "weight",)),
    Parameter(_LAYER + "mlp.linear_fc2.bias", (HIDDEN,), None, (_DOWN + "bias",), when=_BIAS),
    Parameter(_LAYER + "mlp.linear_fc2.post_norm.weight", (HIDDEN,), None, (_HF + "mlp.post_norm.weight",), when=("post_norms",)),
    Parameter("decoder.final_layernorm.weight", (HIDDEN,), None, ("model.norm.weight",)),
    Parameter("decoder.final_layernorm.bias", (HIDDEN,), None, ("model.norm.bias",), when=_NORM_BIAS),
    Parameter("output_layer.weight", (VOCAB, HIDDEN), 0, ("lm_head.weight",), when=("not share_embeddings_and_output_weights",)),
)  # fmt: skip

_UNITS = {"hidden": "hidden_size", "ffn": "ffn_hidden_size", "groups": "num_query_groups", "vocab": "vocab_size",
          "channels": "kv_channels", "positions": "position_rows"}  # fmt: skip
CUT = ("hidden", "ffn", "groups")  # the axes of dims that pruning makes smaller


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


def parameters(arch: Arch) -> Iterator[tuple[Parameter, int | None]]:
    """Every parameter of a model of this architecture with its layer number (None outside the blocks)."""
    for row in PARAMETERS:
        if row.exists(arch):
            for layer in range(arch.num_layers) if row.per_layer else (None,):
                yield row, layer


def count_parameters(arch: Arch) -> int:
    """Exact number of parameters of the unsharded, unpadded model."""
    return sum(int(np.prod([dim_size(dim, arch.layer(layer)) for dim in row.dims])) for row, layer in parameters(arch))
