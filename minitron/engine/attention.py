"""The torch spec's modules where Megatron's own need a GPU, Transformer Engine or apex.

Under context parallelism the sequence is cut into 2 x cp pieces and rank r holds pieces r and 2 x cp - 1 - r, in this order,
so that every rank has the same share of a causal mask (Megatron's and Transformer Engine's convention).

Shapes: S sequence (of this rank), B batch, N query heads of this rank, G KV groups of this rank, D kv_channels; W whole sequence, L piece.
"""

import copy
import functools
from typing import Any

import torch
from megatron.core.tensor_parallel import RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.attention.bias import causal_lower_right


def pieces_of(cp: int, cp_rank: int) -> tuple[int, int]:
    """The two pieces of the sequence, out of 2 x cp, that a context rank holds."""
    return cp_rank, 2 * cp - 1 - cp_rank


def sequence_part(whole: torch.Tensor, dim: int, cp: int, cp_rank: int) -> torch.Tensor:
    """A context rank's part of `whole` along `dim`."""
    if cp == 1:
        return whole
    pieces = whole.chunk(2 * cp, dim=dim)
    return torch.cat([pieces[number] for number in pieces_of(cp, cp_rank)], dim=dim)


def whole_context(part: torch.Tensor, group: Any) -> torch.Tensor:
    """[S, ...] of every context rank -> [W, ...] in the order of the sequence; backward, each rank's gradient is summed into the part's."""
    cp = group.size()
    pieces = gather_from_sequence_parallel_region(part, tensor_parallel_output_grad=True, group=group).chunk(2 * cp)
    held = [number for rank in range(cp) for number in pieces_of(cp, rank)]
    return torch.cat([pieces[held.index(number)] for number in range(2 * cp)])


def documents_mask(documents_BW: torch.Tensor, cp: int = 1, cp_rank: int = 0) -> torch.Tensor:
    """What each position of a context rank's part sees of the whole sequence: itself and what comes before it in its document; bool [B, 1, S, W].

    Every position sees itself, so no row is empty. Positions are not counted anew in each document: rotary angles matter by their
    differences alone, and those inside a document are the same wherever it lies (scaled kinds of rope go by the length of the
    whole window, as they do without documents). Learned positions (GPT-2, OPT) know no differences: with them a document is read at
    the positions where it happens to lie, and not from the first one on.
    """
    whole_W = torch.arange(documents_BW.size(1), device=documents_BW.device)
    mine_S, documents_BS = sequence_part(whole_W, 0, cp, cp_rank), sequence_part(documents_BW, 1, cp, cp_rank)
    same_BSW = documents_BS[:, :, None] == documents_BW[:, None, :]
    return (same_BSW & (mine_S[:, None] >= whole_W))[:, None]


def sliding_mask(length: int, window: int, device: torch.device, cp: int = 1, cp_rank: int = 0) -> torch.Tensor:
    """What each position of a context rank's part sees of the whole sequence: itself and `window - 1` before it; bool [1, 1, S, W]."""
    whole_W = torch.arange(length, device=device)
    behind_SW = sequence_part(whole_W, 0, cp, cp_rank)[:, None] - whole_W
    return ((behind_SW >= 0) & (behind_SW < window))[None, None]


def softcapped_attention(query_BNSD: torch.Tensor, key_BNWD: torch.Tensor, value_BNWD: torch.Tensor, attn_mask: torch.Tensor, scale: float,
                         softcap: float, **unused: Any) -> torch.Tensor:  # fmt: skip
    """Attention whose scores x become softcap x tanh(x / softcap) before the softmax, which no kernel of torch does: scores [S, W] are made."""
    scores_BNSW = softcap * torch.tanh(query_BNSD @ key_BNWD.mT * (scale / softcap))
    return torch.softmax(scores_BNSW.float().masked_fill(~attn_mask, -torch.inf), dim=-1).to(value_BNWD) @ value_BNWD


