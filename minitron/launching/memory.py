"""How much memory a rank of a training will take, part by part, before anything is loaded. Pure: sizes and settings are all that is asked.

Parameters are counted exactly, from the table of arch/axes.py. What is held of a microbatch is counted as the modules hold it
(activations.py). What a device and its libraries take for themselves are constants below, with their source; they are not measured here.
docs/architecture.md says how far all this is from what processes really take.

Legend: T tokens of a microbatch, H and G hidden sizes of student and teacher, v vocabulary rows of a rank, E bytes of a number.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, VOCAB, Parameter
from minitron.arch.shards import held_units, padded, shard_shape, stage_layers, stage_of
from minitron.config.layout import check_expert_ranks
from minitron.config.schema import Config, Distill, Parallel
from minitron.distillation.fused import chunk_shape
from minitron.distillation.hidden import pairs_of
from minitron.errors import refuse
from minitron.launching.activations import Block, Pass, block_bytes, most_in_flight, norm_bytes

BYTES = {"bf16": 2, "fp32": 4}
MIB = 2**20

# Not measured by this project. A CUDA context with torch's kernels loaded takes some hundreds of MiB of a GPU, by its generation and driver;
# cuBLAS keeps a workspace of 32 MiB on Hopper (torch.backends.cuda, CUBLAS_WORKSPACE_CONFIG), less before it.
CUDA_CONTEXT, CUBLAS_WORKSPACE = 512 * MIB, 32 * MIB
# NCCL keeps buffers for each channel of each connection, of NCCL_BUFFSIZE = 4 MiB (its documentation's default) and smaller ones for its
# other protocols; a ring has two connections to a rank, and a GPU of today's machines some 16 channels.
NCCL_COMMUNICATOR = 16 * 2 * 4 * MIB
# a Python process with torch, Megatron and transformers imported, before it has any model; benchmarks/memory.py prints what it is here
HOST_PROCESS = 600 * MIB

PARTS = {
    "teacher": "the teacher's weights",
    "student": "the trained model's weights",
    "gradients": "their fp32 gradients",
    "optimizer": "Adam's two moments in fp32 and, with bf16, an fp32 copy of the weights, shared out between the replicas",
    "signals": "what the teacher said of the step's microbatches, until the loss has used it",
    "activations": "what microbatches in flight left for their backward passes",
    "loss": "the buffers of the fused loss, and the head's gradient",
    "working": "what passes, recomputation and updates need at the worst moment, above all these",
    "communication": "buffers of the collectives",
    "copies": "on a CPU: the copy of a checkpoint that is written beside the training",
    "runtime": "what the process and its device's libraries take",
}


@dataclasses.dataclass(frozen=True)
class RankMemory:
    """The memory of the ranks of one pipeline stage, at the worst moment of a step: of those that hold most.

    `parts`: bytes on the device, by the names and in the order of PARTS. `host`: bytes beside it in host memory, where the device is a GPU:
    a teacher that waits there, and the copy of a checkpoint that is written beside the training. `copied`: that copy's part of `host`.
    """

    stage: int
    parts: dict[str, float]
    host: float = 0.0
    copied: float = 0.0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return sum(self.parts.values())

    @property
    def without_copies(self) -> RankMemory:
        """That of the ranks of another replica than the first, which alone copies checkpoints."""
        parts = {name: size for name, size in self.parts.items() if name != "copies"}
        return RankMemory(self.stage, parts, self.host - self.copied)


def memory(student: Arch, teacher: Arch | None, cfg: Config, world_size: int, device: str | None = None) -> list[RankMemory]:
    """What training `student` takes on the ranks of each pipeline stage.

    `teacher`: a model that is asked in every step (None: for `train`, a cache or distill.loss=none). `device`: "cuda" or "cpu" (None: what the
    settings say, a GPU with device=auto). Raises RequestError where the layout does not fit models or ranks.
    """
    model_ranks = cfg.parallel.tp * cfg.parallel.pp * cfg.parallel.cp
    if world_size % model_ranks:
        raise refuse("parallel.tp", cfg.parallel.tp, f"tp x pp x cp = {model_ranks} must divide the number of processes, {world_size}")
    check_expert_ranks(cfg.parallel, world_size)
    found = []
    for stage in range(cfg.parallel.pp):
        ranks = [Rank(student, teacher, cfg, world_size, device, stage, its) for its in teacher_stages(stage, teacher, cfg)]
        found.append(max((rank.memory() for rank in ranks), key=lambda one: one.total))
    return found


def teacher_stages(stage: int, teacher: Arch | None, cfg: Config) -> list[int]:
    """The teacher's pipeline stages that the ranks of a stage of the student hold: both models' stages are runs of ranks."""
    pp, its = cfg.parallel.pp, cfg.teacher_parallel.pp
    if teacher is None:
        return [0]
    return [one for one in range(its) if one * pp < (stage + 1) * its and (one + 1) * pp > stage * its]


def stage_parameters(arch: Arch, parallel: Parallel, stage: int) -> Iterator[tuple[Parameter, Arch, int]]:
    """Rows of the table that the ranks of a pipeline stage hold, with the sizes of their block, and how many of each a rank has, which are several
    of experts: the embedding lies on the first stage, final norm and head on the last, which has a copy of a tied embedding."""
    first, last = stage == 0, stage == parallel.pp - 1
    tied = "embedding.word_embeddings.weight" if arch.share_embeddings_and_output_weights else ""
    blocks = [arch.layer(layer) for layer in itertools.chain(*chunk_layers(arch, parallel, stage))]
    for row in PARAMETERS:
        embedding = row.name.startswith("embedding.")
        if row.per_layer:
            yield from ((row, block, row.copies(block) // parallel.ep if row.per_expert else 1) for block in blocks if row.exists(block))
        elif row.exists(arch) and ((embedding and first) or (last and (not embedding or (row.name == tied and not first)))):
            yield row, arch, 1


def shard_numbers(row: Parameter, block: Arch, tp: int) -> int:
    """Numbers of a rank's part of one parameter, of a block of these sizes."""
    return math.prod(shard_shape(row, block, tp))


