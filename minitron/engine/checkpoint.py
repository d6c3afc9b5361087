"""The checkpoints of a training: what is in one, which of them are kept, and which one is read."""

import contextlib
import dataclasses
import json
import math
import re
import shutil
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica

from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, Indices
from minitron.arch.shards import shard_shape
from minitron.engine.model import Model, put, rows, skeleton
from minitron.engine.optimizer_state import Host, give_state, host_copy, share_counts, states_by_parameter, step_counts_stay, unshare_steps
from minitron.engine.parallel import World, on_main
from minitron.engine.sharded import Saving, fault_of, load_sharded, save_sharded
from minitron.engine.verified import whole
from minitron.errors import RequestError, Stopped, refuse, say_once
from minitron.files import as_written, os_errors_are_requests, read_json, read_object, remove, retire, write_text

if TYPE_CHECKING:
    from minitron.engine.trainer import Trainer

# "self_attention.linear_qkv.layer_norm_weight" -> "input_layernorm.weight": stacked layers share one name in a checkpoint
PLAIN_NAMES = {row.fused.split("{layer}.")[1]: row.name.split("{layer}.")[1] for row in PARAMETERS if row.fused}
PADDED = tuple(row.name.split("{layer}.")[-1] for row in PARAMETERS if row.tp_dim is not None and row.dims[row.tp_dim].axis in ("groups", "vocab"))
# the whole state on the first data-parallel rank, in host memory
OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable", "distrib_optim_fully_reshardable_mem_efficient": True}
NOTES = "notes.json"


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


def save_model(model: Model, folder: Path, world: World) -> None:
    """Write a model without optimizer state: its shards, arch.json, and how pruning left the order of units."""
    save_sharded({"model": model_state(model, world)}, folder, world, notes(model))


def notes(model: Model) -> dict[str, str]:
    """What goes along with a model's tensors: its sizes, and how pruning left the order of units."""
    order = {name: units.tolist() for name, units in model.unit_order.items()}
    return {"arch.json": json.dumps(model.arch.to_dict(), indent=2) + "\n", "unit_order.json": json.dumps(order) + "\n"}


def load_model(folder: Path, world: World, dtype: torch.dtype, spec: str = "torch", recompute: str = "none") -> Model:
    """Read a model that `save_model` or a training run wrote, at this layout."""
    model = empty_model(Arch.from_dict(read_object(folder / "arch.json")), world, dtype, spec, recompute)
    model.unit_order = read_order(folder)
    loaded = load_sharded({"model": model_state(model, world)}, folder)
    fill(model, loaded["model"])
    return model


def read_order(folder: Path) -> dict[str, Indices]:
    """How the units of a saved model lie (see Model.unit_order)."""
    with as_written(folder / "unit_order.json"):
        return {name: np.array(order, dtype=np.int64) for name, order in read_object(folder / "unit_order.json").items()}


def fill(model: Model, tensors: dict[str, Any]) -> None:
    """Put loaded tensors into a model: every parameter, and nothing else."""
    result = model.load_state_dict(tensors, strict=False)
    missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not result.unexpected_keys, f"not loaded: {missing}, unknown: {result.unexpected_keys}"


def empty_model(arch: Arch, world: World, dtype: torch.dtype, spec: str = "torch", recompute: str = "none") -> Model:
    """A model whose parameters are allocated and zero."""
    model = skeleton(arch, world, dtype, spec, recompute)
    for name, row, at in rows(model):
        put(model, name, row, at, torch.zeros(shard_shape(row, arch.layer(at.layer), world.tp), dtype=dtype, device=world.device))
    return model


