"""Holding out: nothing lost, every side served, and decided by seed and number alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.data.holdout import draw, hold_out, stretches


def sides_of(count: int, seed: int, valid: float | None = None, calibration: float | None = None, length: int = 3) -> np.ndarray:
    lengths = np.full(count, length, np.int32)
    return hold_out(lengths, np.zeros_like(lengths), [*stretches(valid, calibration).values()], seed)[2]


@settings(deadline=None)
@given(
    count=st.integers(1, 60), valid=st.none() | st.floats(0.01, 0.5), calibration=st.none() | st.floats(0.01, 0.25), seed=st.integers(0, 10**6),
    length=st.integers(3, 50), data=st.data(),
)  # fmt: skip
def test_every_side_gets_something_and_nothing_is_lost(count, valid, calibration, seed, length, data) -> None:
    owned = stretches(valid, calibration)
    lengths = np.array(data.draw(st.lists(st.integers(3, length), min_size=count, max_size=count)), np.int32)
    prompts = lengths // 2
    pieces, of_prompts, sides = hold_out(lengths, prompts, [*owned.values()], seed)
    assert {*sides.tolist()} == {*range(len(owned))}
    assert (pieces > 0).all() and len(pieces) == len(of_prompts) == len(sides) == (count if count >= len(owned) else count * len(owned))
    # a piece is a run of a document's tokens, the documents in their order, and a token that was a prompt's is one still
    assert set(np.cumsum(lengths)) <= set(np.cumsum(pieces)) and pieces.sum() == lengths.sum()
    marks, again = ([np.arange(n) < p for n, p in zip(*pair, strict=True)] for pair in ((lengths, prompts), (pieces, of_prompts)))
    assert np.array_equal(np.concatenate(marks), np.concatenate(again))


@settings(deadline=None)
@given(fraction=st.floats(0.05, 0.5), seed=st.integers(0, 10**6))
def test_more_documents_change_no_earlier_choice(fraction: float, seed: int) -> None:
    few, many = (sides_of(count, seed, fraction, 0.1) for count in (300, 400))
    assert np.array_equal(many[:300], few)


@given(valid=st.floats(0.01, 0.5), calibration=st.floats(0.01, 0.25), seed=st.integers(0, 10**6))
def test_neither_held_out_side_changes_with_the_other(valid: float, calibration: float, seed: int) -> None:
    both = sides_of(400, seed, valid, calibration)
    draws = np.array([draw(seed, number) for number in range(400)])
    for side, chosen in ((1, draws < valid), (2, draws >= 1 - calibration)):
        if chosen.any():  # else the nearest one changes over
            assert np.array_equal(both == side, chosen)


def test_shares_are_the_fractions() -> None:
    counts = np.bincount(sides_of(20000, 3, 0.05, 0.1))
    for side, share in enumerate((0.85, 0.05, 0.1)):
        assert abs(counts[side] - 20000 * share) < 5 * np.sqrt(20000 * share * (1 - share))


def test_draws_are_fixed_for_all_time() -> None:
    # computed with `b2sum -l 64` of the strings 0:0 and 1234:7, shifted to 53 bits
    assert draw(0, 0) == (int("d56c9c7e6769d062", 16) >> 11) / 2**53
    assert draw(1234, 7) == (int("5158f79177c49ba9", 16) >> 11) / 2**53


@pytest.mark.parametrize(
    ("calibration", "pieces", "sides"), [(None, [95, 5], [0, 1]), (0.25, [25, 70, 5], [2, 0, 1])], ids=["two sides", "three sides"]
)
def test_single_document_is_cut(calibration: float | None, pieces: list[int], sides: list[int]) -> None:
    found = hold_out(np.array([100]), np.array([40]), [*stretches(0.05, calibration).values()], 0)
    assert [part.tolist() for part in found] == [pieces, [40, 0] if calibration is None else [25, 15, 0], sides]


def test_no_document_and_too_short_a_one_stay_as_they_are() -> None:
    assert len(sides_of(0, 1, 0.1)) == 0
    assert sides_of(1, 1, 0.1, 0.1, length=2).shape == (1,)
