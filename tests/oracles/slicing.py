"""Pruning by the book: plain indexing of whole Hugging Face tensors, and ranking by sorting pairs."""

import torch

# part of a layer -> which of its dims are (rows, columns); a bias has rows only
LAYER = {
    "self_attn.q_proj": ("heads", "hidden"),
    "self_attn.k_proj": ("groups", "hidden"),
    "self_attn.v_proj": ("groups", "hidden"),
    "self_attn.o_proj": ("hidden", "heads"),
    "mlp.gate_proj": ("ffn", "hidden"),
    "mlp.up_proj": ("ffn", "hidden"),
    "mlp.down_proj": ("hidden", "ffn"),
    "input_layernorm": ("hidden",),
    "post_attention_layernorm": ("hidden",),
}


def sliced(tensors: dict[str, torch.Tensor], head_dim: int, keep) -> dict[str, torch.Tensor]:
    """The tensors of the pruned model; `keep` has layers, hidden and, by original layer, ffn, heads, groups."""
    hidden = torch.as_tensor(keep.hidden)
    whole = {name: tensor[..., hidden] for name, tensor in tensors.items() if ".layers." not in name}
    for new, old in enumerate(map(int, keep.layers)):
        rows = {"hidden": hidden, "ffn": torch.as_tensor(keep.ffn[old])}
        for axis in ("heads", "groups"):
            rows[axis] = torch.tensor([unit * head_dim + channel for unit in getattr(keep, axis)[old] for channel in range(head_dim)])
        for name, tensor in tensors.items():
            if name.startswith(f"model.layers.{old}."):
                part, _, kind = name.removeprefix(f"model.layers.{old}.").rpartition(".")
                if part == "self_attn.q_proj" and old in keep.partners:
                    tensor = merged(tensor, head_dim, keep.heads[old], keep.partners[old])
                for dim, axis in zip(range(tensor.dim()), LAYER[part], strict=False):
                    tensor = tensor.index_select(dim, rows[axis])
                whole[f"model.layers.{new}.{part}.{kind}"] = tensor
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
