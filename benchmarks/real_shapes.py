"""Models of real shapes, of random weights and from their sizes alone, on one device: what a distillation step, calibration and a cut take.

Each row's rate is compared with that of a large product of matrices, measured here first: the share is model FLOP utilisation against
what the device can do, and not against its data sheet. FLOPs are those of minitron's `mfu`: matrices, attention scores at full length and heads, a
backward pass as two forward passes, the teacher's forward too, nothing that is computed twice.

distill: steps of teacher and student, without a save; the loss's share is its time, gradients included, as marks in the device's queue tell it, and
waits are the calls of a step that made the process wait for the device. calibrate: forward passes of the teacher, without its head, with and
without the hooks. cut: `reslice` in place, beside one copy of all that stays.
A model that would not fit the device with its optimizer's state has fewer blocks of the same width: `blocks` says how many there are.
"""

import dataclasses
import gc
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import arguments, matmul_rate, publish, seconds, settle

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.counts import count, training_flops
from minitron.config.schema import Config, Distill, Parallel, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.importance.hooks import Probes
from minitron.importance.scores import random_scores
from minitron.launching.memory import memory
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice

ROPE = '{"rope_theta": 500000.0, "rope_type": "default"}'
LLAMA_1B = Arch("llama", 16, 2048, 8192, 32, 8, 64, 128256, 131072, share_embeddings_and_output_weights=True, rope=ROPE)
LLAMA_8B = Arch("llama", 32, 4096, 14336, 32, 8, 128, 128256, 131072, rope=ROPE)
# teacher and the sizes that the student differs in; the second is the width of Llama-3.1-Minitron-4B (arXiv 2408.11796)
PAIRS: dict[str, tuple[Arch, dict[str, int]]] = {
    "Llama-3.2-1B": (LLAMA_1B, {"hidden_size": 1536, "ffn_hidden_size": 6144}),
    "Llama-3.1-8B": (LLAMA_8B, {"hidden_size": 3072, "ffn_hidden_size": 9216}),
}
TINY = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "vocab_size": 512,
}
FILLED = 0.9  # of the device's free memory
Row = tuple[Any, ...]


def fitting(teacher: Arch, sizes: dict[str, int], cfg: Config, free: float) -> tuple[Arch, Arch]:
    """(teacher, student) with as many blocks as fit into `free` bytes, by what `minitron plan` says of memory."""
    for layers in range(teacher.num_layers, 0, -1):
        pair = teacher.replace(num_layers=layers), teacher.replace(num_layers=layers, **sizes)
        if memory(pair[1], pair[0], cfg, 1)[0].total <= free:
            break
    return pair


class Marks:
    """Pairs of moments on the device, whose distance is asked for when all is done: a question before would be waited for."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.pairs = device, list[tuple[Any, Any]]()

    def around(self, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action, between two marks."""

        def marked(*args: Any) -> Any:
            start = engine.now(self.device)
            found = action(*args)
            self.pairs.append((start, engine.now(self.device)))
            return found

        return marked

    def seconds(self) -> float:
        """All of them together, and forget them."""
        total, self.pairs = sum(engine.between(*pair) for pair in self.pairs) / 1e3, []
        return total


def waits(action: Callable[[], Any], device: torch.device) -> int | None:
    """How often a process waits for the GPU in an action, as torch notes it; None on a CPU, where nobody waits."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in said)


def peak_gib(device: torch.device) -> float | None:
    """The most that torch's tensors took since the last call, in GiB; None on a CPU."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def batches_of(cfg: Config, vocab: int) -> list[engine.Batch]:
    """Random tokens of a step."""
    shape = cfg.train.global_batch_size, cfg.train.seq_length + 1
    return [engine.Batch(part) for part in torch.randint(0, vocab, shape).split(cfg.train.micro_batch_size)]


def distillation(name: str, teacher: Arch, student: Arch, cfg: Config, world: engine.World, repeats: int, rate: float) -> Row:
    """Steps of the two, side by side."""
    dtype = engine.DTYPES[cfg.dtype]
    models = [engine.random_model(arch, world, dtype, "torch") for arch in (teacher, student)]
    models[0].requires_grad_(False)
    trainer, marks = engine.Trainer(models[1], cfg.train, world), Marks(world.device)
    loss, batches = distillation_loss(models[1], LiveTeacher(models[0], world), cfg.distill, world), batches_of(cfg, teacher.vocab_size)

    def step() -> None:
        asked = loss(trainer.step, batches)
        trainer.update(batches, dataclasses.replace(asked, last=marks.around(asked.last)))
        trainer.step += 1

    peak_gib(world.device)
    step()  # makes the optimizer's state
    waited = waits(step, world.device)
    marks.pairs.clear()
    taken = [(seconds(step, world.device), marks.seconds()) for _ in range(repeats)]
    whole, of_loss = (statistics.median(one) for one in zip(*taken, strict=True))
    tokens = cfg.train.global_batch_size * cfg.train.seq_length
    flops = training_flops(student, cfg.train.seq_length, teacher) * tokens / whole
    trainer.close()
    share = {"loss": of_loss / whole, "waits": waited}
    return row(f"distill {name}", teacher, whole, tokens, flops, rate, peak_gib(world.device), share)


