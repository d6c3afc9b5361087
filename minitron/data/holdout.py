"""Which documents are held out for validation and calibration: decided by (seed, document number) alone, so that no worker or restart changes it.

Each document draws a number in [0, 1), and each side owns a stretch of it: validation the lower end, calibration the upper one, training what is
between. So whether one of them is asked for changes nothing about the other.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

Stretch = tuple[float, float]  # from the first number up to, not including, the second


def stretches(valid: float | None, calibration: float | None) -> dict[str, Stretch]:
    """What train owns, and valid and calibration where these shares of the documents are asked for; train comes first."""
    low, high = valid or 0.0, 1.0 - (calibration or 0.0)
    held = {"valid": (0.0, low), "calibration": (high, 1.0)}
    return {"train": (low, high), **{split: stretch for split, stretch in held.items() if stretch[0] < stretch[1]}}


def draw(seed: int, number: int) -> float:
    """A number in [0, 1), uniform over document numbers and the same on every machine."""
    digest = hashlib.blake2b(f"{seed}:{number}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def hold_out(lengths: np.ndarray, prompts: np.ndarray, owned: Sequence[Stretch], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The side of each document, int8 [documents], after its length and its prompt's; side k owns the stretch `owned[k]`.

    Every side gets something: where no draw falls on one, the document nearest to it changes over. Fewer documents than sides are cut, each into
    pieces in the order of their tokens, which are then what is returned; with less than one token for each side they stay whole.
    """
    count = len(lengths)
    if len(owned) > 1 and 0 < count < len(owned) and int(lengths.min()) >= len(owned):
        return _cut(lengths, prompts, owned)
    if len(owned) == 1 or not count:
        return lengths, prompts, np.zeros(count, np.int8)
    draws = np.fromiter((draw(seed, number) for number in range(count)), np.float64, count)
    sides = np.zeros(count, np.int8)
    for side, (low, high) in enumerate(owned):
        sides[(low <= draws) & (draws < high)] = side
    for side, (low, high) in enumerate(owned):
        if side not in sides:
            spare = np.bincount(sides, minlength=len(owned))[sides] > 1
            away = np.maximum(low - draws, draws - high)
            if spare.any():
                sides[np.where(spare, away, np.inf).argmin()] = side
    return lengths, prompts, sides


def _cut(lengths: np.ndarray, prompts: np.ndarray, owned: Sequence[Stretch]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Each document in one piece for each side: what owns the highest numbers comes first, so that validation reads its end."""
    order = sorted(range(len(owned)), key=lambda side: -owned[side][0])
    ends = np.rint(lengths[:, None] * (1 - np.array([owned[side][0] for side in order]))).astype(np.int64)
    for place in range(len(order)):
        before = ends[:, place - 1] if place else 0
        ends[:, place] = np.clip(ends[:, place], before + 1, lengths - (len(order) - 1 - place))
    starts = np.concatenate([np.zeros((len(lengths), 1), np.int64), ends[:, :-1]], axis=1)
    pieces = ends - starts
    of_prompts = np.clip(prompts[:, None] - starts, 0, pieces)
    return pieces.ravel().astype(np.int32), of_prompts.ravel().astype(np.int32), np.tile(np.array(order, np.int8), len(lengths))