class Attention(MegatronModule):
    """Causal attention by `scaled_dot_product_attention`: flash kernels on a GPU, no [S, S] matrix there unless a mask says what is seen.

    A mask is made where a sliding window is shorter than the sequence, and where scores have a softcap.
    Under context parallelism each rank gathers the keys and values of the whole sequence and keeps its own queries.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, attn_mask_type: Any, attention_type: str,
                 softmax_scale: float | None = None, pg_collection: Any = None, **unused: Any) -> None:  # fmt: skip
        super().__init__(config=config)
        self.context = pg_collection.cp
        self.softmax_scale = softmax_scale or config.kv_channels**-0.5
        self.softcap: float | None = config.attention_softcap
        slides = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window: int | None = config.window_size[0] + 1 if slides else None

    def seen(self, attention_mask: torch.Tensor | None, length: int, device: torch.device) -> torch.Tensor | None:
        """`attention_mask`, with what the sliding window leaves of it in a sequence of `length`; None only where everything before is seen."""
        window = length if self.window is None else self.window
        if window >= length and (self.softcap is None or attention_mask is not None):
            return attention_mask
        mask_11SW = sliding_mask(length, window, device, self.context.size(), self.context.rank())
        return mask_11SW if attention_mask is None else attention_mask & mask_11SW

    def forward(self, query_SBND: torch.Tensor, key_SBGD: torch.Tensor, value_SBGD: torch.Tensor, attention_mask: Any,
                attn_mask_type: Any = None, attention_bias: Any = None, packed_seq_params: Any = None) -> torch.Tensor:  # fmt: skip
        """Returns [S, B, N * D]. `attention_mask`: None, or as `documents_mask` makes it, the causal part included."""
        cp = self.context.size()
        if cp > 1:
            key_SBGD, value_SBGD = (whole_context(x, self.context) for x in (key_SBGD, value_SBGD))
        query_BNSD, key_BGWD, value_BGWD = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        attention_mask = self.seen(attention_mask, key_BGWD.size(2), key_BGWD.device)
        # a GPU's kernels that take a mask know no groups, nor do those for fp32: without this they would all be passed over
        if attention_mask is not None or (query_BNSD.is_cuda and query_BNSD.dtype == torch.float32):
            key_BGWD, value_BGWD = (x.repeat_interleave(query_BNSD.size(1) // x.size(1), dim=1) for x in (key_BGWD, value_BGWD))
        if self.softcap is not None:
            attend = functools.partial(softcapped_attention, scale=self.softmax_scale, softcap=self.softcap)
        else:
            attend = functools.partial(
                torch.nn.functional.scaled_dot_product_attention, scale=self.softmax_scale, enable_gqa=query_BNSD.size(1) != key_BGWD.size(1)
            )
        if cp == 1:
            out_BNSD = attend(query_BNSD, key_BGWD, value_BGWD, attn_mask=attention_mask, is_causal=attention_mask is None)
        else:
            length, parts = query_BNSD.size(2) // 2, []
            masks = (None, None) if attention_mask is None else attention_mask.chunk(2, dim=2)
            for query_BNLD, piece, seen_B1LW in zip(query_BNSD.chunk(2, dim=2), pieces_of(cp, self.context.rank()), masks, strict=True):
                end = (piece + 1) * length  # what a piece may see: everything up to its own end
                mask = causal_lower_right(length, end) if seen_B1LW is None else seen_B1LW[..., :end]
                parts.append(attend(query_BNLD, key_BGWD[:, :, :end], value_BGWD[:, :, :end], attn_mask=mask))
            out_BNSD = torch.cat(parts, dim=2)
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)


class BlockAttention(SelfAttention):
    """Megatron's, with biases of its own kind, apart from the MLP's, and in a layer that has them with rotary angles of its own."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        own = copy.copy(config)
        own.add_bias_linear = config.add_attention_bias
        super().__init__(own, *args, **kwargs)
        self.rotary: Rotary | None = None

    def forward(self, hidden_SBH: torch.Tensor, attention_mask: Any, *args: Any, rotary_pos_emb: Any = None, **kwargs: Any) -> Any:
        """As Megatron's."""
        if self.rotary is not None:
            rotary_pos_emb = self.rotary(rotary_pos_emb.size(0) * self.rotary.cp)
        return super().forward(hidden_SBH, attention_mask, *args, rotary_pos_emb=rotary_pos_emb, **kwargs)


