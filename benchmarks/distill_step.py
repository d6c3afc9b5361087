"""Seconds of one distillation step, by part, beside its two halves alone and beside the same step written with plain transformers.

The halves, by this project's own means: the teacher scores the tokens (its forward pass with its head, in chunks), and
the student is trained on them by next-token cross-entropy. All sides run the same two models (the demo's teacher, and
that teacher cut to the demo's target) on the same tokens in one process, in turns. The plain side is what one would
write by hand: two transformers models, `log_softmax` of both whole [tokens, vocabulary] logits, torch's fused AdamW
with the same settings and, for bf16, fp32 master weights, as Megatron's optimizer has them. What differs: Megatron's
schedule, gradient buffers (fp32) and distributed optimizer, and the fused loss, which makes both models' logits in
chunks inside the student's part, so compare the totals.
"""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import arguments, publish

from minitron import engine
from minitron.config.compose import compose
from minitron.config.schema import Config
from minitron.distillation.losses import forward_kl
from minitron.distillation.signal import LiveTeacher, NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.session import Session, session
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder

Step = Callable[[torch.Tensor], tuple[float, dict[str, float]]]  # tokens [B, S + 1] -> loss per token, seconds of each part
PARTS = ("teacher", "student", "optimizer")


class Watch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self.since = time.perf_counter()

    def lap(self) -> float:
        before, self.since = self.since, time.perf_counter()
        return self.since - before


def minitron_step(opened: Session, student_folder: Path) -> Step:
    """The project's own step; on the way the student is written to `student_folder` for the other side."""
    cfg, world, arch = opened.cfg, opened.world, opened.source.arch
    target = target_arch(arch, cfg.target, cfg.parallel)
    # which units stay does not matter for the time
    student = reslice(opened.load_source(), select(random_scores(arch, cfg.seed), arch, target), target, world)
    export(student, world, opened.source.config, opened.source.folder, student_folder, opened.dtype)
    trainer = engine.Trainer(student, cfg.train, world)
    loss = distillation_loss(student, LiveTeacher(opened.teacher, world), cfg.distill, world)
    watch, seconds = Watch(), dict[str, float]()
    laps(trainer, watch, seconds)

    def step(tokens_BS: torch.Tensor) -> tuple[float, dict[str, float]]:
        batches = [engine.Batch(part) for part in tokens_BS.split(cfg.train.micro_batch_size)]
        watch.lap()
        student_loss = loss(0, batches)
        seconds["teacher"] = watch.lap()
        line = trainer.update(batches, student_loss)
        return line["loss"], dict(seconds)

    return step


def laps(trainer: engine.Trainer, watch: Watch, seconds: dict[str, float]) -> None:
    """Have the trainer's updates note the seconds of the student's passes and of the optimizer."""
    prepare, finish = trainer.optimizer.prepare_grads, trainer.optimizer.step_with_ready_grads

    def prepare_grads() -> Any:
        seconds["student"] = watch.lap()
        return prepare()

    def step_with_ready_grads() -> Any:
        result = finish()
        seconds["optimizer"] = watch.lap()
        return result

    trainer.optimizer.prepare_grads, trainer.optimizer.step_with_ready_grads = prepare_grads, step_with_ready_grads


def halves(opened: Session, student_folder: Path) -> Step:
    """A teacher that just scores, and a student that just learns the next token."""
    cfg, world = opened.cfg, opened.world
    student = load(open_folder(student_folder, "model.path"), world, opened.dtype)
    trainer = engine.Trainer(student, cfg.train, world)
    loss = distillation_loss(student, NoTeacher(), dataclasses.replace(cfg.distill, cross_entropy=1.0), world)
    watch, seconds = Watch(), dict[str, float]()
    laps(trainer, watch, seconds)

    def step(tokens_BS: torch.Tensor) -> tuple[float, dict[str, float]]:
        parts = tokens_BS.split(cfg.train.micro_batch_size)
        watch.lap()
        engine.language_model_score(opened.teacher, [(part, torch.ones(len(part), dtype=torch.bool)) for part in parts], world)
        seconds["teacher"] = watch.lap()
        batches = [engine.Batch(part) for part in parts]
        line = trainer.update(batches, loss(0, batches))
        return line["loss"], dict(seconds)

    return step


