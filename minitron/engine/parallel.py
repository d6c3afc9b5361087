"""Processes and groups. Nothing else in the project touches Megatron's parallel state.

A run is started by torchrun (or SLURM through it), which sets RANK, WORLD_SIZE and the rendezvous, or as one plain process.
"""

import contextlib
import dataclasses
import datetime
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from minitron.config.layout import check_layout
from minitron.config.schema import Parallel
from minitron.engine.host import on_host
from minitron.engine.joining import MAKING, in_time
from minitron.engine.meeting import meet, pick_device
from minitron.engine.peers import Lookout
from minitron.errors import RequestError

Result = TypeVar("Result")
PATIENCE = datetime.timedelta(days=7)
OPENINGS = itertools.count()  # of worlds in this process, one after another: the same on every rank


@dataclasses.dataclass(frozen=True)
class World:
    """A rank's place: its device, its groups, and its number inside each of them."""

    device: torch.device
    rank: int
    size: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    dp: int
    dp_rank: int
    cp: int
    cp_rank: int
    ep: int
    ep_rank: int
    vpp: int
    sequence_parallel: bool
    groups: ProcessGroupCollection
    patient: Any  # a group of all ranks that waits for as long as rank 0 needs for what it does alone
    alone: list[bool]  # not empty while it does
    lookout: Lookout  # hears of ranks that are gone
    globals: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False)  # Megatron's own, as `inside` puts them in place

    @property
    def is_main(self) -> bool:
        """The one rank that writes files and speaks to the user."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the final norm and the head, and computes losses."""
        return self.pp_rank == self.pp - 1

    @property
    def replica(self) -> int:
        """Its number among the ranks that hold the same shards of all but experts: those of the context, then of the data."""
        return self.dp_rank * self.cp + self.cp_rank

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()


@contextlib.contextmanager
def world(parallel: Parallel, device_setting: str, seed: int) -> Iterator[World]:
    """Join the processes of this run, make Megatron's groups, and take both down again on exit."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(parallel, size)
    device = pick_device(device_setting)
    with contextlib.ExitStack() as undo:
        if device.type == "cpu":
            undo.enter_context(on_host())
        else:
            torch.cuda.set_device(device)
        # Megatron and torch's checkpoints warn of their own deprecated calls: nothing that a user could act on
        undo.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", module=r"megatron\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
        if dist.is_initialized():
            raise RequestError("a process group exists already: one run per process")
        lookout = Lookout(parallel.timeout_minutes)
        undo.push(lambda kind, error, trace: _stop(lookout, error))
        with in_time(parallel.start_minutes, lookout) as trial:
            _join(size, device, datetime.timedelta(minutes=parallel.timeout_minutes), lookout)
            trial.at = MAKING
            _make_groups(parallel, device)
            tensor_parallel.model_parallel_cuda_manual_seed(seed)
            here = _placed(parallel, device, dist.new_group(backend="gloo", timeout=PATIENCE), [], lookout)
            trial.run(device, here.patient, here.groups)
        yield here


def beside(first: World, parallel: Parallel) -> World:
    """The same processes laid out a second time, for another model. Called by every rank; the groups end with those of `first`.

    What Megatron reads from its globals instead of being told, it reads of `first` everywhere but `inside` the second.
    """
    check_layout(parallel, first.size)
    with _globals(dict.fromkeys(_megatron_globals())), in_time(parallel.start_minutes, first.lookout) as trial:
        trial.at = MAKING
        _make_groups(parallel, first.device)
        here = _placed(parallel, first.device, first.patient, first.alone, first.lookout)
        trial.run(first.device, first.patient, here.groups)
    return here


@contextlib.contextmanager
def inside(world: World) -> Iterator[None]:
    """Megatron's globals are those of `world` in this block, and afterwards what they were before. What runs a model of it enters by itself."""
    with _globals(world.globals):
        yield


@contextlib.contextmanager
def _globals(values: dict[str, Any]) -> Iterator[None]:
    before = _megatron_globals()
    vars(parallel_state).update(values)
    try:
        yield
    finally:
        vars(parallel_state).update(before)


def _megatron_globals() -> dict[str, Any]:
    """Megatron's record of its groups, ranks and sizes. All of it is empty (None, or a dict that only hybrid layouts fill) before groups are made."""
    groups = {name: value for name, value in vars(parallel_state).items() if re.fullmatch(r"_[A-Z][A-Z_]*", name) and name != "_HYBRID_DP_CP_GROUPS"}
    return {**groups, "_global_process_group_list": parallel_state._global_process_group_list}


