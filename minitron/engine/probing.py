"""What a model predicts without runs of its layers, many runs in one walk through the layers.

What goes into layer i is the same for every probe that leaves out layers from i on. It is computed once, by a walk through the
layers; a probe branches off it and goes on behind the layers that it leaves out. Leaving out each of L layers in turn takes about L / 2
passes through the layers in place of L.

Between pipeline stages travel, in one tensor, the streams that later stages go on with: the probes begun so far, then the walk itself.
Megatron's schedules carry it, so stages work at the same time, on different microbatches; of a probe a stage computes what its layers are.
In a chunk of layers a few probes at a time go through to its end, side by side in the batch, where microbatches are small. So beside what
comes in and goes out (between stages, at most as many hidden states of a microbatch as there are probes, and one) a chunk holds those of
TOGETHER tokens, or of two streams; a model on one stage holds no more than these.

Legend: B microbatch, S sequence (a rank's part under sequence and context parallelism), T = S + 1 tokens, H hidden, P probes, R sums,
K = streams x B.
"""

import collections
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch

from minitron.engine.batch import to_device
from minitron.engine.model import Chunk, Model
from minitron.engine.parallel import World
from minitron.engine.schedule import fill_up, in_passes, local_part, run_schedule
from minitron.engine.scoring import from_last_stages, position_losses

Tensor = torch.Tensor
TOGETHER = 2048  # tokens of probes that go through layers side by side: more makes products no faster


class Scored(NamedTuple):
    """A microbatch of text whose predictions are judged."""

    tokens_BT: Tensor
    counted_BS: Tensor  # bool: the prediction made at a position counts
    rows_B: Tensor  # int: which sum each sequence adds to


