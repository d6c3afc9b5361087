"""What the ranks of a training send each other in one step, counted from sizes and settings alone. Pure.

The counts follow what Megatron's modules, its distributed optimizer and the fused loss call, with the torch spec (Transformer Engine's ring
attention sends keys and values in other pieces, as many bytes). Left out: single numbers, such as counts of tokens and the gradient's norm.

Legend: T tokens of a microbatch on a rank, E bytes of a number.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

from minitron.arch.arch import Arch
from minitron.arch.shards import padded, stage_of
from minitron.config.schema import Config, Distill, Parallel
from minitron.distillation.fused import chunk_shape
from minitron.distillation.hidden import pairs_of
from minitron.launching.memory import BYTES, chunk_layers, shard_numbers, stage_parameters

STATISTIC = 8  # bytes of one of the loss' statistics: float64
# what a rank sends of a collective's tensor, as a share of its bytes, with n ranks in a ring (the algorithm with the least traffic)
RING = {
    "all-reduce": lambda ranks: 2 * (ranks - 1) / ranks,
    "all-gather": lambda ranks: (ranks - 1) / ranks,
    "reduce-scatter": lambda ranks: (ranks - 1) / ranks,
    "all-to-all": lambda ranks: (ranks - 1) / ranks,
    "send": lambda ranks: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Calls of one collective that a rank takes part in during a step.

    `what` travels and `operation`, in words; `group`: the ranks that take part, "tp", "cp", "dp" (with the context ranks), "ep", "edp" (the replicas
    of an expert), "pp", "ends" (first and last stage) or "world", and how many these are. `bytes`: of all calls' tensors as a whole: what is
    summed, what is gathered, what is scattered, what is sent, all to all what arrives. `once`: in a step, not with each microbatch.
    """

    what: str
    operation: str
    group: str
    ranks: int
    calls: int
    bytes: int
    once: bool = False

    @property
    def sent(self) -> float:
        """Bytes that one rank sends."""
        return float(RING[self.operation](self.ranks)) * self.bytes


@dataclasses.dataclass(frozen=True)
class Training:
    """A training laid over so many processes. `teacher`: a model that is asked in every step (None: there is none, or a cache stands in for it)."""

    student: Arch
    teacher: Arch | None
    cfg: Config
    world_size: int

    @property
    def layout(self) -> Parallel:
        """The student's."""
        return self.cfg.parallel

    @property
    def teacher_layout(self) -> Parallel:
        """The teacher's."""
        return self.cfg.teacher_parallel

    @property
    def foreign(self) -> bool:
        """Whether the teacher has a layout of its own."""
        return self.teacher is not None and self.teacher_layout != self.layout

    def replicas(self, layout: Parallel) -> int:
        """Data-parallel ranks."""
        return self.world_size // (layout.tp * layout.pp * layout.cp)

    def microbatches(self, layout: Parallel) -> int:
        """Of a replica and step; of the teacher's, those of the replica that has most."""
        train = self.cfg.train
        return math.ceil(train.global_batch_size / train.micro_batch_size / self.replicas(layout))

    @property
    def teacher_turns(self) -> int:
        """Microbatches that go through the teacher's pipeline: the interleaved schedule fills them up to a multiple of its stages."""
        layout = self.teacher_layout
        count = self.microbatches(layout)
        return math.ceil(count / layout.pp) * layout.pp if layout.vpp > 1 else count

    @property
    def tokens(self) -> int:
        """T."""
        train = self.cfg.train
        return train.micro_batch_size * train.seq_length // self.layout.cp

    @property
    def element(self) -> int:
        """E."""
        return BYTES[self.cfg.dtype]

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.cfg.train.global_batch_size * self.cfg.train.seq_length

    @property
    def loss(self) -> Distill:
        """The settings of the loss: without any teacher's say it is the next-token cross-entropy."""
        given = self.cfg.distill
        alone = self.teacher is None and self.cfg.teacher.cache.folder is None and given.loss != "none"
        return Distill(loss="none", cross_entropy=1.0) if alone else given