def _make_groups(parallel: Parallel, device: torch.device) -> None:
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        parallel.vpp if parallel.vpp > 1 else None,
        context_parallel_size=parallel.cp,
        expert_model_parallel_size=parallel.ep,
        distributed_timeout_minutes=parallel.timeout_minutes,
        create_gloo_process_groups=device.type != "cpu",  # on the CPU every group is a gloo group already
    )


def _placed(parallel: Parallel, device: torch.device, patient: Any, alone: list[bool], lookout: Lookout) -> World:
    """This rank's place in the groups that Megatron has now."""
    return World(
        device=device,
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        tp=parallel.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=parallel.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        cp=parallel.cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        ep=parallel.ep,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        vpp=parallel.vpp,
        sequence_parallel=parallel.sp,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        patient=patient,
        alone=alone,
        lookout=lookout,
        globals=_megatron_globals(),
    )


def _join(size: int, device: torch.device, timeout: datetime.timedelta, lookout: Lookout) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if size == 1 and "RANK" not in os.environ:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        meeting, rank, size = meet(timeout)
        meeting.set_timeout(timeout)
        store = dist.PrefixStore(f"world_{next(OPENINGS)}", meeting)  # what an earlier world left there is of ranks that it had
        if size > 1:
            lookout.begin(store, rank)  # before the groups: a rank that waits for another to make one with it hears of nothing else
        dist.init_process_group(backend, store=dist.PrefixStore("default_pg", store), rank=rank, world_size=size, timeout=timeout)


def _stop(lookout: Lookout, error: BaseException | None) -> None:
    """Leave the groups; an error that another rank's end caused becomes LostRank, one that its silence caused HungRank."""
    lost = lookout.leave(error)
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    if lost is not None:
        raise lost from error


def gather_to_main(tensor: torch.Tensor | None, world: World, dim: int | None, ep_rank: int = 0) -> torch.Tensor | None:
    """The whole of a tensor on rank 0, None elsewhere. Called by every rank; the ranks of one pipeline stage hold the same parameters, but
    for those of an expert, which the ones with its `ep_rank` hold.

    `tensor` is this rank's shard along `dim` (None: every tensor rank holds the same), or None on the pipeline stages that
    don't hold it. The first replica of the first stage that does speaks.
    """
    stage = _first_holder(tensor is not None, world, ep_rank)
    first_replica = world.replica == ep_rank  # expert ranks are the first of those that hold the same shards of all else
    speaks = first_replica and world.pp_rank == stage
    whole = None
    if speaks and tensor is not None:
        if dim is None or world.tp == 1:
            whole = tensor
        else:
            shards = [torch.empty_like(tensor) for _ in range(world.tp)] if world.tp_rank == 0 else None
            dist.gather(tensor.contiguous(), shards, dst=dist.get_global_rank(world.groups.tp, 0), group=world.groups.tp)
            whole = torch.cat(shards, dim) if shards else None
    if stage > 0 and first_replica and world.tp_rank == 0:
        whole = _send_to_first(whole, stage, world.groups.pp, world)
    if ep_rank > 0 and world.replica < world.ep and world.pp_rank == 0 and world.tp_rank == 0:
        whole = _send_to_first(whole, ep_rank, world.groups.ep, world)
    return whole if world.is_main else None


def _first_holder(holds: bool, world: World, ep_rank: int) -> int:
    """The lowest pipeline stage on which the ranks with this number hold something."""
    if world.pp == 1:
        return 0
    flag = torch.tensor([world.pp_rank if holds and world.ep_rank == ep_rank else world.pp], device=world.device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=world.groups.pp)
    return int(flag.item())


def _send_to_first(whole: torch.Tensor | None, place: int, group: Any, world: World) -> torch.Tensor | None:
    """Ship a tensor from the rank at a place of a group to its first one (this rank is one of the two, or not concerned)."""
    source, target = (dist.get_global_rank(group, rank) for rank in (place, 0))
    box = [None if whole is None else (whole.shape, whole.dtype)]
    dist.broadcast_object_list(box, src=source, group=group)
    if world.rank == source and whole is not None:
        dist.send(whole.contiguous(), dst=target, group=group)
    if world.rank == target:
        assert box[0] is not None
        shape, dtype = box[0]
        whole = torch.empty(shape, dtype=dtype, device=world.device)
        dist.recv(whole, src=source, group=group)
    return whole


def move_between_stages(
    tensor: torch.Tensor | None, source: int, destination: int, shape: tuple[int, ...], dtype: torch.dtype, world: World
) -> torch.Tensor | None:
    """Ship a tensor from one pipeline stage to another, each tensor rank its own; called by the ranks of the two. None at the source."""
    ranks = [dist.get_global_rank(world.groups.pp, stage) for stage in (source, destination)]
    if tensor is not None:
        dist.send(tensor, dst=ranks[1], group=world.groups.pp)
        return None
    received = torch.empty(shape, dtype=dtype, device=world.device)
    dist.recv(received, src=ranks[0], group=world.groups.pp)
    return received


