"""How long a training takes and what it costs, from its arithmetic, its traffic and what the hardware can do. Pure.

An estimate: products run at an assumed (or measured) share of the peak, collectives at an assumed share of a link's speed, and nothing overlaps
but what the settings say. What is assumed is a constant here or a setting under `plan`.

Legend: M microbatches of a replica, S stages.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from minitron.arch.arch import Arch
from minitron.arch.counts import count, training_flops
from minitron.arch.shards import padded
from minitron.config.planning import Planning
from minitron.config.schema import Parallel
from minitron.hardware import MACHINES, Machine, peak_of
from minitron.launching.memory import RankMemory, held_parameters, memory, shared_out_parameters
from minitron.launching.traffic import Traffic, Training, blocks_of, teacher_traffic, traffic

GIB = 2**30
# Assumed, not measured by this project: large collectives come to some four fifths of a link's speed; each call waits for its kernel to start
# and for the ranks to meet, for some ten microseconds inside a machine and some more between machines.
LINK_SHARE, CALL_SECONDS = 0.8, {"nvlink": 10e-6, "network": 25e-6}
# some 25 kernels of a block's forward pass, each of which takes Python and the driver some microseconds to start: a GPU is no faster than that
BLOCK_SECONDS = 200e-6
# and some eight of each expert's, which come one after another
EXPERT_SECONDS = 60e-6
# bytes per logit that a chunk of the fused loss reads and writes in all its passes over fp32 buffers, student's and teacher's together
LOGIT_BYTES = 108
# bytes per parameter of an update: buffers cleared and scaled on every rank; gradient, moments and weights read and written for its share
UPDATE_WHOLE, UPDATE_SHARE = 12, 42

# parts of a step, in their order: the student's passes; activations that are made once more; the teacher's passes; heads and loss; hidden
# states (and the loss' statistics) between tensor ranks, keys and values between context ranks, tokens between expert ranks, hidden states
# between stages; waiting of stages for each other; the teacher's last hidden states on their way into the student's layout, its weights on
# theirs from the host; gradients and parameters between replicas, where the settings hide them behind nothing; the optimizer's update
SECONDS = ("student", "recompute", "teacher", "loss", "tensor", "context", "experts", "stages", "waiting", "relay", "offload", "replicas", "update")


# of a microbatch: the part of SECONDS, and the groups whose traffic it is
BETWEEN = {"tensor": ("tp",), "context": ("cp",), "experts": ("ep",), "stages": ("pp",)}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines as far as a plan asks."""

    machine: Machine
    gpus_per_node: int
    flops: float  # a second, of one GPU in a model's passes
    price: float | None

    @classmethod
    def of(cls, plan: Planning, dtype: str) -> Cluster:
        """What the settings say."""
        known, peak = MACHINES[plan.hardware], peak_of(plan.hardware, dtype)
        assert peak is not None
        given = {"memory_gib": plan.memory_gib, "network": plan.network_gbits / 8 if plan.network_gbits is not None else None}
        machine = dataclasses.replace(known, **{name: value for name, value in given.items() if value is not None})
        return cls(machine, plan.gpus_per_node, 1e12 * (plan.tflops or plan.efficiency * peak), plan.price)

    def link(self, group: str, ranks: int, layout: Parallel, replicas: int, ring: bool = True) -> tuple[str, float]:
        """(name, bytes a second of one GPU) of the slowest link that a group goes over. `ring`: each member sends to the next, not to all others.

        Ranks lie in Megatron's order: tensor ranks side by side, then context ranks, replicas, stages; expert ranks are the next after the tensor
        ranks. A ring over several machines leaves each of them through the cards of all its members there.
        """
        stage = layout.tp * layout.cp * replicas
        whole = stage * layout.pp
        distance = {"tp": 1, "cp": layout.tp, "dp": layout.tp, "ep": layout.tp, "edp": layout.tp * layout.ep}.get(group, stage)
        block = whole if group in ("pp", "ends", "world") else distance * ranks  # neighbours among which the group lies
        machine = self.machine
        if whole <= self.gpus_per_node or (block <= self.gpus_per_node and self.gpus_per_node % block == 0):
            return "nvlink", 1e9 * machine.nvlink * LINK_SHARE
        together = 1 if group in ("pp", "ends", "world") or not ring else max(1, min(ranks, self.gpus_per_node // distance))
        return "network", 1e9 * min(machine.nvlink, machine.network * together) * LINK_SHARE

    def seconds(self, one: Traffic, layout: Parallel, replicas: int) -> float:
        """What traffic takes with nothing beside it."""
        name, speed = self.link(one.group, one.ranks, layout, replicas, one.operation != "all-to-all")
        return one.sent / speed + one.calls * CALL_SECONDS[name]


@dataclasses.dataclass(frozen=True)
class Sent:
    """What the ranks of each stage of the two pipelines send."""

    student: list[list[Traffic]]
    teacher: list[list[Traffic]]

    @classmethod
    def of(cls, training: Training) -> Sent:
        """In a training."""
        mine = [traffic(training, stage) for stage in range(training.layout.pp)]
        return cls(mine, [teacher_traffic(training, stage) for stage in range(training.teacher_layout.pp)])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a training comes to. `memory`: of each stage, `traffic`: of the rank that sends most of each kind, with its link and seconds;
    `seconds`: of a step, by the parts of SECONDS; `bubble`: share of the pipelines' time in which a stage waits, on average."""

    layout: dict[str, Any]
    gpus: int
    flops: float  # of a step: of the models' passes as such, however they are made
    step_tokens: int
    steps: int
    memory: list[RankMemory]
    traffic: list[dict[str, Any]]
    seconds: dict[str, float]
    bubble: float
    price: float | None

    @property
    def step_seconds(self) -> float:
        """Of one step, validations and checkpoints not counted."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> float:
        """Of the fullest rank."""
        return max(one.total for one in self.memory)

    @property
    def figures(self) -> dict[str, float | None]:
        """What a reader asks for."""
        seconds, gpu_hours = self.step_seconds * self.steps, self.step_seconds * self.steps * self.gpus / 3600
        return {
            "step_seconds": self.step_seconds,
            "tokens_per_second": self.step_tokens / self.step_seconds,
            "tokens_per_day": 86400 * self.step_tokens / self.step_seconds,
            "tflop_per_second_per_gpu": self.flops / self.step_seconds / self.gpus / 1e12,
            "tokens": float(self.step_tokens) * self.steps,
            "days": seconds / 86400,
            "gpu_hours": gpu_hours,
            "cost": None if self.price is None else gpu_hours * self.price,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON form, for plan.json."""
        stages = [{"stage": one.stage, "total": one.total, "host": one.host, "parts": one.parts} for one in self.memory]
        return {**dataclasses.asdict(self), "memory": stages, "peak_bytes": self.peak_bytes, **self.figures}


def estimate(training: Training, cluster: Cluster, held: list[RankMemory] | None = None) -> Estimate:
    """What a training that its layout can hold comes to. `held`: its memory, where it is known."""
    cfg, layout = training.cfg, training.layout
    sent = Sent.of(training)
    parts, bubble = step_seconds(training, cluster, sent)
    per_token = flops_per_token(training.student, cfg.train.seq_length, training.teacher)
    described = {
        "tp": layout.tp, "pp": layout.pp, "vpp": layout.vpp, "cp": layout.cp, "ep": layout.ep, "sp": layout.sp,
        "dp": training.replicas(layout),
        "micro_batch_size": cfg.train.micro_batch_size, "microbatches": training.microbatches(layout), "recompute": cfg.train.recompute,
        "teacher_tp": training.teacher_layout.tp, "teacher_pp": training.teacher_layout.pp, "teacher_ep": training.teacher_layout.ep,
    }  # fmt: skip
    return Estimate(
        layout=described,
        gpus=training.world_size,
        flops=float(per_token) * training.step_tokens,
        step_tokens=training.step_tokens,
        steps=cfg.train.steps,
        memory=held or memory(training.student, training.teacher, cfg, training.world_size, "cuda"),
        traffic=most_traffic(training, cluster, sent),
        seconds=parts,
        bubble=bubble,
        price=cluster.price,
    )


def most_traffic(training: Training, cluster: Cluster, sent: Sent) -> list[dict[str, Any]]:
    """Of each kind, that of the stage whose ranks send most; with the link, what a rank sends, and the seconds it takes."""
    most: dict[tuple[str, str], tuple[Traffic, Parallel]] = {}
    for stages, layout in ((sent.student, training.layout), (sent.teacher, training.teacher_layout)):
        for one in itertools.chain(*stages):
            key = one.what, one.operation
            if key not in most or one.sent > most[key][0].sent:
                most[key] = one, layout
    found = []
    for one, layout in most.values():
        replicas = training.replicas(layout)
        link = cluster.link(one.group, one.ranks, layout, replicas)[0]
        found.append({**dataclasses.asdict(one), "link": link, "sent": one.sent, "seconds": cluster.seconds(one, layout, replicas)})
    return found


def step_seconds(training: Training, cluster: Cluster, sent: Sent) -> tuple[dict[str, float], float]:
    """(seconds of a step by the parts of SECONDS, share of the pipelines' time in which a stage waits)."""
    layout = training.layout
    replicas = training.replicas(layout)
    busy = [student_seconds(training, cluster, stage, mine) for stage, mine in enumerate(sent.student)]
    turns = training.microbatches(layout)
    parts, work = pipeline(busy, turns, layout.vpp), pipeline_work(busy, turns)
    if training.teacher is not None:
        its, its_turns = training.teacher_layout, training.teacher_turns
        its_busy = [teacher_seconds(training, cluster, stage, mine) for stage, mine in enumerate(sent.teacher)]
        its_parts = pipeline(its_busy, its_turns, its.vpp)
        parts = {name: parts.get(name, 0.0) + its_parts.get(name, 0.0) for name in {**parts, **its_parts}}
        work += pipeline_work(its_busy, its_turns)
    pipelines = sum(parts.values())
    parts["relay"] = max(of_kind(cluster, one, layout, replicas, ("world",)) for one in sent.student)
    parts["offload"] = offload_seconds(training, cluster)
    parts["replicas"] = max(replica_seconds(training, cluster, *of_stage) for of_stage in zip(sent.student, busy, strict=True))
    parts["update"] = max(update_seconds(training, cluster, stage) for stage in range(layout.pp))
    return {name: parts.get(name, 0.0) for name in SECONDS}, 1 - work / pipelines


def pipeline(busy: Sequence[dict[str, float]], microbatches: int, chunks: int) -> dict[str, float]:
    """What M microbatches take through S stages that are busy for so long with each: the slowest stage's parts, and how long it waits.

    The slowest stage is busy for M microbatches; the first one must reach it, and the last one leave it, through all the others, in pieces of one
    virtual stage. With stages alike: (M + (S - 1) / chunks) times one microbatch (arXiv 2104.04473, section 2.2).
    """
    totals = [sum(one.values()) for one in busy]
    slowest = busy[totals.index(max(totals))]
    waiting = (sum(totals) - max(totals)) / chunks
    return {**{name: microbatches * value for name, value in slowest.items()}, "waiting": waiting}


def pipeline_work(busy: Sequence[dict[str, float]], microbatches: int) -> float:
    """Seconds in which a stage works, on average."""
    return microbatches * sum(sum(one.values()) for one in busy) / len(busy)


flops_per_token = functools.lru_cache(maxsize=64)(training_flops)  # the same for every layout


@functools.cache
def block_flops(block: Arch, tp: int, seq_length: int) -> tuple[float, float, float]:
    """FLOPs of a block's forward pass per token on one tensor rank, padding included: (all, attention's scores, MLP); attention at full length."""
    whole = padded(block, tp).replace(num_layers=1, layers=())
    head = 2 * whole.vocab_size * whole.hidden_size
    scores = 4 * seq_length * whole.kv_channels * whole.num_attention_heads
    neurons = whole.ffn_hidden_size
    if whole.num_moe_experts is not None:  # those that a token goes through
        neurons = (whole.moe_router_topk or 0) * (whole.moe_ffn_hidden_size or 0) + (whole.moe_shared_expert_intermediate_size or 0)
    mlp = 2 * (3 if whole.gated_linear_unit else 2) * whole.hidden_size * neurons
    return (count(whole, seq_length).flops_per_token - head) / tp, scores / tp, mlp / tp


def passes(blocks: Iterable[Arch], tp: int, seq_length: int, recompute: str = "none") -> tuple[float, float]:
    """FLOPs per token of a forward pass through blocks, and of what of it is made once more."""
    forward = again = 0.0
    for block in blocks:
        whole, scores, mlp = block_flops(block, tp, seq_length)
        forward += whole
        again += {"none": 0.0, "selective": scores + (0 if block.mlp_bias else mlp), "full": whole}[recompute]
    return forward, again


def least_seconds(blocks: Sequence[Arch], layout: Parallel) -> float:
    """Of a forward pass through blocks: what starting their kernels takes."""
    experts = sum((block.num_moe_experts or 0) // layout.ep for block in blocks)
    return BLOCK_SECONDS * len(blocks) + EXPERT_SECONDS * experts


def student_seconds(training: Training, cluster: Cluster, stage: int, sent: Sequence[Traffic]) -> dict[str, float]:
    """What a stage is busy with for one microbatch of the student, forward and backward."""
    cfg, layout, tokens = training.cfg, training.layout, training.tokens
    blocks = blocks_of(training.student, layout, stage)
    forward, again = passes(blocks, layout.tp, cfg.train.seq_length, cfg.train.recompute)
    least = least_seconds(blocks, layout)
    found = {"student": 3 * max(forward * tokens / cluster.flops, least), "recompute": again * tokens / cluster.flops, "loss": 0.0}
    if stage == layout.pp - 1:
        twice = 2 if training.loss.gradients == "recompute" else 1
        rows = padded(training.student, layout.tp).vocab_size // layout.tp
        head = (2 + twice) * training.student.hidden_size + (twice * training.teacher.hidden_size if training.teacher is not None else 0)
        found["loss"] = tokens * rows * (2 * head / cluster.flops + twice * LOGIT_BYTES / (1e9 * cluster.machine.hbm))
    replicas, turns = training.replicas(layout), training.microbatches(layout)
    one_by_one = [one for one in sent if not one.once]
    for name, groups in BETWEEN.items():
        found[name] = of_kind(cluster, one_by_one, layout, replicas, groups) / turns
    return found


def teacher_seconds(training: Training, cluster: Cluster, stage: int, sent: Sequence[Traffic]) -> dict[str, float]:
    """What a stage is busy with for one microbatch of the teacher."""
    assert training.teacher is not None
    layout, turns = training.teacher_layout, training.teacher_turns
    blocks = blocks_of(training.teacher, layout, stage)
    forward, _ = passes(blocks, layout.tp, training.cfg.train.seq_length)
    replicas = training.replicas(layout)
    return {
        "teacher": max(forward * training.tokens / cluster.flops, least_seconds(blocks, layout)),
        **{name: of_kind(cluster, sent, layout, replicas, groups) / turns for name, groups in BETWEEN.items()},
    }


def of_kind(cluster: Cluster, sent: Iterable[Traffic], layout: Parallel, replicas: int, groups: Sequence[str]) -> float:
    """Seconds of what goes through these groups."""
    return sum(cluster.seconds(one, layout, replicas) for one in sent if one.group in groups)


def replica_seconds(training: Training, cluster: Cluster, sent: Sequence[Traffic], busy: dict[str, float]) -> float:
    """What reducing gradients and gathering parameters takes beyond what the settings let them hide behind: the backward pass of the last
    microbatch and the forward pass of the first."""
    train, layout = training.cfg.train, training.layout
    replicas, one_pass = training.replicas(layout), busy["student"] / 3
    hidden = {
        "gradients": 2 * one_pass if train.overlap_grad_reduce else 0.0,
        "parameters": one_pass if train.overlap_param_gather else 0.0,
    }
    takes: dict[str, float] = {}
    for one in sent:
        if one.once and one.group != "world":
            what = one.what.removeprefix("experts' ")
            takes[what] = takes.get(what, 0.0) + cluster.seconds(one, layout, replicas)
    return sum(max(0.0, seconds - hidden.get(what, 0.0)) for what, seconds in takes.items())


def update_seconds(training: Training, cluster: Cluster, stage: int) -> float:
    """Reading and writing what an update touches."""
    layout = training.layout
    numbers, experts = (of(training.student, layout, stage) for of in (held_parameters, shared_out_parameters))
    shares = (numbers - experts + layout.ep * experts) / (training.replicas(layout) * layout.cp)
    return (numbers * UPDATE_WHOLE + shares * UPDATE_SHARE) / (1e9 * cluster.machine.hbm)


def offload_seconds(training: Training, cluster: Cluster) -> float:
    """The teacher's weights, once in a step from pinned host memory."""
    if training.teacher is None or not training.cfg.teacher.offload:
        return 0.0
    layout = training.teacher_layout
    held = max(held_parameters(training.teacher, layout, stage) for stage in range(layout.pp))
    return held * training.element / (1e9 * cluster.machine.host)
