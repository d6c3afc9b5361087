"""Text sources: what a source string names, whether it can be read, and its documents one after another.

A source is one of
    PATH               a file (.txt, .jsonl or .json, each also with .gz, .zst or .bz2 after it, or .parquet), or a folder: every such file below
                       it, in the order of their paths
    PATH               the common prefix of a .bin and an .idx file that Megatron's tools or `prepare` made
    package:NAME/PATH  a file or folder inside an installed Python package
    ID or ID:CONFIG    a data set of the Hugging Face hub, streamed; what exists locally under that name goes first
and `SOURCE#FIELD` takes the text from FIELD instead of data.text_key. A blend is `weight source weight source ...`.

Documents: a .txt file is one document, whole and unchanged. A .jsonl line, a .parquet row, a hub record and each record of a .json file (a list of
records, or an object whose values are records) are a document each. Empty documents are left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from minitron.config.setting import MISSING
from minitron.errors import RequestError, first_line, refuse
from minitron.packages import PREFIX, resolve_package

COMPRESSIONS = (".gz", ".zst", ".bz2")
HUB_ID = re.compile(r"(?P<id>[\w-][\w.-]*(/[\w.-]+)?)(:(?P<config>[\w.-]+))?")
CHECKED_FILES = 64  # of a folder: more would make the check before a run slow; the rest is checked as it is read
CHECKED_BYTES = 64 << 20  # a compressed file up to this size is unpacked once to see that it is whole


Row = tuple[str, str]  # a record's prompt and text, both of which may be empty


class Keys(NamedTuple):
    """The fields of a record that are read."""

    text: str
    prompt: str | None = None


@dataclasses.dataclass
class Place:
    """Where the reading of a source stands. The readers keep it up to date."""

    skip: int = 0  # records that are still to be passed over
    total: int = 0  # bytes of all files
    before: int = 0  # bytes of the files that were read to their ends
    within: Callable[[], int] = lambda: 0  # bytes read of the file that is open

    def passes(self) -> bool:
        """Whether the record that comes next is to be passed over."""
        self.skip -= (passed := self.skip > 0)
        return passed

    @property
    def share(self) -> float | None:
        """How much of the files was read, in [0, 1]; None where their size is not known."""
        return (self.before + self.within()) / self.total if self.total else None


@dataclasses.dataclass(frozen=True)
class Source:
    """What the string `given` names. `kind` is files, prepared (`files` = .bin, .idx) or hub; `name` is `given` without its #FIELD."""

    setting: str
    given: str
    name: str
    kind: str
    files: tuple[Path, ...] = ()
    field: str | None = None

    @property
    def prefix(self) -> Path:
        """What the two files of prepared data have in common."""
        return self.files[0].with_suffix("")

    def refusal(self, where: object, reason: str) -> RequestError:
        """The refusal of this source because of the file or record `where`."""
        return refuse(self.setting, self.given, reason if str(where) == self.given else f"{where}: {reason}")


def blend(spec: str, setting: str) -> list[tuple[float, str]]:
    """`weight source weight source ...` as (weight, source) pairs; anything that does not start with a number is one source."""
    words = spec.split()
    if len(words) < 2 or _weight(words[0]) is None or os.path.exists(spec):
        return [(1.0, spec)]
    weights = [_weight(word) for word in words[::2]]
    if len(words) % 2 or any(weight is None or not 0 < weight < math.inf for weight in weights):
        raise refuse(setting, spec, "a blend is `weight source weight source ...` with weights above 0 and no spaces in a source")
    return [(weight, source) for weight, source in zip(weights, words[1::2], strict=True) if weight is not None]


def locate(given: str, setting: str) -> Source:
    """Find what a source string (not a blend) names, without reading any text. Raises RequestError where there is nothing of the kind."""
    if given in ("", MISSING):
        raise refuse(setting, given, "a source of text is needed")
    name, mark, key = given.rpartition("#")
    if not mark or os.path.exists(given):  # not Path.exists, which raises on what is too long for a name, as a blend may be
        name, key = given, ""
    field = key or None
    path = resolve_package(name, setting) if name.startswith(PREFIX) else Path(name).expanduser()
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    pair = tuple(Path(f"{prefix}{ending}") for ending in (".bin", ".idx"))
    if any(map(os.path.isfile, pair)) and not os.path.isdir(path):
        if missing := [file for file in pair if not os.path.isfile(file)]:
            raise refuse(setting, given, f"{missing[0]} is missing: prepared data is a .bin and an .idx file")
        return Source(setting, given, name, "prepared", tuple(file.absolute() for file in pair))
    if os.path.isdir(path):
        files = tuple(sorted(file for file in path.rglob("*") if file.is_file() and _reader(file) and not _hidden(file.relative_to(path))))
        if not files:
            raise refuse(setting, given, f"the folder holds no file that ends in {_endings()}")
        return Source(setting, given, name, "files", files, field)
    if os.path.exists(path):
        if not _reader(path):
            raise refuse(setting, given, f"a file must end in {_endings()}")
        return Source(setting, given, name, "files", (path,), field)
    if not HUB_ID.fullmatch(name) or _reader(path):
        raise refuse(setting, given, "no such file or folder")
    return Source(setting, given, name, "hub", (), field)


