"""`python -m tests.stages.watched VERB ...` is `python -m minitron VERB ...` that notes what it trains on, and dies where it is told to.

What happens in a run is counted by place, "STAGE:WHAT": files made, renamed or removed by what they belong to in the run's folder
("distill:checkpoints"), modules imported ("start:import"), passes through a model's modules ("calibrate:forward"), the beginnings and ends of
steps ("distill:update"). Files are seen by Python's audit events, so nothing here depends on who writes what.
"""

import atexit
import collections
import json
import os
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NamedTuple

ORDERS = "MINITRON_TEST_ORDERS"
# audit events that change files -> where their arguments say in which folder a relative path lies
CHANGES = {"open": None, "os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.chmod": 2, "os.truncate": None, "os.link": 2}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
ROOM = 64  # bytes of a file that are written before the end of a rank that dies in the middle of one


class Moment(NamedTuple):
    """The event of a place at which a rank dies. `how`: it alone ("rank"), every process of the run ("all"), or alone while it writes ("write")."""

    place: str
    number: int
    how: str = "rank"
    rank: int = 0


class Orders(NamedTuple):
    """The run's folder, where notes about it go, and where it ends."""

    run: str
    notes: str
    moment: Moment | None = None

    def to_text(self) -> str:
        """For the environment."""
        return json.dumps(self)

    @classmethod
    def from_text(cls, text: str) -> "Orders":
        """Inverse of `to_text`."""
        run, notes, moment = json.loads(text)
        return cls(run, notes, moment and Moment(*moment))


class Watch:
    """Counts events and ends the process at one of them."""

    def __init__(self, orders: Orders, rank: int) -> None:
        self.orders, self.rank, self.stage, self.main = orders, rank, "start", os.getpid()
        self.counts: collections.Counter[str] = collections.Counter()
        self.counting = threading.Lock()
        sys.addaudithook(self.hear)

    def hear(self, name: str, arguments: tuple[Any, ...]) -> None:
        """An audit event."""
        if name == "import":
            self.event("import")
        elif name in CHANGES and (name != "open" or arguments[2] & WRITING) and isinstance(arguments[0], str | bytes | os.PathLike):
            path, where = os.fsdecode(arguments[0]), CHANGES[name]
            if not os.path.isabs(path) and where is not None and len(arguments) > where and arguments[where] >= 0:
                path = os.path.join(os.readlink(f"/proc/self/fd/{arguments[where]}"), path)
            inside = os.path.relpath(os.path.abspath(path), self.orders.run)
            if not inside.startswith(".."):
                # ".arch.json.partial" belongs to arch.json
                self.event(inside.split(os.sep)[0].removeprefix(".").removesuffix(".partial").removesuffix(".removed"))

    def event(self, what: str) -> None:
        """Something happens next."""
        place, moment = f"{self.stage}:{what}", self.orders.moment
        with self.counting:
            self.counts[place] += 1
            now = moment is not None and (moment.place, moment.number, moment.rank) == (place, self.counts[place], self.rank)
        if now:
            assert moment is not None
            self.end(moment)

    def end(self, moment: Moment) -> None:
        """Die, noting why."""
        handle = os.open(f"{self.orders.notes}/fired", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, f"{moment.place}\n".encode())
        if moment.how == "write" and os.getpid() == self.main:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, ROOM))
            return
        if moment.how == "all":
            for process in of_run(self.orders.run):
                if process.pid not in (self.main, os.getpid()):
                    process.kill()
        os.kill(self.main, signal.SIGKILL)

    def note(self, name: str, value: Any) -> None:
        """Append a line to this rank's notes."""
        handle = os.open(f"{self.orders.notes}/{name}.{self.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(handle, (json.dumps(value) + "\n").encode())
        os.close(handle)


def of_run(run: str) -> list[Any]:
    """The processes that run with orders for this folder, and what they started."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and (text := process.environ().get(ORDERS)) and Orders.from_text(text).run == run:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def stage_of(watch: Watch, verb: str, work: Any) -> Any:
    """A stage's work, during which what happens is counted as that stage's."""

    def staged(opened: Any) -> Any:
        watch.stage = verb
        try:
            return work(opened)
        finally:
            watch.stage = "between"

    return staged


def attach(watch: Watch) -> None:
    """Have the stages, the models and the trainer tell of themselves."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    from minitron.data.corpus import TrainingSamples
    from minitron.engine.trainer import Trainer
    from minitron.stages import compress

    compress.STAGES.update({verb: stage_of(watch, verb, work) for verb, work in compress.STAGES.items()})
    register_module_forward_pre_hook(lambda *_: watch.event("forward"))
    batch, update = TrainingSamples.batch, Trainer.update

    def numbered(self: Any, numbers: Any) -> Any:
        found = batch(self, numbers)
        found.tokens_BT.numbers = [*map(int, numbers)]
        return found

    def noted(self: Any, batches: Any, loss: Any) -> Any:
        watch.event("update")
        line = update(self, batches, loss)
        watch.note("trained", [self.step, [number for one in batches for number in one.tokens_BT.numbers], int(line["skipped"])])
        watch.event("update")
        return line

    TrainingSamples.batch, Trainer.update = numbered, noted  # type: ignore[method-assign]


def main() -> None:
    """The command, watched."""
    orders = Orders.from_text(os.environ[ORDERS])
    Path(orders.notes).mkdir(parents=True, exist_ok=True)
    watch = Watch(orders, int(os.environ.get("RANK", "0")))
    attach(watch)
    atexit.register(lambda: watch.note("counts", watch.counts))
    runpy.run_module("minitron", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
