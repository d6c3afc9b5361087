"""Scores of the sharded model against activations recorded whole on a plain `transformers` model, at every layout."""

import itertools
import types

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minitron.checks import no_compiler
from minitron.engine.schedule import forward_only
from minitron.importance import aggregate, hooks
from minitron.importance.aggregate import AGGREGATIONS, finish_sequence, sequence_sums
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, expected_shapes, magnitude_scores
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.importance import AGGREGATE, Recorded, magnitudes
from tests.oracles.models import BIASES, NEMOTRON, UNTIED, same_tensors, save_model, tokens_of

# of each model, the aggregations (over samples, over tokens) that are compared
PAIRS = {"tied": [("l2", "mean")], "nemotron": [("l2", "mean")], "biases": list(itertools.product(AGGREGATIONS, AGGREGATIONS))}
LAYOUTS = [
    Layout(), Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=True), Layout(dp=2), Layout(pp=2), Layout(pp=4), Layout(tp=2, pp=2, sp=True),
    Layout(tp=2, dp=2), Layout(tp=3, sp=True), Layout(cp=2), Layout(cp=3), Layout(tp=2, cp=2), Layout(tp=2, cp=2, sp=True), Layout(pp=2, vpp=2),
]  # fmt: skip
SAMPLES, LENGTH, MICROBATCH = 12, 24, 6


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "tied": save_model(root / "tied", 1),
        "biases": save_model(root / "biases", 2, **BIASES, **UNTIED, num_key_value_heads=2, head_dim=10),
        "nemotron": save_model(root / "nemotron", 3, **NEMOTRON, **BIASES, hidden_size=50),
    }


@pytest.fixture(scope="module")
def samples():
    return tokens_of(61, SAMPLES, LENGTH)


@pytest.fixture(scope="module")
def expected(models, samples):
    """What `battery` must find."""
    scores = {}
    for name, folder in models.items():
        recorded = Recorded(folder, samples)
        scores |= {(name, *pair): recorded.scores(*pair) for pair in PAIRS[name]}
        scores[name, "magnitude"] = magnitudes(folder, recorded.config)
    return scores


def battery(world, models, samples):
    """Scores of every model under every pair of aggregations, and by magnitude."""
    found = {}
    mine = samples[world.dp_rank :: world.dp]
    for name, folder in models.items():
        model = load(open_folder(folder, "model.path"), world, torch.float32)
        for batch_agg, seq_agg in PAIRS[name]:
            probes = Probes(model, world, seq_agg, batch_agg, LENGTH)
            with probes.attached():
                forward_only(model, mine.split(MICROBATCH), world, watch=probes)
            found[name, batch_agg, seq_agg] = collect(probes, world)
        found[name, "magnitude"] = magnitude_scores(model, world)
    return found


def wrong(found, expected):
    """The largest relative error of each tensor that is off by more than 1e-5, or is missing."""
    errors = {}
    for name in found.keys() | expected.keys():
        one, other = found.get(name), expected.get(name)
        relative = np.inf if one is None or other is None else np.abs(one.numpy() / other - 1).max()
        if not relative < 1e-5:
            errors[name] = relative
    return errors


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scores_are_those_of_the_recorded_activations(layout, models, samples, expected):
    first, *others = on_ranks(battery, layout, models, samples)
    assert first.keys() == expected.keys()
    assert {key: errors for key in expected if (errors := wrong(first[key], expected[key]))} == {}
    assert all(same_tensors(found[key], first[key]) for found in others for key in expected)


def collectives(world, folder, samples):
    """How many collectives the probes of one microbatch take, beside those of the pass itself."""
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    count = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hooks, "dist", types.SimpleNamespace(all_reduce=lambda tensor, group: count.append(1) or dist.all_reduce(tensor, group=group)))
        probes = Probes(model, world, "mean", "l2", LENGTH)
        with probes.attached():
            forward_only(model, samples[:4].split(2), world, watch=probes)
    return len(count)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("layout", "each"),
    [(Layout(tp=2), 0), (Layout(dp=2), 0), (Layout(tp=2, sp=True), 1), (Layout(cp=2), 1), (Layout(tp=2, cp=2, sp=True), 1), (Layout(pp=2, vpp=2), 0)],
    ids=str,
)
def test_a_microbatch_takes_one_packed_reduction_or_none(layout, each, models, samples):
    assert on_ranks(collectives, layout, models["tied"], samples) == [2 * each] * layout.size


