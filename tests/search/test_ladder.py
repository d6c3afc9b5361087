"""Who goes on from a rung, and when the order has settled, against definitions written out."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.config.schema import Config, Search, Train
from minitron.errors import RequestError
from minitron.search.candidates import Rung
from minitron.search.ladder import has_settled, kendall_tau, mean_losses, ranking, survivors, tau_between_seeds, trial

LOSSES = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(0, 5).map(float), max_size=8)


def rung(order, steps=1, stayed=2):
    """A rung on which these are in this order."""
    return Rung(steps, steps, {name: [float(place)] for place, name in enumerate(order)}, [*order[:stayed]])


def test_the_least_loss_comes_first_and_what_is_no_number_last():
    losses = {"a": 2.0, "b": math.nan, "c": 1.0, "d": math.inf, "e": 2.0}
    assert ranking(Rung(1, 1, {name: [loss] for name, loss in losses.items()})) == ["c", "a", "e", "b", "d"]


def test_the_loss_is_the_mean_over_the_seeds():
    assert mean_losses(Rung(1, 1, {"a": [1.0, 3.0], "b": [2.5], "c": []})) == {"a": 2.0, "b": 2.5}


@given(st.integers(1, 200), st.integers(1, 100))
def test_a_share_goes_on_and_two_at_least(count, percent):
    kept = survivors(count, percent / 100)
    assert kept == min(count, max(2, -(-count * percent // 100)))


@given(LOSSES, LOSSES)
def test_kendall_tau_counts_pairs(one, other):
    """tau-b by its definition, over every ordered pair."""
    both = sorted({*one} & {*other})
    concordant = discordant = here = there = 0
    for a, b in itertools.permutations(both, 2):
        product = (one[a] - one[b]) * (other[a] - other[b])
        concordant, discordant = concordant + (product > 0), discordant + (product < 0)
        here, there = here + (one[a] != one[b]), there + (other[a] != other[b])
    tau = kendall_tau(one, other)
    if not here or not there:
        assert tau is None
    else:
        assert tau == pytest.approx((concordant - discordant) / math.sqrt(here * there))


def test_tau_is_1_of_the_same_order_and_minus_1_of_the_opposite():
    order = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert kendall_tau(order, {name: loss**2 for name, loss in order.items()}) == 1.0
    assert kendall_tau(order, {name: -loss for name, loss in order.items()}) == -1.0
    assert kendall_tau(order, {"a": 2.0, "b": 1.0, "c": 3.0}) == pytest.approx(1 / 3)


def test_between_seeds_it_is_the_mean_over_their_pairs():
    seeds = [(1.0, 2.0, 3.0), (1.0, 3.0, 2.0), (3.0, 2.0, 1.0)]
    losses = dict(zip("abc", map(list, zip(*seeds, strict=True)), strict=True))
    assert tau_between_seeds(losses) == pytest.approx((1 / 3 - 1 - 1 / 3) / 3)
    assert tau_between_seeds({name: values[:1] for name, values in losses.items()}) is None


@pytest.mark.parametrize(
    ("orders", "times", "settled"),
    [
        (["abcd", "abcd"], 2, True),
        (["abcd", "bacd"], 2, False),
        (["abdc", "abcd"], 2, False),  # of those that go out, too
        (["acbd", "ab"], 2, True),  # of those that came so far
        (["ab"], 2, False),
        (["ab"], 1, True),
        (["bacd", "abcd", "abcd"], 2, True),
        (["bacd", "abcd", "abcd"], 3, False),
        (["ab", "ab", "ab"], 0, False),
    ],
)
def test_the_order_has_settled(orders, times, settled):
    rungs = [rung(orders[0], steps=0), *(rung(order, steps) for steps, order in enumerate(orders, start=1))]
    assert has_settled(rungs, times) == settled


def test_a_candidate_trains_to_the_last_rung_and_each_seed_on_another_order():
    cfg = Config(search=Search(rungs=[5, 20]), train=Train(steps=700), seed=7)
    assert [(trial(cfg, number).seed, trial(cfg, number).train) for number in (0, 2)] == [(7, Train(steps=20)), (9, Train(steps=20))]
    with pytest.raises(RequestError, match=r"^train\.decay_steps=300: 1 to 20 steps"):
        trial(Config(search=Search(rungs=[5, 20]), train=Train(steps=700, schedule="wsd", decay_steps=300, warmup_steps=0)))
