"""Where the tokens of a training sample come from, and what of them counts: from lengths alone, so nothing here reads a token. Pure.

Legend: T tokens of a sample, S = T - 1 positions that a prediction is made at.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Span(NamedTuple):
    """A run of tokens of one document in a sample: `length` of them, from the document's token `start` on."""

    document: int
    start: int
    length: int


class Packing(NamedTuple):
    """Whole documents in windows: window w is the spans bounds[w] ... bounds[w + 1] - 1."""

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bounds: np.ndarray

    @property
    def windows(self) -> int:
        """How many there are."""
        return len(self.bounds) - 1

    def spans(self, window: int) -> list[Span]:
        """What a window is made of, in order."""
        here = slice(int(self.bounds[window]), int(self.bounds[window + 1]))
        return [Span(*map(int, row)) for row in zip(self.documents[here], self.starts[here], self.lengths[here], strict=True)]


def pack(lengths: np.ndarray, seq_length: int, seed: int) -> Packing:
    """Documents of `lengths` tokens into windows of seq_length + 1 tokens, each document whole and in exactly one of them.

    A longer document is cut into pieces that share a token, the last of one and the first of the next, so that every token of a document but its
    first is predicted once. Pieces go in by best fit, the longest first and equal ones in an order drawn with `seed`; so does the order in a window.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    pieces = np.where(lengths > 0, np.maximum(-(-(lengths - 1) // seq_length), 1), 0)
    documents = np.repeat(np.arange(len(lengths)), pieces)
    starts = (np.arange(len(documents)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * seq_length
    sizes = np.minimum(lengths[documents] - starts, seq_length + 1)
    drawn = np.random.default_rng(seed).permutation(len(documents))
    order = drawn[np.argsort(-sizes[drawn], kind="stable")]
    window_of = np.empty(len(documents), dtype=np.int64)
    window_of[order] = best_fit(sizes[order].tolist(), seq_length + 1)
    by_window = drawn[np.argsort(window_of[drawn], kind="stable")]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(window_of))])
    return Packing(documents[by_window], starts[by_window], sizes[by_window], bounds)


def best_fit(sizes: Sequence[int], room: int) -> list[int]:
    """The window of each piece, taken in order: the one with the least room that holds it, or a new one of `room`."""
    with_room: dict[int, list[int]] = {left: [] for left in range(1, room + 1)}
    lefts: list[int] = []  # the rooms that some window has left, ascending
    chosen, windows = [], 0
    for size in sizes:
        place = bisect.bisect_left(lefts, size)
        if place == len(lefts):
            window, left, windows = windows, room, windows + 1
        else:
            left = lefts[place]
            window = with_room[left].pop()
            if not with_room[left]:
                del lefts[place]
        if left > size:
            if not with_room[left - size]:
                bisect.insort(lefts, left - size)
            with_room[left - size].append(window)
        chosen.append(window)
    return chosen


def masks(spans: Sequence[Span], seq_length: int, separate: bool, prompts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Of a sample made of `spans` and, after them, padding: which predictions count, bool [S], and the number of each position's span, int64 [S].

    Not counted is the prediction of: padding; a token of its document's prompt (the first `prompts[document]`); with `separate`, a span's first
    token, since the position before it, the end of another document, sees nothing that would tell it; and, of a document that was cut, the first
    token of a later piece, which the piece before predicts. Padding has a number of its own: it is seen by itself alone.
    """
    counted_T = np.zeros(seq_length + 1, dtype=bool)
    numbers_T = np.full(seq_length + 1, len(spans), dtype=np.int64)
    at = 0
    for number, span in enumerate(spans):
        here = slice(at, at + span.length)
        counted_T[here] = True if prompts is None else np.arange(span.start, span.start + span.length) >= prompts[span.document]
        counted_T[at] &= not separate and span.start == 0
        numbers_T[here] = number
        at += span.length
    return counted_T[1:], numbers_T[:-1]
