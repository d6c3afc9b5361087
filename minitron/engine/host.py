"""Megatron-Core on a machine without a GPU: the few names through which it reaches for CUDA, pointed at the CPU.

Megatron calls `torch.cuda.*` and writes `device="cuda"` in a handful of modules. Inside `on_host()` those names lead to
the CPU; on exit every one is what it was. Only these places are touched: no torch function is intercepted, so a step
costs what it costs in plain torch.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

CPU = torch.device("cpu")

# Megatron modules that create tensors with the literal device="cuda"
LITERALS = (
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.data",
    "megatron.core.utils",
)
FACTORIES = ("empty", "full", "ones", "tensor", "zeros")


class _Event:
    """Stands in for torch.cuda.Event: on a CPU everything is done when the call returns."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: "_Event") -> float:
        return 0.0


class _Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: "_Stream") -> None: ...

    def wait_event(self, event: _Event) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _nothing() -> Callable[..., None]:
    return lambda *args, **kwargs: None  # a new function each time: torch's compiler refuses one object under two names


def _cuda_names() -> dict[str, Any]:
    return {
        "current_device": lambda: CPU,
        "current_stream": lambda *a, **k: _Stream(),
        "Event": _Event,
        "Stream": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": _nothing(),
        "set_device": _nothing(),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "is_current_stream_capturing": lambda: False,
    }


def _torch_with_host_factories() -> types.ModuleType:
    """A module that is torch, except that its tensor factories read the device "cuda" as "cpu"."""
    host = types.ModuleType("torch")
    host.__dict__.update(vars(torch))
    host.__getattr__ = functools.partial(getattr, torch)  # type: ignore[method-assign]  # names that torch loads late

    def on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
            return factory(*args, device=CPU if str(device).startswith("cuda") else device, **kwargs)

        return create

    for name in FACTORIES:
        setattr(host, name, on_cpu(getattr(torch, name)))
    return host


def _tensor_type(original: Callable[..., Any]) -> Callable[..., Any]:
    """Megatron's optimizers compare `tensor.type()` with 'torch.cuda.FloatTensor' and the like."""

    def type_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if isinstance(result, str) and not self.is_cuda else result

    return type_name


def _tagged_p2p_ops(*, tensor_send_prev: Any, tensor_recv_prev: Any, tensor_send_next: Any, tensor_recv_next: Any, group: Any,
                    prev_pipeline_rank: int, next_pipeline_rank: int) -> list[Any]:  # fmt: skip
    """A stage's exchange with its neighbours, each direction under a tag of its own.

    gloo pairs messages of two ranks in the order they are posted. Where virtual stages go round two ranks, the previous and the
    next rank are one peer, and without tags what is sent forward would be taken for what is sent backward.
    """
    forward, backward = 1, 2
    posts = (
        (dist.isend, tensor_send_prev, prev_pipeline_rank, backward),
        (dist.irecv, tensor_recv_prev, prev_pipeline_rank, forward),
        (dist.isend, tensor_send_next, next_pipeline_rank, forward),
        (dist.irecv, tensor_recv_next, next_pipeline_rank, backward),
    )
    return [post(tensor, peer, group=group, tag=tag) for post, tensor, peer, tag in posts if tensor is not None]


def _gather_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """Parts of different lengths from every rank, which gloo gathers all to all alone: each rank's part goes to all."""

    def gather(mine: torch.Tensor, group: Any, output_split_sizes: list[int] | None = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return original(mine, group, output_split_sizes, use_global_buffer)
        whole = mine.new_empty(sum(output_split_sizes), *mine.shape[1:])
        everywhere = mine.repeat(group.size(), *[1] * (mine.dim() - 1))
        dist.all_to_all_single(whole, everywhere, output_split_sizes, [len(mine)] * group.size(), group=group)
        return whole

    return gather


def _reduce_scatter_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """The sum of every rank's parts for this one, where parts differ in length: they come all to all."""

    def reduce_scatter(whole: torch.Tensor, group: Any, input_split_sizes: list[int] | None = None, use_global_buffer: bool = False) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return original(whole, group, input_split_sizes, use_global_buffer)
        length = input_split_sizes[group.rank()]
        parts = whole.new_empty(group.size() * length, *whole.shape[1:])
        dist.all_to_all_single(parts, whole.contiguous(), [length] * group.size(), input_split_sizes, group=group)
        return parts.view(group.size(), length, *whole.shape[1:]).sum(dim=0)

    return reduce_scatter


def _all_to_all(original: Callable[..., Any]) -> Callable[..., Any]:
    """gloo takes the lengths of parts as lists of whole numbers alone; Megatron has them in arrays."""

    def exchange(group: Any, mine: torch.Tensor, output_sizes: Any = None, input_sizes: Any = None) -> Any:
        return original(group, mine, *([int(size) for size in sizes] if sizes is not None else None for sizes in (output_sizes, input_sizes)))

    return exchange


@contextlib.contextmanager
def on_host() -> Iterator[None]:
    """Run Megatron-Core on the CPU inside this block. Nothing of it remains afterwards, whatever happened inside."""
    with contextlib.ExitStack() as undo:

        def put(owner: Any, name: str, value: Any) -> None:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        for name, value in _cuda_names().items():
            put(torch.cuda, name, value)
        put(torch.Tensor, "cuda", lambda self, *a, **k: self)
        put(torch.Tensor, "type", _tensor_type(torch.Tensor.type))
        put(torch.nn.Module, "cuda", lambda self, *a, **k: self)
        rng = importlib.import_module("megatron.core.tensor_parallel.random")
        put(rng, "_get_cuda_rng_state", lambda *a, **k: torch.get_rng_state())
        put(rng, "_set_cuda_rng_state", lambda state, *a, **k: torch.set_rng_state(state))
        p2p = importlib.import_module("megatron.core.pipeline_parallel.p2p_communication")
        for name in ("_p2p_ops", "_batched_p2p_ops"):
            put(p2p, name, _tagged_p2p_ops)
        mappings = importlib.import_module("megatron.core.tensor_parallel.mappings")
        put(mappings, "_gather_along_first_dim", _gather_first(mappings._gather_along_first_dim))
        put(mappings, "_reduce_scatter_along_first_dim", _reduce_scatter_first(mappings._reduce_scatter_along_first_dim))
        dispatcher = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
        put(dispatcher.MoEAlltoAllTokenDispatcher, "cuda_dtoh_stream", _Stream())  # kept on the class by the first that is made
        put(dispatcher, "all_to_all", _all_to_all(dispatcher.all_to_all))
        host_torch = _torch_with_host_factories()
        for module in map(importlib.import_module, LITERALS):
            put(module, "torch", host_torch)
        yield
