"""Which documents are held out for validation: decided by (seed, document number) alone, so that no order, worker or restart changes it."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

Tokens = TypeVar("Tokens", bound=Any)  # whatever has a length and can be sliced


def draw(seed: int, number: int) -> float:
    """A number in [0, 1), uniform over document numbers and the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def hold_out(documents: Iterable[Tokens], fraction: float, seed: int) -> Iterator[tuple[bool, Tokens]]:
    """Mark each document as held out (True) or kept, `fraction` of them held out on average; both sides always get something.

    Where the draws of a small corpus all fall on one side, the one nearest to the other side changes over. A single document is cut: its last
    `fraction` of tokens is held out. Documents are looked at in advance only until both sides have one (about 1/fraction of them).
    """
    stream = iter(documents)
    head: list[Tokens] = []
    sides = set()
    for document in stream:
        sides.add(draw(seed, len(head)) < fraction)
        head.append(document)
        if len(sides) == 2:
            break
    else:
        yield from _small(head, fraction, seed)
        return
    for number, document in enumerate(itertools.chain(head, stream)):
        yield draw(seed, number) < fraction, document


def _small(documents: list[Tokens], fraction: float, seed: int) -> Iterator[tuple[bool, Tokens]]:
    if len(documents) == 1:
        tokens = documents[0]
        cut = min(max(round(len(tokens) * (1 - fraction)), 1), len(tokens) - 1)
        yield from ((False, tokens[:cut]), (True, tokens[cut:]))
        return
    draws = [draw(seed, number) for number in range(len(documents))]
    all_out = bool(draws) and max(draws) < fraction
    odd_one = draws.index(max(draws) if all_out else min(draws)) if draws else 0
    for number, document in enumerate(documents):
        yield all_out != (number == odd_one), document
