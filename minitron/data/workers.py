"""Work spread over processes, in order.

Not concurrent.futures: of a worker that is killed halfway through its answer, that pool waits for the rest for ever. Here each worker has a pipe of
its own, whose end tells either side that the other one is gone.
"""

import collections
import contextlib
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from minitron.errors import refuse

AHEAD = 3  # tasks of a worker that are under way: the one it works on, and those that wait for it


def spread(work: Callable[[Any], Any], tasks: Iterable[Any], workers: int) -> Iterator[Any]:
    """`work(task)` of each task, in order, in `workers` fresh interpreters (spawned, so a script that calls this needs `if __name__ ==
    "__main__"`). Tasks are read `AHEAD` for each worker in advance. Raises what `work` raises, and RequestError where a worker dies.
    """
    with _started(work, workers) as connections:
        turns = itertools.cycle(connections)
        asked: collections.deque[Connection] = collections.deque()
        for task in tasks:
            asked.append(next(turns))
            with _dying(workers):
                asked[-1].send(task)
            if len(asked) >= AHEAD * workers:
                yield _answer(asked.popleft(), workers)
        while asked:
            yield _answer(asked.popleft(), workers)


@contextlib.contextmanager
def _started(work: Callable[[Any], Any], workers: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")
    connections = []
    with contextlib.ExitStack() as stack:
        for _ in range(workers):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()  # or its end would not be noticed
            for end in (process.join, process.kill, ours.close):  # the last one first
                stack.callback(end)
            connections.append(ours)
        for connection in connections:  # not with `start`, which waits until the worker has read all of it
            with _dying(workers):
                connection.send(work)
        yield connections


def _answer(connection: Connection, workers: int) -> Any:
    with _dying(workers):
        done, value = connection.recv()
    if not done:
        raise value
    return value


@contextlib.contextmanager
def _dying(workers: int) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:  # OSError: nobody at the other end, or none any more halfway through a message
        allowed = "a worker process died (killed, or out of memory?); the same command continues, and fewer workers need less"
        raise refuse("data.workers", workers, allowed) from error


def _serve(connection: Connection) -> None:
    """A worker: its first message is what it does, the others are its tasks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process of a terminal; the parent sees to the workers
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()
    try:
        work = pickle.loads(messages.get())
        while True:
            _reply(connection, True, work(pickle.loads(messages.get())))
    except Exception as error:
        error.add_note(f"in a worker process:\n{traceback.format_exc()}")
        _reply(connection, False, error)
        threading.Event().wait()  # for the parent, which reads it after the answers before it


def _listen(connection: Connection, messages: "queue.SimpleQueue[bytes]") -> None:
    """Takes tasks while the worker is busy: a parent that waited to be rid of one could not read the answers meanwhile."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            messages.put(connection.recv_bytes())
    os._exit(1)  # the parent ended, was killed, or has no more to ask


def _reply(connection: Connection, done: bool, value: Any) -> None:
    with contextlib.suppress(ConnectionError):  # the parent is gone; `_listen` ends the worker
        connection.send((done, value))
