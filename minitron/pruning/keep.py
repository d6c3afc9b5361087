"""Ranking: from scores and a target architecture to the units that stay. Pure.

Legend: E experts, F neurons of one expert.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron.arch.arch import Arch
from minitron.arch.axes import Indices
from minitron.errors import RequestError, refuse
from minitron.files import atomic_path

FILE = "keep.safetensors"
PER_LAYER = ("ffn", "groups", "heads", "partners", "experts", "expert_ffn", "shared_ffn")


@dataclasses.dataclass(frozen=True)
class Keep:
    """Kept units in the original numbering, ascending. All but `layers` and `hidden` are keyed by original layer number.

    `heads[layer]` holds numbers over the whole layer (head h belongs to group h // heads_per_group). `partners[layer]`, where
    heads are merged, holds for each of them the head whose difference is added, itself where there is none. A block has either
    `ffn` or, where tokens are routed, `experts` [E], `expert_ffn` [E, k], a row of neurons for each expert that stays, and
    `shared_ffn` where there is a shared expert.
    """

    layers: Indices
    hidden: Indices
    ffn: dict[int, Indices]
    groups: dict[int, Indices]
    heads: dict[int, Indices]
    partners: dict[int, Indices] = dataclasses.field(default_factory=dict)
    experts: dict[int, Indices] = dataclasses.field(default_factory=dict)
    expert_ffn: dict[int, Indices] = dataclasses.field(default_factory=dict)
    shared_ffn: dict[int, Indices] = dataclasses.field(default_factory=dict)

    def heads_in_groups(self, layer: int, original: Arch) -> Indices:
        """[kept groups, kept heads per group], each head numbered inside its group."""
        return self.heads[layer].reshape(len(self.groups[layer]), -1) % original.heads_per_group

    def partners_in_groups(self, layer: int, original: Arch) -> Indices:
        """As `heads_in_groups`, of the heads that are merged into them."""
        return self.partners[layer].reshape(len(self.groups[layer]), -1) % original.heads_per_group

    def tensors(self) -> dict[str, torch.Tensor]:
        """Named as in importance.safetensors."""
        named: dict[str, Indices] = {"layers": self.layers, "hidden": self.hidden}
        for axis in PER_LAYER:
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
        per_layer: dict[str, dict[int, Indices]] = {axis: {} for axis in PER_LAYER}
        for name, units in named.items():
            if "." in name:
                axis, layer = name.split(".")
                per_layer[axis][int(layer)] = units
        return cls(layers=named["layers"], hidden=named["hidden"], **per_layer)


def top(scores: torch.Tensor, count: int) -> Indices:
    """The `count` highest, ascending by index; of equal scores the lower index stays."""
    order = np.argsort(-scores.double().numpy(), kind="stable")
    return np.sort(order[:count]).astype(np.int64)


def by_answers(by: str) -> bool:
    """Whether layers are ranked by the answers to questions."""
    return by in ("choices", "block_choices")


def skipped_at_a_time(by: str, total: int, count: int) -> int:
    """How many layers are left out at a time to measure what `by` needs."""
    return 1 if by in ("loss", "choices") else total - count


def top_layers(scores: dict[str, torch.Tensor], count: int, by: str) -> Indices:
    """The layers that stay: by Block Importance, by what the model loses without each of them, or all but the contiguous block that is missed least.

    What it loses is the loss without them or (`choices`) right answers, where equal the loss. Raises RequestError where that was not measured.
    """
    total = len(scores["layers.bi"])
    if by == "bi" or count == total:
        return top(scores["layers.bi"], count)
    at_a_time = skipped_at_a_time(by, total, count)
    losses, accuracies = (scores.get(f"layers.{kind}.{at_a_time}") for kind in ("loss", "choices"))
    if losses is None:
        what = f"the loss was not measured without {at_a_time} at a time: calibrate with calibrate.skip_layers={at_a_time}"
        raise refuse("target.layers_by", by, what)
    missed = [losses.double().numpy()]
    if by_answers(by):
        if accuracies is None:
            what = f"no questions were answered without {at_a_time} at a time: calibrate with calibrate.choices and calibrate.skip_layers={at_a_time}"
            raise refuse("target.layers_by", by, what)
        missed.append(-accuracies.double().numpy())
    if by in ("loss", "choices"):
        most_missed_last = np.lexsort([-np.arange(total), *missed])  # by the last of these, where that is equal by the one before
        return np.sort(most_missed_last[total - count :]).astype(np.int64)
    dropped = int(np.lexsort(missed)[0])
    return np.delete(np.arange(total), np.arange(dropped, dropped + at_a_time))


def merge_partners(scores: torch.Tensor, kept: int) -> Indices:
    """For the kept heads of a group, ascending, the head whose difference is added to each (arXiv 2407.14679, section 2.3).

    With heads numbered 1..L by importance and K kept, head i in [2K - L + 1, K] becomes head_i + (head_i - head_(2K - i + 1)).
    """
    order = np.argsort(-scores.double().numpy(), kind="stable")
    partner = {int(order[i - 1]): int(order[2 * kept - i]) if i > 2 * kept - len(order) else int(order[i - 1]) for i in range(1, kept + 1)}
    return np.array([partner[head] for head in sorted(partner)], dtype=np.int64)


def select(scores: dict[str, torch.Tensor], original: Arch, target: Arch, layers_by: str = "bi", merge_heads: bool = False) -> Keep:
    """The units that stay (arXiv 2407.14679, section 2.3): hidden channels over the whole model, neurons, groups and experts per layer,
    query heads inside each kept group, an expert's neurons inside each kept expert, layers as `top_layers` says."""
    for name, values in scores.items():
        if not values.isfinite().all():
            raise RequestError(f"importance scores {name}: some are not finite; calibrate with dtype=fp32, or look at the model and the text")
    keep = Keep(top_layers(scores, target.num_layers, layers_by), top(scores["hidden"], target.hidden_size), {}, {}, {})
    per_group = original.heads_per_group
    for position, layer in enumerate(map(int, keep.layers)):
        block = target.layer(position)
        if original.routes(layer):
            keep_experts(keep, layer, scores, target)
        else:
            keep.ffn[layer] = top(scores[f"ffn.{layer}"], block.ffn_hidden_size)
        groups = keep.groups[layer] = top(scores[f"groups.{layer}"], block.num_query_groups)
        by_group = scores[f"heads.{layer}"].view(original.num_query_groups, per_group)
        keep.heads[layer] = np.concatenate([top(by_group[group], block.heads_per_group) + group * per_group for group in groups])
        if merge_heads and block.heads_per_group < per_group:
            merged = [merge_partners(by_group[group], block.heads_per_group) + group * per_group for group in groups]
            keep.partners[layer] = np.concatenate(merged)
    return keep


def keep_experts(keep: Keep, layer: int, scores: dict[str, torch.Tensor], target: Arch) -> None:
    """Add what stays of a layer's experts: the best of them, and of each of these the best neurons."""
    assert target.num_moe_experts is not None and target.moe_ffn_hidden_size is not None
    neurons_EF, count = scores[f"expert_ffn.{layer}"], target.moe_ffn_hidden_size
    experts = keep.experts[layer] = top(scores[f"experts.{layer}"], target.num_moe_experts)
    keep.expert_ffn[layer] = np.stack([top(neurons_EF[expert], count) for expert in experts])
    if target.moe_shared_expert_intermediate_size is not None:
        keep.shared_ffn[layer] = top(scores[f"shared_ffn.{layer}"], target.moe_shared_expert_intermediate_size)