@dataclasses.dataclass
class Checkpoints:
    """The checkpoints of one training run: `step_N` folders. Those count that are whole: complete, and as they were written.

    Kept are the newest `keep_last`, those whose step is a multiple of `keep_every`, and the one with the least validation loss. With
    `in_background`, what `fit` saves on the way is copied and then written beside the steps that follow.
    """

    folder: Path
    keep_last: int = 2
    keep_every: int | None = None
    in_background: bool = False
    damaged: dict[int, str] = dataclasses.field(default_factory=dict)  # found so, by reading all of them, and what is wrong
    intact: set[int] = dataclasses.field(default_factory=set)
    kept: Host = dataclasses.field(default_factory=dict)  # room for the copies that are written in the background
    pending: tuple[int, Saving] | None = None  # the save in flight, and its step
    removing: list[threading.Thread] = dataclasses.field(default_factory=list)

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are complete, by their files' lengths, and not known to be damaged; ascending."""
        return [step for step in self._folders() if step not in self.damaged and (step in self.intact or whole(self.path(step)))]

    def latest(self) -> int | None:
        """The newest of `steps`."""
        return max(self.steps(), default=None)

    def path(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"step_{step:08d}"

    def _folders(self) -> list[int]:
        """Steps of all folders, whatever is in them, ascending."""
        found = (re.fullmatch(r"step_(\d+)", path.name) for path in self.folder.glob("step_*"))
        return sorted(int(match.group(1)) for match in found if match)

    def validation_loss(self, step: int) -> float | None:
        """What a checkpoint's validation gave; None where it had none, or one that is no number."""
        try:
            loss = read_json(self.path(step) / NOTES)["valid_loss"]
        except (RequestError, KeyError, TypeError):
            return None
        return loss if isinstance(loss, float) and math.isfinite(loss) else None

    def begin(self, trainer: "Trainer") -> None:
        """Before the first step: make the room for copies, which takes longer than to fill it, if a save on the way will need it."""
        interval = trainer.settings.save_interval
        if self.in_background and (trainer.step // interval + 1) * interval < trainer.settings.steps:
            _whole_state(trainer, self.kept)

    def save(self, trainer: "Trainer", valid_loss: float | None = None, final: bool = True) -> None:
        """Save model, optimizer, schedule, step and extras; then forget what is not to be kept.

        One that is not `final` may go on in the background (see `poll`), and where it cannot be written, a line says so and the
        training goes on. Raises RequestError where a final one cannot be written.
        """
        self.wait(trainer.world)
        step, world = trainer.step, trainer.world
        self.intact.discard(step)
        background = self.in_background and not final
        texts = notes(trainer.model) | {NOTES: json.dumps({"step": step, "valid_loss": valid_loss}) + "\n"}
        try:
            state = _whole_state(trainer, self.kept if self.in_background else None)
            self.pending = step, Saving(state, self.path(step), world, texts)
            if not background:
                self._finish(world)
        except RequestError as error:
            if final:
                raise RequestError(f"{error}: {self._what_stays()}; with room for it, the same command continues") from error
            self._say_lost(error, world)

    def poll(self, world: World) -> None:
        """Between two steps: if a save in flight is written by now, on every rank, complete it."""
        if self.pending is not None and self.pending[1].is_written():
            self.wait(world)

    def drop(self) -> None:
        """This rank ends without the others: what is in flight is given up, nothing is left running."""
        if self.pending is not None:
            self.pending[1].drop()
            self.pending = None
        self._await_removals()

    def wait(self, world: World) -> None:
        """Wait for the save in flight and complete it, all ranks together; a failure is said, and what was saved before stays."""
        try:
            self._finish(world)
        except RequestError as error:
            self._say_lost(error, world)

    def _say_lost(self, error: RequestError, world: World) -> None:
        if world.is_main:
            say_once(f"{error}: {self._what_stays()}, and the training goes on")

    def _what_stays(self) -> str:
        before = self.latest()
        return "this checkpoint is not there, " + ("there is none before it" if before is None else f"the one of step {before} stays")

    def _finish(self, world: World) -> None:
        if self.pending is None:
            return
        (step, saving), self.pending = self.pending, None
        try:
            saving.finish()
        except BaseException:  # a signal too: nothing goes on writing
            saving.drop()
            raise
        self.damaged.pop(step, None)
        self.intact.add(step)

        on_main(world, lambda: self._settle(step))

    def _settle(self, newest: int) -> None:
        """Name the newest in a file, forget those that are not to be kept."""
        try:
            with os_errors_are_requests("cannot write", self.folder):
                write_text(self.folder / "latest", f"{newest}\n")
                there = self.steps()
                keep = retained({one: self.validation_loss(one) for one in there}, self.keep_last, self.keep_every)
                # a newer one that is damaged stays until its step is saved again, or one after it; of one that can't be read nothing is known
                self._remove([one for one in self._folders() if one not in keep and (one in there or (one < newest and one in self.damaged))])
        except RequestError as error:
            say_once(f"{error}: the checkpoint of step {newest} is there, older ones that are not needed may be too")

    def _remove(self, steps: Iterable[int]) -> None:
        """The folders lose their names now; that their files go takes longer, and nobody waits for it."""
        self._await_removals()
        for step in steps:
            doomed = retire(self.path(step))
            self.removing.append(threading.Thread(target=shutil.rmtree, args=(doomed,), kwargs={"ignore_errors": True}))
            self.removing[-1].start()

    def _await_removals(self) -> None:
        while self.removing:
            self.removing.pop().join()

    def choose(self, which: str | int, world: World) -> int | None:
        """The step of the checkpoint to read: the last, the best (least validation loss), or the one of a step; every file of it is read and
        found as it was written, by each rank a share. Called by every rank together.

        One that is damaged is said, in one line, and the next takes its place. None if there never was a checkpoint. Raises RequestError
        where none is left, or none is such.
        """
        known, wrong = set(self.damaged), list[str]()
        for step in on_main(world, lambda: self._candidates(which)):
            found = None if step in self.intact else self.damaged.get(step) or fault_of(self.path(step), world)
            if found is None:
                self.intact.add(step)
                for one in [one for one in self.damaged if one not in known and world.is_main]:
                    say_once(f"{self.damaged[one]}: this checkpoint is skipped")
                return step
            self.damaged[step] = found
            wrong.append(found)
        if wrong and isinstance(which, int):
            raise refuse("run.checkpoint", which, f"{wrong[0]}; last, best or another step are allowed")
        if wrong:
            told = f"{wrong[0]}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}"
            raise RequestError(f"{told}: no checkpoint in {self.folder} is left to go on from; restore one, or use another run.dir")
        return None

    def _candidates(self, which: str | int) -> list[int]:
        """Steps in the order in which they are to be tried."""
        there = self._folders()
        if which == "last":
            if not there and (self.folder / "latest").exists():
                raise RequestError(f"{self.folder} has no checkpoint any more; restore one, or remove this folder to train from the beginning")
            return there[::-1]
        steps = self.steps()
        listed = ", ".join(map(str, steps)) or "none"
        losses = {step: loss for step in steps if (loss := self.validation_loss(step)) is not None}
        if which == "best":
            if not losses:
                raise refuse("run.checkpoint", which, f"no checkpoint in {self.folder} had a validation; last or a step are allowed, of {listed}")
            return sorted(losses, key=lambda step: (losses[step], step))
        if which not in there:
            raise refuse("run.checkpoint", which, f"there is no such checkpoint in {self.folder}; last, best or a step are allowed, of {listed}")
        return [int(which)]

    def resume(self, trainer: "Trainer") -> bool:
        """Continue from the newest whole checkpoint; False if there never was one. Raises RequestError where none is left."""

        def sweep() -> None:
            for path in self.folder.glob(".*"):  # what a killed run was about to write or to remove
                with contextlib.suppress(OSError):  # in nobody's way
                    remove(path)

        on_main(trainer.world, sweep)
        step = self.choose("last", trainer.world)
        if step is None:
            return False
        on_main(trainer.world, lambda: self._settle(step))  # a run that was killed after its last save may not have come to that
        loaded = load_sharded(_whole_state(trainer, None, loading=True), self.path(step))
        fill(trainer.model, loaded["model"])
        share_counts(loaded["optimizer"])
        trainer.model.unit_order = read_order(self.path(step))
        with step_counts_stay(trainer.optimizer):
            trainer.optimizer.load_state_dict(loaded["optimizer"])
        unshare_steps(trainer.optimizer)
        trainer.set_state(loaded["trainer"])
        set_random_state(loaded["random"], trainer.world)
        return True

    def stop(self, trainer: "Trainer") -> None:
        """End the run early; everything is saved."""
        raise Stopped(f"stopped at step {trainer.step}, saved in {self.path(trainer.step)}: the same command continues")


def retained(losses: Mapping[int, float | None], keep_last: int, keep_every: int | None) -> set[int]:
    """Which checkpoints stay, of {step: validation loss}: the last, the multiples, and the best; of equals the earliest."""
    best = min((step for step, loss in losses.items() if loss is not None), key=lambda step: (losses[step], step), default=None)
    multiples = {step for step in losses if keep_every is not None and step % keep_every == 0}
    return {*sorted(losses)[-keep_last:], *multiples, *([] if best is None else [best])}


def _whole_state(trainer: "Trainer", kept: Host | None, loading: bool = False) -> dict[str, Any]:
    """All that a checkpoint holds, as copies in host memory, in `kept`, pinned where there is a GPU, or in memory of its own; or, `loading`, the
    places that it is read into."""
    room: Host = {} if kept is None else kept
    model = model_state(trainer.model, trainer.world)
    give_state(trainer.optimizer)  # where no step has been applied yet, there is none
    with states_by_parameter(trainer.optimizer, room, pinned=kept is not None):
        optimizer = trainer.optimizer.sharded_state_dict(model, is_loading=loading, metadata=OPTIMIZER)
    if not loading:
        for name, entry in model.items():
            if isinstance(entry, ShardedTensor | ShardedTensorFactory) and is_main_replica(entry.replica_id):
                copy = host_copy(room, ("model", name), entry.data.shape, entry.data.dtype, kept is not None and entry.data.is_cuda)
                entry.data = copy.copy_(entry.data.detach(), non_blocking=True)
        torch.cuda.synchronize()
    random = {} if loading else random_state(trainer.world)
    return {"model": model, "optimizer": optimizer, "trainer": trainer.state(), "random": random}


def _place(world: World) -> str:
    """A rank's place, by a name that another layout does not have."""
    return f"{world.rank} of tp={world.tp} cp={world.cp} ep={world.ep} dp={world.dp} pp={world.pp} vpp={world.vpp} on {world.device.type}"


def random_state(world: World) -> dict[str, Any]:
    """{place: states of torch's generators and Megatron's}, of all ranks. Called by all together.

    Nothing that is trained here draws from them (the models have no dropout, and the order of the data has a seed of its own), but they are
    a few kilobytes, and what will draw from them goes on where it was, at the same layout.
    """
    device = torch.cuda.get_rng_state() if world.device.type == "cuda" else None
    mine = {"torch": torch.get_rng_state(), "device": device, "megatron": tensor_parallel.get_cuda_rng_tracker().get_states()}
    found: list[Any] = [(_place(world), mine)]
    if world.size > 1:
        found = [None] * world.size
        dist.all_gather_object(found, (_place(world), mine))
    return dict(found)


def set_random_state(states: dict[str, Any], world: World) -> None:
    """This rank's generators go on from `random_state`; at another layout they stay as they are."""
    mine = states.get(_place(world))
    if mine is not None:
        torch.set_rng_state(mine["torch"])
        if mine["device"] is not None:
            torch.cuda.set_rng_state(mine["device"])
        tensor_parallel.get_cuda_rng_tracker().set_states(mine["megatron"])
