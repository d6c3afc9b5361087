"""What a user is told when something cannot be done. The command line turns these into exit codes."""

from __future__ import annotations

import os
import sys

EXIT_DONE, EXIT_DEFECT, EXIT_REQUEST, EXIT_STOPPED = 0, 1, 2, 75


class Passing(str):
    """The line of a fault that may be a node's or the network's."""


class RequestError(Exception):
    """The request is wrong or can't be met here: one line that names the setting, its value and what is allowed (exit 2)."""

    said = False  # whether the user was told already
    passing = False  # a node or the network may be at fault: the same request may go well another time

    @classmethod
    def of(cls, *lines: str) -> RequestError:
        """One error of several lines, which may pass if each of them may."""
        error = cls("\n".join(lines))
        error.passing = all(isinstance(line, Passing) for line in lines)
        return error


class Stopped(Exception):
    """Stopped early, by a signal or by the loss of another rank, with what is finished saved: the same command continues (exit 75)."""

    said = False  # whether the user was told already
    topic: str | None = None  # what of torchrun's ranks only the first is to say, each in its own words


class LostRank(Stopped):
    """Another rank of the run was killed, failed, or is out of reach. `rank` is None where it is not known which."""

    def __init__(self, rank: int | None, said: bool = False) -> None:
        super().__init__(rank, said)
        self.rank, self.said = rank, said

    def __str__(self) -> str:
        who = "a rank" if self.rank is None else f"rank {self.rank}"
        return f"{who} was lost, killed or failed: the same command continues from what is finished"


class HungRank(Stopped):
    """Rank `rank` waited for another one for longer than it may, and left. `where`: in which function, where that is known."""

    topic = "a rank hangs"

    def __init__(self, rank: int, minutes: float, where: str = "") -> None:
        super().__init__(rank, minutes, where)
        self.rank, self.minutes, self.where = rank, minutes, where

    def __str__(self) -> str:
        where = f" in {self.where}" if self.where else ""
        return (
            f"rank {self.rank} waited for another rank{where} for longer than parallel.timeout_minutes={self.minutes:g}: that one hung or died, see "
            "what it said; the same command continues from what is finished"
        )


def refuse(setting: str, value: object, allowed: str) -> RequestError:
    """The one form of a refusal: `setting=value: what is allowed`."""
    return RequestError(f"{setting}={shown(value)}: {allowed}")


def first_line(error: BaseException) -> str:
    """What a library said, in one line: the first of its own, or else the kind of error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def shown(value: object) -> str:
    """A value as one writes it on the command line and in YAML: null, true, [1, 2]."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def say_once(line: str, topic: str | None = None) -> None:
    """Print `minitron: LINE` to stderr; where torchrun's ranks have the same to say, or something on the same topic, only the first of them does.

    The first rather than rank 0: torchrun ends the other ranks as soon as one exits, and rank 0 may be among them.
    """
    line = f"minitron: {' '.join(line.split())}"
    if not _said_elsewhere(topic or line):
        print(line, file=sys.stderr, flush=True)


def _said_elsewhere(topic: str) -> bool:
    """Whether another rank of this job announced `topic` before, asked of the store that torchrun keeps for its ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    from datetime import timedelta

    from torch.distributed import TCPStore

    try:
        store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=3))
        return store.add(f"minitron/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{topic}", 1) > 1
    except RuntimeError:  # the store is gone; better said twice than not at all
        return False
