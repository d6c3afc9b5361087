"""Where the ranks of a run meet before they have groups, and what they tell each other there. Nothing of Megatron's is needed for it."""

import contextlib
import datetime
import itertools
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from minitron.errors import Passing, RequestError, first_line, refuse, say_once

MEETING: list[tuple[Any, int, int]] = []  # of this process, once it has joined the others
CALLS = itertools.count()  # of rolls in this process, one after another: the same on every rank
SLACK = 30.0  # seconds that rank 0 may begin later than the others, or its answer may take
FAREWELL = 3.0  # seconds that rank 0, which may keep the place, waits for the others to hear that it ends
MOST_HOSTS = 8  # named in a line


def pick_device(setting: str) -> torch.device:
    """`auto` takes this process's GPU where there is one; `cuda` without a GPU is refused."""
    if setting == "cuda" and not torch.cuda.is_available():
        error = refuse("device", setting, "no GPU is visible to torch; use auto or cpu")
        error.passing = True  # a node may have lost its own
        raise error
    if setting == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def meet(timeout: datetime.timedelta) -> tuple[Any, int, int]:
    """Where the ranks meet, rank, and their number. Rank 0 may keep that place itself, so no world takes it along when it ends."""
    if not MEETING:
        MEETING.append(next(dist.rendezvous("env://", timeout=timeout)))
    return MEETING[0]


class Roll:
    """The ranks of a run called up at the store where they meet: each says a word, rank 0 answers, all hear the answer.

    Made, and each topic called, by every rank in the same order. A process that is alone answers itself. Raises RequestError where the place
    can't be reached, and on a rank that does not hear of rank 0, which itself waits for `minutes`.
    """

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self.rank, self.size, self.store = 0, 1, None
        number = next(CALLS)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            with _within_reach():
                place, self.rank, self.size = meet(datetime.timedelta(minutes=minutes))
                # a connection of its own: another thread may be waiting for an answer on the first
                self.store = dist.PrefixStore(f"roll_{number}", place.clone())

    def tell(self, topic: str, word: str) -> None:
        """Rank 0 says something to all who ask for it."""
        if self.store is not None:
            with _within_reach():
                self.store.set(topic, word)

    def hear(self, topic: str) -> str:
        """What rank 0 told."""
        assert self.store is not None, "a process that is alone hears nothing"
        with _within_reach():
            # rank 0 may begin to wait for words when this one has waited already, and its line is to be heard
            if not self._there([topic], 2 * 60 * self.minutes + SLACK):
                raise RequestError.of(
                    Passing(
                        f"nothing was heard of rank 0 within parallel.start_minutes={self.minutes:g}: it did not start, hangs or has ended; "
                        "see what it said"
                    )
                )
            return self.store.get(topic).decode()

    def call(self, topic: str, mine: str, answer: Callable[[list[str | None]], str]) -> str:
        """Rank 0's answer, made of every rank's word; None stands for a rank that said nothing within `minutes`."""
        if self.store is None:
            return answer([mine])
        with _within_reach():
            self.store.set(f"{topic}/{self.rank}", mine)
            if self.rank:
                return self.hear(topic)
            self.tell(topic, said := answer(self._words(topic)))
            return said

    def settle(self, topic: str, mine: str, judge: Callable[[list[str | None]], list[str]]) -> None:
        """`call` for a decision: rank 0 says the faults that `judge` finds, a line each, and then all raise RequestError with them.

        Whether a fault is Passing goes along with its line.
        """

        def answer(words: list[str | None]) -> str:
            try:
                faults = judge(words)
            except BaseException:
                self.fail(topic, "", "rank 0 failed: see what it said")
                raise
            for fault in faults:
                say_once(fault)
            return _dump(faults)

        if faults := [Passing(line) if passes else line for line, passes in json.loads(self.call(topic, mine, answer))]:
            self._part(topic)
            error = RequestError.of(*faults)
            error.said = True
            raise error

    def fail(self, topic: str, mine: str, fault: str) -> None:
        """Instead of `settle`, by a rank that is about to end with an error of its own: the others are not to wait for it."""
        if self.store is not None:
            with contextlib.suppress(dist.DistError):
                self.store.set(topic if self.rank == 0 else f"{topic}/{self.rank}", _dump([Passing(fault)]) if self.rank == 0 else mine)

    def _words(self, topic: str) -> list[str | None]:
        assert self.store is not None
        keys = [f"{topic}/{rank}" for rank in range(self.size)]
        if self._there(keys, 60 * self.minutes):
            return [word.decode() for word in self.store.multi_get(keys)]
        return [self.store.get(key).decode() if self.store.check([key]) else None for key in keys]

    def _there(self, keys: list[str], seconds: float) -> bool:
        """Whether all of these come in time. Asked again and again: a signal reaches a process only between two questions."""
        assert self.store is not None
        until, pause = time.monotonic() + seconds, 0.001
        while not self.store.check(keys):
            if time.monotonic() > until:
                return False
            time.sleep(pause)
            pause = min(0.1, 1.5 * pause)
        return True

    def _part(self, topic: str) -> None:
        """Rank 0 ends last: the place where they meet may be its own."""
        if self.store is not None:
            with contextlib.suppress(dist.DistError):
                until = time.monotonic() + FAREWELL
                self.store.add(f"{topic}/heard", 1)
                while self.rank == 0 and self.store.add(f"{topic}/heard", 0) < self.size and time.monotonic() < until:
                    time.sleep(0.01)


def host_name() -> str:
    """This machine's name."""
    return socket.gethostname()


def _dump(faults: list[str]) -> str:
    return json.dumps([(fault, isinstance(fault, Passing)) for fault in faults])


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextlib.contextmanager
def _within_reach() -> Iterator[None]:
    try:
        yield
    except dist.DistError as error:
        line = f"the place where the ranks meet, {_place()}, is not in reach of {host_name()} or is gone: {first_line(error)}"
        raise RequestError.of(Passing(line)) from error


def located(ranks: Iterable[int], hosts: Sequence[str]) -> str:
    """`a (ranks 0 to 3), b (rank 4)`: ranks by host; `hosts` has that of each rank."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts[rank], []).append(rank)
    named = [f"{name} ({spans(its)})" for name, its in by_host.items()]
    more = [f"and {len(named) - MOST_HOSTS} more"] if len(named) > MOST_HOSTS else []
    return ", ".join(named[:MOST_HOSTS] + more)


def spans(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 1`, `ranks 0 to 3, 7`: of ranks that grow."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and found[-1][-1] == rank - 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    words = [f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in found]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(words)}"
