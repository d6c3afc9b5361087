"""Several processes read one corpus: rank 0 makes the order, the others take it."""

from pathlib import Path

import numpy as np
import pytest

from minitron.data.corpus import TrainingSamples
from minitron.data.indexed import IndexedDatasetBuilder
from minitron.engine.parallel import on_main
from tests.multirank.ranks import Layout, on_ranks


def write(prefix: Path, documents: int, first: int) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for number in range(documents):
        builder.add_document(np.arange(first, first + 5 + number), [5 + number])
        first += 5 + number
    builder.finalize(f"{prefix}.idx")


def read(world, folder: Path, cache: str) -> list[list[int]]:
    blend = [(folder / "a", 2.0), (folder / "b", 1.0)]
    samples = TrainingSamples(blend, 8, 25, 3, folder / cache, once=lambda make: on_main(world, make))
    return [samples[index].tolist() for index in range(len(samples))]


@pytest.mark.multirank
def test_ranks_read_what_one_process_reads(tmp_path: Path) -> None:
    write(tmp_path / "a", 9, 0)
    write(tmp_path / "b", 7, 1000)
    found = on_ranks(read, Layout(dp=2), tmp_path, "shared")
    (alone,) = on_ranks(read, Layout(), tmp_path, "alone")
    assert found == [alone, alone]
    assert sorted(path.name for path in (tmp_path / "shared").iterdir()) == sorted(path.name for path in (tmp_path / "alone").iterdir())
