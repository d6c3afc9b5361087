"""Units that an earlier cut over tensor ranks left out of order: from their numbers to the places where they lie, and back. Pure.

`Model.unit_order` names them: "ffn.3" -> what is numbered how, place by place. Any numbers that ascend as the units do serve.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from minitron.arch.arch import Arch
from minitron.arch.axes import Indices
from minitron.pruning.keep import Keep


def ranks(order: Indices) -> Indices:
    """The unit at each place, numbered from 0 in ascending order."""
    return order.argsort().argsort()


def as_laid(keep: Keep, orders: Mapping[str, Indices], original: Arch) -> Keep:
    """`keep` with the places of units for their numbers, ascending too; itself where all units lie in order."""
    neurons = {"ffn": dict(keep.ffn), "shared_ffn": dict(keep.shared_ffn)}
    groups, heads, partners = dict(keep.groups), dict(keep.heads), dict(keep.partners)
    for layer in map(int, keep.layers):
        for axis, units in neurons.items():
            if (order := orders.get(f"{axis}.{layer}")) is not None:
                units[layer] = np.flatnonzero(np.isin(ranks(order), units[layer]))
        if (order := orders.get(f"groups.{layer}")) is not None:
            places = np.flatnonzero(np.isin(ranks(order), keep.groups[layer]))
            rows, firsts = np.searchsorted(keep.groups[layer], ranks(order)[places]), places[:, None] * original.heads_per_group
            groups[layer] = places
            heads[layer] = (keep.heads_in_groups(layer, original)[rows] + firsts).reshape(-1)
            if layer in partners:
                partners[layer] = (keep.partners_in_groups(layer, original)[rows] + firsts).reshape(-1)
    return dataclasses.replace(keep, ffn=neurons["ffn"], shared_ffn=neurons["shared_ffn"], groups=groups, heads=heads, partners=partners)
