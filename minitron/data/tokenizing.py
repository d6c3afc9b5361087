"""Documents -> token ids, in one process or several. Imports no torch and no megatron, so that worker processes start fast.

A document becomes the tokens of its text and the end-of-document token, nothing else: no token is put in front, and text that spells a special token
(`</s>` in a web page) is tokenised as the text it is. A prompt's tokens come before them, tokenised by themselves as when the model is used, so
that no token lies across its end. What comes out does not depend on the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import numpy as np

from minitron.errors import refuse

Text = TypeVar("Text", str, tuple[str, str])
CHUNK_DOCUMENTS, CHUNK_CHARACTERS = 256, 1 << 20  # one task of a worker: whichever is reached first


def load_tokenizer(path: str, setting: str = "model.path") -> Any:
    """The `transformers` tokenizer of a model folder or hub id. Raises RequestError where there is none, or none with an end-of-document token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise refuse(setting, path, f"its tokenizer can't be read: {reason}") from error
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


def tokenize(tokenizer: Any, texts: list[str]) -> list[np.ndarray]:
    """Token ids (int32) of each text that has any, each with the end-of-document token after them."""
    return [np.array([*row, tokenizer.eos_token_id], dtype=np.int32) for row in _ids(tokenizer, texts) if row]


def tokenize_prompted(tokenizer: Any, rows: list[tuple[str, str]]) -> list["Document"]:
    """As `tokenize`, of (prompt, text) pairs."""
    prompts, texts = (_ids(tokenizer, [row[side] for row in rows]) for side in (0, 1))
    return [
        Document(np.array([*prompt, *text, tokenizer.eos_token_id], dtype=np.int32), len(prompt))
        for prompt, text in zip(prompts, texts, strict=True)
        if text
    ]


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False
    )["input_ids"]  # fmt: skip
    return ids


@dataclasses.dataclass(frozen=True)
class Document:
    """A document's token ids, the first `prompt` of them its prompt's. A slice of it is a document too."""

    tokens: np.ndarray
    prompt: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Document":
        start, stop, _ = part.indices(len(self))
        return Document(self.tokens[start:stop], min(max(self.prompt - start, 0), stop - start))


def tokenized(tokenizer: Any, texts: Iterable[Text], workers: int, work: Callable[[Any, list[Any]], list[Any]] = tokenize) -> Iterator[Any]:
    """`tokenize`, or `tokenize_prompted` as `work`, over a stream of texts, in order, holding a few chunks per worker at a time.

    One worker stays in this process. Several are fresh interpreters (spawned), so a script that calls this needs `if __name__ == "__main__"`.
    """
    with _serial_tokenizers():
        if workers == 1:
            for chunk in _chunks(texts):
                yield from work(tokenizer, chunk)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, work)) as pool:
            pending: collections.deque[concurrent.futures.Future[list[Any]]] = collections.deque()
            try:
                for chunk in _chunks(texts):
                    pending.append(pool.submit(_work, chunk))
                    if len(pending) > 2 * workers:
                        yield from pending.popleft().result()
                while pending:
                    yield from pending.popleft().result()
            except BrokenProcessPool as error:
                raise refuse("data.workers", workers, "a worker process died (out of memory?); fewer workers need less") from error
            finally:
                pool.shutdown(cancel_futures=True)


def _chunks(texts: Iterable[Text]) -> Iterator[list[Text]]:
    chunk: list[Text] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text) if isinstance(text, str) else sum(map(len, text))
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


_worker: dict[str, Any] = {}  # what a worker process works with, sent once rather than with every chunk


def _start_worker(tokenizer: Any, work: Callable[[Any, list[Any]], list[Any]]) -> None:
    _worker.update(tokenizer=tokenizer, work=work)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[Any]) -> list[Any]:
    found: list[Any] = _worker["work"](_worker["tokenizer"], texts)
    return found


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
