"""Which sizes a grid has, and which of its points are no model."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron.arch.families import from_hf
from minitron.config.schema import Parallel, Search, Target
from minitron.errors import RequestError
from minitron.pruning.target import target_arch
from minitron.search.candidates import SIZES
from minitron.search.grid import axes, dominated, impossible, ladder, points
from tests.oracles.published import CONFIGS

SMOLLM2 = CONFIGS["SmolLM2-135M"]
SMOL = from_hf(SMOLLM2, "x")


@pytest.mark.parametrize(
    ("full", "least", "step", "most", "sizes"),
    [
        (30, 27, 1, 9, [30, 29, 28, 27]),
        (576, 288, 64, 9, [576, 512, 448, 384, 320]),
        (4096, 2048, 64, 9, [4096, 3840, 3584, 3328, 3072, 2816, 2560, 2304, 2048]),
        (4096, 2048, 64, 8, [4096, 3584, 3072, 2560, 2048]),
        (600, 300, 128, 9, [600, 512, 384]),  # the model's own size is always there
        (64, 32, 128, 9, [64]),
        (96, 84, 1, 2, [96, 88]),
    ],
)
def test_a_grid_of_its_own(full, least, step, most, sizes):
    assert ladder(full, least, step, most) == sizes


def test_axes_are_those_given_or_the_models_own():
    assert axes(SMOL, Search(), Parallel()) == {
        "num_layers": [30, 29, 28, 27], "hidden_size": [576, 512, 448, 384, 320],
        "ffn_hidden_size": [1536, 1408, 1280, 1152, 1024, 896, 768], "num_attention_heads": [9], "num_query_groups": [3],
    }  # fmt: skip
    assert axes(SMOL, Search(num_layers=[20, 24, 20], hidden_size=[500]), Parallel())["num_layers"] == [24, 20]
    assert axes(from_hf(CONFIGS["Llama-3.1-8B"], "x"), Search(), Parallel(tp=3))["ffn_hidden_size"] == [14336, 13824, 12288, 10752, 9216, 7680]


def test_neurons_by_width_and_heads_by_groups():
    found = points(SMOL, Search(num_layers=[30], hidden_size=[576, 512], ffn_expansion=[2, 2.5, 2.51], num_query_groups=[1, 2]), Parallel())
    # 2.5 x 576 = 1440 lies between 1408 and 1536
    expected = {(30, hidden, ffn, 3 * groups, groups) for hidden, ffn in [(576, 1152), (576, 1408), (512, 1024), (512, 1280)] for groups in (1, 2)}
    assert {tuple(map(int, point)) for point in found} == expected
    assert len(found) == len(expected)


@pytest.mark.parametrize(("name", "given", "most"), [("num_layers", [31, 20], 30), ("hidden_size", [577], 576), ("num_query_groups", [4], 3)])
def test_a_size_larger_than_the_models_is_refused(name, given, most):
    with pytest.raises(RequestError, match=rf"search.{name}=\[{given[0]}.*\]: the model has {most}: pruning can only make it smaller"):
        points(SMOL, Search(**{name: given}), Parallel())


@given(
    sizes=st.tuples(*[st.lists(st.integers(1, most), min_size=1, max_size=3, unique=True) for most in (4, 24, 30, 12, 6)]),
    tp=st.sampled_from([1, 2, 3]), pp=st.integers(1, 3), biases=st.booleans(),
)  # fmt: skip
def test_points_that_are_no_model_are_those_that_a_target_is_refused_for(sizes, tp, pp, biases):
    config = {**SMOLLM2, "num_hidden_layers": 4, "hidden_size": 24, "intermediate_size": 30, "num_attention_heads": 12, "num_key_value_heads": 6}
    arch, parallel = from_hf({**config, "head_dim": 8, "attention_bias": biases, "mlp_bias": biases}, "x"), Parallel(tp=tp, pp=pp)
    found = points(arch, Search(**dict(zip(SIZES, sizes, strict=True))), parallel)
    assert sorted(map(tuple, found.tolist())) == sorted(itertools.product(*sizes))
    faulty = np.logical_or.reduce([mask for _, mask in impossible(arch, found, parallel).values()])
    for point, fault in zip(found.tolist(), faulty, strict=True):
        try:
            possible = target_arch(arch, Target(**dict(zip(SIZES, point, strict=True))), parallel) != arch
        except RequestError:
            possible = False
        assert possible == (not fault), point


@given(st.lists(st.tuples(*[st.integers(1, 4)] * len(SIZES)), min_size=1, max_size=30, unique=True))
def test_dominated_means_that_another_is_nowhere_smaller(chosen):
    expected = [any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in chosen) for one in chosen]
    assert dominated(np.array(chosen)).tolist() == expected


def test_experts_have_no_mlp_to_cut():
    mixed = from_hf(CONFIGS["Qwen3-30B-A3B"], "x")
    assert axes(mixed, Search(), Parallel())["ffn_hidden_size"] == [mixed.ffn_hidden_size]
    with pytest.raises(RequestError, match=r"search.ffn_hidden_size=\[512\]: must be null: every block has experts"):
        axes(mixed, Search(ffn_hidden_size=[512]), Parallel())
    with pytest.raises(RequestError, match=r"search.ffn_expansion=\[2.0\]: must be null"):
        axes(mixed, Search(ffn_expansion=[2.0]), Parallel())
    dense = mixed.replace(moe_layers=(True,) * 47 + (False,))
    assert len(axes(dense, Search(), Parallel())["ffn_hidden_size"]) > 1