def check_source(spec: str, setting: str, text_key: str = "text", split: str = "train", prompt_key: str | None = None) -> None:
    """See that a source, or each source of a blend, exists and that its first document can be read; cheap, for use before any model is loaded.

    Raises RequestError: nothing there, unreadable, unknown ending, empty, binary or not UTF-8, truncated, or no field `text_key` or `prompt_key`.
    """
    for _, given in blend(spec, setting):
        check_located(locate(given, setting), text_key, split, prompt_key)


def check_located(source: Source, text_key: str = "text", split: str = "train", prompt_key: str | None = None) -> None:
    """`check_source` of one source that was found."""
    keys = Keys(source.field or text_key, prompt_key)
    if source.kind == "prepared":
        from minitron.data.indexed import open_indexed, open_prompts  # megatron takes seconds to import

        indexed = open_indexed(source.prefix, source.setting)
        if prompt_key is not None:
            open_prompts(source.prefix, indexed, source.setting)
    elif source.kind == "files":
        _check_files(source, keys)
    elif next(_hub(source, keys, split, Place()), None) is None:
        raise source.refusal(source.given, f"split {split} holds no text")


def newest_revision(source: Source) -> str:
    """The commit that a data set of the hub is at; "" of what has none: what lies here, and where the hub can't be asked."""
    import huggingface_hub

    name = HUB_ID.fullmatch(source.name)
    if source.kind != "hub" or name is None:
        return ""
    try:
        with _quiet_hub():
            return huggingface_hub.HfApi().dataset_info(name["id"]).sha or ""
    except Exception:  # of half a dozen libraries; whether the data set can be read without the hub shows when it is
        return ""


def records(source: Source, place: Place, text_key: str = "text", split: str = "train", prompt_key: str | None = None,
            revision: str = "") -> Iterator[Row]:  # fmt: skip
    """Prompt and text of every record of a source of text after the first `place.skip`, in order, never more than one file's row group, line or
    .txt/.json file in memory. An empty text is no document, but counts as a record. `revision`: of a data set of the hub, "" for the newest.

    Raises RequestError, while it runs, for what can't be read.
    """
    keys = Keys(source.field or text_key, prompt_key)
    if source.kind == "hub":
        yield from _hub(source, keys, split, place, revision)
        return
    place.total = sum(file.stat().st_size for file in source.files)
    for file in source.files:
        yield from _file(source, file, keys, place)
        place.before, place.within = place.before + file.stat().st_size, lambda: 0


def _check_files(source: Source, keys: Keys) -> None:
    found = False
    for file in source.files[:CHECKED_FILES]:
        found |= next((True for _, text in _file(source, file, keys, Place()) if text), False)
        if file.suffix.lower() in COMPRESSIONS and file.stat().st_size <= CHECKED_BYTES:
            with _readable(source, file), pa.input_stream(str(file), compression="detect") as stream:
                while stream.read(1 << 20):
                    pass
    if not found and len(source.files) <= CHECKED_FILES:
        raise refuse(source.setting, source.given, "holds no text")


# ---- readers: (source, file, fields, place) -> (prompt, text) of every record that is not to be passed over ----


def _file(source: Source, file: Path, keys: Keys, place: Place) -> Iterator[Row]:
    reader = _reader(file)
    assert reader is not None, f"locate() let {file} through"
    with _readable(source, file):
        yield from reader(source, file, keys, place)


def _plain(source: Source, file: Path, keys: Keys, place: Place) -> Iterator[Row]:
    if keys.prompt is not None:
        raise refuse("data.prompt_key", keys.prompt, f"{file} has no fields: records (.jsonl, .json, .parquet) are needed")
    if place.passes():
        return
    with _opened(file, place) as handle:
        text = handle.read()
    if "\0" in text:
        raise source.refusal(file, "not text: it holds NUL bytes")
    yield "", text


def _json_lines(source: Source, file: Path, keys: Keys, place: Place) -> Iterator[Row]:
    with _opened(file, place) as handle:
        for number, line in enumerate(handle, 1):
            if line.strip() and not place.passes():
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise source.refusal(file, f"line {number} is not JSON ({error})") from error
                yield _row(source, record, keys, f"line {number} of {file}")


def _json(source: Source, file: Path, keys: Keys, place: Place) -> Iterator[Row]:
    with _opened(file, place) as handle:
        try:
            content = json.load(handle)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            hint = "; a file with one record a line must end in .jsonl" if "Extra data" in str(error) else ""
            raise source.refusal(file, f"not JSON ({error}){hint}") from error
    if not isinstance(content, list | dict):
        raise source.refusal(file, "a list of records, or an object whose values are records, is needed")
    for name, record in content.items() if isinstance(content, dict) else enumerate(content):
        if not place.passes():
            yield _row(source, record, keys, f"record {name} of {file}")


