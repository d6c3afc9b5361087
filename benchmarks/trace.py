"""A distillation step under torch's profiler: what the device and the process do when, as a picture, and where the time goes, as a table.

Two models of random weights, of SmolLM2-135M's sizes and of the demo's target (`--model` takes another pair of benchmarks/real_shapes.py). The
picture has a row for what the device computes, by kind, one for what is copied to and from it, and one for what the process waits for it. On
a CPU the operators stand in for kernels.
"""

import bisect
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import arguments, publish, settle
from real_shapes import PAIRS, TINY, batches_of
from torch.profiler import ProfilerActivity, profile

from minitron import engine
from minitron.arch.arch import Arch
from minitron.config.schema import Config, Distill, Parallel, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss

SMOLLM2 = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, share_embeddings_and_output_weights=True)
MODELS = {"SmolLM2-135M": (SMOLLM2, {"hidden_size": 512, "ffn_hidden_size": 1152}), **PAIRS}
WAITING = ("Synchronize",)  # in the names of CUDA's calls
# parts of names of kernels, and of operators on a CPU, in the order in which they are looked for
KINDS = {
    "attention": ("flash", "fmha", "attention", "sdpa"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "aten::mm", "matmul", "addmm", "bmm", "splitK", "Linear"),
    "optimizer": ("adam", "multi_tensor"),
    "norms": ("norm", "rms"),
    "collectives": ("nccl",),
}
OTHER = "other kernels"


class Span(NamedTuple):
    """Microseconds."""

    row: str
    kind: str
    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    """Of a kernel, by its name."""
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def spans_of(events: Any, on_gpu: bool) -> list[Span]:
    """What is drawn, from the profiler's events."""
    found = []
    for event in events:
        name, start, end = event.name, event.time_range.start, event.time_range.end
        if event.device_type == torch.autograd.DeviceType.CUDA:
            copied = name.startswith(("Memcpy", "Memset"))
            found.append(Span("copies" if copied else "device", "copies" if copied else kind_of(name), name, start, end))
        elif on_gpu and any(part in name for part in WAITING):
            found.append(Span("process waits", "waiting", name, start, end))
        elif not on_gpu and event.cpu_parent is None:
            found.append(Span("device", kind_of(name), name, start, end))
    return found


def busy(spans: list[Span]) -> float:
    """Microseconds in which at least one of them goes on."""
    total = until = 0.0
    for start, end in sorted((span.start, span.end) for span in spans):
        total, until = total + max(0.0, end - max(start, until)), max(until, end)
    return total


def draw(spans: list[Span], path: Path, title: str) -> None:
    """The picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, begin = ["process waits", "copies", "device"], min(span.start for span in spans)
    kinds = sorted({span.kind for span in spans})
    colours = dict(zip(kinds, pyplot.get_cmap("tab10").colors, strict=False))
    figure, axes = pyplot.subplots(figsize=(14, 3))
    for kind in kinds:
        for height, row in enumerate(rows):
            bars = [((span.start - begin) / 1e3, (span.end - span.start) / 1e3) for span in spans if (span.row, span.kind) == (row, kind)]
            axes.broken_barh(bars, (height + 0.1, 0.8), color=colours[kind], linewidth=0)
        axes.plot([], [], linewidth=6, color=colours[kind], label=kind)
    axes.set_ylim(0, len(rows))
    axes.set_yticks([height + 0.5 for height in range(len(rows))], rows)
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.legend(ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def one_step(name: str, cfg: Config, world: engine.World, tiny: bool) -> Any:
    """A step of the pair, ready to be taken again and again."""
    teacher, sizes = MODELS[name]
    if tiny:
        teacher, sizes = teacher.replace(**TINY), {"hidden_size": 48, "ffn_hidden_size": 64}
    models = [engine.random_model(arch, world, engine.DTYPES[cfg.dtype], "torch") for arch in (teacher, teacher.replace(**sizes))]
    models[0].requires_grad_(False)
    trainer, batches = engine.Trainer(models[1], cfg.train, world), batches_of(cfg, teacher.vocab_size)
    loss = distillation_loss(models[1], LiveTeacher(models[0], world), cfg.distill, world)

    def step() -> None:
        trainer.update(batches, loss(trainer.step, batches))
        trainer.step += 1
        settle(world.device)

    return step


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--dtype", default="bf16", choices=engine.DTYPES)
    parser.add_argument("--model", default="SmolLM2-135M", choices=list(MODELS))
    parser.add_argument("--sequences", type=int, default=8, help="of a step, in passes of half of them (default: %(default)s)")
    parser.add_argument("--seq-length", type=int, default=1024)
    parser.add_argument("--chunk-tokens", type=int, default=Distill.chunk_tokens)
    parser.add_argument("--picture", type=Path, default=Path("trace.png"), help="where to draw (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="models of no size, to try the script itself")
    options = parser.parse_args()
    train = Train(
        steps=10**6, global_batch_size=options.sequences, micro_batch_size=max(1, options.sequences // 2),
        seq_length=32 if options.tiny else options.seq_length, lr=1e-5, min_lr=0.0,
    )  # fmt: skip
    with engine.world(Parallel(), options.device, 1) as world:
        cfg = Config(dtype=options.dtype, device=world.device.type, train=train, distill=Distill(chunk_tokens=options.chunk_tokens))
        step, on_gpu = one_step(options.model, cfg, world, options.tiny), world.device.type == "cuda"
        for _ in range(3):
            step()
        with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
            step()
        spans = spans_of(profiler.events(), on_gpu)
    of_device = [span for span in spans if span.row == "device"]
    length = max(span.end for span in spans) - min(span.start for span in spans)
    by_kind: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        by_kind[span.kind].append(span)
    rows = [(kind, len(its), busy(its) / 1e3, busy(its) / length) for kind, its in by_kind.items()]
    slowest = gaps(of_device)
    notes = [
        f"{options.model}, {options.dtype}: a step of {length / 1e3:.1f} ms, the device busy for {busy(of_device) / length:.1%} of it",
        f"the longest times in which the device has nothing to do: {', '.join(f'{gap / 1e3:.2f} ms' for gap in slowest)}",
    ]
    draw(spans, options.picture, notes[0])
    columns = {"kind": "<", "calls": "d", "ms": ".2f", "of the step": ".1%"}
    publish("A step under the profiler", columns, sorted(rows, key=lambda row: -row[2]), notes, options.json)


def gaps(spans: list[Span], most: int = 5) -> list[float]:
    """The longest times, in microseconds, between two spans in which none goes on."""
    found: list[float] = []
    until = None
    for start, end in sorted((span.start, span.end) for span in spans):
        if until is not None and start > until:
            bisect.insort(found, start - until)
        until = end if until is None else max(until, end)
    return found[::-1][:most]


if __name__ == "__main__":
    main()
