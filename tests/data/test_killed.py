"""Preparation that is killed, again and again: what is complete is kept, what is made in the end is what an unbroken run makes."""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors import safe_open

from minitron.config.schema import Data
from minitron.data import prepare, tokenizing
from minitron.data.manifest import Manifest
from minitron.data.pieces import Pieces
from minitron.data.tokenizing import Tokens
from tests.data.test_prepare import stored
from tests.data.test_tokenizing import ROOT, children

TEXTS = [f"document {number} " + "x" * (number * 7 % 61) for number in range(90)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    """The pieces that are there; a piece that is written again is another file."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.glob("train.pieces/*.safetensors")}


def records_in(folder: Path) -> int:
    """Of the source, in the pieces that are there."""
    found = 0
    for file in folder.glob("train.pieces/*.safetensors"):
        with safe_open(file, "numpy") as piece:
            found += int(piece.metadata()["records"])
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 4 documents, pieces of 3 chunks or so."""
    monkeypatch.setattr(tokenizing, "CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(prepare, "PIECE_TOKENS", 500)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text, "body": f"b{text}"}) for text in TEXTS]
    path.write_text("\n".join([*lines[:30], "", '{"text": "", "body": ""}', *lines[30:]]) + "\n")
    return Data(train=str(path), valid_fraction=0.2, calibration_fraction=0.1)


@pytest.fixture
def unbroken(data: Data, tokenizer_path: Path, tmp_path: Path) -> dict[str, bytes]:
    prepare.prepare(data, tokenizer_path, tmp_path / "unbroken", seed=1)
    return contents(tmp_path / "unbroken")


def in_child(work: Callable[[], object]) -> int:
    """What ended a copy of this process that did `work`: 0, or a signal's number."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert not os.WEXITSTATUS(status) if os.WIFEXITED(status) else True
    return os.WTERMSIG(status)


def killed_at(moment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends this process at its `moment`-th step towards a complete file: before it is flushed, before and after it gets its name."""
    steps = iter(range(1, 10**6))

    def step() -> None:
        if next(steps) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    flush, rename = os.fsync, os.replace

    def stepping_flush(handle: int) -> None:
        step()
        flush(handle)

    def stepping_rename(*paths: Path) -> None:
        step()
        rename(*paths)
        step()

    monkeypatch.setattr(os, "fsync", stepping_flush)
    monkeypatch.setattr(os, "replace", stepping_rename)


@pytest.mark.parametrize("moment", [3, *(pytest.param(moment, marks=pytest.mark.slow) for moment in (1, 4, 7, 12))])
def test_killed_again_and_again_gives_what_an_unbroken_run_gives(
    moment: int, data: Data, unbroken: dict[str, bytes], tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run comes `moment` steps further, at first; once that leads nowhere, as when writing the result takes more, one step more each time."""
    folder, told = tmp_path / "run", tmp_path / "told"
    ended, before, patience = 1, dict[str, tuple[int, int]](), 0
    for run in itertools.count():
        assert run < 200
        done = records_in(folder)
        patience = 0 if inodes(folder) != before else patience + 1
        before = inodes(folder)

        def work(moment: int = moment + patience) -> None:
            killed_at(moment, monkeypatch)
            log(told, monkeypatch)
            prepare.prepare(data, tokenizer_path, folder, seed=1)

        ended = in_child(work)
        if told.exists():
            assert not {*told.read_text().splitlines()} & {*TEXTS[: done - (done > 30)]}  # none of a complete piece is tokenised again
            told.unlink()
        assert before.items() <= inodes(folder).items() or not inodes(folder)  # nor written again
        if not ended:
            break
        assert "train" not in Manifest.load(folder).splits
    assert run > 3
    assert contents(folder) == unbroken
    assert not [path for path in folder.iterdir() if path.is_dir() or path.name.startswith(".")]


def log(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write down every text that is tokenised."""
    whole = tokenizing._Fast.__call__

    def logged(self, texts: list[str]) -> list[list[int]]:
        with open(file, "a") as handle:
            handle.writelines(f"{text}\n" for text in texts)
        return whole(self, texts)

    monkeypatch.setattr(tokenizing._Fast, "__call__", logged)


def broken_off(data: Data, tokenizer_path: Path, folder: Path, documents: int = 50) -> None:
    def stop(name: str, done: int, tokens: int, share: float | None) -> None:
        if done >= documents:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(data, tokenizer_path, folder, seed=1, on_progress=stop)


def texts_read(data: Data, tokenizer_path: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int = 1) -> list[str]:
    with monkeypatch.context() as patch:
        log(tmp_path / "told", patch)
        prepare.prepare(data, tokenizer_path, folder, seed=seed)
    read = (tmp_path / "told").read_text().splitlines()
    (tmp_path / "told").unlink()
    return read


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder", "jsonl.gz"])
def test_every_form_of_source_goes_on_where_it_was(
    form: str, data: Data, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": text} for text in (*TEXTS[:40], "", *TEXTS[40:])]
    if form == "json":
        (tmp_path / "b.json").write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=9)
    elif form == "folder":
        (tmp_path / "b.folder").mkdir()
        for number, row in enumerate(rows):
            (tmp_path / "b.folder" / f"{number:03d}.txt").write_text(row["text"])
    else:
        with pa.output_stream(f"{tmp_path}/b.{form}") as handle:
            handle.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    data = dataclasses.replace(data, train=f"{tmp_path}/b.{form}")
    broken_off(data, tokenizer_path, tmp_path / "run")
    done = records_in(tmp_path / "run")
    assert 20 < done < 55
    read = texts_read(data, tokenizer_path, tmp_path / "run", tmp_path, monkeypatch)
    assert read == [row["text"] for row in rows[done:]]
    prepare.prepare(data, tokenizer_path, tmp_path / "fresh", seed=1)
    assert contents(tmp_path / "run") == contents(tmp_path / "fresh")


def test_pieces_are_good_for_another_division_but_not_for_another_text(
    data: Data, tokenizer_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    changes: list[tuple[Callable[[], Data], bool]] = [
        (lambda: dataclasses.replace(data, valid_fraction=0.4, calibration_fraction=None), True),
        (lambda: dataclasses.replace(data, text_key="body"), False),
        (lambda: (os.utime(data.train), data)[1], False),
    ]
    for change, kept in changes:
        shutil.rmtree(folder, ignore_errors=True)
        broken_off(data, tokenizer_path, folder)
        done, changed = records_in(folder), change()
        read = texts_read(changed, tokenizer_path, folder, tmp_path, monkeypatch, seed=3)
        assert done and len(read) == len(TEXTS) + 1 - (done if kept else 0)
        prepare.prepare(changed, tokenizer_path, tmp_path / "fresh", seed=3)
        assert contents(folder) == contents(tmp_path / "fresh")


def test_pieces_that_are_no_longer_asked_for_are_removed(data: Data, tokenizer_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    broken_off(data, tokenizer_path, folder)
    assert (folder / "train.pieces").is_dir()
    prepare.prepare(dataclasses.replace(data, train=f"1 {data.train} 2 {data.train}#body"), tokenizer_path, folder, seed=1)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_pieces_after_one_that_is_missing_or_broken_are_made_again(tmp_path: Path) -> None:
    def piece(number: int) -> Tokens:
        return Tokens(np.arange(5, dtype=np.uint16) + number, np.array([2, 3], np.int32), np.array([0, 1], np.int32), 4)

    for harm in (Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-1]), lambda file: file.write_bytes(b"")):
        made = Pieces(tmp_path / "p", {"a": [1]})
        for number in range(len(made.files), 5):
            made.add([piece(number)])
        (tmp_path / "p" / ".00000009.safetensors.partial").write_bytes(b"half")
        harm(made.files[3])
        again = Pieces(tmp_path / "p", {"a": [1]})
        assert (again.records, again.documents, again.tokens) == (12, 6, 15)
        assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [f"{number:08d}.safetensors" for number in range(3)]
        assert np.array_equal(np.concatenate([*again.blocks()]), np.concatenate([piece(number).ids for number in range(3)]))
        assert again.of_documents("prompts").tolist() == [0, 1] * 3
    assert not Pieces(tmp_path / "p", {"a": [2]}).files and not (tmp_path / "p").exists()


# ---- the command itself ----


@pytest.fixture
def command(stories_path: Path, tmp_path: Path) -> list[str]:
    """`minitron data` with two workers and small pieces, on 4 MB of text."""
    draw = random.Random(1)
    words = ["Once", "upon", "a", "time", "there", "was", "Lily", "who", "played", "."]
    with open(tmp_path / "stories.jsonl", "w") as handle:
        for number in range(2500):
            handle.write(json.dumps({"text": f"{number} " + " ".join(draw.choices(words, k=300))}) + "\n")
    (tmp_path / "small.py").write_text(
        "import sys\nfrom minitron.cli import main\nfrom minitron.data import prepare, tokenizing\n"
        "tokenizing.CHUNK_DOCUMENTS, prepare.PIECE_TOKENS = 16, 40_000\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    settings = [f"model.path={stories_path}", f"data.train={tmp_path}/stories.jsonl", "data.calibration_fraction=0.1", "device=cpu"]
    return [sys.executable, f"{tmp_path}/small.py", "data", *settings]


@contextlib.contextmanager
def running(command: list[str], folder: Path, workers: int = 2):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    arguments = [*command, f"run.dir={folder}", f"data.workers={workers}"]
    with subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(command: list[str], folder: Path, workers: int = 2) -> tuple[int, str]:
    with running(command, folder, workers) as process:
        said = process.communicate()[0]
    return process.returncode, said


def first_piece(process: subprocess.Popen, folder: Path) -> None:
    """Wait until there is one more piece than now."""
    before = inodes(folder / "data")
    while inodes(folder / "data") == before and process.poll() is None:
        time.sleep(0.005)


def tokens_made(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder / "data").items() if not name.endswith(".json")}


@pytest.mark.slow
def test_killed_worker_is_one_line_and_the_same_command_continues(command: list[str], tmp_path: Path) -> None:
    with running(command, tmp_path / "run") as process:
        first_piece(process, tmp_path / "run")
        os.kill(children(process.pid)[0], signal.SIGKILL)
        said = process.communicate()[0]
    assert process.returncode == 2
    assert [line for line in said.splitlines() if line.startswith("minitron: ")] == [
        "minitron: data.workers=2: a worker process died (killed, or out of memory?); the same command continues, and fewer workers need less"
    ]
    assert "Traceback" not in said
    before = inodes(tmp_path / "run" / "data")
    assert before
    with running(command, tmp_path / "run") as process:
        first_piece(process, tmp_path / "run")
        assert before.items() < inodes(tmp_path / "run" / "data").items()
        assert process.wait() == 0 if process.communicate() else True
    assert finished(command, tmp_path / "unbroken", workers=1)[0] == 0
    assert tokens_made(tmp_path / "run") == tokens_made(tmp_path / "unbroken")


@pytest.mark.long
def test_command_killed_at_twenty_moments_gives_what_an_unbroken_run_gives(command: list[str], tmp_path: Path) -> None:
    assert finished(command, tmp_path / "unbroken")[0] == 0
    oracle = contents(tmp_path / "unbroken" / "data")
    texts = [json.loads(line)["text"] for line in (tmp_path / "stories.jsonl").read_text().splitlines()]
    draw, folder, kills = random.Random(5), tmp_path / "run", Counter[str]()
    while kills.total() < 20:
        before = inodes(folder / "data")
        with running(command, folder, workers=draw.choice([1, 2])) as process:
            # anywhere: while the libraries are imported, while tokenising, while joining
            if draw.random() < 0.8:
                first_piece(process, folder)
            time.sleep(draw.random() * draw.choice([0.1, 1]))
            victims = children(process.pid) if draw.random() < 0.4 else []
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):  # a worker that has ended meanwhile
                    os.kill(draw.choice(victims) if victims else process.pid, signal.SIGKILL)
                    kills["worker" if victims else "command"] += 1
            process.communicate(timeout=120)
        now = inodes(folder / "data")
        assert before.items() <= now.items() or not now
        if process.returncode == 0:
            assert contents(folder / "data") == oracle
            shutil.rmtree(folder)  # all was done before the kill: from the beginning
        else:
            assert process.returncode in (-signal.SIGKILL, 2)
    assert finished(command, folder)[0] == 0
    assert contents(folder / "data") == oracle
    assert not [path for path in (folder / "data").iterdir() if path.is_dir() or path.name.startswith(".")]
    assert sum(len(stored(folder / "data" / name)) for name in ("train", "valid", "calibration")) == len(texts)
    assert {*kills} == {"worker", "command"}