def _parquet(source: Source, file: Path, keys: Keys, place: Place) -> Iterator[Row]:
    with pq.ParquetFile(file) as table:
        # the first row is judged by names and types alone, so that no other column is read
        _row(source, dict.fromkeys(table.schema_arrow.names), keys, str(file))
        columns = [key for key in keys if key is not None]
        for key in columns:
            kind = table.schema_arrow.field(key).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise source.refusal(file, f"the field {key} holds {kind}, not text")
        size, groups = file.stat().st_size, table.metadata.num_row_groups
        for number in range(groups):
            if (count := table.metadata.row_group(number).num_rows) <= place.skip:
                place.skip -= count  # without reading it
                continue
            place.within = functools.partial(int, size * number / groups)
            for rows in table.iter_batches(batch_size=1024, row_groups=[number], columns=columns):
                passed = min(place.skip, len(rows))
                place.skip -= passed
                texts = rows.column(keys.text)[passed:].to_pylist()
                prompts = rows.column(keys.prompt)[passed:].to_pylist() if keys.prompt is not None else [""] * len(texts)
                yield from ((prompt or "", text or "") for prompt, text in zip(prompts, texts, strict=True))


def _hub(source: Source, keys: Keys, split: str, place: Place, revision: str = "") -> Iterator[Row]:
    import datasets

    name = HUB_ID.fullmatch(source.name)
    assert name is not None, f"locate() let {source.name} through"
    try:
        with _quiet_hub():
            stream = datasets.load_dataset(name["id"], name["config"], split=split, streaming=True, revision=revision or None)
            for number, record in enumerate(stream.skip(place.skip) if place.skip else stream, place.skip):
                yield _row(source, record, keys, f"record {number} of {source.given}")
    except RequestError:
        raise
    except Exception as error:  # the hub's clients raise errors of half a dozen libraries: not found, offline, wrong split, wrong config, ...
        reason = f"no such file or folder, and split {split} can't be read from the hub: {first_line(error)}"
        raise refuse(source.setting, source.given, reason) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The hub's client tells of every attempt to reach it; what came of them is said once, by the refusal."""
    log = logging.getLogger("huggingface_hub")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


Reader = Callable[[Source, Path, Keys, Place], Iterator[Row]]
READERS: dict[str, Reader] = {".txt": _plain, ".jsonl": _json_lines, ".json": _json, ".parquet": _parquet}


# ---- helpers ----


def _reader(file: Path) -> Reader | None:
    name = file.name.lower()
    packed = next((ending for ending in COMPRESSIONS if name.endswith(ending)), "")
    reader = READERS.get(Path(name.removesuffix(packed)).suffix)
    return None if packed and reader is _parquet else reader


def _endings() -> str:
    return ", ".join(READERS) + f" (all but .parquet also with {', '.join(COMPRESSIONS)} after it)"


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _row(source: Source, record: Any, keys: Keys, where: str) -> Row:
    """Prompt and text of one record; a null is an empty one."""
    if not isinstance(record, dict):
        raise source.refusal(where, f"a record with the field {keys.text} is needed, not {type(record).__name__}")
    text = _field(source, record, keys.text, (source.setting, source.given) if source.field else ("data.text_key", keys.text), where)
    return "" if keys.prompt is None else _field(source, record, keys.prompt, ("data.prompt_key", keys.prompt), where), text


def _field(source: Source, record: dict[str, Any], key: str, named: tuple[str, str], where: str) -> str:
    """The text in a field of a record; `named`: the setting that names the field, and its value."""
    if key not in record:
        setting, value = named
        raise refuse(setting, value, f"{where} has no such field; it has {', '.join(map(str, record)) or 'none'}")
    if not isinstance(record[key], str | None):
        raise source.refusal(where, f"the field {key} holds {type(record[key]).__name__}, not text")
    text = record[key] or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell what is no character, and no tokenizer takes it
        raise source.refusal(where, f"the field {key} holds half a surrogate pair at character {error.start}") from error
    return text


@contextlib.contextmanager
def _opened(file: Path, place: Place) -> Iterator[io.TextIOWrapper]:
    """A text file, unpacked by its ending. Line ends are kept as they are; a byte-order mark is dropped."""
    codec = pa.Codec.detect(str(file).lower()).name if file.suffix.lower() in COMPRESSIONS else None
    with open(file, "rb") as packed, pa.input_stream(packed, compression=codec) as stream:
        place.within = lambda: 0 if packed.closed else packed.tell()
        yield io.TextIOWrapper(io.BufferedReader(stream), encoding="utf-8-sig", newline="\n")


@contextlib.contextmanager
def _readable(source: Source, file: Path) -> Iterator[None]:
    """What the readers raise on a broken file, as one line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise source.refusal(file, f"not UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})") from error
    except (OSError, pa.ArrowException) as error:
        reason = next(iter(str(getattr(error, "strerror", None) or error).splitlines()), type(error).__name__)
        raise source.refusal(file, f"cannot be read: {reason}") from error
