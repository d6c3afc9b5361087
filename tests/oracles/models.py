"""Random tiny `transformers` models of odd shapes, saved as Hugging Face folders."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, NemotronConfig, PreTrainedConfig, PreTrainedModel

TINY = {
    "num_hidden_layers": 4, "hidden_size": 48, "intermediate_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8,
    "vocab_size": 61, "max_position_embeddings": 64, "tie_word_embeddings": True, "rms_norm_eps": 1e-5,
}  # fmt: skip
BIASES = {"attention_bias": True, "mlp_bias": True}
UNTIED = {"tie_word_embeddings": False}
NEMOTRON = {"model_type": "nemotron"}
ZERO_CENTRED = ("nemotron", "gemma", "gemma2", "gemma3_text")


def _rope(kind: str, theta: float = 10000.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


# what each model has beside TINY; sequences longer than max_position_embeddings are where scaled rotary kinds differ
ZOO: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {**UNTIED, "vocab_size": 97, "rms_norm_eps": 1e-3},
    "one_group": {"num_key_value_heads": 1},
    "two_groups": {"num_key_value_heads": 2, **UNTIED},
    "every_group": {"num_key_value_heads": 6, "num_attention_heads": 6},
    "wide_heads": {"head_dim": 14, **UNTIED},
    "mistral": {"hidden_size": 50, "num_attention_heads": 4, "num_key_value_heads": 4},
    "mistral_one_group": {"hidden_size": 55, "num_key_value_heads": 1, **UNTIED},
    "biases": {**BIASES, **UNTIED},
    "biases_tied": {**BIASES, "num_key_value_heads": 2},
    "theta": _rope("default", theta=500.0),
    "linear": _rope("linear", factor=3.0),
    "dynamic": {**_rope("dynamic", factor=4.0), "max_position_embeddings": 16},
    "yarn": {**_rope("yarn", factor=4.0, original_max_position_embeddings=16), "max_position_embeddings": 64},
    "longrope": {
        **_rope("longrope", factor=4.0, original_max_position_embeddings=16, short_factor=[1.0, 1.1, 1.3, 1.5], long_factor=[1.0, 2.0, 4.0, 7.0]),
        "max_position_embeddings": 64,
    },
    "llama3": _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
    "nemotron": {**NEMOTRON, **UNTIED, "num_key_value_heads": 2},
    "nemotron_biases": {**NEMOTRON, **BIASES, "hidden_size": 50, "rms_norm_eps": 1e-3, **_rope("default", partial_rotary_factor=0.7)},
    "nemotron_yarn": {
        **NEMOTRON, **_rope("yarn", factor=4.0, original_max_position_embeddings=16, partial_rotary_factor=0.75), "num_key_value_heads": 1,
    },
}  # fmt: skip


def config_of(**changes: Any) -> PreTrainedConfig:
    """TINY with changes, as the class that accepts the shape: LlamaConfig refuses a hidden size that the heads don't divide. `model_type`
    may name another family; sizes have Llama's names all the same."""
    sizes = {**TINY, **changes}
    if sizes.pop("model_type", None) == "nemotron":
        return NemotronConfig(norm_eps=sizes.pop("rms_norm_eps"), **sizes)
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        return MistralConfig(**sizes, sliding_window=None)
    return LlamaConfig(**sizes)


def randomise(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights under which every part matters: fresh norms are all ones, fresh biases zero, and fresh matrices so small that nothing stands out.

    Norms are near what leaves lengths alone: ones, or zeros where 1 is added to them.
    """
    centre = 0.0 if model.config.model_type in ZERO_CENTRED else 1.0
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.dim() > 1:
                tensor.copy_(noise * (1.0 if "embed" in name or ".wte" in name or ".wpe" in name else 1.5 / tensor.shape[-1] ** 0.5))
            else:
                tensor.copy_(noise * 0.3 + centre * name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight")))
    return model


def save_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, max_shard_size: str = "1GB", **changes: Any) -> Path:
    """Write a random model of `config_of(**changes)`."""
    model = randomise(AutoModelForCausalLM.from_config(config_of(**changes), dtype=torch.float32), seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def save_zoo(root: Path) -> dict[str, Path]:
    """Every model of ZOO, and two of them in bf16 over several files."""
    folders = {name: save_model(root / name, seed, **changes) for seed, (name, changes) in enumerate(ZOO.items())}
    folders["bf16_files"] = save_model(root / "bf16_files", 101, torch.bfloat16, "30KB", **UNTIED)
    folders["fp32_files"] = save_model(root / "fp32_files", 102, torch.float32, "50KB", **BIASES)
    return folders


def hf_model(folder: Path) -> PreTrainedModel:
    """A folder as `transformers` loads it, in fp32, ready to evaluate."""
    # its grouped products of experts ask for rows of a multiple of 16 bytes
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()


def tokens_of(vocab_size: int, batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [batch, length]."""
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def saved_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder's safetensors files, by name."""
    from safetensors.torch import load_file

    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether both hold the same names with the same types, shapes and bits."""
    return set(one) == set(other) and all(
        tensor.dtype == other[name].dtype and tensor.shape == other[name].shape and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
