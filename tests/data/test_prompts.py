"""Prompts: their tokens come first, where they end is stored beside the tokens and vouched for by the manifest."""

import dataclasses
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron.config.schema import Data
from minitron.data.manifest import Manifest
from minitron.data.prepare import prepare
from minitron.data.sources import check_source
from minitron.errors import RequestError
from tests.data.test_prepare import stored

ROWS = [(f"ask {number}" * (number % 4), f"tell {number}") for number in range(60)] + [(None, "no prompt"), ("no text", ""), ("null text", None)]


def expected(rows: list[tuple[str | None, str | None]]) -> Counter:
    """The oracle: byte b is token b + 2, and 1 ends a document."""
    return Counter(((*(byte + 2 for byte in ((prompt or "") + text).encode()), 1), len((prompt or "").encode())) for prompt, text in rows if text)


def documents(manifest: Manifest, split: str) -> Counter:
    found: Counter = Counter()
    for prefix, _ in manifest.blend(split):
        prompts = np.fromfile(f"{prefix}.prompts", "<i4").tolist()
        found.update(zip(map(tuple, stored(prefix)), prompts, strict=True))
    return found


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "told.jsonl"
    path.write_text("".join(json.dumps({"question": prompt, "text": text}) + "\n" for prompt, text in ROWS))
    return path


@pytest.fixture
def data(corpus: Path) -> Data:
    return Data(train=str(corpus), valid_fraction=0.2, prompt_key="question")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "data"


def test_prompts_are_read_and_their_ends_are_stored(data: Data, folder: Path, tokenizer_path: Path) -> None:
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    train, valid = documents(manifest, "train"), documents(manifest, "valid")
    assert train and valid and train + valid == expected(ROWS)
    for name in ("train", "valid"):
        content = (folder / f"{name}.prompts").read_bytes()
        assert manifest.parts[name].bytes["prompts"] == len(content) == 4 * manifest.parts[name].documents
        assert manifest.parts[name].sha256["prompts"] == hashlib.sha256(content).hexdigest()


def test_parquet_and_workers_give_the_same(data: Data, folder: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.tokenizing.CHUNK_DOCUMENTS", 5)
    table = pa.table({"other": [1] * len(ROWS), "text": [text for _, text in ROWS], "question": [prompt for prompt, _ in ROWS]})
    pq.write_table(table, tmp_path / "told.parquet")
    one = prepare(data, tokenizer_path, folder, seed=1)
    for changes in ({"workers": 2}, {"train": f"{tmp_path}/told.parquet"}):
        other = prepare(dataclasses.replace(data, **changes), tokenizer_path, folder.with_name("other"), seed=1)
        assert {name: part.sha256 for name, part in one.parts.items()} == {name: part.sha256 for name, part in other.parts.items()}


def test_prompts_lost_or_no_longer_asked_for(data: Data, folder: Path, tokenizer_path: Path) -> None:
    prepare(data, tokenizer_path, folder, seed=1)
    (folder / "train.prompts").unlink()
    assert documents(again := prepare(data, tokenizer_path, folder, seed=1), "train") + documents(again, "valid") == expected(ROWS)
    without = prepare(dataclasses.replace(data, prompt_key=None), tokenizer_path, folder, seed=1)
    assert not list(folder.glob("*.prompts")) and {*without.parts["train"].bytes} == {"bin", "idx"}
    assert without.parts["train"].tokens + without.parts["valid"].tokens == sum(len(text) + 1 for _, text in ROWS if text)
    (folder / "train.prompts").write_bytes(b"")  # what nothing vouches for is not taken
    assert documents(prepare(data, tokenizer_path, folder, seed=1), "train") == documents(again, "train")


def test_prepared_prompts_are_used_in_place_and_held_out_of(data: Data, folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    made = prepare(dataclasses.replace(data, valid=data.train), tokenizer_path, folder, seed=1)
    prefix, other = folder / "train", tmp_path / "other"
    in_place = prepare(Data(train=str(prefix), valid=str(prefix), prompt_key="any"), tokenizer_path, other, seed=1)
    assert in_place.parts["train"].sha256 == made.parts["train"].sha256 and not list(other.glob("*.prompts"))
    carved = prepare(Data(train=str(prefix), valid_fraction=0.3, prompt_key="any"), tokenizer_path, other, seed=1)
    train, valid = documents(carved, "train"), documents(carved, "valid")
    assert train and valid and train + valid == expected(ROWS)
    np.zeros(made.parts["train"].documents, "<i4").tofile(f"{prefix}.prompts")  # others: the parts made of them are out of date
    assert {prompt for _, prompt in documents(prepare(Data(train=str(prefix), prompt_key="any"), tokenizer_path, other, seed=1), "train")} == {0}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "train: data.prompt_key needs train.prompts beside its tokens, which can't be read"),
        ([0], "train: train.prompts does not hold one int32 for each document of train.idx"),
        ([9, 0, 0], "train: train.prompts has prompts that are longer than their documents"),
        ([0, -1, 0], "train: train.prompts has prompts that are longer than their documents"),
    ],
)
def test_prepared_tokens_without_good_prompts_are_refused(
    content: list[int] | None, said: str, folder: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "abc"}\n' * 3)
    prepare(Data(train=f"{tmp_path}/a.jsonl", valid=f"{tmp_path}/a.jsonl"), tokenizer_path, folder, seed=1)
    if content is not None:
        np.array(content, "<i4").tofile(folder / "train.prompts")
    prepared = Data(train=str(folder / "train"), valid_fraction=0.3, prompt_key="question")
    for refused in (
        lambda: check_source(prepared.train, "data.train", prompt_key="question"),
        lambda: prepare(prepared, tokenizer_path, folder.with_name("o"), seed=1),
    ):
        with pytest.raises(RequestError, match=r"^data.train=.*") as refusal:
            refused()
        assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_records_without_the_field_and_files_without_fields_are_refused(corpus: Path, tmp_path: Path) -> None:
    check_source(str(corpus), "data.train", prompt_key="question")
    with pytest.raises(RequestError, match=r"^data.prompt_key=query: line 1 of .* has no such field; it has question, text$"):
        check_source(str(corpus), "data.train", prompt_key="query")
    (tmp_path / "plain.txt").write_text("no fields")
    with pytest.raises(RequestError, match=r"^data.prompt_key=query: .*plain.txt has no fields: records .* are needed$"):
        check_source(f"{tmp_path}/plain.txt", "data.train", prompt_key="query")
    pq.write_table(pa.table({"text": ["a"], "question": [1]}), tmp_path / "number.parquet")
    with pytest.raises(RequestError, match=r"the field question holds int64, not text$"):
        check_source(f"{tmp_path}/number.parquet", "data.train", prompt_key="question")