def traffic(training: Training, stage: int) -> list[Traffic]:
    """What a rank of a stage of the student's pipeline takes part in, without the teacher's passes."""
    found = [
        *pass_traffic(training, training.student, training.layout, stage, "student"),
        *loss_traffic(training, stage),
        *replica_traffic(training, stage),
        *compared_traffic(training, stage),
        *relay_traffic(training, stage),
    ]
    return [one for one in found if one.ranks > 1 and one.calls]


def teacher_traffic(training: Training, stage: int) -> list[Traffic]:
    """What a rank of a stage of the teacher's pipeline takes part in during the teacher's passes."""
    if training.teacher is None:
        return []
    found = pass_traffic(training, training.teacher, training.teacher_layout, stage, "teacher")
    return [one for one in found if one.ranks > 1 and one.calls]


def blocks_of(arch: Arch, layout: Parallel, stage: int) -> list[Arch]:
    """The blocks on a stage, each as the uniform architecture that it is one of."""
    return [arch.layer(layer) for layers in chunk_layers(arch, layout, stage) for layer in layers]


def pass_traffic(training: Training, arch: Arch, layout: Parallel, stage: int, who: str) -> Iterator[Traffic]:
    """Of a model's passes: between its tensor ranks, context ranks and stages. The student's lead back, too."""
    trains = who == "student"
    turns = training.microbatches(layout) if trains else training.teacher_turns
    element, tokens, blocks = training.element, training.tokens, blocks_of(arch, layout, stage)
    first, last = stage == 0, stage == layout.pp - 1
    whole = tokens * arch.hidden_size * element  # the hidden states of a microbatch, of a context rank's sequence
    recompute = training.cfg.train.recompute if trains else "none"
    # products that put their sum out, two of a block, one where experts see to it; of those made once more, `selective` leaves attention's alone
    halves = [len(blocks), sum(block.num_moe_experts is None or block.moe_shared_expert_intermediate_size is not None for block in blocks)]
    remade = {"none": [0, 0], "selective": [0, 0 if arch.mlp_bias else 1], "full": [1, 1]}[recompute]
    again = sum(count * times for count, times in zip(halves, remade, strict=True))
    forward, back = sum(halves), sum(halves) * trains
    # the head's input is copied to (under sequence parallelism: gathered on) all tensor ranks, so its gradient is their sum
    if not layout.sp:
        yield _sums(f"{who}'s hidden states", "all-reduce", layout.tp, turns, forward + back + again + first + (last and trains), whole)
    else:
        gathers = forward + 2 * back + again + (first and trains) + last
        yield _sums(f"{who}'s hidden states", "all-gather", layout.tp, turns, gathers, whole)
        yield _sums(f"{who}'s hidden states", "reduce-scatter", layout.tp, turns, forward + back + again + first + (last and trains), whole)
    yield from expert_traffic(training, blocks, layout, who, turns, remade[1])
    keys = sum(2 * tokens * layout.cp * (padded(block, layout.tp).num_query_groups // layout.tp) * block.kv_channels * element for block in blocks)
    times = 1 + (recompute != "none")
    yield Traffic(f"{who}'s keys and values", "all-gather", "cp", layout.cp, 2 * len(blocks) * times * turns, keys * times * turns)
    if trains:
        yield Traffic(f"{who}'s keys and values", "reduce-scatter", "cp", layout.cp, 2 * len(blocks) * turns, keys * turns)
    sends = (layout.vpp - last + (layout.vpp - first) * trains) * turns
    yield Traffic(f"{who}'s hidden states", "send", "pp", layout.pp, sends, sends * whole // (layout.tp if layout.sp else 1))


def expert_traffic(training: Training, blocks: list[Arch], layout: Parallel, who: str, turns: int, again: int) -> Iterator[Traffic]:
    """Of a model's experts: tokens on their way to them and back, with the weights that they were chosen by; each expert is taken to get as many as
    every other. `again`: how many times a forward pass is made once more."""
    mixed = [block for block in blocks if block.num_moe_experts is not None]
    trains = who == "student"
    passes = turns * (1 + again + trains)
    element, tp, ep = training.element, layout.tp, layout.ep
    sent = sum(training.tokens * (block.moe_router_topk or 0) for block in mixed)  # tokens for the experts of a rank's tensor group
    states = element * sum(training.tokens * (block.moe_router_topk or 0) * block.hidden_size for block in mixed)
    outside = tp if layout.sp else 1
    count, weights = len(mixed), element * sent
    # there with their weights, and back; each with its gradient
    yield Traffic(f"{who}'s tokens for experts", "all-to-all", "ep", ep, 3 * count * passes, passes * (2 * states + weights) // outside)
    told = 8 * sum(block.num_moe_experts or 0 for block in mixed) * turns * (1 + again)  # how many tokens go to each expert
    if not layout.sp:
        yield Traffic("numbers of tokens by expert", "all-gather", "ep", ep, count * turns * (1 + again), told * ep)
        # what experts put out is summed; so are the gradients of what they are given, tokens and weights
        sums, rows = turns * (1 + again), turns * trains
        yield Traffic(f"{who}'s tokens for experts", "all-reduce", "tp", tp, count * (sums + 2 * rows), sums * states + rows * (states + weights))
        return
    yield Traffic("numbers of tokens by expert", "all-gather", "ep", ep * tp, count * turns * (1 + again), told * ep * tp)
    there, back = turns * (1 + again), turns * trains
    gathered, scattered = there * (states + weights) + back * states, there * states + back * (states + weights)
    yield Traffic(f"{who}'s tokens for experts", "all-gather", "tp", tp, count * (2 * there + back), gathered)
    yield Traffic(f"{who}'s tokens for experts", "reduce-scatter", "tp", tp, count * (there + 2 * back), scattered)


def _sums(what: str, operation: str, ranks: int, turns: int, calls: int, whole: int) -> Traffic:
    return Traffic(what, operation, "tp", ranks, turns * calls, turns * calls * whole)


def loss_traffic(training: Training, stage: int) -> Iterator[Traffic]:
    """The statistics of each token that tensor ranks tell each other on the last stage (distillation/rows.py)."""
    layout, settings = training.layout, training.loss
    if stage != layout.pp - 1:
        return
    numbers = statistics(settings, training.teacher is not None, training.cfg.teacher.cache.top_k)
    turns = training.microbatches(layout) * (2 if settings.gradients == "recompute" else 1)
    keeps = settings.cross_entropy > 0 and settings.loss != "none"
    _, rows, _ = chunk_shape(settings.chunk_tokens, training.tokens, keeps, training.teacher is not None, training.element == 4)
    calls = turns * math.ceil(training.tokens / rows) * len(numbers)
    yield Traffic("the loss' statistics", "all-gather", "tp", layout.tp, calls, turns * training.tokens * layout.tp * sum(numbers) * STATISTIC)


def statistics(settings: Distill, live: bool, cached: int) -> list[int]:
    """Numbers per token of each collective of the loss. `live`: a teacher is asked; `cached`: the tokens that are read of a cache otherwise."""
    riders = 2 if settings.cross_entropy > 0 else 0
    if settings.loss == "none":
        return [riders]
    if not live:
        return [1 + cached + riders]
    if settings.top_k is not None:
        return [2 * settings.top_k, 1 + settings.top_k + 1 + riders]
    return [2, 2 + riders] if settings.loss == "jsd" else [3 + riders]


def replica_traffic(training: Training, stage: int) -> Iterator[Traffic]:
    """What the distributed optimizer sums and gathers over the replicas once in a step, and gradients that other ranks have a part of."""
    layout, arch = training.layout, training.student
    shards = shards_of(arch, layout, stage)
    ranks = training.replicas(layout) * layout.cp
    # Megatron has an optimizer of their own for experts, on stages without any, too, and each of the two has all parameters gathered
    gathers = 2 if arch.num_moe_experts is not None and not training.cfg.train.overlap_param_gather else 1
    for whose, group, of, kinds in (("", "dp", ranks, ("dense", "tied")), ("experts' ", "edp", ranks // layout.ep, ("experts",))):
        mine = [[count for _, count, its in shards if its == kind] for kind in kinds]
        numbers = sum(buffer_numbers(counts, of) for counts in mine if counts)
        # each virtual stage has a buffer of its own, and a tied embedding on two stages; with overlap it has several parts, which are sent one by one
        calls = layout.vpp * bool(mine[0]) + bool(mine[1:] and mine[1])
        yield Traffic(f"{whose}gradients", "reduce-scatter", group, of, calls, 4 * numbers, once=True)
        yield Traffic(f"{whose}parameters", "all-gather", group, of, gathers * calls, gathers * training.element * numbers, once=True)
    if layout.sp:
        copied = sum(count for split, count, _ in shards if not split)
        yield Traffic("gradients of norms and biases", "all-reduce", "tp", layout.tp, 1, 4 * copied, once=True)
    if arch.share_embeddings_and_output_weights and layout.pp > 1 and stage in (0, layout.pp - 1):
        rows = padded(arch, layout.tp).vocab_size // layout.tp
        yield Traffic("gradients of the tied embedding", "all-reduce", "ends", 2, 1, 4 * rows * arch.hidden_size, once=True)


@functools.cache
def shards_of(arch: Arch, layout: Parallel, stage: int) -> tuple[tuple[bool, int, str], ...]:
    """Of every parameter on a stage: whether the tensor ranks have parts of it, the numbers of a rank's, and its kind: "experts", an
    embedding that is "tied" to another stage's head, "dense"."""
    tied = "embedding.word_embeddings.weight" if arch.share_embeddings_and_output_weights and layout.pp > 1 else ""
    return tuple(
        (
            row.tp_dim is not None,
            shard_numbers(row, block, layout.tp),
            "experts" if row.per_expert else "tied" if row.name == tied else "dense",
        )
        for row, block, held in stage_parameters(arch, layout, stage)
        for _ in range(held)
    )


def buffer_numbers(shards: list[int], ranks: int) -> int:
    """Numbers of Megatron's buffer for these parameters: each begins at a multiple of 64, the end is one of 128 and of the ranks."""
    whole = math.lcm(ranks, 128)
    return math.ceil(sum(math.ceil(count / 64) * 64 for count in shards) / whole) * whole


def compared_traffic(training: Training, stage: int) -> Iterator[Traffic]:
    """The teacher's hidden states that the student's are compared to, where these arise on another stage, and what learns to bridge them."""
    settings, layout = training.cfg.distill.hidden, training.layout
    if training.teacher is None or not settings.enabled:
        return
    pairs = pairs_of(settings, training.student, training.teacher)
    where = [(stage_at(pair.student, training.student, layout), stage_at(pair.teacher, training.teacher, layout)) for pair in pairs]
    sends = training.microbatches(layout) * sum(theirs == stage != ours for ours, theirs in where)
    size = training.tokens * training.teacher.hidden_size * training.element // (layout.tp if layout.sp else 1)
    yield Traffic("the teacher's compared hidden states", "send", "pp", layout.pp, sends, sends * size)
    if settings.projection:
        numbers = training.student.hidden_size * training.teacher.hidden_size
        yield Traffic("gradient of the projection", "all-reduce", "world", training.world_size, 1, 4 * numbers, once=True)


def stage_at(point: int, arch: Arch, layout: Parallel) -> int:
    """The stage on which what a layer puts out arises, 0 being the embedding."""
    return stage_of(point - 1, arch.num_layers, layout.pp, layout.vpp) if point else 0


def relay_traffic(training: Training, stage: int) -> Iterator[Traffic]:
    """Of a teacher in a layout of its own: tokens of all replicas, and the last hidden states that the student's last stage is sent."""
    layout, teacher = training.layout, training.teacher
    if teacher is None or not training.foreign:
        return
    replicas = training.replicas(layout)
    both = 2 if training.cfg.data.separate_documents else 1  # the numbers of their documents, too
    yield Traffic("tokens of all replicas", "all-gather", "dp", replicas, both, both * 8 * training.step_tokens, once=True)
    if stage == layout.pp - 1:
        count = training.microbatches(layout)
        size = training.tokens * teacher.hidden_size * training.element
        yield Traffic("the teacher's last hidden states", "send", "world", training.world_size, count, count * size, once=True)