def plain_step(teacher_folder: Path, student_folder: Path, cfg: Config) -> Step:
    """The same step by hand."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    teacher, student = (AutoModelForCausalLM.from_pretrained(folder, dtype=engine.DTYPES[cfg.dtype]) for folder in (teacher_folder, student_folder))
    teacher.requires_grad_(False)
    weights = list(student.parameters())
    masters = [weight.detach().float() if cfg.dtype == "bf16" else weight for weight in weights]
    groups = [
        {"params": [m for m in masters if m.dim() > 1], "weight_decay": cfg.train.weight_decay},
        {"params": [m for m in masters if m.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.train.lr / cfg.train.warmup_steps, betas=(cfg.train.beta1, cfg.train.beta2), fused=True)

    def step(tokens_BS: torch.Tensor) -> tuple[float, dict[str, float]]:
        batches = tokens_BS[:, :-1].split(cfg.train.micro_batch_size)
        watch, seconds = Watch(), {}
        with torch.no_grad():
            signals_BSV = [teacher(batch_BS).logits for batch_BS in batches]
        seconds["teacher"] = watch.lap()
        student.zero_grad()
        total = 0.0
        for batch_BS, signal_BSV in zip(batches, signals_BSV, strict=True):
            loss = forward_kl(student(batch_BS).logits.flatten(0, 1), signal_BSV.flatten(0, 1)).sum() / tokens_BS[:, 1:].numel()
            loss.backward()
            total += loss.item()
        seconds["student"] = watch.lap()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                master.grad = weight.grad.float()
            torch.nn.utils.clip_grad_norm_(masters, cfg.train.clip_grad)
            optimizer.step()
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        seconds["optimizer"] = watch.lap()
        return total, seconds

    return step


def measure(dtype: str, repeats: int, overrides: list[str]) -> list[tuple[Any, ...]]:
    """Rows of the table: the median seconds of each part, of both sides, in turns on the same tokens."""
    with tempfile.TemporaryDirectory() as scratch:
        cfg = compose("compress", ["recipe=smollm2_135m_to_100m", f'run.dir="{scratch}/run"', *overrides, f"dtype={dtype}"])
        with session(cfg, "compress") as opened:
            ours = minitron_step(opened, Path(scratch, "student"))
            sides = {
                "minitron": ours,
                "halves alone": halves(opened, Path(scratch, "student")),
                "transformers": plain_step(opened.source.folder, Path(scratch, "student"), cfg),
            }
            shape = (cfg.train.global_batch_size, cfg.train.seq_length + 1)
            generator = torch.Generator().manual_seed(cfg.seed)
            seconds: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
            first: dict[str, float] = {}
            for number in range(repeats + 1):
                tokens_BS = torch.randint(0, opened.source.arch.vocab_size, shape, generator=generator)
                turn = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]  # what a side leaves in memory meets each of the others
                for name in turn:
                    loss, parts = sides[name](tokens_BS)
                    first.setdefault(name, loss)
                    if number > 0:  # the first step also allocates
                        seconds[name].append({**parts, "total": sum(parts.values())})
    names = (*PARTS, "total")
    tokens = cfg.train.global_batch_size * cfg.train.seq_length
    rows: list[tuple[Any, ...]] = []
    for name, steps in seconds.items():
        medians = [statistics.median(one[part] for one in steps) for part in names]
        rows.append((f"{name}, {dtype}", first[name], *medians, tokens / medians[-1]))
    for title, one, other in (("transformers / minitron", "transformers", "minitron"), ("minitron / halves alone", "minitron", "halves alone")):
        pairs = list(zip(seconds[one], seconds[other], strict=True))
        rows.append((f"{title}, {dtype}", None, *(statistics.median(a[part] / b[part] for a, b in pairs) for part in names), None))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each side and type (default: 3)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as train.seq_length=128")
    options = parser.parse_args()
    rows = [row for dtype in options.dtypes for row in measure(dtype, options.repeats, options.set)]
    columns = {"side": "<", "first loss": ".4f", **dict.fromkeys((*PARTS, "total"), ".2f"), "tokens/s": ",.0f"}
    notes = [
        f"seconds, medians of {options.repeats} steps after one that is not counted; teacher: its forward pass; student: forward, loss, backward",
        "transformers' teacher part includes its logits, minitron makes them inside the student's part: compare the totals",
        "ratios: of the same turn, the median",
        "first loss: both sides before any update, on the same tokens",
    ]
    publish("One distillation step", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
