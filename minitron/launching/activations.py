"""What a microbatch leaves behind on its way forward, for its way back: bytes of one transformer block, and of those in flight in a pipeline. Pure.

The counts follow the modules that Megatron builds (engine/specs.py) tensor by tensor, as arXiv 2205.05198 (section 4) does for its own; they
are not that paper's, as there is no dropout here, no matrix of attention scores is held, and the MLP's activation is not fused.

Of experts, each is taken to get as many tokens as every other: a rank then works on K T tokens of them, however many ranks share them out.

Legend, all of one rank: T tokens of a microbatch inside the matrices, t outside of them (T, or T / tp under sequence parallelism), H hidden,
Q and K channels of all query heads and of all KV groups, F MLP neurons, E bytes of a number; K experts that a token is sent to.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from minitron.arch.arch import Arch
from minitron.arch.axes import HIDDEN, PARAMETERS
from minitron.arch.shards import padded


@dataclasses.dataclass(frozen=True)
class Pass:
    """A microbatch's way through a rank: what of it the rank sees, and how its modules work."""

    micro_batch_size: int
    seq_length: int  # of the whole sequence
    tp: int
    cp: int
    sequence_parallel: bool
    element: int  # E
    device: str  # "cuda" | "cpu"
    recompute: str = "none"
    documents: bool = False  # whether attention is told of them by a mask
    ep: int = 1

    @property
    def positions(self) -> int:
        """Of each sequence."""
        return self.seq_length // self.cp

    @property
    def tokens(self) -> int:
        """T."""
        return self.micro_batch_size * self.positions

    @property
    def weight_gradient(self) -> int:
        """Bytes of a number of a weight's gradient before it is added to those in fp32, which on a CPU takes an fp32 copy of it."""
        return self.element + (4 if self.device == "cpu" and self.element < 4 else 0)

    @property
    def outside(self) -> float:
        """t."""
        return self.tokens / (self.tp if self.sequence_parallel else 1)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A block's sizes on a rank: H, channels of queries and of keys, F, and its query heads; neurons of an expert and of the shared one."""

    hidden: int
    queries: int
    keys: int
    ffn: int
    heads: int
    expert: int
    shared: int

    @classmethod
    def of(cls, block: Arch, tp: int) -> Sizes:
        """Of a block, padded as it is laid over `tp` ranks."""
        whole = padded(block, tp)
        heads, groups = whole.num_attention_heads // tp, whole.num_query_groups // tp
        experts = ((size or 0) // tp for size in (whole.moe_ffn_hidden_size, whole.moe_shared_expert_intermediate_size))
        return cls(whole.hidden_size, heads * whole.kv_channels, groups * whole.kv_channels, whole.ffn_hidden_size // tp, heads, *experts)


def norm_bytes(arch: Arch, way: Pass) -> float:
    """What a norm keeps, with what it puts out, which the matrix behind it keeps: its input and its output, and a number or two per token.

    torch's RMSNorm on a CPU is made of single operations, which keep the input and the normalised one, both in fp32.
    """
    composed = way.device == "cpu" and arch.normalization == "RMSNorm"
    channels = 2 * 4 + way.element if composed else 2 * way.element
    statistics = 4 if arch.normalization == "RMSNorm" else 2 * way.element
    weight = way.element * arch.hidden_size if arch.layernorm_zero_centered_gamma else 0  # with 1 added
    return (channels * arch.hidden_size + statistics) * way.outside + weight


@dataclasses.dataclass(frozen=True)
class Block:
    """Bytes that one block holds of a microbatch until its way back: `kept`; `remade`, once more, while it is on its way back (train.recompute);
    `backward`, above what is held, what its backward pass needs itself; `forward`: the most that a pass without gradients holds at a time."""

    kept: float
    remade: float
    backward: float
    forward: float


@functools.cache
def block_bytes(arch: Arch, way: Pass) -> Block:
    """Of a block of these sizes."""
    size = Sizes.of(arch, way.tp)
    norms = sum(row.exists(arch) and row.per_layer and row.dims == (HIDDEN,) and row.name.endswith("norm.weight") for row in PARAMETERS)
    normed = norms * norm_bytes(arch, way)
    around, inner = attention_bytes(arch, size, way)
    half = expert_half(arch, size, way) if arch.num_moe_experts is not None else mlp_half(arch, size, way)
    stream = way.element * way.outside * size.hidden
    kept, remade = {
        "none": (normed + around + inner, 0.0),
        "selective": (normed + around, inner),
        "full": (stream, normed + around + inner),
    }[way.recompute]
    if way.recompute == "none" or (way.recompute == "selective" and arch.mlp_bias):  # an MLP with biases is not made once more
        kept += half.kept
    else:
        remade += half.kept
    return Block(kept, remade, stream + half.backward, 2 * stream + max(half.forward, around))


class Half(NamedTuple):
    """Bytes of a block's second half: kept for its way back, needed beside them on it, and the most that a pass without gradients holds."""

    kept: float
    backward: float
    forward: float


def mlp_half(arch: Arch, size: Sizes, way: Pass) -> Half:
    """Of an MLP."""
    numbers = way.element * way.tokens
    # gate and up in one, the activation of the gate, up once more (an offset of 0 is added), their product; or relu and its square
    kept = numbers * (5 if arch.gated_linear_unit else 2) * size.ffn
    wide = 2 * size.ffn if arch.gated_linear_unit else size.ffn
    down, up = (way.weight_gradient * size.hidden * width for width in (size.ffn, wide))  # gradients of the MLP's matrices, one at a time
    # at the product, gradients of both factors and what came; at each matrix, what comes and goes beside its own, less what was freed before
    backward = max(numbers * wide, numbers * size.ffn + down, up + numbers * (size.hidden + wide) - kept)
    return Half(kept, backward, numbers * (5 if arch.gated_linear_unit else 3) * size.ffn)


def expert_half(arch: Arch, size: Sizes, way: Pass) -> Half:
    """Of a router with its experts, and of the shared one."""
    count, chosen = arch.num_moe_experts or 0, arch.moe_router_topk or 0
    outside, sent = way.element * way.outside, way.element * way.tokens * chosen
    # probabilities of all experts in fp32 and, where they are made to add up to one, those of the chosen and their sum; the weights once more
    router = way.outside * (4 * (count + (0 if arch.moe_router_pre_softmax else chosen + 1)) + way.element * count)
    # tokens in the order of their experts; of each what an MLP keeps, its product times its weight, and this weight
    experts = sent * (size.hidden + 6 * size.expert + 1)
    shared = way.element * way.tokens * 5 * size.shared + (outside * (size.hidden + 1) if arch.moe_shared_expert_gate else 0)
    one = sent / max(1, count // way.ep)  # of one expert: they come one after another
    down, up = (way.weight_gradient * size.hidden * width for width in (size.expert, 2 * size.expert))
    # gradients of what the experts put out and of what they were given, both whole, beside those inside of one of them
    backward = 2 * sent * size.hidden + max(one * 3 * size.expert + down, one * (size.hidden + 2 * size.expert) + up)
    forward = 2 * sent * size.hidden + max(one * 6 * size.expert, way.element * way.tokens * 5 * size.shared)
    return Half(router + experts + shared, backward, forward)


def attention_bytes(arch: Arch, size: Sizes, way: Pass) -> tuple[float, float]:
    """(what lies around the attention itself, what it keeps by itself): the first are kept even if the attention is made once more."""
    numbers = way.element * way.tokens
    fused = numbers * (size.queries + 2 * size.keys)  # of which the values are a part, so all of it stays
    turned = numbers * (size.queries + size.keys)
    channels = arch.kv_channels * float(arch.rope_parameters.get("partial_rotary_factor", 1.0))
    angles = 4 * way.element * way.positions * channels  # cos and sin, for queries and for keys
    out = numbers * size.queries
    sums = 4 * way.tokens * size.heads  # log-sum-exp
    around = fused + turned + angles + out
    whole = numbers * way.cp  # keys and values of the whole sequence
    seen = way.element * way.micro_batch_size * way.positions * way.seq_length  # a mask, which is made numbers of
    if way.documents:  # keys and values of every query head, and the mask
        inner = float(2 * whole * size.queries + seen)
    elif way.cp > 1:
        inner = 2 * whole * size.keys + (seen / way.micro_batch_size if way.device == "cpu" else 0.0)
    else:
        return around, sums
    if way.cp > 1:  # made in two pieces
        inner += out
    if way.recompute != "selective":  # keys and values were copied: what they were copied from goes
        around -= fused + numbers * size.keys
    return around, inner + sums


def most_in_flight(chunks: Sequence[float], stage: int, stages: int, microbatches: int) -> float:
    """The most that a stage holds at a time, where a microbatch leaves `chunks` bytes in each of its virtual stages.

    Megatron's schedules: a stage runs ahead by as many microbatches as there are stages behind it, then one forward, one backward (1F1B); with
    virtual stages, it takes them in groups of `stages` through chunk after chunk, and runs ahead further.
    """
    count = len(chunks)
    order = [chunk for start in range(0, microbatches, stages) for chunk in range(count) for _ in range(min(stages, microbatches - start))]
    behind = stages - stage - 1
    ahead = min(len(order), behind if count == 1 else 2 * behind + (count - 1) * stages)
    held = most = 0.0
    for turn in range(len(order) + ahead):
        if turn < len(order):
            held += chunks[order[turn]]
            most = max(most, held)
        if turn >= ahead:
            held -= chunks[count - 1 - order[turn - ahead]]
    return most
