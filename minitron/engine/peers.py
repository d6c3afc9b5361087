"""Notices that a rank of this run is gone, whatever this rank is doing, and says which.

gloo tells whoever talks to a lost rank, NCCL nobody, and a rank that computes by itself would learn of it much later. So every
rank keeps an idle connection to rank 0: the system closes it with the process, however that ends, and rank 0 passes the word on.
"""

import _thread
import contextlib
import multiprocessing
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import types
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist

from minitron.errors import EXIT_STOPPED, HungRank, LostRank, Stopped, say_once

# what the libraries say of a connection that ended with the process on its other side
SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",  # gloo
    "Connection was likely closed",  # torch's store, which rank 0 or torchrun keeps
    "ncclRemoteError", "remote process exited",  # NCCL
)  # fmt: skip
# what they say of a process on the other side that lives on and does not answer
SILENCE = (
    "Timed out waiting",  # gloo
    "wait timeout after", "timed out after",  # torch's store
    "Watchdog caught collective operation timeout",  # NCCL; its watchdog as a rule ends the process before any exception is raised
)  # fmt: skip
KEY = "minitron/lookout"
RANK_DIGITS = 8
FAREWELL = "bye"
INTERRUPT = signal.SIGUSR2  # not SIGINT: a user may mean another thing by it, and shells let background jobs ignore it
PATIENCE = 5.0  # seconds for a message to come
TO_NOTICE, TO_STOP, TO_END = 3.0, 12.0, 15.0  # seconds until a rank that goes on is interrupted, is given up, is ended
TO_SAY = 1.0  # seconds until a rank that another one waited for says where it is: if it hangs it is still there


def tells_of_loss(error: BaseException | None) -> bool:
    """Whether an exception means that another rank is gone, rather than that this one failed."""
    return _says(error, SIGNS)


def tells_of_silence(error: BaseException | None) -> bool:
    """Whether an exception means that another rank was waited for in vain."""
    return _says(error, SILENCE)


def _says(error: BaseException | None, signs: tuple[str, ...]) -> bool:
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):  # torch's DistError, DistBackendError, ... among them
        return True
    return error is not None and _says(error.__cause__, signs)


def place(frames: Iterable[types.FrameType]) -> str:
    """The function that a stack, innermost frame first, is in and, where that is not this project's, the one of this project's that led there."""
    names = [f"{frame.f_globals.get('__name__', '?')}.{frame.f_code.co_name}" for frame in frames]
    ours = next((name for name in names if name.startswith("minitron.")), None)
    return names[0] if ours in (None, names[0]) else f"{names[0]}, called from {ours}"


def stack_of_main() -> list[types.FrameType]:
    """What the main thread is in now, innermost frame first."""
    frame, frames = sys._current_frames().get(threading.main_thread().ident or 0), []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def stack_of_error(error: BaseException) -> list[types.FrameType]:
    """Where an exception came from, innermost frame first; of one with a cause, where that did."""
    while error.__cause__ is not None:
        error = error.__cause__
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    return frames[::-1]


class Interrupted(BaseException):
    """Raised in the midst of whatever the main thread does, once another rank is lost; `Lookout.leave` makes it a LostRank."""


