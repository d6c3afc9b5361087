"""How an unsharded model is laid over tensor-parallel ranks: padding, shard shapes, and which units a rank holds.

Where the units of an axis do not divide by the ranks, *dead* units are appended: vocabulary rows, as usual, and whole KV
groups of zeros. A dead group is exact, not an approximation: its values are zero, so it adds nothing to the output
projection, and because its output weights are zero too, every gradient into it is zero and it stays dead under training.
"""

import math

from minitron.arch.arch import Arch
from minitron.arch.axes import Dim, Parameter, dim_size, num_units
from minitron.errors import refuse


def padded(arch: Arch, tp: int) -> Arch:
    """`arch` with dead KV groups and vocabulary rows, so that both divide by `tp` ranks.

    Raises RequestError where the MLP does not divide: a dead neuron would be exact too, but a size that suits no
    kernel is more likely a slip.
    """
    if arch.ffn_hidden_size % tp:
        raise refuse("ffn_hidden_size", arch.ffn_hidden_size, f"must be divisible by parallel.tp={tp}")
    groups = math.ceil(arch.num_query_groups / tp) * tp
    return arch.replace(
        num_query_groups=groups,
        num_attention_heads=groups * arch.heads_per_group,
        vocab_size=math.ceil(arch.vocab_size / tp) * tp,
    )


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
