"""Stand-ins for an encoder in worker processes; in a file that imports nothing slow, since every worker imports it."""

import os
import time


class ProcessEncoder:
    """Gives the process it runs in and the text's number as tokens."""

    eos = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [[os.getpid(), int(text)] for text in texts]


class DyingEncoder:
    """Ends its process, as the kernel does with one that takes too much memory."""

    eos = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        os._exit(9)


class FailingEncoder:
    eos = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        raise LookupError("in the worker")


class LostEncoder:
    """Can't be read by a worker."""

    eos = 0

    def __reduce__(self) -> tuple:
        return int, ("not here",)


class LongEncoder:
    """Answers that no pipe holds, so that sending one takes until it is read."""

    eos = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        return [[os.getpid()] * 10**6 for _ in texts]


class SlowEncoder:
    """Never finishes."""

    eos = 0

    def __call__(self, texts: list[str]) -> list[list[int]]:
        time.sleep(10**6)
        return []
