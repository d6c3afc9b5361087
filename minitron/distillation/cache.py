"""A teacher on disk: of every predicted token the K most probable next tokens, their log-probabilities, and the log of the others' mass.

A cache is a folder of .npz files, each with a fixed number of samples of the training order, whatever the layout that wrote them, and a
manifest.json, written last. A sample lies in its file as arrays of its own, compressed by themselves, so any split of a batch over ranks
reads just what it needs.

Log-probabilities are kept as whole numbers of 1/2048 nat below zero, in 16 bits: they reach down to -32 nats, where a probability is 1e-14, and
are off by at most 2^-12, a share of 0.03 % of any probability. Read back they are brought to a sum of one, which may move them by as much again.
(fp16, in as many bits, is off by up to 2^-8 at -10 nats.) Of the K in falling order the differences are stored, low and high bytes apart, which
compress better.

Legend: S positions, W positions of the whole sequence, B microbatch, T = S x B, K tokens kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from minitron import engine
from minitron.config.schema import Config
from minitron.data.lengths import rows_of
from minitron.distillation.signal import TopSignal
from minitron.distillation.step import local_tokens
from minitron.errors import RequestError, refuse, shown
from minitron.files import atomic_path, os_errors_are_requests, read_json, sha256, write_json

if TYPE_CHECKING:
    from minitron.data.corpus import Samples

Tensor = torch.Tensor
FORMAT, MANIFEST = 1, "manifest.json"
STEPS = 2048  # per nat
LARGEST = 2**16 - 1  # steps


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything that decides what a cache holds; two of equal descriptions hold the same."""

    teacher: str  # Source.fingerprint()
    data: str  # hash of the tokens of data.train
    seed: int
    vocab_size: int
    seq_length: int
    samples: int
    samples_per_file: int
    temperature: float
    top_k: int
    dtype: str
    packing: str
    separate_documents: bool
    format: int = FORMAT

    def key(self) -> str:
        """Short hash, which every file carries."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def predictions(self) -> str:
        """Short hash of what decides a sample's predictions, however many samples there are and however they lie in files."""
        return dataclasses.replace(self, samples=0, samples_per_file=0).key()

    def firsts(self) -> range:
        """The first sample of every file."""
        return range(0, self.samples, self.samples_per_file)

    def rows(self, first: int) -> range:
        """The samples of a file."""
        return range(first, min(first + self.samples_per_file, self.samples))

    def file(self, sample: int) -> str:
        """The name of the file that holds a sample."""
        return f"samples_{sample // self.samples_per_file * self.samples_per_file:010d}.npz"


# what a refusal calls each part of a description
CALLED = {
    "format": "format of the cache", "teacher": "teacher (teacher.path, or else model.path)", "data": "text (data.train)", "seed": "seed",
    "vocab_size": "vocabulary", "seq_length": "train.seq_length", "temperature": "distill.temperature", "top_k": "teacher.cache.top_k",
    "packing": "data.packing", "separate_documents": "data.separate_documents", "dtype": "dtype",
    "samples": "train.steps x train.global_batch_size", "samples_per_file": "teacher.cache.samples_per_file",
}  # fmt: skip
# what a run and the cache that it reads must have in common
SAME = ("format", "teacher", "data", "seed", "vocab_size", "seq_length", "temperature", "packing", "separate_documents")


def settled(cfg: Config) -> dict[str, Any]:
    """What the settings alone tell of a run's Description: all but the models and the text."""
    return {
        "seed": cfg.seed, "seq_length": cfg.train.seq_length, "samples": cfg.train.steps * cfg.train.global_batch_size,
        "samples_per_file": cfg.teacher.cache.samples_per_file, "temperature": cfg.distill.temperature, "top_k": cfg.teacher.cache.top_k,
        "dtype": cfg.dtype, "packing": cfg.data.packing, "separate_documents": cfg.data.separate_documents,
    }  # fmt: skip


def names(cfg: Config) -> dict[str, str]:
    """What the teacher and the text are called, for messages: a Description has but hashes of them."""
    return {"teacher": cfg.teacher.path or cfg.model.path, "data": cfg.data.train}


