"""Seconds of one step of `minitron train`, by part, beside a loop on the same model written with Megatron-Core alone.

Both sides train the same model on the same samples in one process, in turns, with the same optimizer settings. `minitron` is the verb's own
loop: its data, its loss, `Trainer.update`, and what `fit` does around a step (figures, metrics.jsonl). `Megatron` is what one would write
by hand: GPTModel in DistributedDataParallel, the distributed optimizer, Megatron's schedule, tokens read from a tensor in memory, and
  whole logits:  its output layer and vocabulary-parallel cross-entropy, [tokens, vocabulary] in fp32;
  fused loss:    this project's loss on the last hidden states instead, so that what is left between the two is the trainer;
  again:         a second one of the last: what tells it from the first is chance, and so is as much between the others.
Nothing else of minitron is in it but how the model is built and its weights are read.

A step of seconds can't be told from another to a hundredth on a machine that does anything else. So three things are looked at: the seconds; the
operators that the two sides run in a step, counted, and the time of those that only one of them runs; and the seconds of a model of as many layers
so narrow that its arithmetic takes no time, where what a loop does besides is what is left.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import arguments, publish
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from minitron import engine
from minitron.config.compose import compose
from minitron.distillation.fused import Scratch, linear_distillation
from minitron.distillation.signal import Head, NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.reporting.tracking import Tracker
from minitron.session import Session, session
from minitron.stages.train import NEXT_TOKEN
from minitron.training import step_batches

PARTS = ("data", "forward, backward", "optimizer", "metrics")
Laps = dict[str, float]


class Watch:
    """Seconds between calls, by what ended."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock, self.since = clock, clock()
        self.laps: Laps = {}

    def start(self) -> None:
        """A step begins."""
        self.laps, self.since = dict.fromkeys(PARTS, 0.0), self.clock()

    def lap(self, part: str) -> None:
        """What was done since the last call belongs to `part`."""
        now = self.clock()
        self.laps[part] += now - self.since
        self.since = now


class Ours:
    """`minitron train`, one step at a time: `fit` runs from the step done to the next."""

    def __init__(self, opened: Session, watch: Watch) -> None:
        self.opened, self.watch = opened, watch
        model = opened.load_whole()
        self.trainer = engine.Trainer(model, opened.cfg.train, opened.world)
        self.loss = distillation_loss(model, NoTeacher(), NEXT_TOKEN, opened.world)
        self.tracker = Tracker(opened.folder, start_step=0, logging=opened.cfg.logging, config=dataclasses.asdict(opened.cfg))
        self.tracker.__enter__()
        for name, part in (("prepare_grads", "forward, backward"), ("step_with_ready_grads", "optimizer")):
            setattr(self.trainer.optimizer, name, partial(self._lapped, getattr(self.trainer.optimizer, name), part))
        self.figures: list[float] = []

    def _lapped(self, function: Callable[[], Any], part: str) -> Any:
        """The passes end where gradients are prepared, the update where it has been made."""
        if part == "forward, backward":
            self.watch.lap(part)
            return function()
        result = function()
        self.watch.lap(part)
        return result

    def step(self) -> tuple[float, Laps]:
        """(loss, seconds of each part) of the next step."""
        opened, trainer = self.opened, self.trainer

        def microbatches(step: int) -> list[engine.Batch]:
            batches = step_batches(opened.training_samples, opened.cfg, opened.world, step)
            self.watch.lap("data")
            return batches

        def report(line: dict[str, Any]) -> None:
            self.figures.append(line["loss"])
            self.tracker.log(line)

        whole, trainer.settings = trainer.settings, dataclasses.replace(trainer.settings, steps=trainer.step + 1, warmup_steps=0)
        task = engine.Task(microbatches=microbatches, loss=self.loss, validate=dict, report=report)
        self.watch.start()
        engine.fit(trainer, task, Unsaved(), lambda: False)
        self.watch.lap("metrics")
        trainer.settings = whole
        return self.figures[-1], self.watch.laps


class Unsaved(engine.Checkpoints):
    """Checkpoints are no part of a step."""

    def __init__(self) -> None:
        super().__init__(Path())

    def save(self, trainer: engine.Trainer, valid_loss: float | None = None, final: bool = True) -> None:
        """Nothing."""


