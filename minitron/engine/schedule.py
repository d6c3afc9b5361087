"""Passes over microbatches through Megatron's own pipeline schedules.

Legend: B microbatch, S sequence (a rank's part under sequence parallelism), H hidden.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, gather_from_sequence_parallel_region

from minitron.engine.model import Model
from minitron.engine.parallel import World

Tensor = torch.Tensor
LossParts = tuple[Tensor, Tensor, dict[str, Tensor]]


def forward_only(
    model: Model,
    microbatches_BS: Sequence[Tensor],
    world: World,
    collect: Callable[[int, Tensor], Any] | None = None,
    after: Callable[[], None] | None = None,
) -> list[Any]:
    """Run input tokens [B, S] through the model without gradients.

    `collect(microbatch, hidden_SBH)` is called with the last hidden states (after the final norm) on the last stage; what it
    returns is returned, one entry per microbatch, there and nowhere else. `after()` is called on every stage after each
    microbatch's pass.
    """

    def step(numbered: Any, chunk: Model) -> tuple[Tensor, Callable[..., Any]]:
        number, tokens_BS = next(numbered)
        hidden_SBH = chunk(tokens_BS.to(world.device), None, None)
        if after is not None:
            after()
        return hidden_SBH, lambda hidden_SBH, non_loss_data: None if collect is None else collect(number, hidden_SBH)

    batch, seq_length = microbatches_BS[0].shape
    model.eval()
    with torch.no_grad():
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(enumerate(microbatches_BS)),
            model=model,
            num_microbatches=len(microbatches_BS),
            seq_length=seq_length,
            micro_batch_size=batch,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return results


def forward_backward(
    model: Any, microbatches_BS: Sequence[Tensor], world: World, loss: Callable[[int, Tensor], LossParts]
) -> list[dict[str, Tensor]]:
    """Forward and backward over a step's microbatches; gradients end reduced over replicas and divided by the global count of tokens.

    `loss(microbatch, hidden_SBH)` runs on the last stage and returns the sum over its tokens, how many they are (int), and
    detached sums to log; the logs are returned on the last stage.
    """

    def step(numbered: Any, chunk: Any) -> tuple[Tensor, Callable[[Tensor], LossParts]]:
        number, tokens_BS = next(numbered)
        return chunk(tokens_BS.to(world.device), None, None), lambda hidden_SBH: loss(number, hidden_SBH)

    batch, seq_length = microbatches_BS[0].shape
    model.train()
    logs: list[dict[str, Tensor]] = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iter(enumerate(microbatches_BS)),
        model=model,
        num_microbatches=len(microbatches_BS),
        seq_length=seq_length,
        micro_batch_size=batch,
        forward_only=False,
    )
    return logs


def whole_sequence(hidden_SBH: Tensor, world: World) -> Tensor:
    """Last hidden states ready for a product with a vocabulary shard: the whole sequence on every tensor rank.

    Each rank then computes only its shard's part of the gradient, so the backward pass sums it over the tensor ranks.
    """
    if world.sequence_parallel:
        whole: Tensor = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=True)
        return whole
    copied: Tensor = copy_to_tensor_model_parallel_region(hidden_SBH)
    return copied
