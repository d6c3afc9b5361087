"""Passes over microbatches through Megatron's own pipeline schedules.

Legend: B microbatch, S sequence (a rank's part under sequence and context parallelism), H hidden.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import is_checkpointing

from minitron.engine.attention import documents_mask, sequence_part, whole_context
from minitron.engine.batch import Batch, to_device
from minitron.engine.model import Chunk, Model
from minitron.engine.parallel import World, inside, most_of_expert_ranks

Tensor = torch.Tensor
Item = TypeVar("Item")
Inputs = tuple[Tensor, Tensor | None]  # tokens [B, S], and the document that each position is of, where documents don't see each other
LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]


class Watch(Protocol):
    """Follows the forward passes on every stage, for hooks that must know whose activations they see."""

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
    documents_BS: Sequence[Tensor | None] | None = None,
) -> list[Any]:
    """Run input tokens [B, S] through the model without gradients; all microbatches have one shape.

    `documents_BS`: of each microbatch, as in `Batch` (None: every position sees all before it). Ranks that share out the experts call it together;
    they may have different numbers of microbatches, or none.
    `collect(microbatch, hidden_SBH)` is called with the last hidden states (after the final norm) on the last stage; what it
    returns is returned, one entry per microbatch, there and nowhere else.
    """
    inputs: list[Inputs] = list(zip(microbatches_BS, documents_BS or [None] * len(microbatches_BS), strict=True))
    count, one_pass = len(inputs), followed(watch, len(inputs), world)

    def step(numbered: Any, chunk: Chunk) -> tuple[Tensor, Callable[..., Any]]:
        number, inputs = next(numbered)
        with one_pass(number):
            hidden_SBH = run_chunk(chunk, inputs, world)
        return hidden_SBH, lambda hidden_SBH, non_loss_data: collect(number, hidden_SBH) if collect is not None and number < count else None

    filled = fill_up(inputs, world)
    if not filled:
        return []
    model.eval()
    with torch.no_grad(), model.on_device():
        results: list[Any] = run_schedule(model.chunks, step, filled, world, forward_only=True)
    return results[:count]


def followed(watch: Watch | None, count: int, world: World) -> Callable[[int], contextlib.AbstractContextManager[None]]:
    """What to run each pass of a microbatch through a chunk in, by its number, so that `watch` hears of it; those from `count` on fill up."""
    chunks_left: dict[int, int] = {}

    @contextlib.contextmanager
    def one_pass(number: int) -> Iterator[None]:
        if watch is None:
            yield
            return
        watch.begin(number if number < count else None)
        yield
        chunks_left[number] = chunks_left.get(number, world.vpp) - 1
        if number < count and chunks_left[number] == 0:
            watch.end(number)

    return one_pass


def forward_backward(
    wrapped: Sequence[Any], batches: Sequence[Batch], world: World, loss: Callable[[int, Tensor], LossParts], watch: Watch | None = None
) -> list[dict[str, Tensor]]:
    """Forward and backward over a step's microbatches; gradients end reduced over replicas and divided by the global count of tokens.

    `wrapped`: the model's chunks in Megatron's DDP. `loss(microbatch, hidden_SBH)` runs on the last stage and returns the sum
    over its tokens, how many they are (int), and detached sums to log; the logs are returned on the last stage. `watch` follows
    the forward passes.
    """
    one_pass = followed(watch, len(batches), world)

    def step(numbered: Any, chunk: Any) -> tuple[Tensor, Callable[[Tensor], LossParts]]:
        number, inputs = next(numbered)
        with one_pass(number):
            hidden_SBH = run_chunk(chunk, inputs, world)
        return hidden_SBH, lambda hidden_SBH: loss(number, hidden_SBH)

    for chunk in wrapped:
        chunk.train()
    inputs: list[Inputs] = [(batch.inputs_BS, batch.documents_BS) for batch in batches]
    logs: list[dict[str, Tensor]] = run_schedule(list(wrapped), step, inputs, world, forward_only=False)
    return logs


def recomputing() -> bool:
    """Whether this is the second pass through a block whose activations were not held (train.recompute), inside the backward pass."""
    return bool(is_checkpointing()) and torch.is_grad_enabled()


def run_chunk(chunk: Any, inputs: Inputs, world: World) -> Tensor:
    """A chunk's pass over this rank's part of a microbatch. The mask goes to every chunk by itself: stages pass on hidden states alone."""
    tokens_BS, documents_BS = inputs
    mask = None if documents_BS is None else documents_mask(to_device(documents_BS, world.device), world.cp, world.cp_rank)
    hidden_SBH: Tensor = chunk(to_device(sequence_part(tokens_BS, 1, world.cp, world.cp_rank), world.device), None, mask)
    return hidden_SBH


def run_schedule(chunks: list[Any], step: Callable[..., Any], microbatches: Sequence[Inputs], world: World, forward_only: bool) -> Any:
    """Megatron's schedule for this layout; `step` gets an iterator of (number, inputs) of its chunk."""
    batch, seq_length = microbatches[0][0].shape
    iterators = [iter(enumerate(microbatches)) for _ in chunks]
    with inside(world):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if world.vpp > 1 else iterators[0],
            model=chunks if world.vpp > 1 else chunks[0],
            num_microbatches=len(microbatches),
            seq_length=seq_length,
            micro_batch_size=batch,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
        )


def fill_up(microbatches: Sequence[Inputs], world: World) -> Sequence[Inputs]:
    """With the last microbatch repeated, so that every rank passes as many as its schedule and its peers need; what comes of those is dropped.

    The interleaved schedule wants a multiple of the stages. Where ranks share out the experts, each sends its tokens to all of them in every pass:
    one without a microbatch passes a few tokens of its own.
    """
    count = most_of_expert_ranks(len(microbatches), world)
    count += -count % world.pp if world.vpp > 1 else 0
    missing = count - len(microbatches)
    return [*microbatches, *[microbatches[-1] if microbatches else (least_tokens(world), None)] * missing]


def least_tokens(world: World) -> Tensor:
    """The shortest sequence that the ranks which share one can, [1, S]."""
    return torch.zeros(1, (2 * world.cp if world.cp > 1 else 1) * (world.tp if world.sequence_parallel else 1), dtype=torch.int64)


def in_passes(items: Iterable[Item], world: World, shape: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Microbatches in the groups that one forward pass takes: of one shape, and enough that pipeline stages are busy most of the time.

    Where ranks share out the experts they go on until all are done: one that has no more gets empty groups, and must pass these too.
    """
    groups = groups_of_one_shape(items, 1 if world.pp == 1 else 4 * world.pp, shape)
    while most_of_expert_ranks(len(group := next(groups, [])), world):
        yield group


def groups_of_one_shape(items: Iterable[Item], limit: int, shape: Callable[[Item], Any]) -> Iterator[list[Item]]:
    """Runs of items of one shape, at most `limit` long."""
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
