"""Linear, LayerNormLinear, LayerNorm, RMSNorm and DotProductAttention, on one tensor rank.

Legend: S sequence, B batch, N query heads, G KV groups, D channels of a head.
"""

import torch
from torch.nn import functional


class Linear(torch.nn.Module):
    """`weight` [out, in] and, with bias, `bias` [out]; without, an attribute of that name that is no parameter."""

    def __init__(self, in_features, out_features, *, bias, return_bias, params_dtype, device, tp_size=1, **unused):
        super().__init__()
        assert tp_size == 1, "the stand-in knows one tensor rank"
        self.in_features, self.out_features, self.use_bias, self.return_bias = in_features, out_features, bias, return_bias
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device)) if bias else torch.empty(0)

    def get_extra_state(self):
        """Of fp8: there is none."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state):
        """Nothing."""

    def forward(self, x, is_first_microbatch=None):
        out = functional.linear(x, self.weight, self.bias if self.use_bias and not self.return_bias else None)
        return (out, self.bias) if self.return_bias else out


def normed(x, kind, weight, bias, eps, zero_centered):
    """A norm of the last dim, in fp32."""
    scale = weight.float() + 1.0 if zero_centered else weight.float()
    if kind == "RMSNorm":
        return functional.rms_norm(x.float(), x.shape[-1:], scale, eps).type_as(x)
    return functional.layer_norm(x.float(), x.shape[-1:], scale, bias.float(), eps).type_as(x)


class LayerNormLinear(Linear):
    """Beside those of Linear `layer_norm_weight` [in] and, for LayerNorm, `layer_norm_bias` [in]."""

    def __init__(self, in_features, out_features, *, eps, normalization, zero_centered_gamma, params_dtype, device, **kwargs):
        super().__init__(in_features, out_features, params_dtype=params_dtype, device=device, **kwargs)
        self.how = normalization, eps, zero_centered_gamma
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(in_features, dtype=params_dtype, device=device))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(in_features, dtype=params_dtype, device=device))

    def forward(self, x, is_first_microbatch=None):
        kind, eps, zero_centered = self.how
        return super().forward(normed(x, kind, self.layer_norm_weight, self.layer_norm_bias, eps, zero_centered))


class RMSNorm(torch.nn.Module):
    """`weight`."""

    kind, with_bias = "RMSNorm", False

    def __init__(self, hidden_size, eps, zero_centered_gamma, params_dtype, device, **unused):
        super().__init__()
        self.eps, self.zero_centered = eps, zero_centered_gamma
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=params_dtype, device=device))
        self.bias = torch.nn.Parameter(torch.empty(hidden_size, dtype=params_dtype, device=device)) if self.with_bias else None

    def forward(self, x):
        return normed(x, self.kind, self.weight, self.bias, self.eps, self.zero_centered)


class LayerNorm(RMSNorm):
    """`weight` and `bias`."""

    kind, with_bias = "LayerNorm", True


class DotProductAttention(torch.nn.Module):
    """Causal, [S, B, N, D] and [S, B, G, D] to [S, B, N * D]; window_size (n, 0): each position sees n before it."""

    def __init__(self, num_attention_heads, kv_channels, num_gqa_groups, softmax_scale, window_size=None, **unused):
        super().__init__()
        self.softmax_scale, self.window_size = softmax_scale, window_size

    def forward(self, query, key, value, attention_mask, attn_mask_type="causal", **unused):
        assert attention_mask is None and attn_mask_type == "causal"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        length = query.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if self.window_size is not None:
            seen = seen.triu(-self.window_size[0])
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.softmax_scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class Named(type):
    """A class of which nothing is known but its name, and the names inside it."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Named(name, (torch.nn.Module,), {})


def __getattr__(name):
    """Whatever else Megatron derives a class from."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Named(name, (torch.nn.Module,), {})
