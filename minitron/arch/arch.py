"""`Arch`: every size of a GPT. Spelled as Megatron's `TransformerConfig` spells them."""

import dataclasses
import json
from typing import Any

from minitron.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes of one block, in a model whose blocks differ."""

    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int


@dataclasses.dataclass(frozen=True)
class Arch:
    """The shape of one decoder-only transformer.

    Sizes are numbers of units, not bytes. `kv_channels` is the width of one head (head_dim); it never changes under
    pruning (arXiv 2407.14679, section 2.3). `rope` holds the rotary settings in Hugging Face's own terms
    (`rope_type`, `rope_theta`, `partial_rotary_factor`, ...) as a JSON string, so that the class stays hashable.
    `activation_func` is "silu" or "squared_relu", `normalization` "RMSNorm" or "LayerNorm", whose weights lie around zero (what is
    applied is 1 + weight) if `layernorm_zero_centered_gamma`. `layers` holds one entry per block where blocks differ; the sizes above
    are then the largest of them.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    vocab_size: int
    max_position_embeddings: int
    share_embeddings_and_output_weights: bool = False
    layernorm_epsilon: float = 1e-5
    add_qkv_bias: bool = False
    add_bias_linear: bool = False
    gated_linear_unit: bool = True
    activation_func: str = "silu"
    normalization: str = "RMSNorm"
    layernorm_zero_centered_gamma: bool = False
    rope: str = '{"rope_theta": 10000.0, "rope_type": "default"}'
    layers: tuple[Layer, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(f"{field.name}={value!r}: a positive whole number is needed")
        if self.num_attention_heads % self.num_query_groups:
            raise RequestError(f"num_attention_heads={self.num_attention_heads}: must be a multiple of num_query_groups={self.num_query_groups}")
        if self.layers and len(self.layers) != self.num_layers:
            raise RequestError(f"layers: sizes of {len(self.layers)} blocks, and num_layers={self.num_layers}")

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization == "LayerNorm"

    def layer(self, number: int | None) -> "Arch":
        """The uniform architecture that block `number` is a block of; this one itself outside the blocks (None) or where blocks are alike."""
        if number is None or not self.layers:
            return self
        return dataclasses.replace(self, layers=(), **dataclasses.asdict(self.layers[number]))

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary settings as Hugging Face writes them."""
        return dict(json.loads(self.rope))

    def num_parameters(self) -> int:
        """Exact number of parameters, a tied output layer counted once."""
        from minitron.arch.axes import count_parameters

        return count_parameters(self)

    def replace(self, **sizes: Any) -> "Arch":
        """This architecture with other sizes."""
        return dataclasses.replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, the content of `arch.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Arch":
        """Inverse of `to_dict`; unknown or missing keys are refused."""
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RequestError(f"arch: unknown sizes {', '.join(unknown)}")
        try:
            return cls(**{**values, "layers": tuple(Layer(**sizes) for sizes in values.get("layers", ()))})
        except TypeError as error:
            raise RequestError(f"arch: {error}") from error
