"""A sharded state in a folder: each rank writes and reads its own shards; a folder is complete or absent."""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization, strategies
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from torch.distributed.checkpoint.api import CheckpointException

from minitron.engine.parallel import World, any_rank, on_main, refuse_together
from minitron.engine.verified import MARKER, Sums, fault, mark, sums
from minitron.engine.writer import Writer
from minitron.errors import RequestError
from minitron.files import fsync_path, os_errors_are_requests, remove, why_not_written

WAYS_TO_FAIL = (Exception, CheckpointException)  # torch's is no Exception; both wrap what the writers met


class Saving:
    """A save of a sharded state as `folder`, begun by all ranks together and written beside whatever they do then.

    Every rank writes into a temporary folder. `finish`, by all ranks together, waits for that, adds the marker that names
    each file with its checksum, and gives the folder its name. `texts` are small files to go along. What may change before it is
    written is to be copied before. Raises RequestError on every rank if any rank could not write, at the beginning or at the end.
    """

    def __init__(self, state: dict[str, Any], folder: Path, world: World, texts: dict[str, str] | None = None) -> None:
        self.folder, self.world, self.texts = folder, world, texts or {}
        self.temporary = folder.with_name(f".{folder.name}.partial")
        self.alone: list[Exception] = []  # what rank 0 met while it wrote alone
        self.mine: Sums = {}
        self.failure: str | None = None

        def begin() -> None:
            with os_errors_are_requests("cannot write", folder):
                remove(self.temporary)
                self.temporary.mkdir(parents=True)

        on_main(world, begin)
        with self._failing_together():
            self.temporary.mkdir(exist_ok=True)  # a rank that can't reach it is found before Megatron's collectives
        with self._failing_together(), written_by_threads():
            self.request = dist_checkpointing.save(state, str(self.temporary), async_sharded_save=True)
        self.writer: Writer = self.request.async_fn.__self__
        self.thread = threading.Thread(target=self._write, name="save")
        self.thread.start()

    def _write(self) -> None:
        try:
            self.writer.write()
            self.mine = sums(self.temporary, self.writer.files)
        except Exception as error:  # whatever it is, no rank may take the folder for complete
            self.failure = self._why(error)

    def is_written(self) -> bool:
        """Whether every rank has written its shards: asked by all together, the same on all."""
        return not any_rank(self.thread.is_alive(), self.world)

    def drop(self) -> None:
        """End this rank's writing as soon as may be, without the other ranks; what is there stays incomplete."""
        self.writer.dropped = True
        self.thread.join()

    def finish(self) -> None:
        """Wait for every rank; afterwards the folder is there, complete."""
        self.thread.join()
        with self._failing_together():
            for finalize in self.request.finalize_fns:
                finalize()
        parts: list[Any] = [self.mine]
        if self.world.size > 1:
            parts = [None] * self.world.size
            dist.all_gather_object(parts, self.mine)

        def complete() -> None:
            with os_errors_are_requests("cannot write", self.folder):
                self._complete({name: found for part in parts for name, found in part.items()})

        try:
            on_main(self.world, complete)
        except RequestError:
            self._clear()
            raise

    def _complete(self, files: Sums) -> None:
        """Add what rank 0 alone writes, the marker last, and give the folder its name."""
        for name, text in self.texts.items():
            (self.temporary / name).write_text(text, encoding="utf-8")
        own = [path for path in sorted(self.temporary.iterdir()) if path.name not in files]
        mark(self.temporary, files | sums(self.temporary, own))
        if (wrong := fault(self.temporary, contents=False)) is not None:  # a rank wrote where others do not see it
            raise RequestError(f"cannot write {self.folder}: {wrong}")
        for path in [*own, self.temporary / MARKER, self.temporary]:  # the writers' files are on the disk already
            fsync_path(path)
        remove(self.folder)
        self.temporary.rename(self.folder)
        fsync_path(self.folder.parent)

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """What goes wrong on one rank in the block is raised after it, by all ranks, as one line."""
        log = logging.getLogger("megatron.core.dist_checkpointing")
        level = log.level
        log.setLevel(logging.CRITICAL)  # what went wrong is said once
        try:
            with failing_later(self.alone):
                yield
        except WAYS_TO_FAIL as error:
            self.failure = self._why(error)
        finally:
            log.setLevel(level)
        if self.alone:
            self.failure = self._why(self.alone[0])
        try:
            refuse_together(self.failure, self.world)
        except RequestError:
            self._clear()
            raise

    def _why(self, error: BaseException) -> str:
        """One line."""
        return f"cannot write {self.folder}: {why_not_written(error, self.temporary)}"

    def _clear(self) -> None:
        """Leave nothing of a save that failed."""
        if "thread" in vars(self):
            self.drop()
        if self.world.is_main:
            with contextlib.suppress(OSError):
                remove(self.temporary)


def save_sharded(state: dict[str, Any], folder: Path, world: World, texts: dict[str, str] | None = None) -> None:
    """Write a sharded state as `folder` and wait for it (see Saving)."""
    Saving(state, folder, world, texts).finish()


def check_whole(folder: Path, world: World) -> None:
    """Refuse a folder that does not hold what was saved; each rank reads a share of the files. Called by every rank together."""
    if (wrong := fault_of(folder, world)) is not None:
        raise RequestError(f"{wrong}; make it again")


def fault_of(folder: Path, world: World) -> str | None:
    """What is wrong with a folder that was saved, naming the file; the same on every rank, each of which reads a share."""
    mine = fault(folder, world.rank, world.size)
    found: list[str | None] = [mine]
    if world.size > 1:
        found = [None] * world.size
        dist.all_gather_object(found, mine)
    return next((one for one in found if one is not None), None)


def load_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read what was saved as `folder`, at this layout."""
    if not (folder / MARKER).is_file():
        raise RequestError(f"{folder} is not a complete checkpoint")
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    return loaded


@contextlib.contextmanager
def written_by_threads() -> Iterator[None]:
    """Inside the block Megatron prepares saves for our writer."""
    usual = torch_strategies.FileSystemWriterAsync
    torch_strategies.FileSystemWriterAsync = Writer
    try:
        yield
    finally:
        torch_strategies.FileSystemWriterAsync = usual


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
