"""Worker processes: order, liveness and errors; and the real tokenizer against its own plain call."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from minitron.data import tokenizing
from minitron.data.tokenizing import fingerprint, load_tokenizer, num_ids, tokenized
from minitron.errors import RequestError
from tests.data.fakes import DyingTokenizer, FailingTokenizer, ProcessTokenizer


@pytest.fixture
def single_document_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizing, "CHUNK_DOCUMENTS", 1)


def test_workers_are_other_processes_and_keep_the_order(single_document_chunks: None) -> None:
    rows = [row.tolist() for row in tokenized(ProcessTokenizer(), map(str, range(40)), 2)]
    assert [row[1:] for row in rows] == [[number, 0] for number in range(40)]
    assert os.getpid() not in {row[0] for row in rows}
    assert {row[0] for row in (row.tolist() for row in tokenized(ProcessTokenizer(), ["1", "2"], 1))} == {os.getpid()}


def test_input_is_not_read_far_ahead(single_document_chunks: None) -> None:
    taken = []

    def texts() -> Iterator[str]:
        for number in range(1000):
            taken.append(number)
            yield str(number)

    stream = tokenized(ProcessTokenizer(), texts(), 2)
    next(stream)
    assert len(taken) < 10
    stream.close()


def test_dead_worker_is_one_line_and_a_failing_one_is_not_hidden(single_document_chunks: None) -> None:
    with pytest.raises(RequestError, match=r"^data.workers=2: a worker process died"):
        list(tokenized(DyingTokenizer(), ["1"] * 9, 2))
    with pytest.raises(LookupError, match="in the worker"):
        list(tokenized(FailingTokenizer(), ["1"] * 9, 2))


def test_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    assert len(list(tokenized(ProcessTokenizer(), ["1"], 1))) == 1
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_fingerprint_is_of_the_rules_not_of_the_place(tokenizer_path: Path, endless_tokenizer_path: Path, tmp_path: Path) -> None:
    load_tokenizer(str(tokenizer_path)).save_pretrained(tmp_path / "copy")
    assert fingerprint(load_tokenizer(str(tmp_path / "copy"))) == fingerprint(load_tokenizer(str(tokenizer_path)))
    assert fingerprint(load_tokenizer(str(tokenizer_path))) != fingerprint(AutoTokenizer.from_pretrained(endless_tokenizer_path))


def test_real_tokenizer_gives_its_plain_ids(stories_path: Path) -> None:
    tokenizer = load_tokenizer(str(stories_path))
    assert num_ids(tokenizer) == 512
    texts = ["Once upon a time, there was a little girl named Lily.\n\nShe liked to play.", "é 東京", " leading and trailing ", "\n"]
    plain = AutoTokenizer.from_pretrained(stories_path)
    for text, row in zip(texts, tokenized(tokenizer, texts, 1), strict=True):
        assert row.tolist() == [*plain(text, add_special_tokens=False)["input_ids"], 2]
    (spelled,) = tokenized(tokenizer, ["a <s>b</s>"], 1)
    assert 1 not in spelled and list(spelled).count(2) == 1 and spelled[-1] == 2
    assert tokenizer.decode(spelled[:-1]).strip() == "a <s>b</s>"
