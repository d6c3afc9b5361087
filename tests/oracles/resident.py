"""How much memory a rank really takes while it trains: what is resident of its process, as the kernel counts it."""

import ctypes
import dataclasses
import gc
from pathlib import Path
from typing import Any

import torch

from minitron.arch.arch import Arch
from minitron.config.schema import Config, Data, Distill, Hidden, Parallel, Teacher, TeacherParallel, Train
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher, NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints, empty_model
from minitron.engine.model import DTYPES
from minitron.engine.parallel import beside
from minitron.engine.trainer import Trainer
from minitron.engine.vocab import live_head
from minitron.launching.memory import RankMemory, memory
from minitron.stages.train import NEXT_TOKEN
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import tokens_of

LIBC = ctypes.CDLL(None)
M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8  # malloc.h


STUDENT = Arch(
    family="llama", num_layers=6, hidden_size=448, ffn_hidden_size=1216, num_attention_heads=8, num_query_groups=4, kv_channels=56,
    vocab_size=8192, max_position_embeddings=512,
)  # fmt: skip
TEACHER = STUDENT.replace(num_layers=8, hidden_size=512, ffn_hidden_size=1408, kv_channels=64)


@dataclasses.dataclass(frozen=True)
class Case:
    """A training to measure: its layout, models, and settings."""

    layout: Layout
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)  # of Config
    student: Arch = STUDENT
    teacher: Arch | None = TEACHER
    saves: bool = False

    def config(self) -> Config:
        """The settings."""
        layout = self.layout
        train = {"steps": 10, "seq_length": 256, "micro_batch_size": 2, "global_batch_size": 4 * layout.dp * layout.pp, "warmup_steps": 1}
        parallel = Parallel(tp=layout.tp, pp=layout.pp, cp=layout.cp, vpp=layout.vpp, sp=layout.sp, ep=layout.ep)
        changes = {"dtype": "fp32", "device": "cpu", "train": Train(**{**train, **self.train, "save_interval": 1 if self.saves else 10})}
        return Config(parallel=parallel, **{**changes, **self.changes})