def calibration(name: str, arch: Arch, cfg: Config, world: engine.World, repeats: int, rate: float) -> Row:
    """Forward passes with hooks, and without, in turns."""
    model = engine.random_model(arch, world, engine.DTYPES[cfg.dtype], "torch")
    batches = [batch.inputs_BS for batch in batches_of(cfg, arch.vocab_size)]

    def plain() -> None:
        engine.forward_only(model, batches, world)

    def hooked() -> None:
        probes = Probes(model, world, "mean", "l2", cfg.train.seq_length)
        with probes.attached():
            engine.forward_only(model, batches, world, watch=probes)

    peak_gib(world.device)
    plain()
    hooked()
    turns = [(seconds(plain, world.device), seconds(hooked, world.device)) for _ in range(repeats)]
    cost, whole = statistics.median(b / a - 1 for a, b in turns), statistics.median(b for _, b in turns)
    tokens = cfg.train.global_batch_size * cfg.train.seq_length
    flops = (count(arch, cfg.train.seq_length).flops_per_token - 2 * arch.vocab_size * arch.hidden_size) * tokens / whole
    return row(f"calibrate {name}", arch, whole, tokens, flops, rate, peak_gib(world.device), {"hooks": cost, "waits": waits(hooked, world.device)})


def cut(name: str, teacher: Arch, student: Arch, cfg: Config, world: engine.World) -> Row:
    """A cut in place, and a copy of what stays. Which units stay does not matter for the time."""
    model, scores = engine.random_model(teacher, world, engine.DTYPES[cfg.dtype], "torch"), random_scores(teacher, 1)
    keep, kept = select(scores, teacher, student), list[engine.Model]()
    peak_gib(world.device)
    with torch.no_grad():
        whole = seconds(lambda: kept.append(reslice(model, keep, student, world)), world.device)
        peak = peak_gib(world.device)
        copies = seconds(lambda: [parameter.detach().clone() for parameter in kept[0].parameters()], world.device)
    return row(f"cut {name}", teacher, whole, None, None, 1.0, peak, {"one copy": copies / whole})


def row(what: str, arch: Arch, whole: float, tokens: int | None, flops: float | None, rate: float, peak: float | None, notes: dict[str, Any]) -> Row:
    """As the table has it: shares in per cent, counts as they are."""
    told = ", ".join(f"{key} {value:.1%}" if isinstance(value, float) else f"{key} {value}" for key, value in notes.items() if value is not None)
    speed = None if flops is None else flops / 1e12
    return what, arch.num_layers, whole, tokens and tokens / whole, speed, flops and flops / rate, peak, told


def measure(name: str, options: Any, world: engine.World, rate: float) -> list[Row]:
    """All rows of one model."""
    teacher, sizes = PAIRS[name]
    if options.tiny:
        teacher, sizes = teacher.replace(**TINY), {"hidden_size": 48, "ffn_hidden_size": 64}
    length = 64 if options.tiny else options.seq_length
    train = Train(
        steps=10**6, global_batch_size=options.sequences, micro_batch_size=options.micro_batch, seq_length=length, lr=1e-5, min_lr=0.0,
        recompute=options.recompute,
    )  # fmt: skip
    distill = Distill(chunk_tokens=64 if options.tiny else options.chunk_tokens)
    cfg = Config(dtype=options.dtype, device=world.device.type, spec="torch", train=train, distill=distill)
    pair = fitting(teacher, sizes, cfg, FILLED * engine.free_memory(world.device))
    whole = teacher, teacher.replace(**sizes)
    found: list[Row] = []
    todo: dict[str, Callable[[], Row]] = {
        "distill": lambda: distillation(name, *pair, cfg, world, options.repeats, rate),
        "calibrate": lambda: calibration(name, teacher, cfg, world, options.repeats, rate),
        "cut": lambda: cut(name, *whole, cfg, world),
    }
    for what in options.only:
        try:
            found.append(todo[what]())
        except torch.OutOfMemoryError as error:
            found.append((f"{what} {name}", None, None, None, None, None, None, f"out of memory: {str(error).splitlines()[0]}"))
        gc.collect()
        settle(world.device)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=engine.DTYPES)
    parser.add_argument("--models", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--only", nargs="+", default=["distill", "calibrate", "cut"], choices=("distill", "calibrate", "cut"))
    parser.add_argument("--sequences", type=int, default=4, help="of a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences of a pass (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--chunk-tokens", type=int, default=Distill.chunk_tokens, help="tokens of a chunk of the loss (default: %(default)s)")
    parser.add_argument("--recompute", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--repeats", type=int, default=5, help="timed steps and turns, whose median counts (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the script itself")
    options = parser.parse_args()
    with engine.world(Parallel(), options.device, 1) as world:
        rate = matmul_rate(engine.DTYPES[options.dtype], world.device)
        rows = [one for name in options.models for one in measure(name, options, world, rate)]
    columns = {"what": "<", "blocks": "d", "seconds": ".3f", "tokens/s": ",.0f", "TFLOP/s": ".2f", "of a product": ".1%", "peak GiB": ".1f", "": ""}
    shape = "tiny" if options.tiny else f"{options.sequences} x {options.seq_length} tokens in passes of {options.micro_batch}"
    notes = [
        f"{options.dtype}, {shape}; a large product: {rate / 1e12:.2f} TFLOP/s; medians of {options.repeats}",
        "loss: the loss's share of a step; waits: how often the process waits for the device in one; hooks: what they add to the passes",
    ]
    publish("Real shapes on one device", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
