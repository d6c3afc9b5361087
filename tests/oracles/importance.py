"""Importance by the book, on a plain `transformers` model: every activation is recorded whole, and scores are made of them at the end.

Legend: S tokens of a sample, B samples, U units, N heads, D channels of a head.
"""

from pathlib import Path

import numpy as np
import torch

from tests.oracles.experts import Routed
from tests.oracles.models import hf_model, saved_tensors

AGGREGATE = {
    "mean": lambda values, axis: np.abs(values).mean(axis=axis),
    "l2": lambda values, axis: np.sqrt((values**2).sum(axis=axis)),
    "var": lambda values, axis: values.var(axis=axis),
}


class Recorded:
    """The activations of every sample, in float64: `values[name]` is [B, S, U]."""

    def __init__(self, folder: Path, tokens_BS: torch.Tensor) -> None:
        model = hf_model(folder)
        self.config, self.values, self.routed = model.config, {}, {}
        self.layers, self.groups = model.config.num_hidden_layers, model.config.num_key_value_heads

        def record(name, tensor_BSU):
            self.values.setdefault(name, []).append(tensor_BSU.double().numpy())

        for number, layer in enumerate(model.model.layers):
            layer.input_layernorm.register_forward_hook(lambda _, args, out, n=number: record(f"norm.{n}.attention", out))
            layer.post_attention_layernorm.register_forward_hook(lambda _, args, out, n=number: record(f"norm.{n}.mlp", out))
            layer.self_attn.o_proj.register_forward_hook(lambda _, args, out, n=number: record(f"o_proj.{n}", args[0]))
            if hasattr(layer.mlp, "experts"):
                self.routed[number] = Routed(layer.mlp)
            for axis, mlp in (("ffn", layer.mlp), ("shared_ffn", getattr(layer.mlp, "shared_expert", None))):
                if hasattr(mlp, "down_proj"):  # a shared expert is given all tokens in one row
                    mlp.down_proj.register_forward_hook(
                        lambda _, args, out, name=f"{axis}.{number}": record(name, args[0].view(1, *args[0].shape[-2:]))
                    )
            layer.register_forward_hook(lambda _, args, out, n=number: record(f"block.{n}", torch.stack([args[0], out])))
        model.model.norm.register_forward_hook(lambda _, args, out: record("norm.last", out))
        with torch.no_grad():
            for sample_S in tokens_BS:
                model(sample_S[None])
        # a block's entry holds its input and its output
        self.values = {name: np.concatenate(parts, axis=1 if name.startswith("block") else 0) for name, parts in self.values.items()}

    def scores(self, batch_agg: str, seq_agg: str) -> dict[str, np.ndarray]:
        """Scores of every axis: over a sample's tokens first, then over samples."""

        def aggregated(values_BSU):
            return AGGREGATE[batch_agg](AGGREGATE[seq_agg](values_BSU, 1), 0)

        found = {"hidden": sum(aggregated(values) for name, values in self.values.items() if name.startswith("norm."))}
        for layer in range(self.layers):
            found |= {name: aggregated(self.values[name]) for name in (f"ffn.{layer}", f"shared_ffn.{layer}") if name in self.values}
            if (routed := self.routed.get(layer)) is not None:
                found |= {f"experts.{layer}": routed.means(routed.lengths), f"expert_ffn.{layer}": routed.means(routed.activations)}
            out_BSC = self.values[f"o_proj.{layer}"]
            heads_BSND = out_BSC.reshape(*out_BSC.shape[:2], self.config.num_attention_heads, self.config.head_dim)
            found[f"heads.{layer}"] = aggregated(np.sqrt((heads_BSND**2).sum(axis=-1)))
            found[f"groups.{layer}"] = found[f"heads.{layer}"].reshape(self.groups, -1).sum(axis=1)
        return found | {"layers.bi": np.array([self.block_influence(layer) for layer in range(self.layers)])}

    def block_influence(self, layer: int) -> float:
        """1 - the mean cosine between what goes into a block and what comes out of it, over all tokens."""
        before_BSH, after_BSH = self.values[f"block.{layer}"]
        lengths = np.linalg.norm(before_BSH, axis=-1) * np.linalg.norm(after_BSH, axis=-1)
        return float(1 - ((before_BSH * after_BSH).sum(axis=-1) / lengths).mean())


def magnitudes(folder: Path, config) -> dict[str, np.ndarray]:
    """The L2 norm of every weight that would go with a unit, from the tensors of a Hugging Face folder."""
    tensors = {name: tensor.double().numpy() for name, tensor in saved_tensors(folder).items()}
    heads, groups, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    hidden = np.zeros(config.hidden_size)
    found = {}
    per_layer = [np.zeros(1) for _ in range(config.num_hidden_layers)]
    for name, tensor in tensors.items():
        if name.endswith("proj.bias"):
            across = tensor if "o_proj" in name or "down_proj" in name else None
        elif tensor.ndim == 1:  # a norm's weight or bias
            across = tensor
        else:  # [rows, hidden], or [hidden, columns] where a block writes into the residual stream
            across = tensor.T if "o_proj" in name or "down_proj" in name else tensor
        if across is not None:
            hidden += (across**2).reshape(-1, config.hidden_size).sum(axis=0)
        if ".layers." in name:
            per_layer[int(name.split(".")[2])] += (tensor**2).sum()
    for layer in range(config.num_hidden_layers):
        base = f"model.layers.{layer}."

        def rows(part, base=base):
            """Squares of a projection's rows, bias included."""
            bias = tensors.get(f"{base}{part}.bias")
            return (tensors[f"{base}{part}.weight"] ** 2).sum(axis=1) + (0 if bias is None else bias**2)

        def columns(part, base=base):
            return (tensors[f"{base}{part}.weight"] ** 2).sum(axis=0)

        gate = rows("mlp.gate_proj") if f"{base}mlp.gate_proj.weight" in tensors else 0
        found[f"ffn.{layer}"] = np.sqrt(gate + rows("mlp.up_proj") + columns("mlp.down_proj"))
        query = (rows("self_attn.q_proj") + columns("self_attn.o_proj")).reshape(heads, width).sum(axis=1)
        key_value = (rows("self_attn.k_proj") + rows("self_attn.v_proj")).reshape(groups, width).sum(axis=1)
        found[f"heads.{layer}"] = np.sqrt(query)
        found[f"groups.{layer}"] = np.sqrt(query.reshape(groups, -1).sum(axis=1) + key_value)
    return found | {"hidden": np.sqrt(hidden), "layers.bi": np.sqrt(np.concatenate(per_layer))}
