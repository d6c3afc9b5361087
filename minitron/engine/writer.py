"""Writes a rank's shards of a checkpoint in threads, beside a training that goes on or while it waits."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import _wrap_exception
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, SerializationFormat
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

Bucket = tuple[str, list[tuple[WriteItem, Any]]]  # a file's name, and what goes into it


class Writer(filesystem_async.FileSystemWriterAsync):
    """Megatron's writer, by threads where it has processes, and without its copies before the writing.

    Its processes would die of the signal that asks the run to stop where its whole process group gets it, and nothing would be saved; they
    would outlive a rank that is killed; and forking beside the threads of gloo and torch may hang. What may change while it is written
    is to be copied before. What is a part of a larger tensor, of which all would be written, becomes a tensor of its own in its turn.
    """

    buckets: list[Bucket]
    results: list[WriteResult]
    failure: Exception | None
    dropped = False  # set by another thread: what is not written yet is not needed any more

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Share out what this rank writes among its files."""
        self.buckets, self.results, self.failure = [], [], None
        for items in filesystem_async._split_by_size_and_type(self.thread_count, plan.items):
            if items:
                in_order = sorted(items, key=lambda item: item.type != WriteItemType.BYTE_IO)
                name = f"{plan.storage_data.prefix}{len(self.buckets)}{DEFAULT_SUFFIX}"
                self.buckets.append((name, [(item, planner.resolve_data(item)) for item in in_order]))

    def get_save_function_and_args(self) -> tuple[Any, Any, list[Any]]:
        """What Megatron's request for an asynchronous save is to call: (write, nothing to do before, its arguments)."""
        return self.write, None, []

    @property
    def files(self) -> list[Path]:
        """The files that this rank writes."""
        return [Path(self.checkpoint_dir, name) for name, _ in self.buckets]

    def write(self) -> None:
        """Write this rank's files, each by a thread. An error is kept for `retrieve_write_results`."""
        torch.serialization.set_crc32_options(False)  # a checksum of each tensor: there is one of each file
        with ThreadPoolExecutor(max(len(self.buckets), 1)) as pool:
            written = [pool.submit(self._write_file, *bucket) for bucket in self.buckets]
        torch.serialization.set_crc32_options(True)
        for future in written:
            if (error := future.exception()) is not None:
                self.failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            else:
                self.results += future.result()

    def _write_file(self, name: str, items: list[tuple[WriteItem, Any]]) -> list[WriteResult]:
        found = []
        with open(Path(self.checkpoint_dir, name), "wb") as stream:
            for item, data in items:
                if self.dropped:
                    raise InterruptedError("dropped")
                if isinstance(data, torch.Tensor):
                    data = data.detach().cpu()
                    data = data.clone() if data.untyped_storage().nbytes() != data.nbytes else data
                found.append(
                    filesystem_async._write_item(self.transforms, stream, data, item, name, serialization_format=SerializationFormat.TORCH_SAVE)
                )
            stream.flush()
            os.fsync(stream.fileno())
        return found

    def retrieve_write_results(self) -> Any:
        """What was written where, or the wrapped error."""
        if self.failure is None:
            return self.results
        try:
            raise self.failure
        except Exception as error:
            return _wrap_exception(error)