class Plain:
    """The same steps by hand. `loss(hidden_SBH, labels_BS)` returns the sum over tokens."""

    def __init__(self, opened: Session, batches: list[torch.Tensor], fused: bool, watch: Watch) -> None:
        self.batches, self.micro, self.done, self.watch = batches, opened.cfg.train.micro_batch_size, 0, watch
        self.model, train = opened.load_whole(), opened.cfg.train
        chunk, world = self.model.chunks[0], opened.world
        config, scratch = chunk.config, Scratch()
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.wrapped = DistributedDataParallel(config, buffers, chunk)
        config.finalize_model_grads_func, config.no_sync_func = finalize_model_grads, self.wrapped.no_sync
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=train.lr, min_lr=train.min_lr, weight_decay=train.weight_decay, adam_beta1=train.beta1, adam_beta2=train.beta2,
                clip_grad=train.clip_grad, bf16=config.bf16, params_dtype=config.params_dtype, use_distributed_optimizer=True,
            ),
            [self.wrapped], use_gloo_process_groups=False,
        )  # fmt: skip
        for inner in self.optimizer.chained_optimizers:  # torch's own one-pass kernel, which minitron turns on too
            for group in inner.optimizer.param_groups:
                group.update(fused=True, foreach=False)
        config.grad_scale_func = self.optimizer.scale_loss
        decay = train.weight_decay
        # 0.0: where the warm-up starts; then the weight decay's start, end, length and form
        rates, decay = (0.0, train.lr, train.min_lr, train.warmup, train.steps, train.schedule), train.weight_decay
        self.scheduler = OptimizerParamScheduler(self.optimizer, *rates, decay, decay, 0, "constant")

        def whole_logits(hidden_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
            logits_SBV, _ = chunk.output_layer(hidden_SBH, weight=self.model.head_weight())
            return vocab_parallel_cross_entropy(logits_SBV.float(), labels_BS.t().contiguous()).sum()

        def fused_loss(hidden_SBH: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
            mask_T, labels_T = torch.ones(labels_BS.numel(), dtype=torch.bool), labels_BS.t().flatten()
            head = Head(self.model.head_weight())
            return linear_distillation(hidden_SBH.flatten(0, 1), head, None, mask_T, world, NEXT_TOKEN, labels_T, scratch).total

        self.loss = fused_loss if fused else whole_logits

    def _forward(self, microbatches: Any, wrapped: Any) -> tuple[torch.Tensor, Callable[..., Any]]:
        tokens_BT = next(microbatches)
        labels_BS = tokens_BT[:, 1:]

        def reduced(hidden_SBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
            loss = self.loss(hidden_SBH, labels_BS)
            return loss, torch.tensor(labels_BS.numel(), dtype=torch.int), {"loss": loss.detach()}

        return wrapped(tokens_BT[:, :-1], None, None), reduced

    def step(self) -> tuple[float, Laps]:
        """(loss, seconds of each part) of the next step."""
        self.watch.start()
        tokens_BT = self.batches[self.done]
        microbatches = tokens_BT.split(self.micro)
        self.watch.lap("data")
        self.wrapped.train()
        self.wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.scheduler.step(1)
        logs = get_forward_backward_func()(
            forward_step_func=self._forward, data_iterator=iter(microbatches), model=self.wrapped, num_microbatches=len(microbatches),
            seq_length=tokens_BT.shape[1] - 1, micro_batch_size=self.micro, forward_only=False,
        )  # fmt: skip
        self.watch.lap("forward, backward")
        self.optimizer.step()
        self.watch.lap("optimizer")
        loss = sum(log["loss"].item() for log in logs) / tokens_BT[:, 1:].numel()
        self.watch.lap("metrics")
        self.done += 1
        return loss, self.watch.laps


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OURS, FUSED, WHOLE, AGAIN = "minitron train", "Megatron, fused loss", "Megatron, whole logits", "Megatron, fused loss, again"
WORDS = ("Document", "The", "quick", "brown", "fox", ".")


def narrow(folder: Path) -> str:
    """Writes a random model of SmolLM2's layers and heads, 72 channels wide, with a tokenizer of a few words; the setting that names it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(("<end>", *WORDS))}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    sizes = {"hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    LlamaForCausalLM(LlamaConfig(vocab_size=1 + len(WORDS), tie_word_embeddings=True, **sizes)).save_pretrained(folder)
    return f'model.path="{folder}"'


class Operators(NamedTuple):
    """What torch's profiler saw of a step of each side: how many operators, and the seconds of those that this side runs more of than the other."""

    count: int
    more: float


def operators(one: Callable[[], Any], other: Callable[[], Any]) -> list[Operators]:
    """Of a step of each."""
    seen: list[dict[str, tuple[int, float]]] = []
    for step in (one, other):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
        seen.append({event.key: (event.count, event.self_cpu_time_total / 1e6) for event in profile.key_averages()})
    found = []
    for mine, theirs in (seen, seen[::-1]):
        more = {name: count - theirs.get(name, (0, 0.0))[0] for name, (count, _) in mine.items()}
        took = sum(extra * mine[name][1] / mine[name][0] for name, extra in more.items() if extra > 0)  # at the mean of their kind
        found.append(Operators(sum(count for count, _ in mine.values()), took))
    return found


def measure(
    dtype: str, repeats: int, model: str, overrides: list[str], clock: Callable[[], float]
) -> tuple[dict[str, list[Laps]], dict[str, float], list[Operators]]:
    """Seconds of each part of every step of each side, in turns; each side's last loss; operators of minitron's step and of the plain one's."""
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch, "text.jsonl")
        text.write_text("".join(json.dumps({"text": f"Document {number} . " + "The quick brown fox . " * 400}) + "\n" for number in range(40)))
        steps = repeats + 2  # the first also allocates, the last is looked into
        files = [model, f'data.train="{text}"', f'run.dir="{scratch}/run"', f"train.steps={steps}", "train.warmup_steps=1"]
        sizes = ["train.seq_length=256", "train.global_batch_size=4", "train.eval_tokens=256", "logging.progress=false"]
        with session(compose("train", [*files, *sizes, *overrides, f"dtype={dtype}"]), "train") as opened:
            made = (step_batches(opened.training_samples, opened.cfg, opened.world, step) for step in range(steps))
            batches = [torch.cat([batch.tokens_BT for batch in step]) for step in made]
            sides: dict[str, Ours | Plain] = {
                FUSED: Plain(opened, batches, fused=True, watch=Watch(clock)),
                OURS: Ours(opened, Watch(clock)),
                AGAIN: Plain(opened, batches, fused=True, watch=Watch(clock)),
                WHOLE: Plain(opened, batches, fused=False, watch=Watch(clock)),
            }
            seconds: dict[str, list[Laps]] = {name: [] for name in sides}
            last: dict[str, float] = {}
            for number in range(repeats + 1):
                turn = [*sides][number % len(sides) :] + [*sides][: number % len(sides)]  # what a side leaves in memory meets each of the others:
                turn = turn[::-1] if number // len(sides) % 2 else turn  # in one direction alone, each side would mostly follow the same one
                for name in turn:
                    last[name], laps = sides[name].step()
                    if number > 0:
                        seconds[name].append({**laps, "total": sum(laps.values())})
            return seconds, last, operators(sides[OURS].step, sides[FUSED].step)


def compared(name: str, seconds: dict[str, list[Laps]], other: str) -> list[tuple[Any, ...]]:
    """Rows: a side's step over another's."""
    ratio = statistics.median(a["total"] / b["total"] for a, b in zip(seconds[name], seconds[other], strict=True))
    # what others do on a machine only ever adds to a step: the quickest steps are the least disturbed
    count = max(1, len(seconds[name]) // 4)
    quickest = [sum(sorted(one["total"] for one in seconds[side])[:count]) for side in (name, other)]
    blank = [None] * (1 + len(PARTS))
    return [(f"{name} / {other}", *blank, ratio), ("  the same of the quickest quarter", *blank, quickest[0] / quickest[1])]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=12, help="timed steps of each side and type (default: 12)")
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as train.seq_length=128")
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="cpu: processor time, for a machine that others use too (default: wall)")
    options = parser.parse_args()
    names, rows = (*PARTS, "total"), []
    notes = [
        f"seconds ({options.clock}), medians of {options.repeats} steps after one that is not counted; ratios: of the same turn, the median",
        "last loss: all sides after the same steps on the same samples",
    ]
    for dtype in options.dtypes:
        seconds, last, (mine, theirs) = measure(dtype, options.repeats, "model=smollm2_135m", options.set, CLOCKS[options.clock])
        for name, found in seconds.items():
            rows.append((f"{name}, {dtype}", last[name], *(statistics.median(one[part] for one in found) for part in names)))
        for other in (FUSED, AGAIN, WHOLE):
            rows += compared(OURS, seconds, other)
        rows += compared(AGAIN, seconds, FUSED)
        step = statistics.median(one["total"] for one in seconds[FUSED])
        with tempfile.TemporaryDirectory() as folder:
            thin, _, _ = measure(dtype, 5 * options.repeats, narrow(Path(folder)), options.set, CLOCKS[options.clock])
        added, chance = (statistics.median(a["total"] - b["total"] for a, b in zip(thin[name], thin[FUSED], strict=True)) for name in (OURS, AGAIN))
        share, thin_step = added / step, statistics.median(one["total"] for one in thin[FUSED])
        notes += [
            f"{dtype}, operators of a step: {mine.count:,} here, {theirs.count:,} in the plain loop with the fused loss; those that one has more of "
            f"took {mine.more * 1000:.2f} and {theirs.more * 1000:.2f} ms: {mine.more / step:.3%} and {theirs.more / step:.3%} of a step",
            f"{dtype}, the narrow model: {added * 1000:+.2f} ms on a step of {thin_step * 1000:.1f} ms, {share:.2%} of SmolLM2's step "
            f"(the plain loop against itself: {chance * 1000:+.2f} ms)",
        ]
    columns = {"side": "<", "last loss": ".4f", **dict.fromkeys(names, ".3f")}
    publish("One training step", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
