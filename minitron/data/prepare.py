"""Sources -> `run.dir/data/`: .bin/.idx files of the splits train, valid, calibration and text_NAME, and manifest.json.

With data.prompt_key, the first three have a .prompts file too: how many tokens of each document are its prompt, int32, in the index's order.
valid is data.valid or, where that is null, documents held out of data.train (holdout.py), which train then lacks. calibration is data.calibration or,
where that is null, documents held out likewise (data.calibration_fraction) or else the train split itself, never the valid one. Prepared data is used
where it lies, unless documents are to be held out of it.

A source is tokenised into pieces (pieces.py), which are joined when the last one is there: its tokens are on the disk twice until the pieces are
removed. A restart goes on after the last piece, and redoes only the parts whose source, tokenizer or settings changed, or whose files are not there
as the manifest says.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron.config.schema import Data
from minitron.data.holdout import hold_out, stretches
from minitron.data.indexed import PROMPT_TYPE, DType, num_tokens, open_indexed, open_prompts, token_blocks, write_index
from minitron.data.manifest import Manifest, Part
from minitron.data.pieces import ENDING, PIECE_TOKENS, Pieces
from minitron.data.sources import Place, Source, blend, check_located, locate, newest_revision, records
from minitron.data.tokenizing import Tokenize, Tokens, encoder, fingerprint, load_tokenizer, num_ids, tokenized
from minitron.errors import refuse
from minitron.files import atomic_path, remove, sha256

SPLITS = ("train", "valid", "calibration")
ENDINGS = ("bin", "idx", "prompts")
# (name of the part, documents so far, tokens so far, share of the source's bytes that was read or None)
Progress = Callable[[str, int, int, float | None], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and the parts it gives: (split, part name), those after the first for the documents held out of it."""

    source: Source
    weight: float
    parts: tuple[tuple[str, str], ...]
    prompt_key: str | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files of each part."""
        return ENDINGS[:2] if self.prompt_key is None else ENDINGS

    @property
    def name(self) -> str:
        return self.parts[0][1]

    @property
    def in_place(self) -> bool:
        return self.source.kind == "prepared" and len(self.parts) == 1


def prepare(data: Data, tokenizer_path: str | Path, folder: Path, *, seed: int, splits: Sequence[str] = SPLITS,
            texts: Mapping[str, str] | None = None, vocab_size: int | None = None, on_progress: Progress | None = None) -> Manifest:  # fmt: skip
    """Make `splits`, and a split text_NAME of each of `texts` (name: source), in `folder`; for one process of a run, the others read afterwards.

    `seed` draws the held-out documents. Raises RequestError: a source that `check_source` refuses (before anything is tokenised), no tokens, a
    token id that a model with `vocab_size` lacks, a full disk.
    """
    folder = Path(folder)
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(str(tokenizer_path))
    jobs = _jobs(data, splits, texts or {})
    keys = [_made_from(job, data, seed, fingerprint(tokenizer)) for job in jobs]
    todo = [(job, key) for job, key in zip(jobs, keys, strict=True) if not _is_current(manifest, job, key)]
    for job, _ in todo:
        if job.source.kind == "prepared" and job.source.prefix.parent.resolve() == folder.resolve():
            raise job.source.refusal(job.source.given, "is this run's own data; give the source that it was made from, or use another run.dir")
        check_located(job.source, data.text_key, data.split, job.prompt_key)
    for job, key in todo:
        for _, name in job.parts:
            manifest.drop(name)
        if not job.in_place:
            manifest.save()  # before the files change: a part that is listed is complete
            stored = _prepared(job) if job.source.kind == "prepared" else _tokenise(job, key, tokenizer, data, folder, vocab_size, on_progress)
            _write(job, folder, stored, data, seed)
        for _, name in job.parts:
            manifest.parts[name] = _describe(job, name, folder, key)
        manifest.save()
        remove(folder / f"{job.name}.{ENDING}")
    for split in {split: None for job in jobs for split, _ in job.parts}:
        manifest.splits[split] = [(name, job.weight) for job in jobs for to, name in job.parts if to == split]
    if data.calibration is None and data.calibration_fraction is None and any(split == "train" for job in jobs for split, _ in job.parts):
        manifest.splits["calibration"] = manifest.splits["train"]
    for job in jobs:
        for _, name in job.parts:
            _check_vocabulary(job.source, manifest.parts[name].largest_id, vocab_size)
    _remove_unused(manifest)
    manifest.save()
    return manifest


def _jobs(data: Data, splits: Sequence[str], texts: Mapping[str, str]) -> list[Job]:
    specs = {"train": data.train, "valid": data.valid, "calibration": data.calibration}
    wanted = [(split, f"data.{split}", spec) for split, spec in specs.items() if split in splits and spec is not None]
    if "train" not in splits and any(split in splits and specs[split] is None for split in ("valid", "calibration")):
        wanted.append(("train", "data.train", data.train))
    for name, spec in texts.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise refuse("eval.texts", name, "a name of letters, digits, _ and - is needed")
        wanted.append((f"text_{name}", f"eval.texts.{name}", spec))
    jobs = []
    for split, setting, spec in wanted:
        outputs = [*_owned(data)] if split == "train" else [split]
        sources = blend(spec, setting)
        for number, (weight, given) in enumerate(sources):
            suffix = f".{number}" if len(sources) > 1 else ""
            prompt_key = data.prompt_key if split in SPLITS else None
            jobs.append(Job(locate(given, setting), weight, tuple((output, output + suffix) for output in outputs), prompt_key))
    return jobs


def _owned(data: Data) -> dict[str, tuple[float, float]]:
    """The splits that data.train gives, train first, and the stretch of the draws of each (holdout.py)."""
    return stretches(data.valid_fraction if data.valid is None else None, data.calibration_fraction)


def _made_from(job: Job, data: Data, seed: int, tokenizer: str) -> dict[str, Any]:
    """What decides the content of a job's files, in JSON's types so that it compares equal after a restart."""
    files = [*job.source.files]
    if job.source.kind == "prepared" and job.prompt_key is not None:
        check_located(job.source, prompt_key=job.prompt_key)
        files.append(Path(f"{job.source.prefix}.prompts"))
    stats = [(file.absolute(), file.stat()) for file in files]
    return {
        "source": job.source.name,
        "files": [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in stats],
        "text_key": None if job.source.kind == "prepared" else job.source.field or data.text_key,
        "hub_split": data.split if job.source.kind == "hub" else None,
        "tokenizer": None if job.source.kind == "prepared" else tokenizer,
        "held_out": {"fraction": data.valid_fraction, "seed": seed} if len(job.parts) > 1 else None,
        # only where they are set: without them, data stays what it was before there were these settings
        **({} if len(job.parts) == 1 or data.calibration_fraction is None else {"calibration_fraction": data.calibration_fraction}),
        **({} if job.prompt_key is None or job.source.kind == "prepared" else {"prompt_key": job.prompt_key}),
    }


def _is_current(manifest: Manifest, job: Job, key: dict[str, Any]) -> bool:
    for _, name in job.parts:
        part = manifest.parts.get(name)
        if part is None or part.made_from != key:
            return False
        files = {ending: Path(f"{manifest.folder / part.prefix}.{ending}") for ending in job.endings}
        if {*part.bytes} != {*files} or not all(file.is_file() and file.stat().st_size == part.bytes[ending] for ending, file in files.items()):
            return False
    return True


@dataclasses.dataclass(frozen=True)
class Stored:
    """The documents of a source as tokens on the disk, none of them empty."""

    dtype: Any
    lengths: np.ndarray  # int32 [documents]
    prompts: np.ndarray  # int32 [documents]
    blocks: Callable[[], Iterator[np.ndarray]]  # all tokens, as many at a time as memory holds


def _prepared(job: Job) -> Stored:
    indexed = open_indexed(job.source.prefix, job.source.setting)
    bounds = np.concatenate([[0], np.cumsum(indexed.sequence_lengths, dtype=np.int64)])[indexed.document_indices]
    lengths = np.diff(bounds).astype(np.int32)
    given = np.zeros_like(lengths) if job.prompt_key is None else open_prompts(job.source.prefix, indexed, job.source.setting)
    dtype = indexed.index.dtype
    return Stored(dtype, lengths[lengths > 0], given[lengths > 0], lambda: token_blocks(job.source.prefix, dtype))


def _tokenise(job: Job, key: dict[str, Any], tokenizer: Any, data: Data, folder: Path, vocab_size: int | None,
              on_progress: Progress | None) -> Stored:  # fmt: skip
    """Tokenise what of the source is not in pieces yet."""
    # documents are held out when the pieces are joined: another fraction or seed finds these as good as before
    pieces = Pieces(folder / f"{job.name}.{ENDING}", {name: value for name, value in key.items() if not name.startswith(("held_out", "calibration"))})
    place, dtype = Place(skip=pieces.records), DType.optimal_dtype(num_ids(tokenizer))  # the smallest of Megatron's that holds the ids
    if not pieces.files:
        pieces.revision = newest_revision(job.source)
    documents, tokens, waiting = pieces.documents, pieces.tokens, list[Tokens]()
    if on_progress:
        on_progress(job.name, documents, tokens, None)
    rows = records(job.source, place, data.text_key, data.split, job.prompt_key, pieces.revision)
    with contextlib.closing(tokenized(Tokenize(encoder(tokenizer), dtype), rows, data.workers)) as chunks:
        for chunk in chunks:
            _check_vocabulary(job.source, int(chunk.ids.max(initial=0)), vocab_size)
            waiting.append(chunk)
            documents, tokens = documents + len(chunk.lengths), tokens + len(chunk.ids)
            if tokens - pieces.tokens >= PIECE_TOKENS:
                pieces.add(waiting)
                waiting.clear()
            if on_progress:
                on_progress(job.name, documents, tokens, place.share)
    if waiting:
        pieces.add(waiting)
    return Stored(dtype, pieces.of_documents("lengths"), pieces.of_documents("prompts"), pieces.blocks)


def _write(job: Job, folder: Path, stored: Stored, data: Data, seed: int) -> None:
    """Write the files of a job's parts, all complete or all absent; a block of tokens and a few bytes for each document are in memory."""
    owned = _owned(data)
    lengths, prompts, sides = hold_out(
        stored.lengths, stored.prompts, [owned[split] for split, _ in job.parts] if len(job.parts) > 1 else [(0, 1)], seed
    )
    if not len(lengths):
        raise job.source.refusal(job.source.given, "holds no text that gives tokens")
    if len(np.unique(sides)) < len(job.parts):
        raise job.source.refusal(job.source.given, f"is too little text to give something to each of {', '.join(split for split, _ in job.parts)}")
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(atomic_path(folder / f"{name}.{ending}")) for ending in job.endings] for _, name in job.parts]
        with contextlib.ExitStack() as opened:
            handles = [opened.enter_context(open(tokens, "wb")) for tokens, *_ in files]
            for block, side_of in _sided(stored.blocks(), lengths, sides):
                for side, handle in enumerate(handles):
                    block[side_of == side].tofile(handle)
        for side, (_, index, *beside) in enumerate(files):
            write_index(index, stored.dtype, lengths[sides == side])
            for file in beside:
                prompts[sides == side].astype(PROMPT_TYPE).tofile(file)
    for _, name in job.parts:
        for ending in set(ENDINGS) - {*job.endings}:
            remove(folder / f"{name}.{ending}")  # of an earlier part of this name


