"""Distributed checkpoints: each rank writes and reads its own shards; a checkpoint is complete or absent."""

import contextlib
import dataclasses
import errno
import functools
import json
import logging
import os
import queue
import re
import shutil
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor, serialization, strategies
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, Indices
from minitron.arch.shards import shard_shape
from minitron.engine.model import Model, put, rows, skeleton
from minitron.engine.optimizer_state import give_state, padding_stays, step_counts_stay, unshare_steps
from minitron.engine.parallel import World, on_main, refuse_together
from minitron.errors import RequestError, Stopped
from minitron.files import fsync_path, os_errors_are_requests, read_json, remove, write_text

if TYPE_CHECKING:
    from minitron.engine.trainer import Trainer

# "self_attention.linear_qkv.layer_norm_weight" -> "input_layernorm.weight": stacked layers share one name in a checkpoint
PLAIN_NAMES = {row.fused.split("{layer}.")[1]: row.name.split("{layer}.")[1] for row in PARAMETERS if row.fused}
PADDED = tuple(row.name.split("{layer}.")[-1] for row in PARAMETERS if row.tp_dim is not None and row.dims[row.tp_dim].axis in ("groups", "vocab"))
OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}
# what Megatron's writer takes from `multiprocessing`
THREADS = types.SimpleNamespace(Queue=queue.Queue, JoinableQueue=queue.Queue, Process=functools.partial(threading.Thread, daemon=True))


def model_state(model: Model, world: World) -> dict[str, Any]:
    """The model's tensors as Megatron shards them, under names that depend on neither layout nor spec.

    Where dead KV groups or vocabulary rows pad a layout, the shapes of two layouts differ at the end. Transformer Engine fuses each norm into
    the matrix behind it and adds states of its own, empty unless fp8 is used.
    """
    state = {
        f"{number}.{name}": entry
        for number, chunk in enumerate(model.chunks)
        for name, entry in chunk.sharded_state_dict().items()
        if not name.endswith("_extra_state")
    }

    def neutral(entry: Any) -> Any:
        if isinstance(entry, ShardedTensor):
            entry.allow_shape_mismatch = entry.key.endswith(PADDED)
            for fused, plain in PLAIN_NAMES.items():
                entry.key = entry.key.replace(fused, plain)
        return entry

    dict_list_map_inplace(neutral, state)
    return state


def save_sharded(state: dict[str, Any], folder: Path, world: World, texts: dict[str, str] | None = None) -> None:
    """Write a sharded state as `folder`: every rank into a temporary folder, which takes its name when all are done.

    `texts` are small files to go along. Raises RequestError on every rank if any rank could not write.
    """
    temporary = folder.with_name(f".{folder.name}.partial")

    def begin() -> None:
        with os_errors_are_requests("cannot write", folder):
            remove(temporary)
            temporary.mkdir(parents=True)

    def finish() -> None:
        with os_errors_are_requests("cannot write", folder):
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")
            for path in [*temporary.rglob("*"), temporary]:
                fsync_path(path)
            remove(folder)
            temporary.rename(folder)
            fsync_path(folder.parent)

    on_main(world, begin)
    failure: str | None = None
    alone: list[Exception] = []
    log = logging.getLogger("megatron.core.dist_checkpointing")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what went wrong is said once, below
    try:
        with written_by_threads(), failing_later(alone):
            dist_checkpointing.save(state, str(temporary))
        if alone:
            failure = f"cannot write {folder}: {why_not_written(alone[0], temporary)}"
    except (Exception, CheckpointException) as error:  # torch's is no Exception; both wrap what the writers met
        failure = f"cannot write {folder}: {why_not_written(error, temporary)}"
    finally:
        log.setLevel(level)
    try:
        refuse_together(failure, world)
    except RequestError:
        if world.is_main:
            remove(temporary)
        raise
    on_main(world, finish)


@contextlib.contextmanager
def written_by_threads() -> Iterator[None]:
    """Inside the block Megatron's writer starts threads where it would start processes.

    Its processes let training go on beside them, and here the run waits for them. They would die of the signal that asks the run to stop
    where its whole process group gets it, and nothing would be saved; and outlive a rank that is killed.
    """
    usual = filesystem_async.mp, filesystem_async._results_queue
    filesystem_async.mp, filesystem_async._results_queue = types.SimpleNamespace(get_context=lambda method: THREADS), queue.Queue()
    try:
        yield
    finally:
        filesystem_async.mp, filesystem_async._results_queue = usual


