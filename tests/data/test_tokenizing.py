"""Worker processes: order, liveness and errors; and the real tokenizer against its own plain call."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from minitron.data import tokenizing
from minitron.data.tokenizing import Tokenize, encoder, fingerprint, load_tokenizer, num_ids, tokenized
from minitron.errors import RequestError
from tests.data.fakes import DyingEncoder, FailingEncoder, LongEncoder, LostEncoder, ProcessEncoder

ROOT = Path(__file__).parents[2]


def rows(texts: Iterator[str] | list[str]) -> Iterator[tuple[str, str]]:
    return (("", text) for text in texts)


def documents(encode, texts: list[str], workers: int = 1) -> list[list[int]]:
    """Of one text a chunk, or few."""
    found = []
    for chunk in tokenized(Tokenize(encode, np.int32), rows(texts), workers):
        found += [part.tolist() for part in np.split(chunk.ids, np.cumsum(chunk.lengths)[:-1])]
    return found


@pytest.fixture
def single_document_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK_DOCUMENTS", 1)


def test_workers_are_other_processes_and_keep_the_order(single_document_chunks: None) -> None:
    found = documents(ProcessEncoder(), [str(number) for number in range(40)], 2)
    assert [row[1:] for row in found] == [[number, 0] for number in range(40)]
    assert len({row[0] for row in found} - {os.getpid()}) == 2
    assert {row[0] for row in documents(ProcessEncoder(), ["1", "2"])} == {os.getpid()}


def test_input_is_not_read_far_ahead(single_document_chunks: None) -> None:
    taken = []

    def texts() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield str(number)

    stream = tokenized(Tokenize(ProcessEncoder(), np.int32), rows(texts()), 2)
    next(stream)
    assert len(taken) < 10
    stream.close()


def test_dead_worker_is_one_line_and_a_failing_one_is_not_hidden(single_document_chunks: None) -> None:
    with pytest.raises(RequestError, match=r"^data.workers=2: a worker process died.*the same command continues"):
        documents(DyingEncoder(), ["1"] * 9, 2)
    with pytest.raises(LookupError, match="in the worker") as raised:
        documents(FailingEncoder(), ["1"] * 9, 2)
    assert "fakes.py" in raised.value.__notes__[0]  # where it happened
    with pytest.raises(ValueError, match="not here"):
        documents(LostEncoder(), ["1"] * 9, 2)


def test_worker_killed_halfway_through_its_answer_is_noticed(single_document_chunks: None) -> None:
    stream = tokenized(Tokenize(LongEncoder(), np.int32), rows(["1"] * 9), 2)
    first, second = (int(next(stream).ids[0]) for _ in range(2))
    time.sleep(0.5)  # both send their next answers by now, which nobody reads
    os.kill(first, signal.SIGKILL)
    with pytest.raises(RequestError, match="a worker process died"):
        list(stream)
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)  # the other one was ended, and waited for


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    code = """
import numpy as np
from minitron.data import tokenizing
from tests.data.fakes import ProcessEncoder, SlowEncoder
if __name__ == "__main__":
    tokenizing.CHUNK_DOCUMENTS = 1
    stream = tokenizing.tokenized(tokenizing.Tokenize(ProcessEncoder(), np.int32), (("", "1") for _ in range(99)), 2)
    busy = tokenizing.tokenized(tokenizing.Tokenize(SlowEncoder(), np.int32), (("", "1") for _ in range(99)), 2)
    print(*{int(next(stream).ids[0]) for _ in range(4)}, flush=True)
    next(busy)
"""
    (tmp_path / "parent.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, tmp_path / "parent.py"], env=environment, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        workers = [int(word) for word in parent.stdout.readline().split()]
        while len(children(parent.pid)) < 4:
            time.sleep(0.05)
        workers = children(parent.pid)
        time.sleep(0.5)
        parent.kill()
    for worker in workers:
        while alive(worker):  # a hang is the test's failure
            time.sleep(0.05)


def children(process: int) -> list[int]:
    """Its processes, without Python's own that tracks shared memory; none where it has ended."""
    try:
        listed = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        return [int(child) for child in listed if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    except (FileNotFoundError, ProcessLookupError):
        return []


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert len(documents(ProcessEncoder(), ["1"])) == 1
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_fingerprint_is_of_the_rules_not_of_the_place(tokenizer_path: Path, endless_tokenizer_path: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tokenizer_path)).save_pretrained(tmp_path / "copy")
    assert fingerprint(load_tokenizer(str(tmp_path / "copy"))) == fingerprint(load_tokenizer(str(tokenizer_path)))
    assert fingerprint(load_tokenizer(str(tokenizer_path))) != fingerprint(AutoTokenizer.from_pretrained(endless_tokenizer_path))


def test_real_tokenizer_gives_its_plain_ids(stories_path: Path) -> None:
    tokenizer = load_tokenizer(str(stories_path))
    assert num_ids(tokenizer) == 512
    texts = ["Once upon a time, there was a little girl named Lily.\n\nShe liked to play.", "é 東京", " leading and trailing ", "\n", "a <s>b</s>"]
    plain = AutoTokenizer.from_pretrained(stories_path)
    oracle = [[*row, 2] for row in plain(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]]
    assert documents(encoder(tokenizer), texts) == oracle
    spelled = oracle[-1]
    assert 1 not in spelled and spelled.count(2) == 1 and tokenizer.decode(spelled[:-1]).strip() == "a <s>b</s>"
    assert documents(pickle.loads(pickle.dumps(encoder(tokenizer))), texts) == oracle  # a worker's copy


def test_settings_of_a_tokenizer_that_shorten_or_fill_texts_are_not_taken_over(stories_path: Path) -> None:
    tokenizer = load_tokenizer(str(stories_path))
    whole = documents(encoder(tokenizer), ["Once upon a time", "Lily"])
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding()
    assert documents(encoder(tokenizer), ["Once upon a time", "Lily"]) == whole


def test_tokenizer_in_python_is_called_as_it_is() -> None:
    class Letters:
        eos_token_id = 0

        def __call__(self, texts: list[str], *, add_special_tokens: bool, split_special_tokens: bool, **_: object) -> dict[str, list[list[int]]]:
            assert not add_special_tokens and split_special_tokens
            return {"input_ids": [[ord(letter) for letter in text] for text in texts]}

    found = list(tokenized(Tokenize(encoder(Letters()), np.uint16), [("p", "ab"), ("", ""), ("lost", ""), ("", "c")], 1))
    (chunk,) = found
    assert chunk.ids.tolist() == [112, 97, 98, 0, 99, 0] and chunk.ids.dtype == np.uint16
    assert (chunk.lengths.tolist(), chunk.prompts.tolist(), chunk.records) == ([4, 2], [1, 0], 4)
