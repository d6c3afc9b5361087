"""Every form of source gives back the documents that were written; whatever is wrong is one line."""

import bz2
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minitron.data.indexed import IndexedDatasetBuilder
from minitron.data.sources import Place, blend, check_source, locate, records
from minitron.errors import RequestError


def lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({"id": number, key: text}, ensure_ascii=number % 2 == 0) + "\n" for number, text in enumerate(texts)).encode()


def zstd(content: bytes) -> bytes:
    return pa.Codec("zstd").compress(content, asbytes=True)


def parquet(texts: list[str], key: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(texts)), key: texts}), sink, row_group_size=10)
    return sink.getvalue().to_pybytes()


def listed(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts]).encode()


def named(texts: list[str]) -> bytes:
    return json.dumps({f"id {number}": {"text": text} for number, text in enumerate(texts)}).encode()


FORMATS = {
    "a.jsonl": lines,
    "a.jsonl.gz": lambda texts: gzip.compress(lines(texts)),
    "a.jsonl.zst": lambda texts: zstd(lines(texts)),
    "a.JSONL.bz2": lambda texts: bz2.compress(lines(texts)),
    "a.json": listed,
    "named.json": named,
    "a.json.gz": lambda texts: gzip.compress(listed(texts)),
    "a.parquet": parquet,
}


def read(spec: str | Path, text_key: str = "text") -> list[str]:
    check_source(str(spec), "data.train", text_key)
    return list(documents(str(spec), text_key))


def documents(spec: str, text_key: str = "text", split: str = "train", skip: int = 0) -> Iterator[str]:
    return (text for _, text in records(locate(spec, "data.train"), Place(skip), text_key, split) if text)


def refusal(spec: str | Path, text_key: str = "text") -> str:
    """The one line of the check."""
    with pytest.raises(RequestError) as raised:
        check_source(str(spec), "data.train", text_key)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_documents(name: str, tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / name).write_bytes(FORMATS[name](texts))
    assert read(tmp_path / name) == texts


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_text_file_is_one_unchanged_document(name: str, tmp_path: Path) -> None:
    text = "one\r\n\r\ntwo\x0cthree é\n"
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read(tmp_path / name) == [text]


def test_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read(tmp_path / "a.txt") == ["hello"]


def test_folder_is_its_files_by_path(tmp_path: Path) -> None:
    for name, text in {"b.txt": "B", "a/2.txt": "A2", "a/10.txt": "A10", ".git/x.txt": "hidden", "README.md": "not text to train on"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "c.jsonl").write_bytes(lines(["C1", "C2"]))
    assert read(tmp_path) == ["A10", "A2", "B", "C1", "C2"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n\n{"text": null}\n   \n{"text": "x"}\n')
    (tmp_path / "a.parquet").write_bytes(parquet(["", "x", None]))
    assert read(tmp_path / "a.jsonl") == ["x"]
    assert read(tmp_path / "a.parquet") == ["x"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("skip", [1, 9, 10, 11, 20, 96, 97, 200])
def test_records_that_were_read_before_are_passed_over(name: str, skip: int, tmp_path: Path, texts: list[str]) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / f"1{name}").write_bytes(FORMATS[name](texts))
    (tmp_path / "folder" / f"2{name}").write_bytes(FORMATS[name](["", *texts]))
    assert list(documents(str(tmp_path / "folder"), skip=skip)) == [text for text in [*texts, "", *texts][skip:] if text]


def test_share_of_the_bytes_that_were_read_grows_to_one(tmp_path: Path, texts: list[str]) -> None:
    for name in ("a.jsonl.gz", "b.parquet", "c.jsonl"):
        (tmp_path / name).write_bytes(FORMATS[name.replace("b.p", "a.p").replace("c.", "a.")](texts * 50))
    place = Place()
    shares = [place.share for _ in records(locate(str(tmp_path), "data.train"), place)]
    known = [share for share in shares if share is not None]
    assert len(known) == len(shares) and known == sorted(known) and known[0] < 0.5 and place.share == 1.0
    assert len({*known}) > 5


def test_jsonl_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' * 5000 + "broken\n")
    stream = documents(str(tmp_path / "a.jsonl"))
    assert next(stream) == "x"  # the broken line is far from being read
    with pytest.raises(RequestError, match="line 5001 is not JSON"):
        list(stream)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_other_field_by_setting_or_by_source(name: str, tmp_path: Path, texts: list[str]) -> None:
    make = parquet if name.endswith("parquet") else lines
    (tmp_path / name).write_bytes(make(texts, "extract"))
    assert read(tmp_path / name, text_key="extract") == texts
    assert read(f"{tmp_path / name}#extract", text_key="text") == texts


def test_number_sign_in_a_file_name(tmp_path: Path) -> None:
    (tmp_path / "a#b.txt").write_text("sharp")
    assert read(tmp_path / "a#b.txt") == ["sharp"]


def test_file_inside_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site" / "some_corpus"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "pages.json").write_text(
        json.dumps({"Leeds": {"title": "Leeds", "extract": "A city."}, "Hull": {"title": "Hull", "extract": "A port."}})
    )
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert read("package:some_corpus/data/pages.json", "extract") == ["A city.", "A port."]
    assert read("package:some_corpus/data", "extract") == ["A city.", "A port."]
    assert "some_corpus" not in sys.modules


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("package:no_such_package_here/a.txt", "no Python package no_such_package_here is installed"),
        ("package:json/no_such_file.txt", "the package json holds no no_such_file.txt"),
        ("package:this/a.txt", "no Python package this is installed"),  # a module, not a package
        ("package:json", "package:NAME/FILE is needed"),
        ("package:json.tool/a.txt", "package:NAME/FILE is needed"),
        ("package:/etc/hosts", "package:NAME/FILE is needed"),
    ],
)
def test_bad_package_sources(path: str, reason: str) -> None:
    line = refusal(path)
    assert line.startswith(f"data.train={path}: ") and reason in line


