"""`Arch`: every size of a GPT. Spelled as Megatron's `TransformerConfig` spells them."""

import dataclasses
import functools
import itertools
import json
from collections.abc import Sequence
from typing import Any

from minitron.errors import RequestError

OF_LAYERS = ("sliding", "moe_layers")  # fields of Arch that say something of each layer
EXPERTS = ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")  # counts of what a model may lack
DENSE: dict[str, Any] = {**dict.fromkeys(EXPERTS), "moe_shared_expert_gate": False, "moe_router_pre_softmax": False, "moe_layers": ()}


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
    `activation_func` is a name of `engine.specs.ACTIVATIONS`, `normalization` "RMSNorm" or "LayerNorm", whose weights lie around zero (what is
    applied is 1 + weight) if `layernorm_zero_centered_gamma`. `layers` holds one entry per block where blocks differ; the sizes above
    are then the largest of them.

    Biases: `add_bias_linear` gives every matrix of a block one, `add_attention_bias` and `add_mlp_bias` those of one half, `add_qkv_bias` QKV alone.
    `qk_layernorm`: each head's queries and keys are normed, by weights that heads share. `post_norms`: what either half of a block puts out is
    normed. `softmax_scale`: what scores are multiplied by (None: 1 / sqrt(kv_channels)). The two softcaps c make c x tanh(x / c) of attention's
    scores and of the logits. With `scaled_embeddings`, embeddings are multiplied by sqrt(hidden_size). With a `sliding_window` of n a position
    sees itself and n - 1 before it, in the layers that `sliding` says (empty: in all); these turn by `sliding_rope` where it is given.
    With a `position_offset` nothing is turned: positions are learned, that of token n is row n + offset.

    Blocks whose entry in `moe_layers` is true (empty: all) have `num_moe_experts` MLPs of `moe_ffn_hidden_size` neurons in place of one. A router
    sends each token to `moe_router_topk` of them and adds up what they put out, weighted by a softmax over the chosen ones' logits, or with
    `moe_router_pre_softmax` by their part of one over all. `moe_shared_expert_intermediate_size`: neurons of an MLP beside them that every
    token goes through, its output times a sigmoid of one number per token with `moe_shared_expert_gate`. None: there are no such MLPs.
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
    add_attention_bias: bool = False
    add_mlp_bias: bool = False
    qk_layernorm: bool = False
    post_norms: bool = False
    scaled_embeddings: bool = False
    softmax_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    sliding_window: int | None = None
    sliding: tuple[bool, ...] = ()
    sliding_rope: str = ""
    position_offset: int | None = None
    num_moe_experts: int | None = None
    moe_router_topk: int | None = None
    moe_ffn_hidden_size: int | None = None
    moe_shared_expert_intermediate_size: int | None = None
    moe_shared_expert_gate: bool = False
    moe_router_pre_softmax: bool = False
    moe_layers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            counts = field.type is int or (field.name in EXPERTS and value is not None)
            if counts and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise RequestError(f"{field.name}={value!r}: a positive whole number is needed")
        if self.num_attention_heads % self.num_query_groups:
            raise RequestError(f"num_attention_heads={self.num_attention_heads}: must be a multiple of num_query_groups={self.num_query_groups}")
        if self.layers and len(self.layers) != self.num_layers:
            raise RequestError(f"layers: sizes of {len(self.layers)} blocks, and num_layers={self.num_layers}")
        for name in OF_LAYERS:
            if (said := getattr(self, name)) and len(said) != self.num_layers:
                raise RequestError(f"{name}: said of {len(said)} layers, and num_layers={self.num_layers}")
        self._check_experts()
        for name, kind in (("sliding_window", int), ("softmax_scale", float), ("attention_softcap", float), ("logit_softcap", float)):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | kind) or value <= 0):
                raise RequestError(f"{name}={value!r}: a positive number is needed")

    def _check_experts(self) -> None:
        given = [name for name in ("num_moe_experts", "moe_router_topk", "moe_ffn_hidden_size") if getattr(self, name) is not None]
        if len(given) not in (0, 3):
            raise RequestError(f"{given[0]}: num_moe_experts, moe_router_topk and moe_ffn_hidden_size are needed together")
        if self.moe_router_topk is not None and self.moe_router_topk > (self.num_moe_experts or 0):
            raise RequestError(f"moe_router_topk={self.moe_router_topk}: at most num_moe_experts={self.num_moe_experts}")
        if not given and (self.moe_layers or self.moe_shared_expert_intermediate_size is not None):
            raise RequestError("moe_layers, moe_shared_expert_intermediate_size: num_moe_experts is needed with them")
        if self.moe_shared_expert_gate and self.moe_shared_expert_intermediate_size is None:
            raise RequestError("moe_shared_expert_gate=True: moe_shared_expert_intermediate_size is needed with it")
        if self.moe_layers and all(self.moe_layers):  # one way to say it, so that equal models are equal
            object.__setattr__(self, "moe_layers", ())

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def norm_bias(self) -> bool:
        """Whether norms have a bias."""
        return self.normalization == "LayerNorm"

    @property
    def attention_bias(self) -> bool:
        """Whether attention's output projection has a bias."""
        return self.add_bias_linear or self.add_attention_bias

    @property
    def mlp_bias(self) -> bool:
        """Whether the matrices of the MLP have biases."""
        return self.add_bias_linear or self.add_mlp_bias

    @property
    def qkv_bias(self) -> bool:
        """Whether QKV has a bias."""
        return self.attention_bias or self.add_qkv_bias

    @property
    def learned_positions(self) -> bool:
        """Whether positions are learned, one row each, in place of rotary angles."""
        return self.position_offset is not None

    @property
    def position_rows(self) -> int:
        """Rows of the learned positions, those before the first token's included."""
        return self.max_position_embeddings + (self.position_offset or 0)

    def slides(self, number: int) -> bool:
        """Whether block `number` sees no further back than the sliding window."""
        return self.sliding_window is not None and (not self.sliding or self.sliding[number])

    def routes(self, number: int) -> bool:
        """Whether block `number` has experts."""
        return self.num_moe_experts is not None and (not self.moe_layers or self.moe_layers[number])

    @property
    def has_dense_blocks(self) -> bool:
        """Whether some block has one MLP, of `ffn_hidden_size` neurons."""
        return not all(self.routes(number) for number in range(self.num_layers))

    def of_layers(self, kept: Sequence[int]) -> "Arch":
        """The architecture of these of its layers, where what they see, or whether they have experts, differs."""
        said = {name: tuple(getattr(self, name)[number] for number in kept) for name in OF_LAYERS if getattr(self, name)}
        return self.replace(num_layers=len(kept), **said)

    def layer(self, number: int | None) -> "Arch":
        """The uniform architecture that block `number` is a block of, one with experts only if the block has some; this one itself outside the
        blocks (None) or where blocks are alike."""
        if number is None or not (self.layers or self.moe_layers):
            return self
        sizes = dataclasses.asdict(self.layers[number]) if self.layers else {}
        return _block(self, self.routes(number), tuple(sizes.items()))

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """The rotary settings as Hugging Face writes them."""
        return dict(json.loads(self.rope))

    def num_parameters(self) -> int:
        """Exact number of parameters, a tied output layer counted once."""
        from minitron.arch.axes import count_parameters

        return count_parameters(self)

    def replace(self, **sizes: Any) -> "Arch":
        """This architecture with other sizes. Of another number of layers, the first of it that slide, or have experts, are these, over and over:
        which layers are kept, and with them how far each of them sees, `of_layers` is told."""
        for name in OF_LAYERS if "num_layers" in sizes else ():
            if said := getattr(self, name):
                sizes = {name: tuple(itertools.islice(itertools.cycle(said), sizes["num_layers"])), **sizes}
        return dataclasses.replace(self, **sizes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, the content of `arch.json`."""
        return {**dataclasses.asdict(self), **{name: list(getattr(self, name)) for name in OF_LAYERS}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Arch":
        """Inverse of `to_dict`; unknown or missing keys are refused."""
        if not isinstance(values, dict):
            raise RequestError("arch: sizes by name are needed")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise RequestError(f"arch: unknown sizes {', '.join(unknown)}")
        try:
            layers, said = tuple(Layer(**sizes) for sizes in values.get("layers", ())), {name: tuple(values.get(name, ())) for name in OF_LAYERS}
            return cls(**{**values, "layers": layers, **said})
        except TypeError as error:
            raise RequestError(f"arch: {error}") from error


@functools.lru_cache(maxsize=4096)
def _block(arch: Arch, routes: bool, sizes: tuple[tuple[str, int], ...]) -> Arch:
    """The uniform architecture of such blocks."""
    others: dict[str, Any] = {**dict(sizes), **({"moe_layers": ()} if routes else DENSE)}
    return dataclasses.replace(arch, layers=(), **others)
