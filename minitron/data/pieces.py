"""What was tokenised of a source so far, in numbered files, each complete or absent: a restart reads on after the last of them.

Where one piece ends and the next begins depends on where runs were broken off; the tokens in them, put one after another, do not.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minitron.data.tokenizing import Tokens
from minitron.files import atomic_path, remove

ENDING = "pieces"
PIECE_TOKENS = 1 << 22  # the most that is tokenised again after a kill, and what is held in memory


class Pieces:
    """The pieces in `folder`, which comes with the first one. Those that were made from anything but `made_from` (JSON's types) are removed.

    `revision`: the state of a source that may change between two runs, which the first piece decides for all; set it before there is one.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any]) -> None:
        self.folder, self.made_from = folder, json.dumps(made_from)
        self.revision = ""
        self.files: list[Path] = []
        self.records = self.documents = self.tokens = 0
        for number, file in enumerate(sorted(folder.glob("*.safetensors"))):
            told = _told(file)
            if file != self._file(number) or told is None or told["made_from"] != self.made_from:
                break
            self.revision = told.get("revision", "")
            self._count(file, int(told["records"]), int(told["documents"]), int(told["tokens"]))
        if not self.files and folder.exists():
            remove(folder)
        for file in {*folder.glob("*"), *folder.glob(".*")} - {*self.files}:
            remove(file)

    def add(self, chunks: Sequence[Tokens]) -> None:
        """Write the next piece: `chunks` one after another."""
        ids, lengths, prompts = (np.concatenate([chunk[part] for chunk in chunks]) for part in range(3))
        records, file = sum(chunk.records for chunk in chunks), self._file(len(self.files))
        told = {"made_from": self.made_from, "records": str(records), "documents": str(len(lengths)), "tokens": str(len(ids))}
        told["revision"] = self.revision
        with atomic_path(file) as temporary:
            save_file({"ids": ids, "lengths": lengths, "prompts": prompts}, temporary, told)
        self._count(file, records, len(lengths), len(ids))

    def of_documents(self, what: str) -> np.ndarray:
        """The `lengths` or the `prompts` of all documents, int32."""
        return np.concatenate([np.empty(0, np.int32), *(_array(file, what) for file in self.files)])

    def blocks(self) -> Iterator[np.ndarray]:
        """All tokens, a piece at a time."""
        return (_array(file, "ids") for file in self.files)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def _count(self, file: Path, records: int, documents: int, tokens: int) -> None:
        self.files.append(file)
        self.records, self.documents, self.tokens = self.records + records, self.documents + documents, self.tokens + tokens


def _array(file: Path, name: str) -> np.ndarray:
    with safe_open(file, "numpy") as piece:
        array: np.ndarray = piece.get_tensor(name)
        return array


def _told(file: Path) -> dict[str, str] | None:
    """What a piece says of itself; None where it is not one."""
    try:
        with safe_open(file, "numpy") as piece:
            told: dict[str, str] = piece.metadata()
            return told
    except (OSError, SafetensorError):
        return None
