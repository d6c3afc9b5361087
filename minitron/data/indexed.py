"""Megatron's indexed datasets: a .bin of token ids, document after document, and an .idx of their lengths. All of data/ that imports megatron."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import RequestError, refuse

with warnings.catch_warnings():  # megatron's import warns of GPU libraries that no dataset uses
    warnings.simplefilter("ignore")
    from megatron.core.datasets import helpers
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "DType",
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "helpers",
    "open_indexed",
    "open_prompts",
    "read_tokens",
]

# the header of an .idx file, as Megatron defines it; the lengths (int32), byte offsets (int64) and document boundaries (int64) follow
_HEADER = np.dtype([("magic", "S9"), ("version", "<u8"), ("dtype", "u1"), ("sequences", "<u8"), ("boundaries", "<u8")])
BLOCK_TOKENS = 1 << 22
PROMPT_TYPE = np.dtype("<i4")
_TOKEN_TYPES = {code.value: np.dtype(code.name) for code in DType if np.dtype(code.name).kind in "iu"}


def open_indexed(prefix: Path, setting: str) -> IndexedDataset:
    """Open `prefix`.bin/.idx, memory-mapped. Raises RequestError, naming `setting`, where they are absent, not Megatron's, truncated or empty."""
    tokens = Path(f"{prefix}.bin")
    index = Path(f"{prefix}.idx")
    try:
        header = np.fromfile(index, _HEADER, 1)
        # checked here since megatron asserts, and its half-built object then complains on the console
        if not len(header) or header["magic"][0] != b"MMIDIDX" or header["version"][0] != 1 or int(header["dtype"][0]) not in _TOKEN_TYPES:
            raise refuse(setting, prefix, f"{index.name} is not an index of token ids that Megatron wrote")
        sequences, boundaries = int(header["sequences"][0]), int(header["boundaries"][0])
        if index.stat().st_size < _HEADER.itemsize + 12 * sequences + 8 * boundaries:
            raise refuse(setting, prefix, f"{index.name} is truncated")
        lengths = np.fromfile(index, np.int32, sequences, offset=_HEADER.itemsize)
        expected = int(lengths.sum(dtype=np.int64)) * _TOKEN_TYPES[int(header["dtype"][0])].itemsize
        if tokens.stat().st_size != expected:
            raise refuse(setting, prefix, f"{tokens.name} has {tokens.stat().st_size} bytes where {index.name} tells of {expected}")
    except OSError as error:
        raise RequestError(f"{setting}={prefix}: cannot be read: {error.strerror or error}") from error
    if not expected:
        raise refuse(setting, prefix, "holds no tokens")
    return IndexedDataset(str(prefix))


def open_prompts(prefix: Path, indexed: IndexedDataset, setting: str) -> np.ndarray:
    """`prefix`.prompts, memory-mapped: how many tokens at the start of each document are its prompt, int32 [documents].

    Raises RequestError, naming `setting`, where it is absent or not of these documents.
    """
    file = Path(f"{prefix}.prompts")
    try:
        size = file.stat().st_size
    except OSError as error:
        raise refuse(setting, prefix, f"data.prompt_key needs {file.name} beside its tokens, which can't be read ({error.strerror})") from error
    lengths = indexed.sequence_lengths
    if size != 4 * len(lengths) or len(indexed.document_indices) != len(lengths) + 1:
        raise refuse(setting, prefix, f"{file.name} does not hold one int32 for each document of {prefix.name}.idx")
    prompts: np.ndarray = np.memmap(file, PROMPT_TYPE, "r")
    if (prompts < 0).any() or (prompts > lengths).any():
        raise refuse(setting, prefix, f"{file.name} has prompts that are longer than their documents")
    return prompts


def write_index(file: Path, dtype: Any, lengths: np.ndarray) -> None:
    """The .idx of documents of these lengths, each one sequence, byte for byte as Megatron's builder writes it; that one keeps Python lists."""
    count = len(lengths)
    starts = np.cumsum(lengths, dtype="<i8") - lengths
    with open(file, "wb") as handle:
        np.array([(b"MMIDIDX", 1, DType.code_from_dtype(np.dtype(dtype).type), count, count + 1)], _HEADER).tofile(handle)
        lengths.astype("<i4").tofile(handle)
        (starts * np.dtype(dtype).itemsize).tofile(handle)
        np.arange(count + 1, dtype="<i8").tofile(handle)


def token_blocks(prefix: Path, dtype: Any) -> Iterator[np.ndarray]:
    """The tokens of `prefix`.bin, `BLOCK_TOKENS` at a time. Read, not mapped: mapped pages would count as this process's memory."""
    with open(f"{prefix}.bin", "rb") as handle:
        while len(block := np.fromfile(handle, dtype, BLOCK_TOKENS)):
            yield block


def check_documents(prefix: Path, indexed: IndexedDataset, asked: str) -> None:
    """Raises RequestError, naming the setting that `asked`, where documents are stored as several sequences each."""
    if len(indexed.document_indices) != len(indexed.sequence_lengths) + 1:
        raise RequestError(f"{asked}: {prefix.name}.idx stores documents in parts, such as sentences; one sequence for each is needed")


def num_tokens(indexed: IndexedDataset) -> int:
    """Tokens of all documents."""
    return int(indexed.sequence_lengths.sum(dtype=np.int64))


def read_tokens(indexed: IndexedDataset, start: int, count: int) -> np.ndarray:
    """Tokens start ... start + count - 1 of all documents put one after another, as int64 [count]."""
    dtype = indexed.index.dtype
    return indexed.bin_reader.read(dtype=dtype, count=count, offset=start * np.dtype(dtype).itemsize).astype(np.int64)