@functools.cache
def held_parameters(arch: Arch, parallel: Parallel, stage: int) -> int:
    """Numbers that a rank of a pipeline stage holds of a model's parameters, padding included: what its modules allocate."""
    return sum(held * shard_numbers(row, block, parallel.tp) for row, block, held in stage_parameters(arch, parallel, stage))


@functools.cache
def shared_out_parameters(arch: Arch, parallel: Parallel, stage: int) -> int:
    """Those of them that other expert ranks do not hold: all experts', where there is more than one such rank."""
    rows = stage_parameters(arch, parallel, stage) if parallel.ep > 1 else ()
    return sum(held * shard_numbers(row, block, parallel.tp) for row, block, held in rows if row.per_expert)


def chunk_layers(arch: Arch, parallel: Parallel, stage: int) -> list[range]:
    """The layers of each of a rank's virtual stages."""
    return stage_layers(arch.num_layers, parallel.pp * parallel.vpp)[stage :: parallel.pp]


def communicators(arch: Arch, parallel: Parallel, world_size: int) -> int:
    """The groups of a model's layout, beside that of all ranks, that a rank of a GPU talks in."""
    tp, pp, cp, ep = parallel.tp, parallel.pp, parallel.cp, parallel.ep
    replicas = world_size // (tp * pp * cp)
    first_and_last = 2 * (pp > 1)  # for a tied embedding, and for one of positions
    # experts' tensor ranks, expert ranks, both together (who tells how many tokens go where), and the replicas of their gradients
    experts = (tp, ep, tp * ep if parallel.sp else 1, replicas * cp // ep) if arch.num_moe_experts is not None else ()
    return sum(size > 1 for size in (tp, pp, cp, replicas, replicas * cp, tp * pp, *experts)) + first_and_last


@dataclasses.dataclass(frozen=True)
class Rank:
    """A rank of a training, as far as its memory goes. `stage`: of the student's pipeline; `teacher_stage`: of the teacher's."""

    student: Arch
    teacher: Arch | None
    cfg: Config
    world_size: int
    given_device: str | None
    stage: int
    teacher_stage: int

    @property
    def device(self) -> str:
        """ "cuda" or "cpu"."""
        return self.given_device or ("cpu" if self.cfg.device == "cpu" else "cuda")

    @property
    def element(self) -> int:
        """E."""
        return BYTES[self.cfg.dtype]

    @property
    def is_first(self) -> bool:
        """Whether it holds the student's embedding."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it computes losses."""
        return self.stage == self.cfg.parallel.pp - 1

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return self.world_size // (self.cfg.parallel.tp * self.cfg.parallel.pp * self.cfg.parallel.cp)

    @property
    def microbatches(self) -> int:
        """Of a replica and step."""
        train = self.cfg.train
        return math.ceil(train.global_batch_size / (train.micro_batch_size * self.replicas))

    @property
    def numbers(self) -> int:
        """The student's parameters here."""
        return held_parameters(self.student, self.cfg.parallel, self.stage)

    @property
    def distill(self) -> Distill:
        """The loss: `train` has none of the settings of a distillation."""
        given = self.cfg.distill
        alone = self.teacher is None and given.loss != "none" and self.cfg.teacher.cache.folder is None
        return Distill(loss="none", cross_entropy=1.0) if alone else given

    def way(self, parallel: Parallel, recompute: str = "none") -> Pass:
        """A microbatch's pass through a model of this layout."""
        train = self.cfg.train
        return Pass(train.micro_batch_size, train.seq_length, parallel.tp, parallel.cp, parallel.sp, self.element, self.device, recompute,
                    self.cfg.data.separate_documents, parallel.ep)  # fmt: skip

    @property
    def tokens(self) -> int:
        """T."""
        return self.way(self.cfg.parallel).tokens

    def memory(self) -> RankMemory:
        """By part."""
        numbers, element = self.numbers, self.element
        parallel, experts = self.cfg.parallel, shared_out_parameters(self.student, self.cfg.parallel, self.stage)
        # expert ranks are some of those that share the optimizer, which for the experts are as many fewer
        shares = (numbers - experts + parallel.ep * experts) / (self.replicas * parallel.cp)
        moments = (2 if element == 4 else 3) * 4 * shares
        blocks, in_flight = self.in_flight()
        loss = self.scratch() + self.head_gradient() if self.is_last else 0.0
        weights, waiting = self.teacher_weights()
        on_gpu = self.device == "cuda"
        on_host, on_device = (self.copies(), 0.0) if on_gpu else (0.0, self.copies())
        parts = {
            "teacher": weights,
            "student": element * numbers,
            "gradients": 4 * numbers,
            "optimizer": moments,
            "signals": self.signals(),
            "activations": in_flight,
            "loss": loss,
            "working": self.working(blocks, in_flight, waiting),
            "communication": self.communication(),
            "copies": on_device,
            "runtime": CUDA_CONTEXT + CUBLAS_WORKSPACE if on_gpu else HOST_PROCESS,
        }
        return RankMemory(self.stage, {name: float(parts[name]) for name in PARTS}, float(on_host + waiting), on_host)

    def teacher_weights(self) -> tuple[float, float]:
        """(bytes on the device through all of a step, bytes that are there for the teacher's passes alone)."""
        if self.teacher is None:
            return 0.0, 0.0
        layout = self.cfg.teacher_parallel
        held = self.element * held_parameters(self.teacher, layout, self.teacher_stage)
        # of a teacher in a layout of its own, the student's last stage has the head once more, in its own layout
        head = self.element * self.head_rows(self.teacher) * self.teacher.hidden_size if self.is_last else 0
        if self.cfg.teacher.offload and self.device == "cuda":
            return head, held
        return held + (head if layout != self.cfg.parallel else 0), 0.0

    def head_rows(self, arch: Arch) -> int:
        """v: rows of the vocabulary that the first tensor rank has of the student's layout, which are the most."""
        return len(held_units(VOCAB, arch, self.cfg.parallel.tp, 0, sharded=True)[0])

    def in_flight(self) -> tuple[list[Block], float]:
        """This rank's blocks, and what microbatches in flight left in them."""
        parallel, way = self.cfg.parallel, self.way(self.cfg.parallel, self.cfg.train.recompute)
        stream = way.element * way.outside * self.student.hidden_size
        blocks, chunks = [], []
        for number, layers in enumerate(chunk_layers(self.student, parallel, self.stage)):
            mine = [block_bytes(self.student.layer(layer), way) for layer in layers]
            ends = self.is_last and number == parallel.vpp - 1
            # beside the blocks: the final norm, or what goes to the next stage, which Megatron holds on to
            chunks.append(sum(block.kept for block in mine) + (norm_bytes(self.student, way) if ends else stream))
            blocks += mine
        return blocks, most_in_flight(chunks, self.stage, parallel.pp, self.microbatches)

    def scratch(self) -> float:
        """The chunks of logits of the fused loss."""
        settings, rows = self.distill, self.head_rows(self.student)
        buffers, of_each, spare = chunk_shape(
            settings.chunk_tokens, self.tokens, settings.cross_entropy > 0 and settings.loss != "none", self.teacher is not None, self.element == 4
        )
        return 4.0 * rows * (buffers * max(of_each, math.ceil(self.student.hidden_size / rows)) + spare)

    def head_gradient(self) -> float:
        """What the loss makes: the head's gradient, in fp32, and that of the last hidden states, which under sequence parallelism are gathered."""
        arch, parallel, rows = self.student, self.cfg.parallel, self.head_rows(self.student)
        states = self.element * self.tokens * arch.hidden_size
        padding = padded(arch, parallel.tp).vocab_size // parallel.tp > rows  # the head is cut to its live rows, and its gradient copied
        added = 0 if self.is_tied_here else self.way(parallel).weight_gradient - self.element  # to the gradients in fp32
        return (4 + max(added, self.element if padding else 0)) * rows * arch.hidden_size + states * (2 if parallel.sp else 1)

    @property
    def is_tied_here(self) -> bool:
        """Whether this rank has the embedding for its head."""
        return self.student.share_embeddings_and_output_weights and self.is_first and self.is_last

    def signals(self) -> float:
        """What the teacher said: its last hidden states, or what was read of a cache, and the states that the student's are compared to."""
        if self.teacher is None:
            cached = self.cfg.teacher.cache.folder is not None and self.distill.loss != "none" and self.is_last
            return self.microbatches * self.tokens * (self.cfg.teacher.cache.top_k * (8 + 4) + 4.0) if cached else 0.0
        states = self.element * self.tokens * self.teacher.hidden_size
        return self.microbatches * (states * self.is_last + self.compared())

    def compared(self) -> float:
        """Of a microbatch, the teacher's hidden states of distill.hidden that are kept here."""
        assert self.teacher is not None
        if not self.cfg.distill.hidden.enabled:
            return 0.0
        parallel, pairs = self.cfg.parallel, pairs_of(self.cfg.distill.hidden, self.student, self.teacher)
        where = [stage_of(pair.student - 1, self.student.num_layers, parallel.pp, parallel.vpp) if pair.student else 0 for pair in pairs]
        return where.count(self.stage) * self.element * self.way(parallel).outside * self.teacher.hidden_size

    def working(self, blocks: list[Block], in_flight: float, waiting: float) -> float:
        """The worst of what comes and goes, above what the other parts say."""
        rows, arch = self.head_rows(self.student), self.student
        head = self.head_gradient() if self.is_last else 0.0
        kept_head = 4.0 * rows * arch.hidden_size if self.is_tied_here else 0.0  # it waits for the embedding's, which comes last
        one_back = max(block.remade + block.backward for block in blocks)
        embedding = self.element * rows * arch.hidden_size if self.is_first else 0.0
        one_pass = sum(block.kept for block in blocks)
        # gloo sums gradients up in a copy of a whole buffer, of which each virtual stage has one, alone on its rank or not
        summed = 4.0 * self.numbers / self.cfg.parallel.vpp if self.device == "cpu" else 0.0
        moments = (
            head,
            kept_head + one_back,
            kept_head + embedding - min(one_pass, in_flight),
            summed - in_flight,
            waiting + self.teacher_pass() - in_flight,
        )
        return max(moments) - head

    def teacher_pass(self) -> float:
        """The most that a block of the teacher holds at a time."""
        if self.teacher is None:
            return 0.0
        layout = self.cfg.teacher_parallel
        layers = itertools.chain(*chunk_layers(self.teacher, layout, self.teacher_stage))
        return max(block_bytes(self.teacher.layer(layer), self.way(layout)).forward for layer in layers)

    def communication(self) -> float:
        """Communicators of a GPU; and under sequence parallelism the buffer that the parts of a sequence are gathered in."""
        parallel, teacher = self.cfg.parallel, self.cfg.teacher_parallel
        gathered = self.element * self.tokens * self.student.hidden_size if parallel.sp else 0
        groups = (self.world_size > 1) + communicators(self.student, parallel, self.world_size)
        if self.teacher is not None and teacher != parallel:
            groups += communicators(self.teacher, teacher, self.world_size)
        return gathered + (groups * NCCL_COMMUNICATOR if self.device == "cuda" else 0)

    def copies(self) -> float:
        """Host memory of the first replica for the copy of a checkpoint: weights, and the optimizer's state whole."""
        train = self.cfg.train
        on_the_way = train.async_save and train.save_interval < train.steps
        return (self.element + 12) * self.numbers if on_the_way else 0.0
