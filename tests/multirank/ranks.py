"""Runs a function on several gloo ranks of this machine, each a process of its own.

Ranks are forked from a server that has imported everything once and holds no threads, so that starting one costs next to
nothing and every one is fresh. They meet at a store that this process keeps: no port is chosen, so none can be taken.
"""

import contextlib
import functools
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from minitron.errors import LostRank


class Layout(NamedTuple):
    """How one model lies over processes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    vpp: int = 1
    sp: bool = False
    ep: int = 1

    @property
    def size(self) -> int:
        """Processes that it takes."""
        return self.tp * self.pp * self.dp * self.cp

    def __str__(self) -> str:
        parts = [f"{name}{getattr(self, name)}" for name in ("tp", "pp", "dp", "cp", "vpp", "ep") if getattr(self, name) > 1]
        return "-".join([*parts, *(["sp"] if self.sp else [])]) or "alone"


def on_ranks(function: Callable[..., Any], layout: Layout, *args: Any, seed: int = 1, timeout: float = 240) -> list[Any]:
    """`function(world, *args)` on every rank of `layout`, inside `minitron.engine.parallel.world`; what each returned, in rank order.

    `function` must be importable by name. What a rank raises is raised here, its traceback as the cause, and the other
    ranks are killed; so are all of them after `timeout` seconds.
    """
    return each_rank(_in_world, layout.size, function, layout, seed, args, timeout=timeout)


def _in_world(function: Callable[..., Any], layout: Layout, seed: int, args: tuple[Any, ...]) -> Any:
    from minitron.config.schema import Parallel
    from minitron.engine.parallel import world

    sizes = {name: getattr(layout, name) for name in ("tp", "pp", "cp", "vpp", "sp", "ep")}
    with world(Parallel(**sizes, timeout_minutes=3), "cpu", seed) as here:
        return function(here, *args)


def each_rank(function: Callable[..., Any], size: int, *args: Any, timeout: float = 240) -> list[Any]:
    """`function(*args)` in `size` processes; what each returned, in rank order. Several get the environment that torchrun gives its ranks."""
    with started(function, size, *args) as ranks:
        return ranks.results(timeout)


@contextlib.contextmanager
def started(function: Callable[..., Any], size: int, *args: Any) -> "Iterator[Ranks]":
    """As `each_rank`, but the ranks run on while the block does; those still alive at its end are killed."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=120), wait_for_workers=False)
    job = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(size)}
    ranks = Ranks()
    try:
        for rank in range(size):
            torchrun = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.start(torchrun if size > 1 else {}, function, args)
        yield ranks
    finally:
        ranks.end()


LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # what gloo says of a rank that went away


class Died(RuntimeError):
    """A rank ended without an answer."""


class Ranks:
    """Running processes and the pipes that their answers come through."""

    def __init__(self) -> None:
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []
        self.answered: set[int] = set()

    def start(self, environment: dict[str, str], function: Callable[..., Any], args: Sequence[Any]) -> None:
        """Start one more."""
        receiving, sending = multiprocessing.Pipe(duplex=False)
        process = _server().Process(target=_answer, args=(environment, function, args, sending))
        process.start()
        sending.close()  # ours only: the pipe then ends with the rank
        self.processes.append(process)
        self.pipes.append(receiving)

    def results(self, timeout: float) -> list[Any]:
        """Wait for every rank's answer; raises what the first rank that failed raised, Died, or TimeoutError."""
        try:
            return self._results(timeout)
        except BaseException:
            self.kill()
            raise

    def _results(self, timeout: float) -> list[Any]:
        answers: dict[int, Any] = {}
        lost: Exception | None = None
        until = time.monotonic() + timeout
        while missing := {pipe: rank for rank, pipe in enumerate(self.pipes) if rank not in answers}:
            ready = wait(list(missing), timeout=max(0.0, until - time.monotonic()))
            if not ready and lost is None:
                raise TimeoutError(f"no answer after {timeout} s from ranks {sorted(missing.values())}")
            if not ready:
                break
            for pipe in ready:
                try:
                    answers[missing[pipe]] = self._answer_of(missing[pipe])
                except (LostRank, RuntimeError) as error:
                    if not isinstance(error, LostRank) and not any(sign in str(error) for sign in LOST):
                        raise
                    # this rank only noticed that another is gone: that one's own answer says why, if it comes soon
                    answers[missing[pipe]], lost, until = None, lost or error, min(until, time.monotonic() + 10)
        if lost is not None:
            raise lost
        return [answers[rank] for rank in range(len(self.pipes))]

    def _answer_of(self, rank: int) -> Any:
        try:
            succeeded, value, trace = pickle.loads(self.pipes[rank].recv_bytes())
        except EOFError:
            self.processes[rank].join()
            raise Died(f"rank {rank} ended with exit code {self.processes[rank].exitcode} and no answer") from None
        self.answered.add(rank)
        if not succeeded:
            raise value from RuntimeError(f"on rank {rank}\n{trace}")
        return value

    def end(self, grace: float = 30) -> None:
        """Let ranks that have answered clean up after themselves, then kill whatever still runs."""
        for rank in self.answered:
            self.processes[rank].join(grace)
        self.kill()

    def kill(self) -> None:
        """End whatever still runs."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _answer(environment: dict[str, str], function: Callable[..., Any], args: Sequence[Any], pipe: Connection) -> None:
    os.environ.update(environment)
    try:
        answer = (True, function(*args), "")
    except BaseException as error:
        answer = (False, error, traceback.format_exc())
    try:
        data = pickle.dumps(answer)
    except Exception:  # an exception, or a result, that can't travel
        data = pickle.dumps((False, RuntimeError(f"no pickle can be made of {answer[1]!r}"), answer[2]))
    pipe.send_bytes(data)


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.multirank.preload"])
    return context
