"""Sources -> `run.dir/data/`: .bin/.idx files of the splits train, valid, calibration and text_NAME, and manifest.json.

With data.prompt_key, the first three have a .prompts file too: how many tokens of each document are its prompt, int32, in the index's order.
valid is data.valid or, where that is null, documents held out of data.train (holdout.py), which train then lacks. calibration is data.calibration or,
where that is null, the train split itself, never the valid one. Prepared data is used where it lies, unless documents are to be held out of it.
A restart redoes only the parts whose source, tokenizer or settings changed, or whose files are not there as the manifest says.
"""

import contextlib
import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minitron.config.schema import Data
from minitron.data.holdout import hold_out
from minitron.data.indexed import PROMPT_TYPE, DType, IndexedDatasetBuilder, num_tokens, open_indexed, open_prompts, read_tokens
from minitron.data.manifest import Manifest, Part
from minitron.data.sources import Source, blend, check_located, documents, locate, prompted_documents
from minitron.data.tokenizing import Document, fingerprint, load_tokenizer, num_ids, tokenize_prompted, tokenized
from minitron.errors import refuse
from minitron.files import atomic_path, remove, sha256

SPLITS = ("train", "valid", "calibration")
ENDINGS = ("bin", "idx", "prompts")
PROGRESS_DOCUMENTS = 256  # documents between two reports
SCAN_TOKENS = 1 << 24  # tokens of a .bin file in memory while it is described
Side = tuple[bool, Document]  # (held out?, a document)
Progress = Callable[[str, int, int], None]  # (name of the part, documents so far, tokens so far)


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and the parts it gives: (split, part name), the second one for the documents held out of the first."""

    source: Source
    weight: float
    parts: tuple[tuple[str, str], ...]
    prompt_key: str | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files of each part."""
        return ENDINGS[:2] if self.prompt_key is None else ENDINGS

    @property
    def in_place(self) -> bool:
        return self.source.kind == "prepared" and len(self.parts) == 1


def prepare(data: Data, tokenizer_path: str | Path, folder: Path, *, seed: int, splits: Sequence[str] = SPLITS,
            texts: Mapping[str, str] | None = None, vocab_size: int | None = None, on_progress: Progress | None = None) -> Manifest:  # fmt: skip
    """Make `splits`, and a split text_NAME of each of `texts` (name: source), in `folder`; for one process of a run, the others read afterwards.

    `seed` draws the held-out documents. Raises RequestError: a source that `check_source` refuses (before anything is tokenised), no tokens, a
    token id that a model with `vocab_size` lacks, a full disk.
    """
    manifest = Manifest.load(folder)
    tokenizer = load_tokenizer(str(tokenizer_path))
    jobs = _jobs(data, splits, texts or {})
    keys = [_made_from(job, data, seed, fingerprint(tokenizer)) for job in jobs]
    todo = [(job, key) for job, key in zip(jobs, keys, strict=True) if not _is_current(manifest, job, key)]
    for job, _ in todo:
        if job.source.kind == "prepared" and job.source.prefix.parent.resolve() == manifest.folder.resolve():
            raise job.source.refusal(job.source.given, "is this run's own data; give the source that it was made from, or use another run.dir")
        check_located(job.source, data.text_key, data.split, job.prompt_key)
    for job, key in todo:
        for _, name in job.parts:
            manifest.drop(name)
        if not job.in_place:
            manifest.save()  # before the files change: a part that is listed is complete
            stream, dtype = _token_documents(job, tokenizer, data)
            sides = hold_out(stream, data.valid_fraction, seed) if len(job.parts) == 2 else ((False, document) for document in stream)
            _write(job, manifest.folder, _watched(sides, job, vocab_size, on_progress), dtype)
        for _, name in job.parts:
            manifest.parts[name] = _describe(job, name, manifest.folder, key)
        manifest.save()
    for split in {split: None for job in jobs for split, _ in job.parts}:
        manifest.splits[split] = [(name, job.weight) for job in jobs for to, name in job.parts if to == split]
    if data.calibration is None and any(split == "train" for job in jobs for split, _ in job.parts):
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
        outputs = (split, "valid") if split == "train" and data.valid is None else (split,)
        sources = blend(spec, setting)
        for number, (weight, given) in enumerate(sources):
            suffix = f".{number}" if len(sources) > 1 else ""
            prompt_key = data.prompt_key if split in SPLITS else None
            jobs.append(Job(locate(given, setting), weight, tuple((output, output + suffix) for output in outputs), prompt_key))
    return jobs


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
        "held_out": {"fraction": data.valid_fraction, "seed": seed} if len(job.parts) == 2 else None,
        # only where there are prompts: without them, data stays what it was before there was this setting
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


