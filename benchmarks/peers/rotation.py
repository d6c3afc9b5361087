"""SliceGPT (Ashkboos et al., arXiv 2401.15024) as far as a plain Llama can hold it: one rotation of the residual stream, folded into the weights,
so that its channels are principal components; the last of them are then cut by the product's own `select` and `reslice`.

As there, the scales of the norms go into the matrices behind them, the components are those of what the norms put out, and a cut norm still
divides by the root of the mean square over the original width. Unlike there, one rotation serves all layers, found from all norms' outputs together:
SliceGPT has one per block, and a matrix on each residual connection that takes one block's components to the next one's, which no class of
`transformers` has. And the components are found once, on the uncut model, where SliceGPT goes on block by block from what is left.

As there, embedding and head differ afterwards by the final norm's scale. So a model that has one matrix for both gets a second one, which counts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

Tensor = torch.Tensor
READERS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")  # of the residual stream
WRITERS = ("self_attn.o_proj", "mlp.down_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")


def components(spread_HH: Tensor) -> tuple[Tensor, Tensor]:
    """Variances [H], the largest first, and the principal components [H, H], a column each."""
    variances_H, components_HH = torch.linalg.eigh(spread_HH)
    return variances_H.flip(0), components_HH.flip(1)


def rotated(tensors: dict[str, Tensor], components_HH: Tensor, width: int) -> dict[str, Tensor]:
    """The tensors of a Llama in the components' coordinates, in float64; the model computes the same if `width` is H. All norms have the scale
    with which they divide by the root of the mean square over H once `width` channels are left."""
    left = {name: tensor.double() for name, tensor in tensors.items()}
    scale = (len(components_HH) / width) ** 0.5
    embedding_VH = left.pop("model.embed_tokens.weight")
    head_VH = left.pop("lm_head.weight", embedding_VH)
    final_H = left.pop("model.norm.weight")
    done = {
        "model.embed_tokens.weight": embedding_VH @ components_HH,
        "lm_head.weight": (head_VH * final_H) @ components_HH,
        "model.norm.weight": torch.full_like(final_H, scale),
    }
    for name, tensor in left.items():
        _, _, layer, *module, _ = name.split(".")  # model.layers.N.MODULE.weight
        kind = ".".join(module)
        if kind in READERS and tensor.dim() == 2:
            norm = "input_layernorm" if kind.startswith("self_attn") else "post_attention_layernorm"
            done[name] = (tensor * left[f"model.layers.{layer}.{norm}.weight"]) @ components_HH
        elif kind in WRITERS and tensor.dim() == 2:
            done[name] = components_HH.T @ tensor
        elif kind in NORMS:
            done[name] = torch.full_like(tensor, scale)
        else:
            raise ValueError(f"{name}: only a Llama without biases is rotated here")
    return done


def save_rotated(model: Any, components_HH: Tensor, width: int, folder: Path) -> None:
    """Write a `transformers` Llama in the components' coordinates as a folder, with a head of its own, in fp32."""
    tensors = {name: tensor.detach() for name, tensor in model.named_parameters()}
    config = type(model.config).from_dict({**model.config.to_dict(), "tie_word_embeddings": False})
    turned = type(model)(config)
    turned.load_state_dict({name: tensor.float() for name, tensor in rotated(tensors, components_HH.double(), width).items()})
    turned.save_pretrained(folder)
