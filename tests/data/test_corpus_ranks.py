"""Several processes read one corpus: rank 0 makes the order, the others take it."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from minitron.data.corpus import TrainingSamples
from minitron.data.indexed import IndexedDatasetBuilder


def write(prefix: Path, documents: int, first: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for number in range(documents):
        builder.add_document(np.arange(first, first + 5 + number), [5 + number])
        first += 5 + number
    builder.finalize(f"{prefix}.idx")


def read(folder: Path, cache: str) -> list[list[int]]:
    samples = TrainingSamples([(folder / "a", 2.0), (folder / "b", 1.0)], 8, 25, 3, folder / cache)
    return [samples[index].tolist() for index in range(len(samples))]


def rank(number: int, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=2)
    np.save(folder / f"rank{number}.npy", read(folder, "shared"))
    dist.destroy_process_group()


@pytest.mark.multirank
def test_ranks_read_what_one_process_reads(tmp_path: Path) -> None:
    write(tmp_path / "a", 9, 0)
    write(tmp_path / "b", 7, 1000)
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    ranks = [context.Process(target=rank, args=(number, tmp_path)) for number in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    alone = read(tmp_path, "alone")
    assert [np.load(tmp_path / f"rank{number}.npy").tolist() for number in range(2)] == [alone, alone]
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(path.name for path in (tmp_path / "alone").iterdir())
