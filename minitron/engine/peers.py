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
import threading
from typing import Any

import torch.distributed as dist

from minitron.errors import EXIT_STOPPED, LostRank, Stopped, say_once

# what the libraries say of a connection that ended with the process on its other side
SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket closed",  # gloo
    "Connection was likely closed",  # torch's store, which rank 0 or torchrun keeps
    "ncclRemoteError", "remote process exited",  # NCCL
)  # fmt: skip
KEY = "minitron/lookout"
RANK_DIGITS = 8
FAREWELL = "bye"
INTERRUPT = signal.SIGUSR2  # not SIGINT: a user may mean another thing by it, and shells let background jobs ignore it
PATIENCE = 5.0  # seconds for a message to come
TO_NOTICE, TO_STOP, TO_END = 3.0, 12.0, 15.0  # seconds until a rank that goes on is interrupted, is given up, is ended


def tells_of_loss(error: BaseException | None) -> bool:
    """Whether an exception means that another rank is gone, rather than that this one failed."""
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS):  # torch's DistError, DistBackendError, ... among them
        return True
    return error is not None and tells_of_loss(error.__cause__)


class Interrupted(BaseException):
    """Raised in the midst of whatever the main thread does, once another rank is lost; `Lookout.leave` makes it a LostRank."""


class Lookout:
    """This rank's connection to rank 0, or rank 0's to all, and a thread that listens to it.

    Once a rank is lost this process will end: by the error that its next exchange with the lost rank raises; where it computes
    by itself, by an interrupt; where neither reaches it, in a library, this thread ends the process. At most half a minute passes.
    The words that are passed: `bye` of a rank that is done, `N failed` of one that says itself why, `N died`.
    """

    def __init__(self) -> None:
        self.rank = 0
        self.lost: int | None = None
        self._how = ""
        self._said = False
        self._heard = threading.Event()  # who was lost is known
        self._leaving = threading.Event()  # the main thread has stopped its work
        self._finished = False  # and not for an error
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
        word = _read(line, 32)
        ears.unregister(line)
        rank = self._peers.pop(line)
        line.close()
        if word != FAREWELL:
            lost, self._how = (word or f"{rank} died").split()
            self.lost = int(lost)

    def _tell(self, word: str) -> None:
        for line in [*self._peers]:
            with contextlib.suppress(OSError):
                line.sendall(word.encode())

    def _say(self) -> None:
        if not self._said:
            self._said = True
            say_once(str(LostRank(self.lost)))

    def leave(self, error: BaseException | None) -> LostRank | None:
        """Tell the others how this rank ends: `error`, or well. The LostRank to raise where the error is another rank's end."""
        told = tells_of_loss(error)
        if told and self._thread is not None:
            self._heard.wait(PATIENCE)
        self._finished = error is None or isinstance(error, Stopped)
        self._leaving.set()
        if self._thread is not None:
            self._waker.close()
            self._thread.join()
        self._tell(FAREWELL if self._finished else f"{self.rank} failed")
        self._close()
        return LostRank(self.lost, self._said) if told or isinstance(error, Interrupted) else None

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