def test_shapes_and_types_are_those_that_a_score_file_must_have(models, samples, alone):
    for name, folder in models.items():
        shapes = expected_shapes(open_folder(folder, "model.path").arch)
        found = battery(alone, {name: folder}, samples[:3])
        for scores in found.values():
            assert {key: tuple(score.shape) for key, score in scores.items()} == shapes
            assert {score.dtype for score in scores.values()} == {torch.float32}


@pytest.mark.parametrize("seq_agg", AGGREGATIONS)
def test_aggregates_of_channels_whose_mean_outweighs_their_spread(seq_agg):
    """Outlier channels of real models stay near one large value: a variance from sums of fp32 squares would be mostly rounding."""
    values = 10 + torch.randn(256, 3, 5, generator=torch.Generator().manual_seed(0))
    found = finish_sequence(sequence_sums(values, seq_agg), seq_agg, 256)
    error = np.abs(found.numpy() / AGGREGATE[seq_agg](values.double().numpy(), 0) - 1).max()
    assert error < 1e-5


def test_hooks_are_gone_after_the_block_even_if_it_fails(models, alone):
    model = load(open_folder(models["tied"], "model.path"), alone, torch.float32)
    hooks = [module._forward_hooks for module in model.modules()]
    with pytest.raises(ZeroDivisionError), Probes(model, alone, "mean", "l2", LENGTH).attached():
        assert any(hooks)
        1 / 0  # noqa: B018
    assert not any(hooks)


def test_activations_in_bf16_are_summed_in_fp32(models, samples, expected, alone):
    """A running sum in bf16 would stop growing after 256 equal terms; this one stays as near as bf16 activations allow."""
    model = load(open_folder(models["biases"], "model.path"), alone, torch.bfloat16)
    probes = Probes(model, alone, "mean", "mean", LENGTH)
    with probes.attached():
        for _ in range(40):
            forward_only(model, [samples], alone, watch=probes)
    for name, score in collect(probes, alone).items():
        assert np.abs(score.numpy() / expected["biases", "mean", "mean"][name] - 1).mean() < 0.05, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("seq_agg", AGGREGATIONS)
def test_activations_that_are_read_in_blocks_give_the_same_sums(seq_agg, dtype, monkeypatch):
    values = torch.randn(11, 2, 6).to(dtype)
    blocks = {}
    for size in (12, 25, 10**6):  # of one row, of two with one over, of all
        monkeypatch.setattr(aggregate, "SMALL", 0)
        monkeypatch.setattr(aggregate, "BLOCK", size)
        blocks[len(aggregate.in_blocks(values))] = sequence_sums(values, seq_agg)
    assert set(blocks) == {11, 6, 1}
    for found in blocks.values():
        torch.testing.assert_close(found, blocks[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 11, 24, 32])
@pytest.mark.parametrize("seq_agg", AGGREGATIONS)
def test_sums_as_compiled_kernels_take_them_are_the_same(seq_agg, tokens, monkeypatch):
    values = torch.randn(tokens, 2, 6)
    eager = sequence_sums(values, seq_agg)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(sequence_sums(values, seq_agg), eager, rtol=1e-6, atol=1e-6)


def test_compiled_hooks_find_the_same_scores(models, samples, expected, alone):
    if no_compiler("cpu"):
        pytest.skip("no C++ compiler")
    model = load(open_folder(models["tied"], "model.path"), alone, torch.float32)
    probes = Probes(model, alone, "mean", "l2", LENGTH, compiled=True)
    with probes.attached():
        forward_only(model, samples.split(MICROBATCH), alone, watch=probes)
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 3
    found, reference = collect(probes, alone), expected["tied", "l2", "mean"]
    assert wrong(found, {name: reference[name] for name in found}) == {}