def holds_others(folder: Path) -> bool:
    """Whether files lie in a folder that no cache has."""
    return any(path.name != MANIFEST and not fnmatch(path.name, "samples_*.npz") for path in folder.iterdir() if not path.name.startswith("."))


@dataclasses.dataclass(frozen=True)
class Cache:
    """A finished cache: what it holds, size and hash of each of its files, and what its teacher and its text were called."""

    folder: Path
    description: Description
    files: dict[str, dict[str, Any]]
    names: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """On disk, without the manifest."""
        return sum(file["bytes"] for file in self.files.values())

    @classmethod
    def load(cls, folder: Path) -> Cache:
        """Read a folder's manifest. Raises RequestError where there is none, or a broken one."""
        if not (folder / MANIFEST).is_file():
            raise refuse("teacher.cache.folder", folder, "no finished cache is there; minitron cache makes one, and finishes one that it began")
        try:
            content = read_json(folder / MANIFEST)
            return cls(folder, Description(**content["cache"]), dict(content["files"]), dict(content.get("names", {})))
        except (TypeError, KeyError, ValueError, AttributeError, RequestError) as error:
            remedy = "another folder is needed" if holds_others(folder) else "remove the folder, and minitron cache makes it again"
            raise refuse("teacher.cache.folder", folder, f"its {MANIFEST} is damaged, or not that of a cache of this version: {remedy}") from error

    def check(self, wanted: Mapping[str, Any], names: Mapping[str, str] = MappingProxyType({})) -> None:
        """Refuse a cache that is not what this run needs, by what its manifest says. `wanted`: a Description's parts, as far as they are known.

        `names`: what the run calls its teacher and its text, where it says so.
        """
        for name in SAME:
            theirs, mine = getattr(self.description, name), wanted.get(name, getattr(self.description, name))
            if theirs != mine:
                there, here = self.names.get(name, shown(theirs)), names.get(name, shown(mine))
                which = f"{there}, and this run's is {here}" if there != here else f"{there} had another content then"
                raise refuse("teacher.cache.folder", self.folder, f"made with another {CALLED[name]}: {which}")
        if wanted["top_k"] > self.description.top_k:
            held = f"the cache in {self.folder} holds {self.description.top_k}: no more can be read"
            raise refuse("teacher.cache.top_k", wanted["top_k"], held)
        if wanted["samples"] > self.description.samples:
            needed = f"{CALLED['samples']} = {wanted['samples']} are needed"
            raise refuse("teacher.cache.folder", self.folder, f"it holds {self.description.samples} samples, and {needed}")

    def fault(self, first: int) -> str | None:
        """What is wrong with a file, found by reading all of it; None if nothing is."""
        name = self.description.file(first)
        path, known = self.folder / name, self.files.get(name)
        if known is None or not path.is_file():
            return f"{path} is missing"
        with os_errors_are_requests("cannot read", path):
            return None if path.stat().st_size == known["bytes"] and sha256(path) == known["sha256"] else f"{path} is damaged"

    def needed(self, samples: int) -> list[int]:
        """The first samples of the files that hold the first `samples`."""
        return [first for first in self.description.firsts() if first < samples]

    def foreign(self, first: int, samples: Samples) -> str | None:
        """Whether a file holds other samples than this run reads, by the hash of each one's tokens."""
        rows = range(first, min(self.description.rows(first).stop, len(samples)))
        stored = opened(self.folder / self.description.file(first))["hashes"]
        for number, hashed in zip(rows, stored, strict=False):
            if hash_tokens(samples[number]) != hashed:
                return (
                    f"made of other samples: its sample {number} is not this run's (their order depends on train.steps x "
                    f"train.global_batch_size, which is {len(samples)} here and {self.description.samples} there)"
                )
        return None

    def verify(self, samples: Samples, world: engine.World, advance: Callable[..., None] = lambda *_: None) -> None:
        """Read every file that the run needs, each on one rank, and hold it against the run's samples. Raises RequestError on every rank."""
        needed, failure = self.needed(len(samples)), None
        for turn in range(world.rank, len(needed), world.size):
            try:
                fault = self.fault(needed[turn])
                failure = self.foreign(needed[turn], samples) if fault is None else f"{fault}; minitron cache makes it again"
            except RequestError as error:
                failure = str(error)
            if failure is not None:
                break
            advance(min(world.size, len(needed) - turn))
        engine.refuse_together(failure and str(refuse("teacher.cache.folder", self.folder, failure)), world)


