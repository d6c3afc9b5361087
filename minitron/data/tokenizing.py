"""Documents -> token ids, in one process or several. Imports no torch and no megatron, so that worker processes start fast.

A document becomes the tokens of its text and the end-of-document token, nothing else: no token is put in front, and text that spells a special token
(`</s>` in a web page) is tokenised as the text it is. A prompt's tokens come before them, tokenised by themselves as when the model is used, so
that no token lies across its end. What comes out does not depend on the number of workers.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from minitron.data.workers import spread
from minitron.errors import first_line, refuse

TEXTS, LARGEST_FILE = (".json", ".model", ".txt", ".jinja"), 1 << 29  # of a tokenizer, in bytes; the largest in use have a tenth of that
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1 << 20  # one task of a worker: whichever is reached first


def load_tokenizer(path: str, setting: str = "model.path") -> Any:
    """The `transformers` tokenizer of a model folder or hub id; code that comes along is never run.

    Raises RequestError where there is none, or none with an end-of-document token.
    """
    from transformers import AutoTokenizer

    for file in sorted(Path(path).glob("*")):
        if file.suffix in TEXTS and (size := file.stat().st_size) > LARGEST_FILE:
            raise refuse(setting, path, f"its tokenizer can't be read: {file.name} has {size:,} bytes, and at most {LARGEST_FILE:,} are read")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the Rust part raises nothing more particular for a broken file
        raise refuse(setting, path, f"its tokenizer can't be read: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise refuse(setting, path, "its tokenizer has no end-of-document token (eos_token)")
    return tokenizer


def differing_token(one: Any, other: Any) -> str | None:
    """A token that two tokenizers number differently or that just one has; None where they agree."""
    ours, theirs = one.get_vocab(), other.get_vocab()
    return min((token for token, _ in ours.items() ^ theirs.items()), default=None)


def fingerprint(tokenizer: Any) -> str:
    """Hash of everything that decides the token ids, wherever the tokenizer came from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{tokenizer.eos_token_id}\n{rules}".encode()).hexdigest()


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id the tokenizer can give."""
    return max(tokenizer.get_vocab().values()) + 1


class Tokens(NamedTuple):
    """Tokenised documents, one after another; those without any token are left out."""

    ids: np.ndarray  # [tokens]
    lengths: np.ndarray  # int32 [documents]
    prompts: np.ndarray  # int32 [documents]: how many tokens at the start of each are its prompt's
    records: int  # records of the source that were read for them


class Encoder(Protocol):
    """What gives the token ids of texts; worker processes get a copy."""

    eos: int

    def __call__(self, texts: list[str]) -> list[list[int]]: ...


class _Fast:
    """The Rust part of a tokenizer by itself: workers then need not import transformers, and no offsets are computed."""

    def __init__(self, backend: Any, eos: int) -> None:
        self.backend, self.eos = type(backend).from_str(backend.to_str()), eos
        self.backend.no_truncation()
        self.backend.no_padding()

    def __call__(self, texts: list[str]) -> list[list[int]]:
        self.backend.encode_special_tokens = True  # set here, since a copy in another process forgets it
        return [found.ids for found in self.backend.encode_batch_fast(texts, add_special_tokens=False)]


class _Plain:
    """A tokenizer in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.eos = tokenizer, tokenizer.eos_token_id

    def __call__(self, texts: list[str]) -> list[list[int]]:
        ids: list[list[int]] = self.tokenizer(
            texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
        )["input_ids"]  # fmt: skip
        return ids


def encoder(tokenizer: Any) -> Encoder:
    """What of a tokenizer is needed to encode: no token is added, and what spells a special one is text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _Plain(tokenizer) if backend is None else _Fast(backend, tokenizer.eos_token_id)


@dataclasses.dataclass(frozen=True)
class Tokenize:
    """(prompt, text) rows -> `Tokens` of type `dtype`; a row whose text has no tokens is left out, prompt and all."""

    encode: Encoder
    dtype: Any

    def __call__(self, rows: list[tuple[str, str]]) -> Tokens:
        texts = self.encode([text for _, text in rows])
        prompts = self.encode([prompt for prompt, _ in rows]) if any(prompt for prompt, _ in rows) else [[]] * len(rows)
        found = [(prompt, text) for prompt, text in zip(prompts, texts, strict=True) if text]
        lengths = np.array([len(prompt) + len(text) + 1 for prompt, text in found], np.int32)
        end = (self.encode.eos,)
        flat = itertools.chain.from_iterable(part for prompt, text in found for part in (prompt, text, end))
        ids = np.fromiter(flat, self.dtype, int(lengths.sum()))
        return Tokens(ids, lengths, np.array([len(prompt) for prompt, _ in found], np.int32), len(rows))


def tokenized(tokenize: Tokenize, rows: Iterable[tuple[str, str]], workers: int) -> Generator[Tokens, None, None]:
    """A stream of (prompt, text) rows, chunk after chunk, holding a few chunks per worker at a time; one worker stays in this process."""
    with _serial_tokenizers():
        chunks = _chunks(rows)
        yield from map(tokenize, chunks) if workers == 1 else spread(tokenize, chunks, workers)


def _chunks(rows: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    chunk: list[tuple[str, str]] = []
    characters = 0
    for prompt, text in rows:
        chunk.append((prompt, text))
        characters += len(prompt) + len(text)
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


@contextlib.contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """data.workers alone says how many cores are used; and threads started by `tokenizers` make it warn at every later fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