def sum_over_replicas(tensors: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    """Each tensor summed over the data-parallel ranks, in one reduction; all must have one type."""
    if world.dp == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=world.groups.dp)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_over_expert_ranks(tensors: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    """Each tensor summed over the ranks that share a layer's experts, packed; all must have one type."""
    if world.ep == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=world.groups.ep)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_over_stage(tensors: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    """Each tensor summed over all ranks of this pipeline stage, packed; all must have one type."""
    if world.size == world.pp or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    for group in (world.groups.tp, world.groups.dp_cp):
        dist.all_reduce(flat, group=group)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_over_tokens(tensors: list[torch.Tensor], world: World) -> list[torch.Tensor]:
    """Each rank's sums over the tokens it holds, on any stage, to sums over the global batch: the same bits on every rank.

    Tensor ranks hold parts of a sequence under sequence parallelism and copies without; then the first one speaks for all.
    """
    if world.size == 1 or not tensors:
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    if world.tp_rank and not world.sequence_parallel:
        flat = torch.zeros_like(flat)
    dist.all_reduce(flat)
    return [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_over_tensor_ranks(tensor: torch.Tensor, world: World) -> torch.Tensor:
    """A new tensor: the sum over the tensor ranks."""
    if world.tp == 1:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=world.groups.tp)
    return total


def gather_shards(shard: torch.Tensor, world: World) -> torch.Tensor:
    """Shards of equal shape, concatenated along their first dim in tensor-rank order, on every tensor rank."""
    if world.tp == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(world.tp)]
    dist.all_gather(shards, shard.contiguous(), group=world.groups.tp)
    return torch.cat(shards)


def merge_over_stages(mine: dict[str, Any], world: World, add: tuple[str, ...] = ()) -> dict[str, Any]:
    """The union of every pipeline stage's named values (CPU tensors, arrays), on every rank; those named in `add` are summed over stages."""
    if world.pp == 1:
        return mine
    parts: list[dict[str, Any] | None] = [None] * world.pp
    dist.all_gather_object(parts, mine, group=world.groups.pp)
    merged: dict[str, Any] = {}
    for part in parts:
        for name, tensor in (part or {}).items():
            merged[name] = merged[name] + tensor if name in merged and name in add else tensor
    return merged


def broadcast_object(value: object, world: World) -> object:
    """Rank 0's value, on every rank."""
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=world.patient, device=torch.device("cpu"))
    return box[0]


def on_main(world: World, action: Callable[[], Result]) -> Result:
    """Rank 0 does something for all and every rank gets its result; if it is refused there, every rank raises the same refusal.

    The others wait for as long as it takes. `action` runs on rank 0 alone, so nothing in it may wait for another rank.
    """
    result = main_only(world, action)
    return broadcast_object(result, world)  # type: ignore[return-value]


def main_only(world: World, action: Callable[[], Result]) -> Result | None:
    """As `on_main`, for a result that stays with rank 0 (None elsewhere)."""
    result, failure = None, None
    assert not world.alone, "an action that rank 0 does alone asks for another one: the other ranks would not take part"
    if world.is_main:
        world.alone.append(True)
        try:
            result = action()
        except RequestError as error:
            failure = str(error)
        finally:
            world.alone.clear()
    said = broadcast_object(failure, world)
    if said is not None:
        raise RequestError(str(said))
    return result


def refuse_together(failure: str | None, world: World) -> None:
    """If one rank failed, all give up with its message instead of waiting for it."""
    failures: list[str | None] = [failure]
    if world.size > 1:
        failures = [None] * world.size
        dist.all_gather_object(failures, failure)
    for message in failures:
        if message is not None:
            raise RequestError(message)


def any_rank(flag: bool, world: World) -> bool:
    """Whether any rank says yes: every rank gets the same answer."""
    if world.size == 1:
        return flag
    votes = torch.tensor([int(flag)], device=world.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def least(value: int, world: World) -> int:
    """The smallest of all ranks' whole numbers, on each of them."""
    if world.size == 1:
        return value
    found = torch.tensor([value], device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return int(found.item())


def most_of_expert_ranks(value: int, world: World) -> int:
    """The largest of the whole numbers of the ranks that share out the experts, on each of them."""
    if world.ep == 1:
        return value
    found = torch.tensor([value], device=world.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=world.groups.ep)
    return int(found.item())


def sum_over_model_ranks(value: int, world: World) -> int:
    """A whole number summed over the tensor, expert and pipeline ranks that together hold one model."""
    total = torch.tensor([value], dtype=torch.int64, device=world.device)
    dist.all_reduce(total, group=world.groups.tp_ep_pp)
    return int(total.item())