def losses_without(
    model: Model, batches: Iterable[Scored], world: World, runs: Sequence[range], rows: int, advance: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Sums of losses in nats without each run of layers, [P, R] in the order of `runs`, and how many predictions they are over, [R]; float64.

    Every rank returns the same. `batches` are this replica's; `advance` is told how many of them are done. Of L layers range(L, L) leaves out none.
    """
    assert all(run.stop <= model.arch.num_layers for run in runs)
    order = sorted(range(len(runs)), key=lambda number: runs[number].start)  # a chunk of layers knows by it what comes in
    probes = [runs[number] for number in order]
    sums_PR = torch.zeros(len(runs), rows, dtype=torch.float64, device=world.device)
    counts_R = torch.zeros(rows, dtype=torch.float64, device=world.device)
    model.eval()
    with torch.no_grad(), model.on_device(), any_shape(model):
        for group in in_passes(batches, world, lambda batch: batch.tokens_BT.shape):
            for number, sums_PB in enumerate(one_pass(model, group, world, probes)):
                sums_PR.index_add_(1, to_device(group[number].rows_B, world.device), sums_PB)
            for batch in group:
                counted_B = to_device(local_part(batch.counted_BS, world).sum(dim=1), world.device)
                counts_R.index_add_(0, to_device(batch.rows_B, world.device), counted_B.to(counts_R.dtype))
            if advance is not None:
                advance(len(group))
    packed = from_last_stages(torch.cat([sums_PR, counts_R[None]]), world)
    return packed[:-1].index_select(0, to_device(torch.argsort(torch.tensor(order)), world.device)), packed[-1]


def one_pass(model: Model, group: Sequence[Scored], world: World, probes: Sequence[range]) -> list[Tensor]:
    """Sums over the counted predictions of each sequence, [P, B] of every microbatch, on the last stage; nothing elsewhere."""

    def step(numbered: Any, chunk: Chunk) -> tuple[Tensor, Callable[..., Tensor | None]]:
        number, (inputs_BS, _) = next(numbered)
        found = streams(chunk, inputs_BS, world, probes)
        if not chunk.post_process:
            return torch.cat(list(found), dim=1), nothing_to_collect
        if number >= len(group):  # it only fills up
            collections.deque(found, maxlen=0)
            return torch.zeros(()), nothing_to_collect
        sums_PB = torch.cat([sums_of(hidden_SKH, group[number]) for hidden_SKH in found])
        return sums_PB, lambda sums_PB, non_loss_data: sums_PB

    def sums_of(hidden_SKH: Tensor, batch: Scored) -> Tensor:
        count = hidden_SKH.size(1) // len(batch.tokens_BT)
        hidden_SKH = model.chunks[-1].decoder.final_layernorm(hidden_SKH)
        losses_KS = position_losses(model, hidden_SKH, batch.tokens_BT.repeat(count, 1), world)
        counted_KS = to_device(local_part(batch.counted_BS, world), world.device).repeat(count, 1)
        return torch.where(counted_KS, losses_KS.double(), 0.0).sum(dim=1).view(count, -1)

    inputs: list[Any] = [(batch.tokens_BT[:, :-1], None) for batch in group]
    sums: list[Tensor] = run_schedule(model.chunks, step, fill_up(inputs, world), world, forward_only=True)
    return sums[: len(group)]


def streams(chunk: Chunk, inputs_BS: Tensor, world: World, probes: Sequence[range]) -> Iterator[Tensor]:
    """What comes out of a chunk's layers, side by side in [S, K, H]: the probes that have begun by its end, in their order, then the walk itself
    where a later chunk goes on with it. `probes` are in the order in which they begin."""
    layers = list(chunk.decoder.layers)
    first = layers[0].layer_number - 1
    end = first + len(layers)
    angles = chunk.angles(inputs_BS.size(1))

    def through(hidden_SKH: Tensor, number: int) -> Tensor:
        hidden_SKH, _ = layers[number - first](hidden_states=hidden_SKH, attention_mask=None, rotary_pos_emb=angles)
        return hidden_SKH

    def to_the_end(members: list[tuple[int, Tensor]]) -> Tensor:
        """Streams, each with the layer that it goes on with, side by side from where they meet."""
        joined = sorted(range(len(members)), key=lambda member: members[member][0])
        number, side_by_side = first, members[joined[0]][1][:, :0]
        for member in joined:
            begin, hidden_SBH = members[member]
            while number < min(begin, end):
                side_by_side = through(side_by_side, number) if side_by_side.size(1) else side_by_side
                number += 1
            side_by_side = torch.cat([side_by_side, hidden_SBH], dim=1)
        for rest in range(number, end):
            side_by_side = through(side_by_side, rest)
        streams_SBH = side_by_side.chunk(len(members), dim=1)
        return side_by_side if joined == sorted(joined) else torch.cat([streams_SBH[joined.index(n)] for n in range(len(members))], dim=1)

    def beginnings() -> Iterator[tuple[int, Tensor]]:
        """The layer that each probe goes on with here and what goes into it; then, where the walk goes on behind this chunk, its end."""
        begun = [probe for probe in probes if probe.start < first]
        waiting = list(probes[len(begun) :])
        if chunk.pre_process:
            incoming = [chunk.embedding(input_ids=to_device(local_part(inputs_BS, world), world.device), position_ids=None)]
        else:
            incoming = list(chunk.decoder.input_tensor.chunk(len(begun) + bool(waiting), dim=1))
        for probe in begun:
            yield max(probe.stop, first), incoming.pop(0)
        for number in range(first, end):
            while waiting and waiting[0].start == number:
                yield waiting.pop(0).stop, incoming[0]
            if not waiting:
                return
            incoming[0] = through(incoming[0].contiguous(), number)
        yield end, incoming[0]

    # where experts are shared, replicas whose microbatches differ in shape go through each layer as often as one another
    source, most = beginnings(), 1 if world.ep > 1 else max(1, TOGETHER // inputs_BS.numel())
    while members := list(islice(source, most)):
        yield to_the_end(members)


def nothing_to_collect(output: Tensor, non_loss_data: bool) -> None:
    """What stages before the last one find: Megatron asks the last one alone."""


@contextlib.contextmanager
def any_shape(model: Model) -> Iterator[None]:
    """Stages tell each other the shape of what they send, instead of knowing it beforehand."""
    before, model.config.variable_seq_lengths = model.config.variable_seq_lengths, True
    try:
        yield
    finally:
        model.config.variable_seq_lengths = before