EXPERTS = {"num_moe_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 448}
TIED = STUDENT.replace(share_embeddings_and_output_weights=True)
CASES = {
    "one rank": Case(Layout()),
    "one rank, full": Case(Layout(), {"recompute": "full", "micro_batch_size": 4}),
    "one rank, selective": Case(Layout(), {"recompute": "selective", "micro_batch_size": 4}),
    "one rank, bf16": Case(Layout(), changes={"dtype": "bf16"}),
    "train, tied": Case(Layout(), student=TIED, teacher=None),
    "saved beside": Case(Layout(), saves=True),
    "tp2": Case(Layout(tp=2)),
    "tp2, sp": Case(Layout(tp=2, sp=True), {"micro_batch_size": 4}),
    "pp2": Case(Layout(pp=2)),
    "pp2, vpp3": Case(Layout(pp=2, vpp=3)),
    "dp2": Case(Layout(dp=2)),
    "ep2": Case(Layout(dp=2, ep=2), student=STUDENT.replace(**EXPERTS), teacher=TEACHER.replace(**EXPERTS)),
    "cp2": Case(Layout(cp=2), {"micro_batch_size": 4}),
    "tp2, pp2, sp, bf16": Case(Layout(tp=2, pp=2, sp=True), {"recompute": "selective", "micro_batch_size": 4, "seq_length": 512}, {"dtype": "bf16"}),
    "pp2, teacher tp2": Case(Layout(pp=2), changes={"teacher": Teacher(parallel=TeacherParallel(tp=2, pp=1))}),
    "tp2, hidden, documents": Case(
        Layout(tp=2), changes={"distill": Distill(hidden=Hidden(enabled=True, projection=True)), "data": Data(separate_documents=True)}
    ),
}


@dataclasses.dataclass(frozen=True)
class Resident:
    """Bytes of one rank: of the process before it had a model, and the most above that until its second step ended."""

    stage: int
    baseline: int
    peak: int


def compared(case: Case, folder: Path) -> list[tuple[RankMemory, Resident]]:
    """Of each pipeline stage: what is said of its ranks, and what that of them took that took most."""
    cfg = case.config()
    said = memory(case.student, case.teacher, cfg, case.layout.size)
    found = on_ranks(measured, case.layout, case.student, case.teacher, cfg, folder / "checkpoints" if case.saves else None)
    return [(one, max((rank for rank in found if rank.stage == one.stage), key=lambda rank: rank.peak)) for one in said]


def settle_allocator() -> None:
    """From here on what is freed goes back to the system. By itself glibc keeps freed blocks of up to 32 MiB for later, so that what is resident
    is more than what is in use by however much was freed before: a property of the C library, and of the order of all calls."""
    assert LIBC.mallopt(M_MMAP_THRESHOLD, 2**16) and LIBC.mallopt(M_ARENA_MAX, 1)


def resident(which: str = "VmRSS") -> int:
    """Bytes resident now, or with VmHWM the most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{which}:"))


def forget_peak() -> None:
    """VmHWM starts again from what is resident now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def measured(world, student: Arch, teacher: Arch | None, cfg: Config, saves: Path | None = None) -> Resident:
    """Two steps of the training that `cfg` asks for, of random models: in the second there is a state of the optimizer. `saves`: a checkpoint
    is begun between them, and written there."""
    settle_allocator()
    # what libraries and Megatron take when they first run is the process's: a step of a model of no size to speak of
    sizes = {"hidden_size": 32, "ffn_hidden_size": 32, "kv_channels": 4, "vocab_size": 64}
    train(world, student.replace(**sizes), None if teacher is None else teacher.replace(**sizes), cfg, None)
    gc.collect()
    LIBC.malloc_trim(0)
    baseline = resident()
    forget_peak()
    train(world, student, teacher, cfg, saves)
    return Resident(world.pp_rank, baseline, resident("VmHWM") - baseline)


def train(world, student: Arch, teacher: Arch | None, cfg: Config, saves: Path | None) -> None:
    """The two steps."""
    dtype = DTYPES[cfg.dtype]
    model = filled(empty_model(student, world, dtype, recompute=cfg.train.recompute))
    its_world = world if cfg.teacher_parallel == cfg.parallel else beside(world, cfg.teacher_parallel)
    its_model = None if teacher is None else filled(empty_model(teacher, its_world, dtype)).requires_grad_(False)
    hidden = HiddenLoss(model, its_model, cfg.distill.hidden, cfg.train, world, 1) if cfg.distill.hidden.enabled else None
    trainer = Trainer(model, cfg.train, world, {"hidden": hidden} if hidden else {})
    loss = loss_of(world, its_world, model, its_model, hidden, cfg)
    checkpoints = Checkpoints(saves, in_background=True) if saves else None
    if checkpoints:
        checkpoints.begin(trainer)
    for step in range(2):
        batches = microbatches(world, student.vocab_size, cfg, step)
        trainer.update(batches, loss(step, batches))
        trainer.step += 1
        if checkpoints and step == 0:
            checkpoints.save(trainer, final=False)
    if checkpoints:
        checkpoints.wait(world)
    trainer.close()


def loss_of(world, its_world, model, its_model, hidden, cfg: Config):
    """The trainer's loss, as the stages make it."""
    if its_model is None:
        return distillation_loss(model, NoTeacher(), NEXT_TOKEN, world)
    if its_world is world:
        asked = LiveTeacher(its_model, world, hidden.teacher_states if hidden else None)
    else:
        rows = len(live_head(model, world)[0]) if world.is_last_stage else 0
        head = torch.randn(rows, its_model.arch.hidden_size).to(DTYPES[cfg.dtype])
        asked = ForeignTeacher(its_model, its_world, Head(head, world.tp_rank * rows), world)
    return distillation_loss(model, asked, cfg.distill, world, hidden)


def filled(model):
    """Weights that are there: memory of zeros is not resident before it is written."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.02)
    return model


def microbatches(world, vocab_size: int, cfg: Config, step: int) -> list[Batch]:
    """This rank's, of random tokens."""
    train = cfg.train
    tokens = tokens_of(vocab_size, train.global_batch_size, train.seq_length + 1, seed=step)
    documents = torch.arange(train.seq_length).div(train.seq_length // 3, rounding_mode="floor") if cfg.data.separate_documents else None
    return [
        Batch(part, None, None if documents is None else documents.expand(len(part), -1))
        for part in tokens[world.dp_rank :: world.dp].split(train.micro_batch_size)
    ]
