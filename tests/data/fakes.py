"""Stand-ins for a tokenizer in worker processes; in a file that imports nothing slow, since every worker imports it."""

import os
from typing import Any


class ProcessTokenizer:
    """Gives the process it runs in and the text's number as tokens."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[os.getpid(), int(text)] for text in texts]}


class DyingTokenizer:
    """Ends its process, as the kernel does with one that takes too much memory."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        os._exit(9)


class FailingTokenizer:
    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        raise LookupError("in the worker")