def missing(folder: Path, wanted: Description, names: Mapping[str, str] = MappingProxyType({})) -> list[int]:
    """The first samples of the files that are still to be made: absent, of another cache that was not finished, or damaged since.

    Raises RequestError, which calls teacher and text by their `names`, where a finished cache of something else lies.
    """
    if not (folder / MANIFEST).is_file():
        return [first for first in wanted.firsts() if not _is_mine(folder / wanted.file(first), wanted)]
    there = Cache.load(folder)
    for field in dataclasses.fields(Description):
        theirs, mine = getattr(there.description, field.name), getattr(wanted, field.name)
        if theirs != mine:
            said, asked = there.names.get(field.name, shown(theirs)), names.get(field.name, shown(mine))
            which = f"is {said}, not {asked}" if said != asked else f"{said} had another content then"
            raise refuse("teacher.cache.folder", folder, f"holds a cache whose {CALLED[field.name]} {which}: another folder is needed")
    return [first for first in wanted.firsts() if there.fault(first) is not None]


def _is_mine(path: Path, wanted: Description) -> bool:
    """Files are complete or absent, so one that carries the key is good."""
    try:
        return path.is_file() and str(opened(path)["key"]) == wanted.key()
    except RequestError:
        return False


def finish(folder: Path, description: Description, names: Mapping[str, str] = MappingProxyType({})) -> Cache:
    """Write the manifest of a folder whose files are all there. `names` are for messages alone."""
    paths = [folder / description.file(first) for first in description.firsts()]
    with os_errors_are_requests("cannot read the cache in", folder):  # files of other nodes too: the folder must be one that all see
        files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths}
    write_json(folder / MANIFEST, {"cache": dataclasses.asdict(description), "names": dict(names), "files": files})
    return Cache(folder, description, files, dict(names))


def write(folder: Path, description: Description, first: int, tokens: Iterable[Tensor], signals: Iterable[TopSignal]) -> None:
    """One file: the samples from `first` on, each as its tokens [W + 1] and its signal [W, K]."""
    arrays: dict[str, Any] = {"key": np.array(description.key())}
    hashes = []
    for number, (tokens_W, signal) in enumerate(zip(tokens, signals, strict=True)):
        hashes.append(hash_tokens(tokens_W))
        arrays[f"tokens.{number}"] = signal.tokens_TK.numpy().astype(np.min_scalar_type(description.vocab_size - 1))
        arrays[f"steps.{number}"] = halves(np.diff(encode(signal.log_probs_TK.numpy()), axis=1, prepend=np.uint16(0)))
        arrays[f"tail.{number}"] = encode(signal.tail_T.numpy())
    arrays["hashes"] = np.array(hashes, dtype=np.uint64)
    with atomic_path(folder / description.file(first)) as temporary, open(temporary, "wb") as handle:
        np.savez_compressed(handle, **arrays)


