"""Which architectures are within a budget, held against counting every single one."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.arch.counts import costs
from minitron.arch.families import from_hf
from minitron.config.schema import BUDGETS, TARGETS, Parallel, Search, Target
from minitron.errors import RequestError
from minitron.search.budget import WORDS, check_free, find, told
from minitron.search.candidates import SIZES
from tests.arch.test_counts import model_of
from tests.oracles.published import CONFIGS

SMOLLM2 = CONFIGS["SmolLM2-135M"]
SMOL = from_hf(SMOLLM2, "x")
MODEL = from_hf({**SMOLLM2, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "head_dim": 8,
                 "intermediate_size": 96, "vocab_size": 40, "tie_word_embeddings": False}, "x")  # fmt: skip


def sizes_of(arch):
    return tuple(getattr(arch, name) for name in SIZES)


def excess(name, cost, search):
    """By what share a cost misses its budget."""
    budget = getattr(search, name)
    return max(0.0, abs(cost / budget - 1) - search.tolerance if name in TARGETS else cost / budget - 1)


def test_every_budget_has_words():
    assert {*WORDS} == {*BUDGETS}


@given(
    grid=st.tuples(*[st.lists(st.sampled_from(sizes), min_size=1, max_size=4, unique=True)
                     for sizes in ([3, 4, 5, 6], [16, 32, 40, 64], [32, 50, 64, 96], [4, 8], [4])]),
    budgets=st.dictionaries(st.sampled_from(BUDGETS[:-1]), st.floats(0.3, 1.2), min_size=1, max_size=3),
    tolerance=st.sampled_from([0.0, 0.05, 0.3]), keep=st.booleans(), dtype=st.sampled_from(["bf16", "fp32"]), batch=st.integers(1, 9),
)  # fmt: skip
def test_candidates_are_those_that_counting_each_finds(grid, budgets, tolerance, keep, dtype, batch):
    own = costs(MODEL, batch, 100, 2)
    settings = {"tolerance": tolerance, "keep_dominated": keep, "batch_size": batch, "seq_length": 100, "max_candidates": 999}
    search = Search(**dict(zip(SIZES, grid, strict=True)), **{name: share * own[name] for name, share in budgets.items()}, **settings)
    every = [MODEL.replace(**dict(zip(SIZES, point, strict=True))) for point in itertools.product(*grid)]
    every = [arch for arch in every if arch != MODEL]
    counted = {sizes_of(arch): costs(arch, batch, 100, {"bf16": 2, "fp32": 4}[dtype]) for arch in every}
    misses = {point: {name: excess(name, cost[name], search) for name in budgets} for point, cost in counted.items()}
    inside = [point for point, miss in misses.items() if not any(miss.values())]
    best = [one for one in inside if keep or not any(one != other and all(a <= b for a, b in zip(one, other, strict=True)) for other in inside)]
    try:
        found = find(MODEL, search, Parallel(), dtype)
    except RequestError as error:
        assert not best
        if every:
            nearest = min(misses.values(), key=lambda miss: (max(miss.values()), sum(miss.values())))
            worst = max(nearest, key=lambda name: nearest[name])
            named = str(error).split("=")[0]
            # several may be equally near, and one may miss two budgets by the same share
            assert nearest[named.removeprefix("search.")] == pytest.approx(nearest[worst])
        return
    assert {tuple(candidate.sizes[name] for name in SIZES) for candidate in found.candidates} == {*best}
    for candidate in found.candidates:
        assert candidate.costs == counted[tuple(candidate.sizes.values())]
    assert sum(found.fell.values()) + len(best) == found.grid == math.prod(map(len, grid))
    assert [one.costs["params"] for one in found.candidates] == sorted((one.costs["params"] for one in found.candidates), reverse=True)
    assert len({one.name for one in found.candidates}) == len(best)


def test_a_candidate_asks_for_its_own_sizes():
    found = find(SMOL, Search(params=100e6), Parallel(), "bf16")
    first = found.candidates[0]
    assert (first.name, first.sizes) == ("L27-H512-F1408-A9-G3", dict(zip(SIZES, (27, 512, 1408, 9, 3), strict=True)))
    target = first.target(Target(layers_by="loss", merge_heads=True))
    assert (target.num_layers, target.hidden_size, target.ffn_hidden_size, target.layers_by) == (27, 512, 1408, "loss")
    config = {**SMOLLM2, "num_hidden_layers": 27, "hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "model_type": "mistral"}
    assert first.costs["params"] == model_of({**config, "sliding_window": None}).num_parameters()
    assert found.fell == {"the model itself": 1, "parameters above 105.00 M": 26, "parameters below 95.00 M": 95, "dominated": 12}
    assert told(found.fell).startswith("95 parameters below 95.00 M, 26 ")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"params": 20e6},
            "search.params=20000000: no architecture of the grid comes within 5 %: the nearest, num_layers=27, hidden_size=320, "
            "ffn_hidden_size=768, num_attention_heads=9, num_query_groups=3, has 48.92 M, 145 % more; a smaller "
            "search.hidden_multiple_of=64 or search.ffn_multiple_of=128, or a larger search.values=9, makes the grid finer; a list such as "
            "search.hidden_size=[...] makes it wider",
        ),
        (
            {"params": 100e6, "memory_gb": 0.1},
            "search.memory_gb=0.1: no architecture of the grid is within it and meets the other budgets: the nearest, num_layers=27, "
            "hidden_size=320, ffn_hidden_size=768, num_attention_heads=9, num_query_groups=3, has 0.183 GB, 82.8 % more "
            "(search.params=100000000: 48.92 M, 51.1 % less); a smaller search.hidden_multiple_of=64 or search.ffn_multiple_of=128, or a larger "
            "search.values=9, makes the grid finer; a list such as search.hidden_size=[...] makes it wider",
        ),
        (
            {"params": 101e6, "tolerance": 0.0, "hidden_size": [512]},
            "search.params=101000000: no architecture of the grid comes within 0 %: the nearest, num_layers=30, hidden_size=512, "
            "ffn_hidden_size=1152, num_attention_heads=9, num_query_groups=3, has 101.87 M, 0.866 % more; a smaller search.ffn_multiple_of=128, or "
            "a larger search.values=9, makes the grid finer; a larger search.tolerance=0 takes more of it",
        ),
        ({"params": 300e6}, "search.params=300000000: the model itself has 134.52 M: pruning can only make it smaller"),
        (
            {"params": 120e6, "active_params": 100e6},
            "search.params=120000000: contradicts search.active_params=100000000: in a model without experts all parameters are active",
        ),
        (
            {"params": 100e6, "max_candidates": 4},
            "search.max_candidates=4: 6 candidates are left, more than that: fewer are left with shorter lists for search.ffn_hidden_size (now 6 "
            "sizes), search.num_layers (now 3 sizes), search.hidden_size (now 3 sizes), search.values below 9, search.tolerance below 0.05; or raise "
            "search.max_candidates",
        ),
        (
            {"params": 100e6, "num_attention_heads": [4, 5]},
            "search.num_attention_heads=[4, 5]: no architecture of the grid is possible: 280 query heads that are no multiple of the KV groups",
        ),
        ({"latency_ms": 3.0}, "search.latency_ms=3.0: latency is measured by minitron search"),
    ],
)
def test_budgets_that_cannot_be_met(settings, said):
    with pytest.raises(RequestError) as refused:
        find(SMOL, Search(**settings), Parallel(), "bf16")
    assert str(refused.value) == said


def test_latency_is_asked_of_what_is_within_the_other_budgets():
    asked = []

    def measure(archs):
        asked.extend(archs)
        return [float(arch.num_layers) for arch in archs]

    search = Search(params=100e6, latency_ms=28.0, keep_dominated=True)
    found = find(SMOL, search, Parallel(), "bf16", measure)
    assert len(asked) == 18
    assert {candidate.costs["latency_ms"] for candidate in found.candidates} == {27.0, 28.0}
    assert found.fell["latency above 28 ms"] == 18 - len(found.candidates) > 0
    with pytest.raises(
        RequestError, match=r"search.latency_ms=5: .* meets the other budgets: the nearest, num_layers=27, .* has 27 ms, 440 % more \(se"
    ):
        find(SMOL, Search(params=100e6, latency_ms=5.0), Parallel(), "bf16", measure)


def test_sizes_beside_a_budget():
    with pytest.raises(RequestError, match=r"target.hidden_size=512: must be null with search.params, which looks .*; search.hidden_size takes"):
        check_free(Target(hidden_size=512), Search(params=1e8))
    check_free(Target(layers_by="loss"), Search(params=1e8))


@pytest.mark.parametrize(
    ("recipe", "published"), [("nemotron4_15b_search_8b", (32, 4096, 16384, 48)), ("nemotron4_15b_search_4b", (32, 3072, 9216, 24))]
)
def test_the_papers_search_spaces(recipe, published):
    """arXiv 2407.14679, Table 12: 18 architectures within 5 % in either space by this count, 15 and 18 by the paper's (docs/results.md)."""
    from minitron.config.compose import compose

    cfg = compose("plan", [f"recipe={recipe}"])
    assert from_hf(cfg.model.shape, "x") == from_hf(CONFIGS["Nemotron-4 15B"], "x")
    found = find(from_hf(cfg.model.shape, "x"), cfg.search, cfg.parallel, cfg.dtype)
    heads = cfg.search.num_attention_heads
    expected = {}
    for layers, hidden, expansion, count in itertools.product(range(29, 33), cfg.search.hidden_size, (2.5, 3, 3.5, 4), heads):
        ffn = int(expansion * hidden)
        block = 2 * count * 128 * hidden + 2 * 8 * 128 * hidden + 2 * hidden * ffn + 2 * 2 * hidden  # two norms with a weight and a bias each
        total = 2 * 256000 * hidden + layers * block + 2 * hidden
        if abs(total - cfg.search.params) <= 0.05 * cfg.search.params:
            expected[(layers, hidden, ffn, count, 8)] = total
    assert {tuple(one.sizes.values()): one.costs["params"] for one in found.candidates} == expected
    assert len(expected) == 18
    assert (*published, 8) in expected
    assert found.grid == {8e9: 160, 4e9: 240}[cfg.search.params]
