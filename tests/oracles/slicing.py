"""Pruning by the book: plain indexing of whole Hugging Face tensors, and ranking by sorting pairs."""

import re

import torch

from tests.oracles.experts import plain_name

# part of a layer -> which of its dims are (rows, columns); a bias has rows only
LAYER = {
    "self_attn.q_proj": ("heads", "hidden"),
    "self_attn.k_proj": ("groups", "hidden"),
    "self_attn.v_proj": ("groups", "hidden"),
    "self_attn.o_proj": ("hidden", "heads"),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
    "mlp.gate": ("experts", "hidden"),
    "mlp.experts.gate_proj": ("expert_ffn", "hidden"),
    "mlp.experts.up_proj": ("expert_ffn", "hidden"),
    "mlp.experts.down_proj": ("hidden", "expert_ffn"),
    "mlp.shared_expert.gate_proj": ("shared_ffn", "hidden"),
    "mlp.shared_expert.up_proj": ("shared_ffn", "hidden"),
    "mlp.shared_expert.down_proj": ("hidden", "shared_ffn"),
    "mlp.shared_expert_gate": ("one", "hidden"),
    "self_attn.q_norm": ("channels",),
    "self_attn.k_norm": ("channels",),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
}


def sliced(tensors: dict[str, torch.Tensor], head_dim: int, keep) -> dict[str, torch.Tensor]:
    """The tensors of the pruned model; `keep` has layers, hidden and, by original layer, ffn, heads, groups and what there is of experts."""
    hidden = torch.as_tensor(keep.hidden)
    whole = {name: tensor[..., hidden] for name, tensor in tensors.items() if ".layers." not in name}
    for new, old in enumerate(map(int, keep.layers)):
        rows = {"hidden": hidden, "one": torch.arange(1), "channels": torch.arange(head_dim)}
        rows |= {axis: torch.as_tensor(units[old]) for axis in ("ffn", "shared_ffn", "experts") if old in (units := getattr(keep, axis))}
        for axis in ("heads", "groups"):
            rows[axis] = torch.tensor([unit * head_dim + channel for unit in getattr(keep, axis)[old] for channel in range(head_dim)])
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{old}."):
                name, new_name = name.removeprefix(f"model.layers.{old}."), name.replace(f".{old}.", f".{new}.", 1)
                part, _, _ = re.sub(r"experts\.\d+", "experts", plain_name(name)).rpartition(".")
                if (found := re.search(r"experts\.(\d+)", name)) is not None:
                    kept = keep.experts[old].tolist()
                    if (expert := int(found[1])) not in kept:
                        continue
                    rows["expert_ffn"] = torch.as_tensor(keep.expert_ffn[old][kept.index(expert)])
                    new_name = new_name.replace(found[0], f"experts.{kept.index(expert)}")
                if part == "self_attn.q_proj" and old in keep.partners:
                    tensor = merged(tensor, head_dim, keep.heads[old], keep.partners[old])
                for dim, axis in zip(range(tensor.dim()), LAYER[part], strict=False):
                    tensor = tensor.index_select(dim, rows[axis])
                whole[new_name] = tensor
    return whole


def merged(tensor: torch.Tensor, head_dim: int, heads, partners) -> torch.Tensor:
    """Query rows with what each of `heads` differs by from its partner added to it."""
    result = tensor.clone()
    for head, partner in zip(heads, partners, strict=True):
        mine, other = (tensor[unit * head_dim : (unit + 1) * head_dim] for unit in (head, partner))
        result[head * head_dim : (head + 1) * head_dim] = mine + (mine - other)
    return result


def best(scores: list[float], count: int, units: list[int] | None = None) -> list[int]:
    """The `count` units of highest score, ascending; of equals, those that come first."""
    units = list(range(len(scores))) if units is None else units
    return sorted(sorted(units, key=lambda unit: (-scores[unit], unit))[:count])