BAD_FILES = {
    "missing.txt": (None, "no such file or folder"),
    "missing/sub/folder": (None, "no such file or folder"),
    "a.csv": (b"text\n", "a file must end in .txt, .jsonl, .json, .parquet"),
    "a.parquet.gz": (b"x", "a file must end in .txt"),
    "empty.txt": (b"", "holds no text"),
    "empty.jsonl": (b"\n\n", "holds no text"),
    "empty.json": (b"[]", "holds no text"),
    "empty.parquet": (parquet([]), "holds"),
    "nul.txt": (b"MZ\x00\x01text", "not text: it holds NUL bytes"),
    "binary.txt": (bytes(range(256)), "not UTF-8 text (byte 0x80"),
    "binary.jsonl": (bytes(range(128, 256)), "not UTF-8 text"),
    "binary.json": (b'[{"text": "\xff"}]', "not UTF-8 text (byte 0xff"),
    "utf16.txt": ("hello".encode("utf-16"), "not UTF-8 text"),
    "broken.jsonl": (b'{"text": "a"\n', "line 1 is not JSON"),
    "nul.jsonl": (b'{"text": "a\x00b"}\n', "line 1 is not JSON"),
    "list.jsonl": (b'["a"]\n', "line 1 of {path}: a record with the field text is needed, not list"),
    "number.jsonl": (b'{"text": 3}\n', "line 1 of {path}: the field text holds int, not text"),
    "surrogate.jsonl": (b'{"text": "a\\ud800"}\n', "line 1 of {path}: the field text holds half a surrogate pair at character 1"),
    "broken.json": (b'[{"text": ', "not JSON"),
    "lines.json": (b'{"text": "a"}\n{"text": "b"}\n', "a file with one record a line must end in .jsonl"),
    "string.json": (b'"text"', "a list of records, or an object whose values are records, is needed"),
    "strings.json": (b'{"text": "a"}', "record text of {path}: a record with the field text is needed, not str"),
    "broken.parquet": (b"PAR1 no table PAR1", "cannot be read"),
    "number.parquet": (parquet([1, 2]), "the field text holds int64, not text"),  # type: ignore[list-item]
    "not.jsonl.gz": (b"plain", "cannot be read"),
    "cut.jsonl.gz": (gzip.compress(lines([f"{number} text" for number in range(9999)]))[:-9], "cannot be read: Truncated"),
    "cut.jsonl.zst": (zstd(lines([f"{number} text" for number in range(9999)]))[:-9], "cannot be read: Truncated"),
    "half.bin": (b"\0\0", "half.idx is missing: prepared data is a .bin and an .idx file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, reason = BAD_FILES[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    line = refusal(path)
    assert line.startswith(f"data.train={path}: ") and reason.format(path=path) in line


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_missing_field_names_those_found(name: str, tmp_path: Path) -> None:
    make = parquet if name.endswith("parquet") else lines
    (tmp_path / name).write_bytes(make(["x"], "body"))
    line = refusal(tmp_path / name)
    assert line.startswith("data.text_key=text: ") and str(tmp_path / name) in line and line.endswith("has no such field; it has id, body")
    assert refusal(f"{tmp_path / name}#page").startswith(f"data.train={tmp_path / name}#page: ")


def test_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    assert refusal(tmp_path).startswith(f"data.train={tmp_path}: the folder holds no file that ends in .txt")
    (tmp_path / "empty.txt").touch()
    assert refusal(tmp_path).endswith("holds no text")


@pytest.mark.parametrize("given", ["", "???"])
def test_absent_setting_is_refused(given: str) -> None:
    assert refusal(given) == f"data.train={given}: a source of text is needed"


def prepared(prefix: Path, documents: list[list[int]]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for document in documents:
        builder.add_document(np.array(document), [len(document)])
    builder.finalize(f"{prefix}.idx")


def test_prepared_data_is_checked(tmp_path: Path) -> None:
    prefix = tmp_path / "tokens.v1"
    prepared(prefix, [[1, 2, 3], [4, 5]])
    for given in (prefix, f"{prefix}.bin", f"{prefix}.idx"):
        check_source(str(given), "data.train")
        assert locate(str(given), "data.train").prefix == prefix
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    whole, whole_tokens = index.read_bytes(), tokens.read_bytes()
    for content, reason in [(whole[:-1], "truncated"), (whole[:20], "not an index"), (b"x" + whole[1:], "not an index"), (b"", "not an index")]:
        index.write_bytes(content)
        assert reason in refusal(prefix)
    index.write_bytes(whole)
    tokens.write_bytes(whole_tokens[:-2])
    assert "tokens.v1.bin has 8 bytes where tokens.v1.idx tells of 10" in refusal(prefix)
    prepared(prefix, [])
    assert refusal(prefix).endswith("holds no tokens")


def test_blend_is_weights_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert blend("0.3 a.txt 7 b.txt", "data.train") == [(0.3, "a.txt"), (7.0, "b.txt")]
    assert blend("my corpus.txt", "data.train") == [(1.0, "my corpus.txt")]
    monkeypatch.chdir(tmp_path)
    Path("2024 corpus.txt").write_text("x")
    assert blend("2024 corpus.txt", "data.train") == [(1.0, "2024 corpus.txt")]


def test_long_names_are_no_files() -> None:
    long = "x" * 5000
    assert refusal(f"/{long}") == f"data.train=/{long}: no such file or folder"
    assert len(blend(f"1 {long} " * 3, "data.train")) == 3


@pytest.mark.parametrize("spec", ["0.3 a 0.7", "0 a 1 b", "-1 a 2 b", "nan a 1 b", "inf a 1 b", "1 a b c"])
def test_bad_blends(spec: str) -> None:
    assert refusal(spec).startswith(f"data.train={spec}: a blend is `weight source weight source ...`")


def test_every_source_of_a_blend_is_checked(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    assert "data.train=" in refusal(f"1 {tmp_path}/a.txt 2 {tmp_path}/b.txt") and "b.txt" in refusal(f"1 {tmp_path}/a.txt 2 {tmp_path}/b.txt")


def test_hub_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool, revision: str | None) -> datasets.IterableDataset:
        assert revision is None
        asked.append((path, name, split, streaming))
        return datasets.Dataset.from_dict({"body": ["one", "", "two"]}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    assert list(documents("some-org/some.set:subset", "body", "validation")) == ["one", "two"]
    assert list(documents("some_set#body")) == ["one", "two"]
    assert list(documents("some_set#body", skip=1)) == ["two"] and asked.pop()
    assert asked == [("some-org/some.set", "subset", "validation", True), ("some_set", None, "train", True)]
    assert refusal("some_set") == "data.text_key=text: record 0 of some_set has no such field; it has body"


@pytest.mark.parametrize(
    "how", [{"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}], ids=["said", "found out"]
)
def test_unreachable_hub_is_one_line(how: dict[str, str], tmp_path: Path) -> None:
    # in a process of its own, since the libraries read these variables when they are imported
    code = """
import sys, time
from minitron.data.sources import check_source
from minitron.errors import RequestError
time.sleep = lambda seconds: None  # between attempts
try:
    check_source('no-such-org/no-such-set', 'data.train')
except RequestError as error:
    sys.exit(str(error))
"""
    offline = {**os.environ, **how, "NO_PROXY": "127.0.0.1", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=offline, capture_output=True, text=True)
    assert ran.stderr.startswith("data.train=no-such-org/no-such-set: no such file or folder, and split train can't be read")
    assert (ran.stderr.count("\n"), ran.stdout) == (1, "")
