"""Preparation: the tokens are those of the plain tokenizer, the splits share nothing and lose nothing, and a restart redoes only what changed."""

import dataclasses
import hashlib
import itertools
import json
import os
import types
from collections import Counter
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from tokenizers import Tokenizer

from minitron.config.schema import Data
from minitron.data.holdout import draw
from minitron.data.indexed import write_index
from minitron.data.manifest import Manifest
from minitron.data.prepare import prepare
from minitron.errors import RequestError


def expected(texts: list[str]) -> list[list[int]]:
    """The oracle: byte b is token b + 2, and 1 ends a document."""
    return [[*(byte + 2 for byte in text.encode()), 1] for text in texts]


def stored(prefix: Path) -> list[list[int]]:
    """The documents as Megatron reads them."""
    indexed = IndexedDataset(str(prefix))
    assert list(indexed.document_indices) == list(range(len(indexed) + 1))
    return [indexed[number].tolist() for number in range(len(indexed))]


def all_stored(manifest: Manifest, split: str) -> list[list[int]]:
    return [document for prefix, _ in manifest.blend(split) for document in stored(prefix)]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir() if path.suffix in (".bin", ".idx")}


@pytest.fixture
def data(corpus: Path) -> Data:
    return Data(train=str(corpus), valid_fraction=0.2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "data"


def test_tokens_are_the_bytes_of_the_text(data: Data, folder: Path, corpus: Path, tokenizer_path: Path, texts: list[str]) -> None:
    manifest = prepare(dataclasses.replace(data, valid=str(corpus)), tokenizer_path, folder, seed=1)
    oracle = expected(texts)
    assert any("</s>" in text for text in texts)  # spelled out, and yet no end of a document
    assert stored(folder / "train") == oracle
    assert stored(folder / "valid") == oracle
    assert IndexedDataset(str(folder / "train")).index.dtype == np.uint16
    part = manifest.parts["train"]
    assert (part.documents, part.tokens) == (len(texts), sum(len(text.encode()) + 1 for text in texts))
    assert part.largest_id == max(map(max, oracle))
    assert part.source == str(corpus)
    for ending in ("bin", "idx"):
        assert part.sha256[ending] == hashlib.sha256((folder / f"train.{ending}").read_bytes()).hexdigest()
    assert Manifest.load(folder) == manifest


def test_held_out_documents_are_disjoint_and_exhaustive(data: Data, folder: Path, tokenizer_path: Path, texts: list[str]) -> None:
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    train, valid = stored(folder / "train"), stored(folder / "valid")
    oracle = expected(texts)
    assert Counter(map(tuple, train + valid)) == Counter(map(tuple, oracle))
    assert [document for document in oracle if document in train] == train  # in their order
    assert 8 <= len(valid) <= 32  # 97 documents, a fifth of them
    assert manifest.num_tokens("train") + manifest.num_tokens("valid") == sum(map(len, oracle))
    other = prepare(data, tokenizer_path, folder.with_name("other"), seed=2)
    assert all_stored(other, "valid") != valid


def test_calibration_is_the_training_split_or_its_own(data: Data, folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    manifest = prepare(data, tokenizer_path, folder, seed=1, splits=("calibration",))
    assert manifest.blend("calibration") == manifest.blend("train") == [(folder / "train", 1.0)]
    (tmp_path / "own.txt").write_text("own")
    manifest = prepare(dataclasses.replace(data, calibration=f"{tmp_path}/own.txt"), tokenizer_path, folder, seed=1, splits=("calibration",))
    assert all_stored(manifest, "calibration") == expected(["own"])
    assert prepare(data, tokenizer_path, folder, seed=1).blend("calibration") == [(folder / "train", 1.0)]
    assert not (folder / "calibration.bin").exists()  # nothing uses it any more


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("own_valid", [False, True])
def test_documents_for_calibration_are_nobody_else_s(
    own_valid: bool, workers: int, data: Data, folder: Path, tokenizer_path: Path, texts: list[str], tmp_path: Path
) -> None:
    (tmp_path / "valid.txt").write_text("its own")
    before = prepare(data, tokenizer_path, folder.with_name("before"), seed=1)
    data = dataclasses.replace(data, calibration_fraction=0.15, workers=workers, valid=f"{tmp_path}/valid.txt" if own_valid else None)
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    sides = {split: {*map(tuple, all_stored(manifest, split))} for split in ("train", "valid", "calibration")}
    assert all(sides.values()) and sum(map(len, sides.values())) == len(set.union(*sides.values())) == len(texts) + own_valid
    # by the draws of the numbers of the documents, and by nothing else
    oracle = [tuple(document) for number, document in enumerate(expected(texts)) if draw(1, number) >= 0.85]
    assert sides["calibration"] == {*oracle} and 5 <= len(oracle) <= 30
    if not own_valid:
        assert sides["valid"] == {*map(tuple, all_stored(before, "valid"))}  # which it does not change


def test_held_out_of_several_documents_and_of_one(folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Two documents for three sides: each is cut, calibration first, validation last."""
    for name, letter in (("1", "a"), ("2", "b")):
        (tmp_path / f"{name}.txt").write_text(letter * 99)
    (tmp_path / "texts").mkdir()
    for name in "12":
        (tmp_path / f"{name}.txt").rename(tmp_path / "texts" / f"{name}.txt")
    data = Data(train=f"{tmp_path}/texts", valid_fraction=0.3, calibration_fraction=0.2)
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    a, b = expected(["a" * 99, "b" * 99])
    assert all_stored(manifest, "calibration") == [a[:20], b[:20]]
    assert all_stored(manifest, "train") == [a[20:70], b[20:70]]
    assert all_stored(manifest, "valid") == [a[70:], b[70:]]
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(RequestError, match=r"^data.train=.*one.txt: is too little text to give something to each of train, valid, calibration$"):
        prepare(dataclasses.replace(data, train=f"{tmp_path}/one.txt"), tokenizer_path, folder, seed=1)
    with pytest.raises(RequestError, match=r"^data.calibration_fraction=0.2: must be null with data.calibration$"):
        dataclasses.replace(data, calibration="a.txt")


def test_index_is_what_megatron_s_builder_writes(tmp_path: Path) -> None:
    for dtype in (np.uint16, np.int32):
        builder = IndexedDatasetBuilder(f"{tmp_path}/theirs.bin", dtype)
        for length in (3, 1, 70000):
            builder.add_document(np.zeros(length, dtype), [length])
        builder.finalize(f"{tmp_path}/theirs.idx")
        write_index(tmp_path / "ours.idx", dtype, np.array([3, 1, 70000], np.int32))
        assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()


def test_blocks_of_tokens_may_end_anywhere(data: Data, folder: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepared data is divided in blocks that know nothing of its documents."""
    whole = prepare(dataclasses.replace(data, valid=data.train), tokenizer_path, folder, seed=1)
    divided = []
    for block in (7, 10**6):
        monkeypatch.setattr("minitron.data.indexed.BLOCK_TOKENS", block)
        manifest = prepare(Data(train=str(folder / "train"), valid_fraction=0.3), tokenizer_path, folder.with_name(f"b{block}"), seed=1)
        divided.append((all_stored(manifest, "train"), all_stored(manifest, "valid")))
    assert divided[0] == divided[1]
    assert Counter(map(tuple, itertools.chain(*divided[0]))) == Counter(map(tuple, all_stored(whole, "train")))


def test_two_workers_give_the_same_bytes_as_one(data: Data, folder: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.tokenizing.CHUNK_DOCUMENTS", 5)  # 20 chunks, so that both workers have several
    one = prepare(data, tokenizer_path, folder, seed=1)
    two = prepare(dataclasses.replace(data, workers=2), tokenizer_path, folder.with_name("two"), seed=1)
    assert {name: part.sha256 for name, part in one.parts.items()} == {name: part.sha256 for name, part in two.parts.items()}
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_blend_keeps_its_sources_apart(folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{number}"}) + "\n" for number in range(30)))
    data = Data(train=f"3 {tmp_path}/a.jsonl 1 {tmp_path}/b.jsonl", valid_fraction=0.2)
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    assert [(prefix.name, weight) for prefix, weight in manifest.blend("train")] == [("train.0", 3.0), ("train.1", 1.0)]
    assert [(prefix.name, weight) for prefix, weight in manifest.blend("valid")] == [("valid.0", 3.0), ("valid.1", 1.0)]
    for number, name in enumerate("ab"):
        documents = stored(folder / f"train.{number}") + stored(folder / f"valid.{number}")
        assert Counter(map(tuple, documents)) == Counter(map(tuple, expected([f"{name}{number}" for number in range(30)])))
    before = snapshot(folder)
    reweighted = prepare(dataclasses.replace(data, train=data.train.replace("3 ", "5 ")), tokenizer_path, folder, seed=1)
    assert [weight for _, weight in reweighted.blend("train")] == [5.0, 1.0]
    assert snapshot(folder) == before  # weights are not in the files


def test_named_texts_are_splits_of_their_own(data: Data, folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("one document\n\nwhole")
    manifest = prepare(data, tokenizer_path, folder, seed=1, splits=(), texts={"wiki-2": f"{tmp_path}/wiki.txt"})
    assert stored(folder / "text_wiki-2") == expected(["one document\n\nwhole"])
    assert list(manifest.splits) == ["text_wiki-2"]
    with pytest.raises(RequestError, match=r"^eval.texts=a/b: "):
        prepare(data, tokenizer_path, folder, seed=1, splits=(), texts={"a/b": f"{tmp_path}/wiki.txt"})
    with pytest.raises(RequestError, match=r"^eval.texts.gone=.*: no such file"):
        prepare(data, tokenizer_path, folder, seed=1, splits=(), texts={"gone": f"{tmp_path}/gone.txt"})
    with pytest.raises(RequestError, match="no train data prepared here; there is text_wiki-2"):
        manifest.blend("train")


def test_restart_does_nothing_again(data: Data, folder: Path, tokenizer_path: Path) -> None:
    first = prepare(data, tokenizer_path, folder, seed=1)
    before = snapshot(folder)
    calls: list[tuple[str, int, int, float | None]] = []
    assert prepare(data, tokenizer_path, folder, seed=1, on_progress=lambda *call: calls.append(call)) == first
    assert snapshot(folder) == before and not calls


def test_restart_redoes_what_changed_and_no_more(data: Data, folder: Path, corpus: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("first")
    data = dataclasses.replace(data, valid=f"{tmp_path}/valid.txt")
    prepare(data, tokenizer_path, folder, seed=1)
    before = snapshot(folder)
    (tmp_path / "valid.txt").write_text("second")
    manifest = prepare(data, tokenizer_path, folder, seed=1)
    assert all_stored(manifest, "valid") == expected(["second"])
    assert snapshot(folder)["train.bin"] == before["train.bin"]
    (folder / "train.idx").unlink()  # a lost file
    prepare(data, tokenizer_path, folder, seed=1)
    assert snapshot(folder)["train.idx"][1] == before["train.idx"][1]


@pytest.mark.parametrize("change", [{"valid_fraction": 0.4}, {"text_key": "id2"}, {"seed": 2}])
def test_other_settings_redo_a_split(change: dict, folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}", "id2": f"x{n}"}) + "\n" for n in range(50)))
    data = Data(train=str(path), valid_fraction=0.2)
    prepare(data, tokenizer_path, folder, seed=1)
    before = snapshot(folder)
    seed = change.pop("seed", 1)
    again = prepare(dataclasses.replace(data, **change), tokenizer_path, folder, seed=seed)
    fresh = prepare(dataclasses.replace(data, **change), tokenizer_path, folder.with_name("fresh"), seed=seed)
    assert all_stored(again, "train") == all_stored(fresh, "train")
    assert snapshot(folder)["train.bin"][1] != before["train.bin"][1]


def test_killed_while_writing_leaves_nothing_that_is_taken_for_complete(
    data: Data, folder: Path, corpus: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete = prepare(data, tokenizer_path, folder, seed=1)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(data, tokenizer_path, folder, seed=2, on_progress=killed)
    assert not list(folder.glob(".*partial"))
    assert "train" not in Manifest.load(folder).splits
    # going back to the first settings must not trust the files that the second ones may have touched
    assert prepare(data, tokenizer_path, folder, seed=1) == complete


def test_a_hub_data_set_is_read_on_as_it_was_when_it_was_begun(
    folder: Path, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states, newest = {"first": [f"old {number}" for number in range(40)], "second": [f"new {number}" for number in range(40)]}, ["first"]

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool, revision: str | None) -> datasets.IterableDataset:
        return datasets.Dataset.from_dict({"text": states[revision or newest[0]]}).to_iterable_dataset()

    def dataset_info(self: object, name: str) -> types.SimpleNamespace:
        return types.SimpleNamespace(sha=newest[0])

    def killed(name: str, documents: int, tokens: int, share: float | None) -> None:
        if documents == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr("minitron.data.prepare.PIECE_TOKENS", 1)
    monkeypatch.setattr("minitron.data.tokenizing.CHUNK_DOCUMENTS", 8)
    monkeypatch.chdir(tmp_path)
    source = Data(train="some-org/some-set", valid_fraction=0.5)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tokenizer_path, folder, seed=1, on_progress=killed)
    newest[0] = "second"
    manifest = prepare(source, tokenizer_path, folder, seed=1)
    read = sorted(all_stored(manifest, "train") + all_stored(manifest, "valid"))
    assert read == sorted(expected(states["first"]))
    prepare(source, tokenizer_path, tmp_path / "other", seed=1)
    other = Manifest.load(tmp_path / "other")
    assert sorted(all_stored(other, "train") + all_stored(other, "valid")) == sorted(expected(states["second"]))


def test_progress_counts_documents_and_tokens(
    data: Data, folder: Path, tokenizer_path: Path, texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.data.tokenizing.CHUNK_DOCUMENTS", 40)
    calls: list[tuple[str, int, int, float | None]] = []
    prepare(data, tokenizer_path, folder, seed=1, on_progress=lambda *call: calls.append(call))
    sizes = [len(text.encode()) + 1 for text in texts]
    assert [call[:3] for call in calls] == [("train", n, sum(sizes[:n])) for n in (0, 40, 80, 97)]
    assert calls[0][3] is None and calls[-1][3] == 1.0


def test_prepared_data_is_used_in_place_or_held_out_of(data: Data, folder: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    made = prepare(data, tokenizer_path, folder, seed=1)
    whole = all_stored(made, "train")
    prefix = tmp_path / "run" / "data" / "train"
    before = snapshot(folder)
    other = tmp_path / "other"
    in_place = prepare(Data(train=str(prefix), valid=str(prefix)), tokenizer_path, other, seed=1)
    assert in_place.blend("train") == [(prefix, 1.0)] and not list(other.glob("*.bin"))
    assert in_place.parts["train"].sha256 == made.parts["train"].sha256
    carved = prepare(Data(train=str(prefix), valid_fraction=0.3), tokenizer_path, other, seed=1)
    assert Counter(map(tuple, all_stored(carved, "train") + all_stored(carved, "valid"))) == Counter(map(tuple, whole))
    assert all_stored(carved, "valid")
    assert snapshot(folder) == before  # never removed, whatever becomes unused
    with pytest.raises(RequestError, match="is this run's own data"):
        prepare(Data(train=str(other / "train")), tokenizer_path, other, seed=1)
    back = prepare(Data(train=str(prefix), valid=str(prefix)), tokenizer_path, other, seed=1)
    assert back.blend("train") == [(prefix, 1.0)] and snapshot(folder) == before


def test_token_ids_beyond_the_vocabulary_are_refused(data: Data, folder: Path, tokenizer_path: Path, texts: list[str]) -> None:
    largest = max(map(max, expected(texts)))
    prepare(data, tokenizer_path, folder, seed=1, vocab_size=largest + 1)
    for place in (folder, folder.with_name("fresh")):  # of files that are there, and of files to be made
        with pytest.raises(RequestError, match=rf"token id {largest} is outside the model's vocabulary of {largest}"):
            prepare(data, tokenizer_path, place, seed=1, vocab_size=largest)
    assert not list(folder.with_name("fresh").glob("*.bin"))  # seen while tokenising, not after it
    with pytest.raises(RequestError, match=f"token id {largest} is outside"):
        prepare(Data(train=str(folder / "train"), valid=str(folder / "valid")), tokenizer_path, folder.with_name("o"), seed=1, vocab_size=largest)


def test_unusable_requests_are_one_line(data: Data, folder: Path, tokenizer_path: Path, endless_tokenizer_path: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"^model.path=.*: its tokenizer has no end-of-document token"):
        prepare(data, endless_tokenizer_path, folder, seed=1)
    with pytest.raises(RequestError, match=r"^model.path=.*: its tokenizer can't be read"):
        prepare(data, tmp_path, folder, seed=1)
    with pytest.raises(RequestError, match=r"^data.train=\?\?\?: a source of text is needed"):
        prepare(Data(), tokenizer_path, folder, seed=1)
    with pytest.raises(RequestError, match=r"^data.valid=gone.txt: no such file"):
        prepare(dataclasses.replace(data, valid="gone.txt"), tokenizer_path, folder, seed=1)
    assert not folder.exists()  # all refused before anything was written
    (tmp_path / "late.jsonl").write_text('{"text": "fine"}\n{"text": "fine"}\n{"body": 1}\n')
    with pytest.raises(RequestError, match=r"^data.text_key=text: line 3 of"):
        prepare(Data(train=f"{tmp_path}/late.jsonl"), tokenizer_path, folder, seed=1)
    assert not list(folder.glob("*.bin")) and not list(folder.glob(".*"))
    folder.joinpath("manifest.json").write_text('{"parts": []}')
    with pytest.raises(RequestError, match="is not a manifest of prepared data"):
        prepare(data, tokenizer_path, folder, seed=1)


def test_text_without_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    from tokenizers import models, normalizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    backend.normalizer = normalizers.Strip()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path / "strip")
    (tmp_path / "blank.txt").write_text(" \n ")
    with pytest.raises(RequestError, match=r"^data.train=.*blank.txt: holds no text that gives tokens"):
        prepare(Data(train=f"{tmp_path}/blank.txt"), tmp_path / "strip", folder, seed=1)
