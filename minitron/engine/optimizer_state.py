"""What Megatron 0.16.1's distributed optimizer needs to save its state right, and to load it where torch's AdamW is inside.

Each function says what goes wrong without it; tests/engine/test_checkpoint.py shows that it does.
"""

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.optimizer import distrib_optimizer

STATES = ("param", "exp_avg", "exp_avg_sq")
NOBODY: Any = "nobody"  # in the place of a parameter, in the state of an optimizer that has none on this rank
Host = dict[tuple[Any, ...], torch.Tensor]  # tensors in host memory, by what they are copies of; kept from save to save


def host_copy(kept: Host, key: tuple[Any, ...], shape: torch.Size, dtype: torch.dtype, pinned: bool) -> torch.Tensor:
    """Room in host memory for a copy of a tensor: the same at every call for `key`, as fresh memory costs more than what is copied into it."""
    if key not in kept:
        kept[key] = torch.empty(shape, dtype=dtype, pin_memory=pinned)
    return kept[key]


class Parts(dict[int, torch.Tensor]):
    """A buffer's elements as one tensor for each parameter, by its start; Megatron takes them out by slices."""

    def __getitem__(self, where: Any) -> torch.Tensor:
        return super().__getitem__(where.start)


@contextlib.contextmanager
def states_by_parameter(optimizer: Any, kept: Host, pinned: bool) -> Iterator[None]:
    """Inside the block Megatron gathers a buffer's state into one host tensor for each parameter, in `kept`, on the first data-parallel rank.

    It comes by way of the memory of the gradients, which the next step clears. `pinned`: room for what lies on a GPU is pinned.

    By itself it passes all of it through several fresh tensors as large as the buffer, on every data-parallel rank. It also drops the padding
    between buckets, and then reads the state at offsets that count the padding: a tied embedding over pipeline stages has a bucket
    of its own, so everything behind it would be saved shifted. And it collects garbage each time, for runs that have turned that off: a third of
    the seconds that a save in the background takes to begin.
    """
    parts = [part for part in optimizer.chained_optimizers if hasattr(part, "get_parameter_state_dp_zero")]
    collector, distrib_optimizer.gc = distrib_optimizer.gc, types.SimpleNamespace(collect=lambda: None)
    for number, part in enumerate(parts):
        part.get_parameter_state_dp_zero = functools.partial(gathered, part, kept, number, pinned)
    try:
        yield
    finally:
        distrib_optimizer.gc = collector
        for part in parts:
            del part.get_parameter_state_dp_zero


def gathered(part: Any, kept: Host, number: int, pinned: bool, empty_data: bool = False, **kwargs: Any) -> dict[Any, Any] | None:
    """In the place of Megatron's get_parameter_state_dp_zero. With `empty_data` just room for the state, on every rank."""
    group = part.data_parallel_group
    holds = empty_data or group.rank() == 0
    found: dict[Any, Any] = {}
    for index, (buffer, maps) in enumerate(zip(part.buffers, part.gbuf_ranges, strict=True)):
        ((dtype, buckets),) = maps.items()
        places = {parameter: (start, end) for parameter, (start, end, _) in buffer.param_index_map.items()}
        states, pin = {key: Parts() for key in STATES}, pinned and buffer.grad_data.is_cuda
        for key in STATES if holds else ():
            for start, end in places.values():
                states[key].update({start: host_copy(kept, (number, index, key, start), torch.Size([end - start]), torch.float32, pin)})
        for bucket, ranges in zip(buffer.buckets, buckets, strict=True) if not empty_data else ():
            for key in STATES:
                collect(part, bucket, ranges["param_map"], key, places, states[key])
        found[index] = {dtype: states}
    return found if holds else None


def collect(part: Any, bucket: Any, ranges: dict[Any, Any], key: str, places: dict[Any, tuple[int, int]], into: Parts) -> None:
    """One bucket's state of one kind, of which each data-parallel rank holds a run of elements, into the first rank's host tensors."""
    group, mine = part.data_parallel_group, {parameter: part._get_main_param_and_optimizer_states(parameter)[key].detach() for parameter in ranges}
    if group.size() == 1:
        for parameter, state in mine.items():
            into[slice(*places[parameter])].copy_(state.flatten(), non_blocking=True)
        return
    size = bucket.grad_data.numel()
    shard = torch.zeros(size // group.size(), dtype=torch.float32, device=bucket.grad_data.device)
    for parameter, state in mine.items():
        local = ranges[parameter]["gbuf_local"]
        shard[local.start : local.end] = state.flatten()
    first = group.rank() == 0
    everything = bucket.grad_data.flatten() if first else None  # fp32, as the optimizer's states are
    shards = list(everything.split(len(shard))) if everything is not None else None
    torch.distributed.gather(shard, shards, dst=torch.distributed.get_global_rank(group, 0), group=group)
    if everything is not None:
        for start, end in places.values():
            if bucket.offset <= start < bucket.offset + size:
                into[slice(start, end)].copy_(everything[start - bucket.offset : end - bucket.offset], non_blocking=True)


def torch_optimizers(optimizer: Any) -> list[torch.optim.AdamW]:
    """The torch optimizers inside Megatron's, where neither apex nor Transformer Engine brings another."""
    return [part.optimizer for part in optimizer.chained_optimizers if isinstance(part.optimizer, torch.optim.AdamW)]


def give_state(optimizer: Any) -> None:
    """Megatron reads the step count out of the optimizer's state even to load it, and torch makes that state at the first step.

    An optimizer of experts on a stage that has none, or of a share that holds no element, has no state to read it of: it is given the others' count.
    """
    inners = torch_optimizers(optimizer)
    for inner in inners:
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            if not inner.state[parameter]:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                inner.state[parameter].update(step=torch.zeros((), dtype=torch.float32, device=parameter.device), **zeros)
    counts = [state["step"] for inner in inners if holds_parameters(inner) for state in inner.state.values()]
    for inner in inners:
        if not holds_parameters(inner):
            inner.state[NOBODY] = {"step": counts[0].clone() if counts else torch.zeros(())}


def holds_parameters(inner: torch.optim.AdamW) -> bool:
    """Whether there is anything that it updates on this rank."""
    return any(group["params"] for group in inner.param_groups)


def share_counts(state: dict[Any, Any]) -> None:
    """Give every group of a loaded optimizer state the count of steps of those that have one.

    Apex and Transformer Engine keep it in the groups. The first rank writes these for all, and has none for experts where its stage has none.
    """
    parts = [state] if "optimizer" in state else list(state.values())
    groups = [group for part in parts for group in part["optimizer"]["param_groups"]]
    counts = [group["step"] for group in groups if "step" in group]
    for group in groups if counts else ():
        group.setdefault("step", counts[0])


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
            state["step"] = state["step"].to(parameter.device if isinstance(parameter, torch.Tensor) else "cpu").clone()
