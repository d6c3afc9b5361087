"""Holding out: nothing lost, both sides served, and decided by seed and number alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from minitron.data.holdout import draw, hold_out


def documents(count: int, length: int = 3) -> list[np.ndarray]:
    return [np.arange(length) + 100 * number for number in range(count)]


@settings(deadline=None)
@given(count=st.integers(1, 60), fraction=st.floats(0.01, 0.5), seed=st.integers(0, 10**6), length=st.integers(2, 50))
def test_both_sides_get_something_and_nothing_is_lost(count: int, fraction: float, seed: int, length: int) -> None:
    made = list(hold_out(documents(count, length), fraction, seed))
    assert {held for held, _ in made} == {True, False}
    assert np.array_equal(np.concatenate([tokens for _, tokens in made]), np.concatenate(documents(count, length)))
    assert len(made) == max(count, 2)


@settings(deadline=None)
@given(fraction=st.floats(0.05, 0.5), seed=st.integers(0, 10**6))
def test_more_documents_change_no_earlier_choice(fraction: float, seed: int) -> None:
    few, many = ([held for held, _ in hold_out(documents(count), fraction, seed)] for count in (300, 400))
    assert many[:300] == few


def test_share_is_the_fraction() -> None:
    held = sum(held for held, _ in hold_out(documents(20000), 0.05, 3))
    assert abs(held - 1000) < 5 * np.sqrt(20000 * 0.05 * 0.95)


def test_draws_are_fixed_for_all_time() -> None:
    # computed with `b2sum -l 64` of the strings 0:0 and 1234:7, shifted to 53 bits
    assert draw(0, 0) == (int("d56c9c7e6769d062", 16) >> 11) / 2**53
    assert draw(1234, 7) == (int("5158f79177c49ba9", 16) >> 11) / 2**53


def test_single_document_is_cut_near_its_end() -> None:
    (kept, first), (held, second) = hold_out([np.arange(100)], 0.05, 0)
    assert (kept, held, len(first), len(second)) == (False, True, 95, 5)


def test_no_document_stays_none() -> None:
    assert list(hold_out([], 0.1, 0)) == []
