"""Rank 0 asks a sharded model, and all ranks answer together: how probable texts are, what the model writes.

Requests are spread over the replicas. Those that differ in their last token alone, as the choices of a question may, share a sequence.

Legend: B sequences of a microbatch, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from minitron import engine
from minitron.errors import RequestError
from minitron.evaluation.choices import Request, by_length, padding
from minitron.files import read_json

Result = TypeVar("Result")
# (what is done, of how many) -> a block that is given what to tell of each part that is done
Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]


class Judge(NamedTuple):
    """Asks how probable endings are: all tokens one after another, the tokens of each request, and how many of them, at its end, are judged."""

    tokens: np.ndarray  # int32
    lengths: np.ndarray  # int64
    endings: np.ndarray  # int64

    @classmethod
    def of(cls, asked: Sequence[Request]) -> Judge:
        """The same as arrays, which travel well."""
        lengths, endings = (np.array(values, dtype=np.int64) for values in ([len(one.tokens) for one in asked], [one.ending for one in asked]))
        return cls(np.fromiter((token for one in asked for token in one.tokens), np.int32, int(lengths.sum())), lengths, endings)

    def requests(self) -> list[Request]:
        """The inverse of `of`, with arrays for lists of tokens."""
        parts = np.split(self.tokens, np.cumsum(self.lengths)[:-1])
        return [Request(part, int(ending)) for part, ending in zip(parts, self.endings, strict=True)]  # type: ignore[arg-type]


class Write(NamedTuple):
    """Asks what the model writes after each prompt, until one of these texts, or so many tokens."""

    prompts: list[list[int]]
    until: list[str]
    most: int


class Answers:
    """What every rank does when rank 0 asks."""

    def __init__(self, model: engine.Model, world: engine.World, tokenizer: Any, ends: Iterable[int], tokens: int, progress: Progress) -> None:
        """`ends`: the tokens after which nothing follows. `tokens`: how many of them a microbatch holds at most."""
        self.model, self.world, self.tokenizer, self.ends, self.tokens, self.progress = model, world, tokenizer, frozenset(ends), tokens, progress
        self.ways = (2 * world.cp if world.cp > 1 else 1) * (world.tp if world.sequence_parallel else 1)

    def __call__(self, job: Judge | Write) -> Any:
        """Of a `Judge` losses and whether greedy, as `engine.judge`; of a `Write` texts."""
        return self.judge(job) if isinstance(job, Judge) else self.write(job)

    def judge(self, job: Judge) -> list[tuple[float, bool]]:
        """The log-likelihood in nats of each ending, and whether it is what the model would write."""
        batches = [*judged(job.requests(), self.tokens, self.ways)]
        mine = batches[self.world.dp_rank :: self.world.dp]
        with self.progress("likelihoods", len(mine)) as advance, self.model.on_device():
            losses, greedy = engine.judge(self.model, mine, self.world, len(job.lengths), advance)
        return [(-loss, best) for loss, best in zip(losses.tolist(), greedy.tolist(), strict=True)]

    def write(self, job: Write) -> list[str]:
        """What is written after each prompt."""

        def ended(number: int, found: list[int]) -> bool:
            if found[-1] in self.ends or len(found) >= job.most:
                return True
            # a text that ends it may be a special token, which is left out of what is written
            return any(stop in self.tokenizer.decode(found) for stop in job.until if stop)

        with self.progress("answers", len(job.prompts) // self.world.dp) as advance, self.model.on_device():
            found = engine.write_greedily(self.model, job.prompts, self.world, ended, self.tokens, padding(self.ways), advance)
        return [self.shown(tokens, job.until) for tokens in found]

    def shown(self, tokens: list[int], until: list[str]) -> str:
        """Tokens as text, up to the first of the texts that end it."""
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        for stop in filter(None, until):
            text = text.partition(stop)[0]
        return text


def judged(asked: Sequence[Request], tokens: int, ways: int) -> Iterator[engine.Judged]:
    """All requests in microbatches `by_length`; one sequence for all of those that the model would read the same of."""
    same: dict[bytes, list[int]] = {}
    for number, request in enumerate(asked):
        assert request.ending < len(request.tokens), "a token is predicted from those before it"
        if request.ending:
            same.setdefault(np.asarray(request.tokens[:-1], dtype=np.int32).tobytes(), []).append(number)
    shared = [*same.values()]
    for length, sequences in by_length([len(asked[numbers[0]].tokens) - 1 for numbers in shared], tokens, ways):
        inputs_BS = torch.zeros(len(sequences), length, dtype=torch.int64)
        parts = []  # rows, positions, labels, requests
        for row, numbers in enumerate(shared[sequence] for sequence in sequences):
            inputs = np.asarray(asked[numbers[0]].tokens[:-1], dtype=np.int64)
            inputs_BS[row, : len(inputs)] = torch.from_numpy(inputs)
            for number in numbers:
                labels = np.asarray(asked[number].tokens, dtype=np.int64)[-asked[number].ending :]
                positions = np.arange(len(inputs) - len(labels), len(inputs))
                parts.append((np.full_like(labels, row), positions, labels, np.full_like(labels, number)))
        yield engine.Judged(inputs_BS, *(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)))


def end_tokens(folder: Path, tokenizer: Any) -> set[int]:
    """The tokens after which nothing follows: the tokenizer's, and those that the model in `folder` was made to stop at."""
    told = [read_json(folder / name).get("eos_token_id") for name in ("generation_config.json", "config.json") if (folder / name).exists()]
    own: int | list[int] = next((ids for ids in told if ids is not None), [])
    return {int(tokenizer.eos_token_id), *(own if isinstance(own, list) else [own])}


def conducted(world: engine.World, answer: Callable[[Any], Any], conduct: Callable[[Callable[[Any], Any]], Result]) -> Result | None:
    """What `conduct(ask)` returns, on rank 0, where alone it runs; None elsewhere. Whatever it asks, every rank answers at the same time.

    A refusal raised in `conduct` is raised on every rank. The others wait for as long as it takes.
    """

    def ask(job: Any) -> Any:
        engine.broadcast_object(job, world)
        return answer(job)

    result, refused = None, None
    if world.is_main:
        try:
            result = conduct(ask)
        except RequestError as error:
            refused = error
        engine.broadcast_object(None, world)
    else:
        while (job := engine.broadcast_object(None, world)) is not None:
            answer(job)

    def outcome() -> Result | None:
        if refused is not None:
            raise refused
        return result

    return engine.main_only(world, outcome)