def opened(path: Path) -> Any:
    """An .npz file, whose arrays are read when they are asked for."""
    try:
        return _Arrays(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from error


class _Arrays:
    """np.load of a file that says in one line what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path, self.arrays = path, np.load(path, allow_pickle=False)

    def __getitem__(self, name: str) -> np.ndarray:
        try:
            found: np.ndarray = self.arrays[name]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise _damaged(self.path, error) from error
        return found


def _damaged(path: Path, error: Exception) -> RequestError:
    return RequestError(f"cannot read {path}: {error}; minitron cache makes it again")


def hash_tokens(tokens_W: Tensor) -> int:
    """64 bits that tell a sample from others."""
    return int.from_bytes(hashlib.blake2b(tokens_W.numpy().astype("<i8").tobytes(), digest_size=8).digest(), "little")


def encode(log_probs: np.ndarray) -> np.ndarray:
    """Steps below zero, uint16; what is below the lowest step is put there."""
    return np.rint(np.minimum(log_probs.astype(np.float64) * -STEPS, LARGEST)).astype(np.uint16)


def halves(values: np.ndarray) -> np.ndarray:
    """uint16 [...] as its low bytes and its high bytes, [2, ...]: the latter are mostly zero, and compress best by themselves."""
    return np.stack([values & 255, values >> 8]).astype(np.uint8)


def joined(bytes_2: np.ndarray) -> np.ndarray:
    """Inverse of `halves`."""
    low, high = bytes_2.astype(np.uint16)
    return low | high << 8


def decode(steps: np.ndarray) -> np.ndarray:
    """Inverse of `encode` but for its rounding, fp32."""
    return steps.astype(np.float32) / -STEPS


class CachedTeacher:
    """A `Teacher` that reads a cache, at any number of replicas and any size of microbatches, from any step on.

    Each microbatch's tokens are held against the hash of those that the teacher saw. `top_k` may be less than the cache's: what is left out joins
    the others.
    """

    def __init__(self, cache: Cache, top_k: int, world: engine.World) -> None:
        self.cache, self.top_k, self.world = cache, top_k, world
        self.open: tuple[str, Any] = ("", None)  # the file that was read last: a rank's samples mostly lie in one

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> list[TopSignal]:
        """As `Teacher` says. Raises RequestError on every rank where one can't read its part."""
        found, failure = [], None
        try:
            if self.world.is_last_stage:
                found = [self._signal(step * len(batches), number, batch.tokens_BT) for number, batch in enumerate(batches)]
        except RequestError as error:
            failure = str(error)
        if engine.any_rank(failure is not None, self.world):
            engine.refuse_together(failure, self.world)
        return found

    def _signal(self, passed: int, number: int, tokens_BT: Tensor) -> TopSignal:
        """Of a step's microbatch; `passed` of them came before the step."""
        size = len(tokens_BT)
        rows = rows_of(passed * size * self.world.dp, number, size, self.world.dp_rank, self.world.dp)
        samples = [self._sample(index, tokens) for index, tokens in zip(rows, tokens_BT, strict=True)]
        tokens_BWK, log_probs_BWK, tail_BW = (torch.from_numpy(np.stack(parts)) for parts in zip(*samples, strict=True))
        return TopSignal(*(local_tokens(whole, self.world) for whole in self._kept(tokens_BWK.long(), log_probs_BWK, tail_BW)))

    def _sample(self, index: int, tokens_W: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a file holds of a sample: tokens [W, K], log-probabilities [W, K] and [W]."""
        description = self.cache.description
        name = description.file(index)
        if self.open[0] != name:
            self.open = (name, opened(self.cache.folder / name))
        arrays, number = self.open[1], index % description.samples_per_file
        if hash_tokens(tokens_W) != arrays["hashes"][number]:
            raise refuse("teacher.cache.folder", self.cache.folder, f"its sample {index} is of other tokens than this run's")
        steps_WK = np.cumsum(joined(arrays[f"steps.{number}"]), axis=1, dtype=np.uint16)
        return arrays[f"tokens.{number}"].astype(np.int64), decode(steps_WK), decode(arrays[f"tail.{number}"])

    def _kept(self, tokens_BWK: Tensor, log_probs_BWK: Tensor, tail_BW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first `top_k`, normalised: rounding leaves a sum that is not quite one."""
        total_BW = torch.logaddexp(log_probs_BWK.logsumexp(dim=2), tail_BW)
        top, rest = log_probs_BWK[:, :, : self.top_k], log_probs_BWK[:, :, self.top_k :]
        tail_BW = torch.cat([rest, tail_BW[:, :, None]], dim=2).logsumexp(dim=2)
        return tokens_BWK[:, :, : self.top_k], top - total_BW[:, :, None], tail_BW - total_BW
