"""Ranking: from scores and a target architecture to the units that stay. Pure."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron.arch.arch import Arch
from minitron.arch.axes import Indices
from minitron.errors import RequestError
from minitron.files import atomic_path

FILE = "keep.safetensors"


@dataclasses.dataclass(frozen=True)
class Keep:
    """Kept units in the original numbering, ascending. `ffn`, `groups` and `heads` are keyed by original layer number.

    `heads[layer]` holds numbers over the whole layer (head h belongs to group h // heads_per_group).
    """

    layers: Indices
    hidden: Indices
    ffn: dict[int, Indices]
    groups: dict[int, Indices]
    heads: dict[int, Indices]

    def heads_in_groups(self, layer: int, original: Arch) -> Indices:
        """[kept groups, kept heads per group], each head numbered inside its group."""
        return self.heads[layer].reshape(len(self.groups[layer]), -1) % original.heads_per_group

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named as in importance.safetensors."""
        named: dict[str, Indices] = {"layers": self.layers, "hidden": self.hidden}
        for axis in ("ffn", "groups", "heads"):
            named |= {f"{axis}.{layer}": units for layer, units in getattr(self, axis).items()}
        return {name: torch.from_numpy(units.copy()) for name, units in named.items()}

    def save(self, path: Path) -> None:
        """Write keep.safetensors."""
        with atomic_path(path) as temporary:
            save_file(self.tensors(), temporary)

    @classmethod
    def load(cls, path: Path) -> "Keep":
        """Read keep.safetensors."""
        try:
            with safe_open(path, framework="np") as handle:
                named = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        except Exception as error:
            raise RequestError(f"cannot read {path}: {error} (minitron prune makes it)") from error
        per_layer: dict[str, dict[int, Indices]] = {"ffn": {}, "groups": {}, "heads": {}}
        for name, units in named.items():
            if "." in name:
                axis, layer = name.split(".")
                per_layer[axis][int(layer)] = units
        return cls(layers=named["layers"], hidden=named["hidden"], **per_layer)


def top(scores: torch.Tensor, count: int) -> Indices:
    """The `count` highest, ascending by index; of equal scores the lower index stays."""
    order = np.argsort(-scores.double().numpy(), kind="stable")
    return np.sort(order[:count]).astype(np.int64)


def select(scores: dict[str, torch.Tensor], original: Arch, target: Arch) -> Keep:
    """The units that stay (arXiv 2407.14679, section 2.3): hidden channels over the whole model, neurons and groups per layer,
    query heads inside each kept group, layers by Block Importance."""
    for name, values in scores.items():
        if not values.isfinite().all():
            raise RequestError(f"importance scores {name}: some are not finite; calibrate with dtype=fp32, or look at the model and the text")
    layers = top(scores["layers.bi"], target.num_layers)
    ffn, groups, heads = {}, {}, {}
    for layer in map(int, layers):
        ffn[layer] = top(scores[f"ffn.{layer}"], target.ffn_hidden_size)
        groups[layer] = top(scores[f"groups.{layer}"], target.num_query_groups)
        by_group = scores[f"heads.{layer}"].view(original.num_query_groups, original.heads_per_group)
        inside = [top(by_group[group], target.heads_per_group) + group * original.heads_per_group for group in groups[layer]]
        heads[layer] = np.concatenate(inside)
    return Keep(layers=layers, hidden=top(scores["hidden"], target.hidden_size), ffn=ffn, groups=groups, heads=heads)
