"""Moving between a tensor and the units its dim is made of (see `axes.py`). Works on any tensor with torch's methods.

Legend: U units, P rows that one unit contributes over all parts, R the other dims.
"""

from typing import TYPE_CHECKING

from minitron.arch.arch import Arch
from minitron.arch.axes import Dim, part_sizes

if TYPE_CHECKING:
    import torch


def to_units(tensor: "torch.Tensor", index: int, dim: Dim, arch: Arch) -> "torch.Tensor":
    """View a contiguous tensor whose dim `index` is `dim` as [U, P, R...]: one entry per unit, its rows of all parts together."""
    sizes = part_sizes(dim, arch)
    first_PUR = tensor.movedim(index, 0)
    units = first_PUR.shape[0] // sum(sizes)
    rest = first_PUR.shape[1:]
    if dim.by == "unit":
        return first_PUR.reshape(units, sum(sizes), *rest)
    # all parts of a dim that is laid out by part have one row per unit
    return first_PUR.reshape(len(sizes), units, *rest).movedim(0, 1)


def from_units(units_UPR: "torch.Tensor", index: int, dim: Dim) -> "torch.Tensor":
    """Inverse of `to_units`, contiguous."""
    ordered = units_UPR if dim.by == "unit" else units_UPR.movedim(0, 1)
    return ordered.reshape(-1, *units_UPR.shape[2:]).movedim(0, index).contiguous()


def unfuse(tensor: "torch.Tensor", dim: Dim, arch: Arch) -> "list[torch.Tensor]":
    """The contiguous parts of a tensor whose first dim is `dim`, each [U * rows, R...], as Hugging Face stores them apart."""
    sizes = part_sizes(dim, arch)
    units_UPR = to_units(tensor, 0, dim, arch)
    return [block.flatten(0, 1).contiguous() for block in units_UPR.split(sizes, dim=1)]
