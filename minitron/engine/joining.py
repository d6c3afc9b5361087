"""Groups that work before anything is built on them: every kind carries an all-reduce, with a right result and in bounded time.

A collective that another host does not answer, over a network interface that leads nowhere say, waits in a library that no signal reaches. So a
thread looks after the main one: where that takes too long, it tells rank 0 where it stands, hears what all are told, and ends the process.
"""

import contextlib
import dataclasses
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from minitron.engine.meeting import Roll, host_name, located
from minitron.engine.peers import Lookout, tells_of_loss, tells_of_silence
from minitron.errors import EXIT_REQUEST, Passing, RequestError, first_line, say_once

# the groups that a run talks in: Megatron's name, ours
KINDS = {
    "tp": "tensor-parallel", "pp": "pipeline", "cp": "context-parallel", "dp": "data-parallel", "dp_cp": "data- and context-parallel",
    "mp": "tensor and pipeline", "embd": "first and last stage's", "ep": "expert-parallel",
}  # fmt: skip
MEETING, MAKING, ALL = "the meeting of all ranks", "the making of groups", "the group of all ranks"
NETWORK = "can the hosts reach each other (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME name the interface; NCCL_DEBUG=INFO tells more)?"


@dataclasses.dataclass
class Standing:
    """How far a rank came. `wrong`: results that are not what they should be."""

    host: str
    stands_in: str
    wrong: list[str]


class Trial:
    """Tries the groups, and knows which one it is at."""

    def __init__(self) -> None:
        self.at, self.wrong = MEETING, list[str]()

    def run(self, device: torch.device, patient: Any, groups: Any) -> None:
        """An all-reduce in each group that this rank shares with another. Called by every rank together."""
        found = [(ALL, dist.group.WORLD, device), ("the group that waits for rank 0", patient, torch.device("cpu"))]
        found += [(f"its {kind} group", getattr(groups, name, None), device) for name, kind in KINDS.items()]
        for self.at, group, place in found:
            if isinstance(group, dist.ProcessGroup) and group.size() > 1:
                self.wrong += tried(self.at, group, place)

    def standing(self, stuck: bool) -> str:
        """How far this rank came, as a word to rank 0."""
        return json.dumps(dataclasses.asdict(Standing(host_name(), self.at if stuck else "", self.wrong)))


def tried(name: str, group: Any, device: torch.device) -> list[str]:
    """Rank numbers, from 1, added up in a group."""
    ranks = dist.get_process_group_ranks(group)
    total = torch.full((8,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total, group=group)
    expected = sum(ranks) + len(ranks)
    if total.tolist() == [expected] * len(total):
        return []
    return [f"an all-reduce over {name}, ranks {ranks}, gave {total[0].item():g} and not {expected}"]


@contextlib.contextmanager
def in_time(minutes: float, lookout: Lookout) -> Iterator[Trial]:
    """Ranks join in the block, which yields what tries their groups: in `minutes`, or all of them end with a line that says who stands where.

    Raises RequestError, on all ranks, where a group works wrongly; on a rank that can't reach another, at once.
    """
    trial, roll, begun = Trial(), Roll(minutes), threading.Lock()

    def end() -> None:
        if begun.acquire(blocking=False):
            give_up(roll, trial, lookout)

    timer = threading.Timer(60 * minutes, end)
    timer.daemon = True
    timer.start()
    try:
        yield trial
    except RuntimeError as error:
        if tells_of_loss(error) or tells_of_silence(error) or not is_of_network(error):
            raise
        raise RequestError.of(Passing(f"{host_name()} stands in {trial.at}: {first_line(error)}; {NETWORK}")) from error
    finally:
        timer.cancel()
    begun.acquire()  # for good where the time is over: the other thread speaks
    roll.settle("groups", trial.standing(stuck=False), judge)


def is_of_network(error: RuntimeError) -> bool:
    """Whether what carries words between ranks failed; anything else that goes wrong is a defect."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (isinstance(error, dist.DistError) or any(name in str(error).lower() for name in ("gloo", "nccl")))


def give_up(roll: Roll, trial: Trial, lookout: Lookout) -> None:
    """End this process, whose main thread is stuck, once rank 0 has said who stands where."""
    try:
        roll.settle("groups", trial.standing(stuck=True), judge)
    except RequestError as error:
        if not error.said:
            say_once(str(error))
    finally:
        lookout.leave(None)  # as one that is done: nobody is to report a lost rank
        os._exit(EXIT_REQUEST)


def judge(words: Sequence[str | None]) -> list[str]:
    """What is wrong with the groups, a line each: all of it may be a host's fault, or the network's."""
    found = [None if word is None else Standing(**json.loads(word)) for word in words]
    hosts = ["a host that is not heard of" if one is None else one.host for one in found]
    stuck = {rank: one.stands_in for rank, one in enumerate(found) if one is not None and one.stands_in}
    faults = []
    for place in dict.fromkeys(stuck.values()):
        waiting = located((rank for rank in stuck if stuck[rank] == place), hosts)
        faults.append(f"{place} did not come about within parallel.start_minutes: {waiting} wait there; {NETWORK}")
    if silent := [rank for rank, one in enumerate(found) if one is None]:
        faults.append(f"nothing was heard of {located(silent, hosts)} while groups were made: see what they said")
    faults += dict.fromkeys(line for one in found if one is not None for line in one.wrong)
    return [Passing(fault) for fault in faults]
