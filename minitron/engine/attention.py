"""The torch spec's modules where Megatron's own need a GPU, Transformer Engine or apex.

Shapes: S sequence, B batch, N query heads of this rank, G KV groups of this rank, D kv_channels.
"""

from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class Attention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`: flash kernels on a GPU, no [S, S] matrix anywhere."""

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str,
                 softmax_scale: float | None = None, **unused: Any) -> None:  # fmt: skip
        super().__init__(config=config)
        scale = softmax_scale or config.kv_channels**-0.5
        # yarn and longrope stretch cos and sin by a factor: on queries and keys alike, so squared in the scores
        self.softmax_scale = scale * getattr(config, "rope_attention_factor", 1.0) ** 2

    def forward(self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, attention_mask: Any,
                attn_mask_type: Any = None, attention_bias: Any = None, packed_seq_params: Any = None) -> torch.Tensor:  # fmt: skip
        """Returns [S, B, N * D]."""
        query_BNSD, key_BGSD, value_BGSD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        shared = query_BNSD.size(1) != key_BGSD.size(1)
        out_BNSD = torch.nn.functional.scaled_dot_product_attention(
            query_BNSD, key_BGSD, value_BGSD, is_causal=True, scale=self.softmax_scale, enable_gqa=shared
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class Norm:
    """torch's norms with the mark that makes Megatron sum a norm's gradient over sequence-parallel ranks."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        kind = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class Rotary(torch.nn.Module):
    """Rotary angles for every scaling kind that transformers knows, by transformers' own formulas.

    `settings` is a transformers config of the model; the angles may depend on the sequence's length (dynamic, longrope),
    so they are computed per length and kept.
    """

    def __init__(self, settings: Any, device: torch.device) -> None:
        super().__init__()
        self.settings, self.device = settings, device
        self.cache: dict[int, torch.Tensor] = {}

    def inverse_frequencies(self, seq_length: int) -> tuple[torch.Tensor, float]:
        """[D / 2] frequencies and the factor on cos and sin for sequences of this length."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = self.settings.rope_parameters
        if rope["rope_type"] == "default":
            dim = self.settings.head_dim
            steps = torch.arange(0, dim, 2, dtype=torch.int64, device=self.device).float() / dim
            return 1.0 / (rope["rope_theta"] ** steps), 1.0
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.settings, self.device, seq_len=seq_length)

    def get_rotary_seq_len(self, inference_context: Any, transformer: Any, hidden_SBH: torch.Tensor, config: TransformerConfig, packed: Any) -> int:
        """Length of the whole sequence, which under sequence parallelism is longer than what this rank holds."""
        held = transformer.input_tensor if transformer.input_tensor is not None else hidden_SBH
        return int(held.size(0)) * (config.tensor_model_parallel_size if config.sequence_parallel else 1)

    def forward(self, seq_length: int, **unused: Any) -> torch.Tensor:
        """Angles [S, 1, 1, D], the two halves of a head turned together (not interleaved)."""
        if seq_length not in self.cache:
            frequencies, _ = self.inverse_frequencies(seq_length)
            angles = torch.outer(torch.arange(seq_length, dtype=torch.float32, device=self.device), frequencies)
            self.cache = {seq_length: torch.cat((angles, angles), dim=-1)[:, None, None, :]}
        return self.cache[seq_length]
