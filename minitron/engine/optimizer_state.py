"""What Megatron 0.16.1's distributed optimizer needs to save its state right, and to load it where torch's AdamW is inside.

Each function says what goes wrong without it; tests/engine/test_checkpoint.py shows that it does.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def padding_stays(optimizer: Any) -> Iterator[None]:
    """Megatron gathers a buffer's state without the padding between its buckets, and then reads it at offsets that count the padding.

    A tied embedding over pipeline stages has a bucket of its own, so everything behind it would be saved shifted. Here the
    padding is put back in between.
    """
    parts = [part for part in optimizer.chained_optimizers if hasattr(part, "get_parameter_state_dp_zero")]

    def padded(part: Any) -> Callable[..., Any]:
        gather = part.get_parameter_state_dp_zero

        def gathered(*args: Any, **kwargs: Any) -> Any:
            state = gather(*args, **kwargs)
            for number, buffer in enumerate(part.buffers if state is not None else []):
                for tensors in state[number].values():
                    for key in ("param", "exp_avg", "exp_avg_sq"):
                        tensors[key] = spread(tensors[key], buffer)
            return state

        return gathered

    for part in parts:
        part.get_parameter_state_dp_zero = padded(part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero


def spread(packed: torch.Tensor, buffer: Any) -> torch.Tensor:
    """The elements of each of a buffer's buckets, which lie one after the other in `packed`, at their places in the buffer."""
    whole, start = packed.new_zeros(buffer.numel), 0
    for bucket in buffer.buckets:
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start : start + bucket.numel_unpadded]
        start += bucket.numel_unpadded
    return whole


def torch_optimizers(optimizer: Any) -> list[torch.optim.AdamW]:
    """The torch optimizers inside Megatron's, where neither apex nor Transformer Engine brings another."""
    return [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]


def give_state(optimizer: Any) -> None:
    """Megatron reads the step count out of the optimizer's state even to load it, and torch makes that state at the first step."""
    for inner in torch_optimizers(optimizer):
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter].update(step=torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros)


@contextlib.contextmanager
def step_counts_stay(optimizer: Any) -> Iterator[None]:
    """Megatron loads torch's step count apart from the tensors, and then misses it among the tensors of each parameter."""
    parts = [part for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]

    def with_step(part: Any) -> Callable[[Any, dict[str, Any]], None]:
        load = part._set_main_param_and_optimizer_states
        return lambda parameter, tensors: load(parameter, {"step": part._get_main_param_and_optimizer_states(parameter)["step"], **tensors})

    for part in parts:
        part._set_main_param_and_optimizer_states = with_step(part)
    try:
        yield
    finally:
        for part in parts:
            del part._set_main_param_and_optimizer_states


def unshare_steps(optimizer: Any) -> None:
    """Megatron loads one step tensor for all parameters, and torch's fused kernel would count it up once for each of them."""
    for inner in torch_optimizers(optimizer):
        for parameter, state in inner.state.items():
            state["step"] = state["step"].to(parameter.device).clone()