@contextlib.contextmanager
def failing_later(failures: list[Exception]) -> Iterator[None]:
    """Inside the block what Megatron has rank 0 write alone is put into `failures` where it fails, and raised by nobody.

    The other ranks are in the next collective by then: rank 0 must take part in it, and say afterwards that it failed.
    """

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def attempt(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:
                failures.append(error)

        return attempt

    places = (
        (strategies.common.TorchCommonSaveStrategy, "save_common"),
        (filesystem_async.FileSystemWriterAsync, "finish"),
        (serialization, "save_config"),
    )
    with contextlib.ExitStack() as undo:
        for owner, name in places:
            undo.callback(setattr, owner, name, vars(owner)[name])
            setattr(owner, name, noting(vars(owner)[name]))
        yield


def why_not_written(error: BaseException, folder: Path) -> str:
    """One line. torch's writer does not say what the system said, so a full disk is looked for."""
    if shutil.disk_usage(folder.parent).free < 1 << 20:
        return os.strerror(errno.ENOSPC)
    return next(reversed(str(error).strip().splitlines()), repr(error))


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what `save_sharded` wrote, at this layout."""
    if not (folder / "metadata.json").is_file():
        raise RequestError(f"{folder} is not a complete checkpoint")
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    return loaded


def save_model(model: Model, folder: Path, world: World) -> None:
    """Write a model without optimizer state: its shards, arch.json, and how pruning left the order of units."""
    save_sharded({"model": model_state(model, world)}, folder, world, notes(model))


def notes(model: Model) -> dict[str, str]:
    """What goes along with a model's tensors: its sizes, and how pruning left the order of units."""
    order = {name: units.tolist() for name, units in model.unit_order.items()}
    return {"arch.json": json.dumps(model.arch.to_dict(), indent=2) + "\n", "unit_order.json": json.dumps(order) + "\n"}


def load_model(folder: Path, world: World, dtype: torch.dtype, spec: str = "torch") -> Model:
    """Read a model that `save_model` or a training run wrote, at this layout."""
    model = empty_model(Arch.from_dict(read_json(folder / "arch.json")), world, dtype, spec)
    model.unit_order = read_order(folder)
    loaded = load_sharded({"model": model_state(model, world)}, folder)
    fill(model, loaded["model"])
    return model


def read_order(folder: Path) -> dict[str, Indices]:
    """How the units of a saved model lie (see Model.unit_order)."""
    return {name: np.array(order, dtype=np.int64) for name, order in read_json(folder / "unit_order.json").items()}


def fill(model: Model, tensors: dict[str, Any]) -> None:
    """Put loaded tensors into a model: every parameter, and nothing else."""
    result = model.load_state_dict(tensors, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not result.unexpected_keys, f"not loaded: {missing}, unknown: {result.unexpected_keys}"


def empty_model(arch: Arch, world: World, dtype: torch.dtype, spec: str = "torch") -> Model:
    """A model whose parameters are allocated and zero."""
    model = skeleton(arch, world, dtype, spec)
    for name, row, layer in rows(model):
        put(model, name, row, layer, torch.zeros(shard_shape(row, arch.layer(layer), world.tp), dtype=dtype, device=world.device))
    return model


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run: `step_N` folders; the newest complete one is where a run continues."""

    folder: Path
    keep: int = 2

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(int(match.group(1)) for match in found if match and (self.folder / match.group(0) / "metadata.json").is_file())

    def latest(self) -> int | None:
        """The newest complete step."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"step_{step:08d}"

    def save(self, trainer: "Trainer") -> None:
        """Write model, optimizer, schedule and step; then forget all but the newest `keep`."""
        world = trainer.world
        save_sharded(_whole_state(trainer, loading=False), self.path(trainer.step), world, notes(trainer.model))

        on_main(world, self._point)

    def _point(self) -> None:
        """Name the newest in a file, forget all but the newest `keep`."""
        with os_errors_are_requests("cannot write", self.folder):
            write_text(self.folder / "latest", f"{self.latest()}\n")
            for step in self.steps()[: -self.keep]:
                remove(self.path(step))

    def resume(self, trainer: "Trainer") -> bool:
        """Continue from the newest complete checkpoint, if there is one."""

        def sweep() -> None:
            with os_errors_are_requests("cannot write", self.folder):
                for path in self.folder.glob(".*"):  # what a killed run was about to write or to remove
                    remove(path)
            if self.latest() is not None:
                self._point()

        on_main(trainer.world, sweep)
        step = on_main(trainer.world, self.latest)
        if step is None:
            return False
        loaded = load_sharded(_whole_state(trainer, loading=True), self.path(step))
        fill(trainer.model, loaded["model"])
        trainer.model.unit_order = read_order(self.path(step))
        with step_counts_stay(trainer.optimizer):
            trainer.optimizer.load_state_dict(loaded["optimizer"])
        unshare_steps(trainer.optimizer)
        trainer.set_state(loaded["trainer"])
        return True

    def stop(self, trainer: "Trainer") -> None:
        """End the run early; everything is saved."""
        raise Stopped(f"stopped at step {trainer.step}, saved in {self.path(trainer.step)}: the same command continues")


def _whole_state(trainer: "Trainer", loading: bool) -> dict[str, Any]:
    model = model_state(trainer.model, trainer.world)
    give_state(trainer.optimizer)  # where no step has been applied yet, there is none
    with padding_stays(trainer.optimizer):
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER)
    return {"model": model, "optimizer": optimizer, "trainer": trainer.state()}