class Lookout:
    """This rank's connection to rank 0, or rank 0's to all, and a thread that listens to it.

    Once a rank is lost this process will end: by the error that its next exchange with the lost rank raises; where it computes
    by itself, by an interrupt; where neither reaches it, in a library, this thread ends the process. At most half a minute passes.
    The words that are passed: `bye` of a rank that is done, `N failed` of one that says itself why, `N waited` of one that waited for another
    in vain, `N died`. `minutes`: how long ranks wait.
    """

    def __init__(self, minutes: float) -> None:
        self.rank, self.minutes = 0, minutes
        self.lost: int | None = None
        self._how = ""
        self._said = False
        self._heard = threading.Event()  # who was lost is known
        self._leaving = threading.Event()  # the main thread has stopped its work
        self._finished = False  # and not for an error
        self._giving_up = False  # it has an error, maybe one that waits for who was lost
        self._thread: threading.Thread | None = None
        self._peers: dict[socket.socket, int] = {}  # connections, and whom to
        self._others: list[socket.socket] = []

    def begin(self, store: dist.Store, rank: int) -> None:
        """Connect. `store` is where the ranks meet; called by every rank."""
        self.rank = rank
        ears = selectors.DefaultSelector()
        asleep, self._waker = socket.socketpair()
        ears.register(asleep, selectors.EVENT_READ)
        self._others = [asleep, self._waker]
        if rank == 0:
            self._open(store, ears)
        else:
            self._connect(store, ears)
        signal.signal(INTERRUPT, self._interrupt)
        os.register_at_fork(after_in_child=self._close)  # a child that outlives this process must not keep its connections open
        self._thread = threading.Thread(target=self._listen, args=(ears,), daemon=True, name="lookout")
        self._thread.start()

    def _open(self, store: dist.Store, ears: selectors.BaseSelector) -> None:
        both = socket.has_dualstack_ipv6()
        listener = socket.create_server(("", 0), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=4096)
        self._others.append(listener)
        token = secrets.token_hex(8)  # whoever else finds the port is not listened to
        ears.register(listener, selectors.EVENT_READ, token)
        store.set(KEY, f"{_own_address()} {listener.getsockname()[1]} {token}")

    def _connect(self, store: dist.Store, ears: selectors.BaseSelector) -> None:
        address, port, token = store.get(KEY).decode().split()
        try:
            line = socket.create_connection((address, int(port)), timeout=PATIENCE)
            line.sendall(_hello(token, self.rank))
        except OSError as error:
            say_once(f"rank {self.rank} cannot reach rank 0 at {address}:{port} ({error}): a lost rank may be noticed late")
        else:
            self._add(line, 0, ears)

    def _add(self, line: socket.socket, rank: int, ears: selectors.BaseSelector) -> None:
        line.settimeout(PATIENCE)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that lost its power closes nothing
        for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._peers[line] = rank
        ears.register(line, selectors.EVENT_READ)

    def _listen(self, ears: selectors.BaseSelector) -> None:
        with ears:
            while self.lost is None and not self._leaving.is_set():
                for key, _ in ears.select():
                    if key.fileobj in self._peers:
                        self._hear(key.fileobj, ears)
                    elif key.data is not None:
                        self._admit(key.fileobj, key.data, ears)
        if self.lost is not None:
            self._tell(f"{self.lost} {self._how}")
            if self._how == "died":
                self._say()  # now: torchrun ends the other ranks within a tenth of a second
            elif self._how == "waited":
                self._say_where()
            self._heard.set()
            threading.Thread(target=self._end_the_process, daemon=True, name="end").start()

    def _admit(self, listener: Any, token: str, ears: selectors.BaseSelector) -> None:
        try:
            line, _ = listener.accept()
        except OSError:  # whoever it was is gone again
            return
        line.settimeout(PATIENCE)
        hello = _read(line, len(_hello(token, 0)))
        if hello[:-RANK_DIGITS] == token:
            self._add(line, int(hello[-RANK_DIGITS:]), ears)
        else:
            line.close()

    def _hear(self, line: Any, ears: selectors.BaseSelector) -> None:
        word = _read(line, 32).partition("\n")[0]  # of several that came together, the first
        ears.unregister(line)
        rank = self._peers.pop(line)
        line.close()
        if word != FAREWELL:
            lost, self._how = (word or f"{rank} died").split()
            self.lost = int(lost)

    def _tell(self, word: str) -> None:
        for line in [*self._peers]:
            with contextlib.suppress(OSError):
                line.sendall(f"{word}\n".encode())

    def _say(self) -> None:
        if not self._said:
            self._said = True
            ending = self._ending()
            say_once(str(ending), ending.topic)

    def _ending(self) -> Stopped:
        """What this rank ends with once it heard what became of another."""
        if self._how == "waited" and self.lost is not None:
            return HungRank(self.lost, self.minutes)
        return LostRank(self.lost, self._said)

    def _say_where(self) -> None:
        """Tell what this rank is doing while another waited in vain, unless it waits itself: it may be the one that hangs."""
        self._leaving.wait(TO_SAY)
        stack = stack_of_main()
        if stack and not self._giving_up and not stack[0].f_globals.get("__name__", "").startswith("torch.distributed"):
            say_once(f"rank {self.rank}, while rank {self.lost} waited for another, was in {place(stack)}")

    def leave(self, error: BaseException | None) -> Stopped | None:
        """Tell the others how this rank ends: `error`, or well. What to raise where the error is another rank's end, or its silence."""
        self._giving_up = error is not None
        told, silence = tells_of_loss(error), tells_of_silence(error)
        if told and self._thread is not None:
            self._heard.wait(PATIENCE)
        self._finished = error is None or isinstance(error, Stopped)
        self._leaving.set()
        if self._thread is not None:
            self._waker.close()
            self._thread.join()
        self._tell(FAREWELL if self._finished else f"{self.rank} {'waited' if silence else 'failed'}")
        self._close()
        if silence and error is not None:
            hung = HungRank(self.rank, self.minutes, place(stack_of_error(error)))
            say_once(str(hung), hung.topic)  # before those that only learn of it
            hung.said = True
            threading.Event().wait(2 * TO_SAY)  # torchrun ends the others when this process ends: the one that hangs is to be heard
            return hung
        return self._ending() if told or isinstance(error, Interrupted) else None

    def _close(self) -> None:
        for line in [*self._peers, *self._others]:
            line.close()

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.lost is not None:
            raise Interrupted

    def _end_the_process(self) -> None:
        if not self._leaving.wait(TO_NOTICE):
            _thread.interrupt_main(INTERRUPT)
        if not self._leaving.wait(TO_STOP):
            self._say()
        elif not self._finished:
            threading.Event().wait(TO_END)  # what is left to do after an error: files closed, children ended
        if not self._finished:
            for child in multiprocessing.active_children():
                child.kill()
            os._exit(EXIT_STOPPED)


def _hello(token: str, rank: int) -> bytes:
    return f"{token}{rank:0{RANK_DIGITS}}".encode()


def _read(line: socket.socket, size: int) -> str:
    """What was sent, at most `size` bytes; nothing where the connection ended."""
    try:
        return line.recv(size).decode(errors="replace")
    except OSError:
        return ""


def _own_address() -> str:
    """Where the other ranks find this one: MASTER_ADDR if that is this machine, else the address of its name, as gloo does."""
    meeting_place = os.environ["MASTER_ADDR"]
    with contextlib.suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(meeting_place, 0, type=socket.SOCK_STREAM):
            with contextlib.suppress(OSError), socket.socket(family, kind) as probe:
                probe.bind(address)
                return meeting_place
        return socket.gethostbyname(socket.gethostname())
    return meeting_place
