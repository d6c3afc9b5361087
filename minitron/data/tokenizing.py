"""Documents -> token ids, in one process or several. Imports no torch and no megatron, so that worker processes start fast.

A document becomes the tokens of its text and the end-of-document token, nothing else: no token is put in front, and text that spells a special token
(`</s>` in a web page) is tokenised as the text it is. What comes out does not depend on the number of workers.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from minitron.errors import refuse

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
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)["input_ids"]
    return [np.array([*row, tokenizer.eos_token_id], dtype=np.int32) for row in ids if row]


def tokenized(tokenizer: Any, texts: Iterable[str], workers: int) -> Iterator[np.ndarray]:
    """`tokenize` over a stream of texts, in order, holding a few chunks per worker at a time. One worker stays in this process.

    Workers are fresh interpreters (spawned), so a script that calls this needs `if __name__ == "__main__"`.
    """
    with _serial_tokenizers():
        if workers == 1:
            for chunk in _chunks(texts):
                yield from tokenize(tokenizer, chunk)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer,)) as pool:
            pending: collections.deque[concurrent.futures.Future[list[np.ndarray]]] = collections.deque()
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


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += len(text)
        if len(chunk) >= CHUNK_DOCUMENTS or characters >= CHUNK_CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


_worker: dict[str, Any] = {}  # the tokenizer of a worker process, sent once rather than with every chunk


def _start_worker(tokenizer: Any) -> None:
    _worker["tokenizer"] = tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(texts: list[str]) -> list[np.ndarray]:
    return tokenize(_worker["tokenizer"], texts)


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
