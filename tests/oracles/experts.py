"""Random tiny models with experts, and what experts score by the book: from the weights and the router's choices of a plain `transformers` model.

Legend: T tokens, K experts of a token, E experts, F neurons of one, H hidden.
"""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.oracles.models import randomise, saved_tensors

SIZES = {
    "num_hidden_layers": 4, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8, "vocab_size": 61,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
QWEN = {"num_experts": 6, "moe_intermediate_size": 20, "intermediate_size": 36}
MODELS: dict[str, PreTrainedConfig] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=6, num_experts_per_tok=2, intermediate_size=28, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **QWEN, num_experts_per_tok=3, norm_topk_prob=True, tie_word_embeddings=True),
    # the second block is dense, and the router's probabilities of the chosen experts do not add up to 1
    "qwen2_moe": Qwen2MoeConfig(**SIZES, **QWEN, num_experts_per_tok=2, shared_expert_intermediate_size=24, mlp_only_layers=[1]),
}
# what Mixtral calls the parts of a layer
MIXTRAL = {"block_sparse_moe.": "mlp.", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def save_experts(folder: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of MODELS with changes."""
    config = copy.deepcopy(MODELS[family])
    config.update(changes)
    randomise(AutoModelForCausalLM.from_config(config, dtype=torch.float32), seed).save_pretrained(folder)
    return folder


def plain_name(name: str) -> str:
    """A tensor's name as Qwen has it."""
    for theirs, ours in MIXTRAL.items():
        name = name.replace(theirs, ours)
    return name


class Routed:
    """What the experts of one block of a plain model did, token by token, in float64."""

    def __init__(self, mlp: torch.nn.Module) -> None:
        self.experts, self.lengths, self.activations = mlp.experts, [], []
        mlp.experts.register_forward_hook(lambda _, args, out: self.record(*args))

    def record(self, hidden_TH: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor) -> None:
        """Every token's outcome of each of its experts: how long its output is, and what each neuron put out, times the router's probability."""
        for token_H, chosen_K, weights_K in zip(hidden_TH.double(), chosen_TK.tolist(), weights_TK.double(), strict=True):
            for expert, weight in zip(chosen_K, weights_K, strict=True):
                gate_F, up_F = (self.experts.gate_up_proj[expert].double() @ token_H).chunk(2)
                activation_F = torch.nn.functional.silu(gate_F) * up_F * weight
                self.lengths.append((expert, (self.experts.down_proj[expert].double() @ activation_F).norm().item()))
                self.activations.append((expert, activation_F.abs().numpy()))

    def means(self, pairs: list[tuple[int, Any]]) -> np.ndarray:
        """The mean of each expert's entries, 0 where it has none."""
        entries: list[list[Any]] = [[] for _ in range(self.experts.num_experts)]
        for expert, value in pairs:
            entries[expert].append(value)
        return np.array([np.mean(found, axis=0) if found else np.zeros_like(pairs[0][1]) for found in entries])


def magnitudes_of_experts(folder: Path) -> dict[str, np.ndarray]:
    """The L2 norm of every weight that would go with a unit of the axes of experts, with a channel of the residual stream, or with a layer."""
    squares: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        squares[name] = squares.get(name, 0) + value

    for name, tensor in saved_tensors(folder).items():
        power, parts = tensor.double().numpy() ** 2, plain_name(name).split(".")
        writes = parts[-2] in ("down_proj", "o_proj")
        if "q_norm" not in name and "k_norm" not in name and not name.endswith("_proj.bias"):
            add("hidden", (power.T if writes else power).reshape(-1, power.shape[0 if writes else -1]).sum(axis=0))
        if "layers" in parts:
            layer = parts[2]
            add(f"layers.{layer}", power.sum())
            if "experts" in parts:
                expert = int(parts[parts.index("experts") + 1])
                add(f"experts.{layer}.{expert}", power.sum())
                add(f"expert_ffn.{layer}.{expert}", power.sum(axis=0 if writes else 1))
            elif parts[-2] == "gate":
                for expert, row in enumerate(power):
                    add(f"experts.{layer}.{expert}", row.sum())
            elif "shared_expert" in parts:
                add(f"shared_ffn.{layer}", power.sum(axis=0 if writes else 1))
    layers = sum(name.startswith("layers.") for name in squares)
    found = {"hidden": squares["hidden"], "layers.bi": np.array([squares[f"layers.{layer}"] for layer in range(layers)])}
    for layer in range(layers):
        for axis in ("experts", "expert_ffn"):
            ones = [squares[name] for expert in range(99) if (name := f"{axis}.{layer}.{expert}") in squares]
            found |= {f"{axis}.{layer}": np.array(ones)} if ones else {}
        found |= {name: squares[name] for name in (f"shared_ffn.{layer}",) if name in squares}
    return {name: np.sqrt(value) for name, value in found.items()}
