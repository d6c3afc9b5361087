"""How an unsharded model is laid over ranks: layers over pipeline stages, units over tensor ranks with padding, shard shapes.

Where the units of an axis do not divide by the ranks, *dead* units are appended: vocabulary rows, as usual, and whole KV
groups of zeros. A dead group is exact, not an approximation: its values are zero, so it adds nothing to the output
projection, and because its output weights are zero too, every gradient into it is zero and it stays dead under training.
"""

import functools
import itertools
import math

from minitron.arch.arch import Arch
from minitron.arch.axes import At, Dim, Parameter, dim_size, num_units
from minitron.errors import RequestError, refuse


def stage_layers(num_layers: int, stages: int) -> list[range]:
    """The layers of each pipeline stage, as even as they go; what does not divide goes to inner stages first, for the outer ones
    hold the embedding and the head too.

    Raises RequestError where a stage would have none.
    """
    if num_layers < stages:
        raise RequestError(
            f"parallel.pp x parallel.vpp = {stages}: every stage needs a layer, at most the number of layers, {num_layers}, is possible"
        )
    extra = [*range(1, stages - 1), 0, stages - 1][: num_layers % stages]
    counts = [num_layers // stages + (stage in extra) for stage in range(stages)]
    ends = list(itertools.accumulate(counts))
    return [range(end - count, end) for end, count in zip(ends, counts, strict=True)]


@functools.lru_cache(maxsize=65536)
def stage_of(layer: int, num_layers: int, pp: int, vpp: int) -> int:
    """The pipeline rank that holds a layer; virtual stages go round the ranks."""
    return next(stage % pp for stage, layers in enumerate(stage_layers(num_layers, pp * vpp)) if layer in layers)


def neurons(arch: Arch) -> dict[str, int]:
    """The sizes of the MLPs that a model has: of dense blocks, of an expert, of the shared expert."""
    names = ["ffn_hidden_size"] * arch.has_dense_blocks + ["moe_ffn_hidden_size", "moe_shared_expert_intermediate_size"]
    return {name: size for name in names if (size := getattr(arch, name)) is not None}


@functools.lru_cache(maxsize=4096)
def padded(arch: Arch, tp: int) -> Arch:
    """`arch` (of one block's sizes) with dead KV groups and vocabulary rows, so that both divide by `tp` ranks.

    Raises RequestError where an MLP, or an expert, does not divide: a dead neuron would be exact too, but a size that suits no
    kernel is more likely a slip; and where a rank would have no part of the vocabulary.
    """
    for name, size in neurons(arch).items():
        if size % tp:
            raise refuse(name, size, f"must be divisible by parallel.tp={tp}")
    if math.ceil(arch.vocab_size / tp) * (tp - 1) >= arch.vocab_size:
        raise refuse("parallel.tp", tp, f"the last rank would have none of the {arch.vocab_size} tokens of the vocabulary")
    groups = math.ceil(arch.num_query_groups / tp) * tp
    return arch.replace(
        num_query_groups=groups,
        num_attention_heads=groups * arch.heads_per_group,
        vocab_size=math.ceil(arch.vocab_size / tp) * tp,
    )


def held_experts(arch: Arch, ep: int, ep_rank: int) -> range:
    """The experts of a block that a rank holds, whole ones in their order; none where there are none.

    Raises RequestError where ranks would hold different numbers of them, or where there are none to share out.
    """
    if ep > 1 and arch.num_moe_experts is None:
        raise refuse("parallel.ep", ep, "must be 1 for a model without experts")
    if (arch.num_moe_experts or 0) % ep:
        raise refuse("parallel.ep", ep, f"must divide num_moe_experts={arch.num_moe_experts}")
    held = (arch.num_moe_experts or 0) // ep
    return range(ep_rank * held, (ep_rank + 1) * held)


def expert_rank(at: At, arch: Arch, ep: int) -> int:
    """The expert rank that holds a parameter of an expert; 0 speaks for what all of them hold."""
    return 0 if at.expert is None else at.expert // len(held_experts(arch, ep, 0))


def held_units(dim: Dim, arch: Arch, tp: int, tp_rank: int, sharded: bool) -> tuple[range, int]:
    """The live units of `dim` that a rank holds, and how many units (live and dead) its shard has."""
    live = num_units(dim, arch)
    if not sharded:
        return range(live), live
    held = num_units(dim, padded(arch, tp)) // tp
    return range(min(tp_rank * held, live), min((tp_rank + 1) * held, live)), held


def shard_shape(row: Parameter, arch: Arch, tp: int) -> tuple[int, ...]:
    """Shape of a rank's part of a parameter."""
    whole = padded(arch, tp)
    return tuple(dim_size(dim, whole) // (tp if index == row.tp_dim else 1) for index, dim in enumerate(row.dims))
