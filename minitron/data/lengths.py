"""How many windows of a text are read, from its number of tokens alone. Pure."""

from collections.abc import Sequence

import numpy as np

from minitron.errors import refuse


def windows_in(tokens: int, seq_length: int, stride: int | None = None) -> int:
    """Windows of `seq_length` predicted tokens in a text, each beginning `stride` tokens (null: its length) behind the last one: a text's first
    token is predicted by none."""
    return max(0, (tokens - 1 - seq_length) // (stride or seq_length) + 1)


def windows_for(tokens: int, texts: int, seq_length: int, stride: int | None = None) -> int:
    """Windows that predict so many tokens at most, of `texts` texts: in the first of each all count, in the others what the one before lacks."""
    return min(tokens // seq_length, texts) + max(0, (tokens - texts * seq_length) // (stride or seq_length))


def rows_of(start: int, micro_batch: int, micro_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """The samples of a data-parallel rank's micro batch, counted from the one that begins with sample `start`: over the ranks, micro batch m is the
    m-th run of micro_batch_size * dp_size samples."""
    first = start + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(first, first + micro_batch_size)


def taken(
    there: Sequence[int],
    weights: Sequence[float],
    seq_length: int,
    limit_tokens: int | None,
    count: int | None,
    setting: str,
    stride: int | None = None,
) -> list[int]:
    """How many of its windows each text of a blend gives: `count` in all, or as many as `limit_tokens` hold, by weight; else all that are `there`.

    Raises RequestError, naming `setting`, where that is none, or less than `count`.
    """
    asked = limit_tokens if count is None else count
    if not any(there):
        raise refuse(setting, asked, f"the text is shorter than one sequence of {seq_length + 1} tokens")
    if count is not None:
        shares = apportion(count, weights)
        if any(wanted > of for wanted, of in zip(shares, there, strict=True)):
            needed = f", needed {' + '.join(map(str, shares))}" if len(there) > 1 else ""
            raise refuse(setting, count, f"the text holds {' + '.join(map(str, there))} sequences of {seq_length} tokens{needed}")
        return shares
    if limit_tokens is None:
        return list(there)
    if limit_tokens < seq_length:
        raise refuse(setting, limit_tokens, f"at least one sequence of {seq_length} tokens is needed")
    asked_of = apportion(windows_for(limit_tokens, len(there), seq_length, stride), weights)
    shares = [min(wanted, of) for wanted, of in zip(asked_of, there, strict=True)]
    if not any(shares):
        raise refuse(setting, limit_tokens, f"too few for a sequence of {seq_length} tokens of each text of the blend that is long enough")
    return shares


def apportion(count: int, weights: Sequence[float]) -> list[int]:
    """Whole shares of `count` in proportion to `weights`, summing to it; what rounding leaves goes to the largest remainders, the first first."""
    exact = count * np.array(weights, dtype=np.float64) / sum(weights)
    shares: np.ndarray = np.floor(exact).astype(int)
    for winner in np.argsort(shares - exact, kind="stable")[: count - int(shares.sum())]:
        shares[winner] += 1
    return [int(share) for share in shares]
