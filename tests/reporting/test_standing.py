"""What a search says as rows, against values worked out by hand."""

import dataclasses
import math

import pytest

from minitron.reporting import standing
from minitron.search.candidates import Candidate, Results, Rung
from tests.reporting.searches import ORIGINAL, search

SIZES = {"num_layers": 30, "hidden_size": 576, "ffn_hidden_size": 1536, "num_attention_heads": 9, "num_query_groups": 3}


def results(rungs, chosen=None, names="abcd", **others):
    candidates = [Candidate(name, {**SIZES, "num_layers": 30 - at}, {"params": 100 - at}) for at, name in enumerate(names)]
    return Results(ORIGINAL, {"params": 90}, 9, {"too large": 5, "too small": 0}, candidates, rungs, chosen, **others)


ZERO = Rung(0, 0, {"a": [5.0, 7.0], "b": [4.0, 5.0], "c": [9.0, 9.0], "d": [math.nan, 1.0]}, ["b", "a", "c"])
FIRST = Rung(10, 100, {"b": [3.0, 3.2], "a": [2.0, 3.0], "c": [4.0, 4.0]}, ["a", "b"], tau=1 / 3, seed_tau=1.0)
SECOND = Rung(30, 300, {"a": [1.5, 2.0], "b": [1.4, 1.9]}, ["b", "a"], tau=-1.0, seed_tau=1.0)


def test_the_order_is_by_how_far_each_came_then_by_its_loss_there():
    found = standing.standings(results([ZERO, FIRST, SECOND], "b"))
    assert [(one.name, one.ranks, one.fell, one.chosen) for one in found] == [
        ("b", (1, 2, 1), None, True),
        ("a", (2, 1, 2), None, False),
        ("c", (3, 3, None), 1, False),
        ("d", (4, None, None), 0, False),
    ]
    assert found[1].losses == (6.0, 2.5, 1.75) and found[2].losses == (9.0, 4.0, None) and found[2].loss == 4.0
    assert [standing.outcome(results([ZERO, FIRST, SECOND], "b"), one) for one in found] == [
        "chosen", "stayed to the end", "out after 10 steps", "out before training",
    ]  # fmt: skip


def test_the_chosen_one_is_first_whatever_it_lost():
    assert standing.standings(results([ZERO, FIRST, SECOND], "a"))[0].name == "a"


def test_nobody_is_out_of_a_rung_that_is_under_way():
    under_way = results([ZERO, Rung(10, 100, {"c": [1.0, 1.0]})])
    found = standing.standings(under_way)
    assert [(one.name, standing.outcome(under_way, one)) for one in found] == [("c", "in"), ("b", "in"), ("a", "in"), ("d", "out before training")]
    assert standing.best_so_far(under_way).name == "b"  # of the last rung that all were on
    nothing = results([])
    assert standing.best_so_far(nothing) is None and {standing.outcome(nothing, one) for one in standing.standings(nothing)} == {"waits"}
    assert standing.told(nothing) == [("grid", "4 candidates of 9 points of the grid; the others: too large: 5")]
    assert standing.best_so_far(results([Rung(0, 0, {"c": [2.0], "a": [3.0]})])).name == "c"


def test_what_is_told_of_a_search():
    assert standing.told(results([ZERO, FIRST, SECOND], "b", settled=True)) == [
        ("chosen", "b: layers 29, 99 params"),
        ("its rank", "1 of 4 before training, 2 of 3 after 10 steps, 1 of 2 after 30 steps"),
        ("order", "Kendall's tau 0.33, -1.00 with the rung before; 1.00, 1.00 between seeds; the order of the last ones had settled"),
        ("cost", "140 steps in 0:00:00, 78 % of the steps that all of them would take that far"),  # 2 seeds: (30 + 30 + 10) and 3 * 30
        ("grid", "4 candidates of 9 points of the grid; the others: too large: 5"),
    ]


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(1, 3), (2, 2), (3, 1)], [0, 1, 2]),
        ([(3, 1), (1, 3), (2, 4)], [1, 0]),
        ([(1, 1), (2, 1), (1, 2)], [0]),
        ([(1, 2), (1, 1), (1, 1)], [1]),
        ([], []),
        ([(1, math.nan), (2, math.inf), (3, 5)], [2]),
    ],
)
def test_the_front_is_of_those_that_no_other_one_beats_in_both(points, expected):
    assert standing.front(points) == expected


def test_only_sizes_that_differ_are_told_beside_the_others():
    assert standing.varied(results([])) == ["num_layers"]
    assert standing.unvaried(results([])) == "Every candidate keeps hidden 576, MLP 1,536, heads 9, KV groups 3."
    assert standing.unvaried(search()) == "Every candidate keeps KV groups 3."
    assert standing.unvaried(results([], names="")) == ""


def test_the_costs_are_those_that_were_counted_and_active_parameters_only_where_they_are_fewer():
    found = search()
    assert standing.costs_of(found) == ["params", "non_embedding_params", "memory_gb", "gflops_per_token", "latency_ms"]
    assert standing.costs_bound(dataclasses.replace(found, settings={"latency_ms": 50.0, "memory_gb": None})) == ["params", "latency_ms"]
    sparse = [dataclasses.replace(one, costs={"params": 9.0, "active_params": 3.0}) for one in found.candidates[:2]]
    assert standing.costs_of(dataclasses.replace(found, candidates=sparse)) == ["params", "active_params"]
