"""Runs `minitron` commands as a user's shell would, in processes of their own."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from tests.multirank.ranks import Ranks, started


class Done(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str


def _main(out: Path, prepare: Callable[[], None] | None, arguments: list[str]) -> int:
    from minitron.cli import main

    out = out.with_name(out.name + os.environ.get("RANK", ""))
    for number, name in ((1, "out"), (2, "err")):
        handle = os.open(out.with_suffix(f".{name}"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if prepare is not None:
        prepare()
    return main(arguments)


@contextlib.contextmanager
def running(log: Path, *arguments: str, prepare: Callable[[], None] | None = None, size: int = 1) -> Iterator[Ranks]:
    """`minitron ARGUMENTS` in `size` processes while the block runs, its output in LOG.out and LOG.err, or LOG0.out and so on of several."""
    with started(_main, size, log, prepare, list(map(str, arguments))) as ranks:
        yield ranks


def minitron(log: Path, *arguments: str, prepare: Callable[[], None] | None = None) -> Done:
    """The outcome of `minitron ARGUMENTS`; `prepare`, importable by name, is called in its process before."""
    with running(log, *arguments, prepare=prepare) as ranks:
        code = ranks.results(timeout=300)[0]
    return Done(code, log.with_suffix(".out").read_text(), log.with_suffix(".err").read_text())


def wait_until(condition: Callable[[], bool], ranks: Ranks, timeout: float = 120) -> None:
    """Return as soon as `condition` holds; fail if the command ends before, or does not get there."""
    until = time.monotonic() + timeout
    while not condition():
        assert ranks.processes[0].is_alive(), "the command ended too early"
        assert time.monotonic() < until, "the command did not get there"
        time.sleep(0.002)


def small_compression(model: Path, text: Path) -> list[str]:
    """Settings of a compression that takes seconds: a quarter off the width of the model of `stories`, sixteen steps."""
    return [
        f"model.path={model}", f"data.train={text}", "target.hidden_size=48", "target.ffn_hidden_size=128",
        "calibrate.samples=32", "calibrate.seq_length=64", "train.steps=16", "train.global_batch_size=8", "train.micro_batch_size=4",
        "train.seq_length=64", "train.eval_interval=8", "train.eval_tokens=2048", "train.save_interval=4", "train.warmup_steps=2", "train.lr=2e-3",
        "eval.tokens=4096", "logging.progress=false",
    ]  # fmt: skip


def write_tales(file: Path) -> Path:
    """96 documents of words that the tokenizer of `stories` knows, in jsonl."""
    draw = random.Random(5)
    words = "once there was a little dog in the big red park and he was very happy to play with Lily".split()  # noqa: SIM905
    file.write_text("".join(json.dumps({"text": " ".join(draw.choices(words, k=draw.randrange(40, 90)))}) + "\n" for _ in range(96)))
    return file
