"""How long forward passes take, on this device and layout: of a whole model, and of the parts that models of other depths are made of.

Legend: B sequences, S positions, T = B x S tokens, C tokens of one chunk, v vocabulary rows of this rank, H hidden.
"""

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from minitron.arch.arch import Arch
from minitron.engine.checkpoint import empty_model
from minitron.engine.model import Model
from minitron.engine.parallel import World
from minitron.engine.schedule import forward_only, whole_sequence
from minitron.engine.vocab import live_head

Tensor = torch.Tensor
BLOCKS = 2  # of each of a probe's chunks; the last one is timed, which runs like those in the middle of a deep model
WARM_UP = 2  # passes that are not counted
SECONDS, MOST = 2.0, 100  # what short passes are repeated for, and how often at most
CHUNK = 512  # tokens whose logits are made at a time: all of a long text's at once may not fit


class Load(NamedTuple):
    """What a pass reads: `batch_size` sequences of `seq_length` tokens. `repeats`: least number of passes whose median counts."""

    batch_size: int
    seq_length: int
    repeats: int = 5


class Parts(NamedTuple):
    """Milliseconds of one pass through a block; of what comes before the blocks on the first stage; of final norm and head on the last one."""

    block: float
    embedding: float
    head: float


def time_parts(arch: Arch, load: Load, world: World, dtype: torch.dtype, spec: str) -> Parts:
    """The parts of a model of these sizes, whatever its depth. Called by every rank together; each returns the same, the slowest rank's."""
    model = random_model(arch.replace(num_layers=BLOCKS * world.pp * world.vpp), world, dtype, spec)
    block = model.chunks[-1].decoder.layers[BLOCKS - 1]
    marks: list[tuple[str, Any]] = []

    def mark(name: str) -> Callable[..., None]:
        return lambda *unused: marks.append((name, now(world.device)))

    hooks = [
        model.chunks[0].register_forward_pre_hook(mark("start")),
        model.chunks[0].decoder.layers[0].register_forward_pre_hook(mark("blocks")),
        block.register_forward_pre_hook(mark("block")),
        block.register_forward_hook(mark("block_end")),
    ]

    def once() -> Parts:
        marks.clear()
        run(model, load, world, lambda: mark("end")())
        at = dict(reversed(marks))  # the first of each: over virtual stages the schedule repeats the batch to fill up
        return Parts(
            block=between(at["block"], at["block_end"]),
            embedding=between(at["start"], at["blocks"]) if world.is_first_stage else 0.0,
            head=between(at["block_end"], at["end"]) if world.is_last_stage else 0.0,
        )

    found = Parts(*repeated(once, load, world))
    for hook in hooks:
        hook.remove()
    return found


def time_forward(arch: Arch, load: Load, world: World, dtype: torch.dtype, spec: str) -> float:
    """Milliseconds of a pass through a whole model of these sizes, with random weights. Called by every rank together; each returns the same.

    Over virtual stages it holds the batches that the schedule fills up with.
    """
    model = random_model(arch, world, dtype, spec)

    def once() -> tuple[float]:
        world.barrier()
        start = now(world.device)
        run(model, load, world)
        return (between(start, now(world.device)),)

    return repeated(once, load, world)[0]


def repeated(once: Callable[[], Sequence[float]], load: Load, world: World) -> list[float]:
    """The medians of what a pass measures, the slowest rank's, over load.repeats passes or more where they are short: a moment tells little."""
    for _ in range(WARM_UP):
        began = time.perf_counter()
        once()
    each = slowest([time.perf_counter() - began], world)[0]
    count = max(load.repeats, min(MOST, math.ceil(SECONDS / each)))
    for _ in range(count // 2):  # processors, allocators and threads take their time to run as fast as they do from then on
        once()
    return slowest([median(values) for values in zip(*(once() for _ in range(count)), strict=True)], world)


def random_model(arch: Arch, world: World, dtype: torch.dtype, spec: str) -> Model:
    """A model with weights of the usual size: what numbers a pass multiplies must not matter, not-a-number and denormal ones would."""
    model = empty_model(arch, world, dtype, spec)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def run(model: Model, load: Load, world: World, after: Callable[[], None] | None = None) -> None:
    """One pass, logits included; `after` is called at its end on the last stage.

    The tokens are drawn, each replica's by its number: of equal ones a router would send all to the same experts.
    """
    drawn = torch.Generator().manual_seed(world.dp_rank)
    tokens_BS = torch.randint(model.arch.vocab_size, (load.batch_size, load.seq_length), generator=drawn)

    def collect(number: int, hidden_SBH: Tensor) -> None:
        weight_vH, _ = live_head(model, world)
        for hidden_CH in whole_sequence(hidden_SBH, world).flatten(0, 1).split(CHUNK):
            hidden_CH @ weight_vH.t()  # logits_Cv
        if after is not None:
            after()

    forward_only(model, [tokens_BS], world, collect)


def now(device: torch.device) -> Any:
    """This moment: of a GPU a mark in its stream of work, of a CPU the clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Milliseconds from one moment to another."""
    if isinstance(start, float):
        return 1e3 * float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end))


def slowest(values: list[float], world: World) -> list[float]:
    """The largest of each value over all ranks, on every rank."""
    if world.size == 1:
        return values
    most = torch.tensor(values, dtype=torch.float64, device=world.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return [float(value) for value in most]
