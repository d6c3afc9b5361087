"""Passes over microbatches through Megatron's own pipeline schedules.

Legend: B microbatch, S sequence (a rank's part under sequence and context parallelism), H hidden.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from minitron.engine.attention import sequence_part, whole_context
from minitron.engine.batch import Batch
from minitron.engine.model import Chunk, Model
from minitron.engine.parallel import World, inside

Tensor = torch.Tensor
Item = TypeVar("Item")
LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]


class Watch(Protocol):
    """Follows the passes of `forward_only` on every stage, for hooks that must know whose activations they see."""

    def begin(self, microbatch: int | None) -> None:
        """A pass of this microbatch through one of this rank's chunks begins (None: one that only fills the schedule up)."""

    def end(self, microbatch: int) -> None:
        """The microbatch has passed all of this rank's chunks."""


def forward_only(
    model: Model,
    microbatches_BS: Sequence[Tensor],
    world: World,
    collect: Callable[[int, Tensor], Any] | None = None,
    watch: Watch | None = None,
) -> list[Any]:
    """Run input tokens [B, S] through the model without gradients; all microbatches have one shape.

    `collect(microbatch, hidden_SBH)` is called with the last hidden states (after the final norm) on the last stage; what it
    returns is returned, one entry per microbatch, there and nowhere else.
    """
    filled, chunks_left = fill_up(microbatches_BS, world), dict[int, int]()

    def step(numbered: Any, chunk: Chunk) -> tuple[Tensor, Callable[..., Any]]:
        number, tokens_BS = next(numbered)
        real = number < len(microbatches_BS)
        if watch is not None:
            watch.begin(number if real else None)
        hidden_SBH = chunk(sequence_part(tokens_BS, 1, world.cp, world.cp_rank).to(world.device), None, None)
        chunks_left[number] = chunks_left.get(number, world.vpp) - 1
        if watch is not None and real and chunks_left[number] == 0:
            watch.end(number)
        return hidden_SBH, lambda hidden_SBH, non_loss_data: collect(number, hidden_SBH) if collect is not None and real else None

    model.eval()
    with torch.no_grad(), model.on_device():
        results: list[Any] = run_schedule(model.chunks, step, filled, world, forward_only=True)
    return results[: len(microbatches_BS)]


def forward_backward(
    wrapped: Sequence[Any], batches: Sequence[Batch], world: World, loss: Callable[[int, Tensor], LossParts]
) -> list[dict[str, Tensor]]:
    """Forward and backward over a step's microbatches; gradients end reduced over replicas and divided by the global count of tokens.

    `wrapped`: the model's chunks in Megatron's DDP. `loss(microbatch, hidden_SBH)` runs on the last stage and returns the sum
    over its tokens, how many they are (int), and detached sums to log; the logs are returned on the last stage.
    """

    def step(numbered: Any, chunk: Any) -> tuple[Tensor, Callable[[Tensor], LossParts]]:
        number, tokens_BS = next(numbered)
        hidden_SBH = chunk(sequence_part(tokens_BS, 1, world.cp, world.cp_rank).to(world.device), None, None)
        return hidden_SBH, lambda hidden_SBH: loss(number, hidden_SBH)

    for chunk in wrapped:
        chunk.train()
    logs: list[dict[str, Tensor]] = run_schedule(list(wrapped), step, [batch.inputs_BS for batch in batches], world, forward_only=False)
    return logs


def run_schedule(chunks: list[Any], step: Callable[..., Any], microbatches_BS: Sequence[Tensor], world: World, forward_only: bool) -> Any:
    """Megatron's schedule for this layout; `step` gets an iterator of (number, tokens) of its chunk."""
    batch, seq_length = microbatches_BS[0].shape
    iterators = [iter(enumerate(microbatches_BS)) for _ in chunks]
    with inside(world):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if world.vpp > 1 else iterators[0],
            model=chunks if world.vpp > 1 else chunks[0],
            num_microbatches=len(microbatches_BS),
            seq_length=seq_length,
            micro_batch_size=batch,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def fill_up(microbatches_BS: Sequence[Tensor], world: World) -> Sequence[Tensor]:
    """The interleaved schedule wants a multiple of the stages: the last microbatch is repeated, and what comes of it dropped."""
    missing = -len(microbatches_BS) % world.pp if world.vpp > 1 else 0
    return [*microbatches_BS, *[microbatches_BS[-1]] * missing]


def in_passes(items: Iterable[Item], world: World, shape: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Microbatches in the groups that one forward pass takes: of one shape, and enough that pipeline stages are busy most of the time."""
    limit = 1 if world.pp == 1 else 4 * world.pp
    group: list[Item] = []
    for item in items:
        if group and (len(group) == limit or shape(item) != shape(group[0])):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def local_part(whole_BS: Tensor, world: World) -> Tensor:
    """The positions of each sequence that this rank's last hidden states belong to."""
    return sequence_part(whole_BS, 1, world.cp, world.cp_rank)


def whole_positions(part_SB: Tensor, world: World) -> Tensor:
    """Inverse of `local_part` for what lies sequence first: every context rank's positions, in order, on each of them."""
    return part_SB if world.cp == 1 else whole_context(part_SB, world.groups.cp)


def whole_sequence(hidden_SBH: Tensor, world: World) -> Tensor:
    """Last hidden states ready for a product with a vocabulary shard: the whole of the context rank's sequence on every tensor rank.

    Each rank then computes only its shard's part of the gradient, so the backward pass sums it over the tensor ranks.
    """
    if world.sequence_parallel:
        whole: Tensor = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        return whole
    copied: Tensor = copy_to_tensor_model_parallel_region(hidden_SBH)
    return copied