class PostNorm:
    """The last matrix of either half of a block, with a norm of what it puts out, bias included: to be mixed into a row-parallel matrix."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)  # type: ignore[call-arg]
        self.post_norm = config.post_norm(config, output_size, eps=config.layernorm_epsilon)

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        """The normed output; nothing is left to be added."""
        out_SBH, bias_H = super().forward(inputs)  # type: ignore[misc]
        return self.post_norm(out_SBH if bias_H is None else out_SBH + bias_H), None


class NormedRowParallelLinear(PostNorm, RowParallelLinear):
    """Torch's spec has this one."""


class ZeroCentredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that multiplies by 1 + weight, in fp32 as transformers does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Of the last dim."""
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1.0, self.eps).type_as(x)


class ZeroCentredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm that multiplies by 1 + weight (LayerNorm1p), in the weight's own type as transformers does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Of the last dim."""
        return torch.nn.functional.layer_norm(input, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


# by kind, and whether weights lie around zero
NORMS = {
    ("RMSNorm", False): torch.nn.RMSNorm,
    ("RMSNorm", True): ZeroCentredRMSNorm,
    ("LayerNorm", False): torch.nn.LayerNorm,
    ("LayerNorm", True): ZeroCentredLayerNorm,
}


class Norm:
    """A norm of plain torch, with the mark that makes Megatron sum its gradient over sequence-parallel ranks."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> Any:
        norm = NORMS[config.normalization, config.layernorm_zero_centered_gamma](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class Rotary(torch.nn.Module):
    """Rotary angles for every scaling kind that transformers knows, by transformers' own formulas.

    `settings` is a transformers config of the model; the angles may depend on the sequence's length (dynamic, longrope),
    so they are computed per length and kept.
    """

    def __init__(self, settings: Any, device: torch.device, cp: int = 1, cp_rank: int = 0) -> None:
        super().__init__()
        self.settings, self.device, self.cp, self.cp_rank = settings, device, cp, cp_rank
        self.cache: dict[int, torch.Tensor] = {}

    def inverse_frequencies(self, seq_length: int) -> tuple[torch.Tensor, float]:
        """[R / 2] frequencies and the factor on cos and sin for sequences of this length; R: the channels of a head that are turned."""
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        rope = self.settings.rope_parameters
        if rope["rope_type"] == "default":
            dim = int(self.settings.head_dim * rope.get("partial_rotary_factor", 1.0))
            steps = torch.arange(0, dim, 2, dtype=torch.int64, device=self.device).float() / dim
            return 1.0 / (rope["rope_theta"] ** steps), 1.0
        return ROPE_INIT_FUNCTIONS[rope["rope_type"]](self.settings, self.device, seq_len=seq_length)

    def get_rotary_seq_len(self, inference_context: Any, transformer: Any, hidden_SBH: torch.Tensor, config: TransformerConfig, packed: Any) -> int:
        """Length of the whole sequence, which under sequence and context parallelism is longer than what this rank holds."""
        held = transformer.input_tensor if transformer.input_tensor is not None else hidden_SBH
        return int(held.size(0)) * (config.tensor_model_parallel_size if config.sequence_parallel else 1) * self.cp

    def forward(self, seq_length: int, **unused: Any) -> torch.Tensor:
        """Angles [S, 1, 1, R] of this rank's part of the sequence, the two halves of the first R channels of a head turned together (not
        interleaved); the other channels stay as they are."""
        if seq_length not in self.cache:
            frequencies, _ = self.inverse_frequencies(seq_length)
            angles = torch.outer(torch.arange(seq_length, dtype=torch.float32, device=self.device), frequencies)
            whole = torch.cat((angles, angles), dim=-1)[:, None, None, :]
            self.cache = {seq_length: sequence_part(whole, 0, self.cp, self.cp_rank)}
        return self.cache[seq_length]