def _token_documents(job: Job, tokenizer: Any, data: Data) -> tuple[Iterator[Document], Any]:
    """A source's documents, and the smallest type of Megatron's that holds their token ids."""
    if job.source.kind == "prepared":
        indexed = open_indexed(job.source.prefix, job.source.setting)
        given = None if job.prompt_key is None else open_prompts(job.source.prefix, indexed, job.source.setting).tolist()
        bounds = np.concatenate([[0], np.cumsum(indexed.sequence_lengths, dtype=np.int64)])[indexed.document_indices]
        spans = zip(bounds[:-1].tolist(), bounds[1:].tolist(), given or [0] * (len(bounds) - 1), strict=True)
        return (Document(read_tokens(indexed, start, end - start), prompt) for start, end, prompt in spans if end > start), indexed.index.dtype
    dtype = DType.optimal_dtype(num_ids(tokenizer))
    if job.prompt_key is not None:
        rows = prompted_documents(job.source, job.prompt_key, data.text_key, data.split)
        return tokenized(tokenizer, rows, data.workers, tokenize_prompted), dtype
    return map(Document, tokenized(tokenizer, documents(job.source, data.text_key, data.split), data.workers)), dtype


def _watched(sides: Iterable[Side], job: Job, vocab_size: int | None, on_progress: Progress | None) -> Iterator[Side]:
    """Pass the documents on, checked against the vocabulary, and report how many went by."""
    count, total = 0, 0
    for held_out, document in sides:
        _check_vocabulary(job.source, int(document.tokens.max()), vocab_size)
        count, total = count + 1, total + len(document)
        if on_progress and count % PROGRESS_DOCUMENTS == 0:
            on_progress(job.parts[0][1], count, total)
        yield held_out, document
    if on_progress:
        on_progress(job.parts[0][1], count, total)


def _write(job: Job, folder: Path, sides: Iterable[Side], dtype: Any) -> None:
    """Write the files of a job's parts, all complete or all absent."""
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(atomic_path(folder / f"{name}.{ending}")) for ending in job.endings] for _, name in job.parts]
        builders = [IndexedDatasetBuilder(str(tokens), dtype) for tokens, *_ in files]
        prompts: list[list[int]] = [[] for _ in files]
        for builder in builders:
            stack.callback(builder.data_file.close)
        for held_out, document in sides:
            builders[held_out].add_document(document.tokens, [len(document)])
            prompts[held_out].append(document.prompt)
        if not all(builder.sequence_lengths for builder in builders):
            raise job.source.refusal(job.source.given, "holds no text that gives tokens")
        for builder, lengths, (_, index, *beside) in zip(builders, prompts, files, strict=True):
            builder.finalize(str(index))
            for file in beside:
                np.array(lengths, PROMPT_TYPE).tofile(file)
    for _, name in job.parts:
        for ending in set(ENDINGS) - {*job.endings}:
            remove(folder / f"{name}.{ending}")  # of an earlier part of this name


def _describe(job: Job, name: str, folder: Path, key: dict[str, Any]) -> Part:
    """Count and hash the files of a part in one pass over its tokens."""
    prefix = job.source.prefix if job.in_place else Path(name)
    path = folder / prefix
    indexed = open_indexed(path, job.source.setting)
    tokens, largest, digest = num_tokens(indexed), 0, hashlib.sha256()
    for start in range(0, tokens, SCAN_TOKENS):
        block = read_tokens(indexed, start, min(SCAN_TOKENS, tokens - start))
        largest = max(largest, int(block.max()))
        digest.update(block.astype(indexed.index.dtype).tobytes())
    files = {ending: Path(f"{path}.{ending}") for ending in job.endings}
    return Part(
        prefix=str(prefix),
        source=job.source.given,
        documents=len(indexed.document_indices) - 1,
        tokens=tokens,
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