def _sided(blocks: Iterator[np.ndarray], lengths: np.ndarray, sides: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each block of tokens with the side of each token; a block may end inside a document."""
    ends = np.cumsum(lengths, dtype=np.int64)
    start = 0
    for block in blocks:
        stop = start + len(block)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")  # the documents of the first and of the last token
        inside = np.diff(np.clip(ends[first : last + 1], start, stop), prepend=start).astype(np.int64)
        yield block, np.repeat(sides[first : last + 1], inside)
        start = stop


def _describe(job: Job, name: str, folder: Path, key: dict[str, Any]) -> Part:
    """Count and hash the files of a part in one pass over its tokens."""
    prefix = job.source.prefix if job.in_place else Path(name)
    path = folder / prefix
    indexed = open_indexed(path, job.source.setting)
    largest, digest = 0, hashlib.sha256()
    for block in token_blocks(path, indexed.index.dtype):
        largest = max(largest, int(block.max()))
        digest.update(block.data)
    files = {ending: Path(f"{path}.{ending}") for ending in job.endings}
    return Part(
        prefix=str(prefix),
        source=job.source.given,
        documents=len(indexed.document_indices) - 1,
        tokens=num_tokens(indexed),
        largest_id=largest,
        bytes={ending: file.stat().st_size for ending, file in files.items()},
        sha256={"bin": digest.hexdigest(), **{ending: sha256(files[ending]) for ending in job.endings[1:]}},
        made_from=key,
    )


def _check_vocabulary(source: Source, largest: int, vocab_size: int | None) -> None:
    if vocab_size is not None and largest >= vocab_size:
        raise source.refusal(source.given, f"token id {largest} is outside the model's vocabulary of {vocab_size}; is it another model's tokenizer?")


def _remove_unused(manifest: Manifest) -> None:
    """Remove the files of parts that no split uses any more (a blend became one source, say). Prepared data lies elsewhere and is never touched."""
    used = {name for rows in manifest.splits.values() for name, _ in rows}
    for name in set(manifest.parts) - used:
        del manifest.parts[name]
        for ending in ENDINGS:
            remove(manifest.folder / f"{name}.{ending}")
    for left in (*manifest.folder.glob(f"*.{ENDING}"), *manifest.folder.glob(".*.partial"), *manifest.folder.glob(".*.removed")):
        remove(left)  # by a killed run of other settings
