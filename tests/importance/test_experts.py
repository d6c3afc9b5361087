"""Scores of experts where replicas that share them have different numbers of samples, by weight magnitude, and of experts that no token chose."""

import numpy as np
import pytest
import torch

from minitron.engine.judging import Judged, judge, write_greedily
from minitron.engine.probing import Scored, losses_without
from minitron.engine.schedule import forward_only, in_passes
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, expected_shapes, magnitude_scores, random_scores
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.experts import MODELS, magnitudes_of_experts, save_experts
from tests.oracles.importance import Recorded
from tests.oracles.models import same_tensors, tokens_of

SAMPLES, LENGTH = 5, 12


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_experts(root / name, name, seed) for seed, name in enumerate(MODELS)}


def measured(world, folders):
    """Of every model the scores by activations and by magnitude; of the last what texts lose without a layer, how likely endings are, and what is
    written. The first replica has a microbatch more than the second, or a longer one."""
    found = {}
    samples = tokens_of(61, SAMPLES, LENGTH)
    for name, folder in folders.items():
        model = load(open_folder(folder, "model.path"), world, torch.float32)
        probes = Probes(model, world, "mean", "l2", LENGTH)
        with probes.attached():
            for group in in_passes(samples[world.dp_rank :: world.dp].split(2), world, lambda tokens_BS: tokens_BS.shape):
                forward_only(model, group, world, watch=probes)
        found[name, "activation"] = collect(probes, world)
        found[name, "magnitude"] = magnitude_scores(model, world)
    batches, asked = [], []
    for number, length in enumerate((12, 8, 4)):
        tokens_BT, rows = tokens_of(61, 1, length + 1, number), torch.tensor([number])
        batches.append(Scored(tokens_BT, torch.ones(1, length, dtype=torch.bool), rows))
        asked.append(Judged(tokens_BT[:, :-1], torch.tensor([0]), torch.tensor([length - 1]), tokens_BT[0, -1:], rows))
    mine = slice(world.dp_rank, None, world.dp)
    losses, _ = losses_without(model, batches[mine], world, [range(0, 1), range(1, 3)], 3)
    likely, _ = judge(model, asked[mine], world, 3)
    prompts = [[5, 6, 7], [8, 9], [10, 11, 12, 13, 14]]
    written = write_greedily(model, prompts, world, lambda number, text: len(text) >= 2 + number, 16, 4)
    return found, losses.cpu(), likely.cpu(), written


@pytest.fixture(scope="module")
def expected(folders):
    recorded = {name: Recorded(folder, tokens_of(61, SAMPLES, LENGTH)).scores("l2", "mean") for name, folder in folders.items()}
    return {(name, "activation"): scores for name, scores in recorded.items()} | {
        (name, "magnitude"): magnitudes_of_experts(folder) for name, folder in folders.items()
    }


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp=2, ep=2),
        *(pytest.param(layout, marks=pytest.mark.long) for layout in (
            Layout(tp=2), Layout(tp=2, dp=2, ep=2), Layout(tp=2, dp=2, ep=2, sp=True), Layout(pp=2, dp=2, ep=2), Layout(pp=2, vpp=2, dp=2, ep=2),
            Layout(dp=3, ep=3),
        )),
    ],
    ids=str,
)  # fmt: skip
def test_replicas_that_share_experts_may_have_different_numbers_of_samples(layout, folders, expected):
    reference = on_ranks(measured, Layout(), folders)[0]
    ranks = on_ranks(measured, layout, folders)
    for key, book in expected.items():
        scores = ranks[0][0][key]
        for name, values in book.items():
            np.testing.assert_allclose(scores[name].numpy(), values, rtol=1e-5, atol=1e-9, err_msg=f"{key} {name}")
        assert all(same_tensors(found[0][key], scores) for found in ranks)
    for found in ranks:
        torch.testing.assert_close(found[1], reference[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], reference[2], rtol=1e-5, atol=1e-5)
        assert found[3] == reference[3]


def test_an_expert_that_no_token_chose_scores_nothing(folders, alone):
    model = load(open_folder(folders["qwen2_moe"], "model.path"), alone, torch.float32)
    probes = Probes(model, alone, "mean", "l2", 1)
    with probes.attached():
        forward_only(model, [tokens_of(61, 1, 1)], alone, watch=probes)
    scores = collect(probes, alone)
    shapes = expected_shapes(model.arch)
    assert {name: tuple(score.shape) for name, score in scores.items()} == shapes
    assert {name: tuple(score.shape) for name, score in random_scores(model.arch, 1).items()} == shapes
    for layer in (0, 2, 3):
        chosen = scores[f"experts.{layer}"] > 0
        assert chosen.sum() == 2
        assert torch.equal((scores[f"expert_ffn.{layer}"] > 0).any(dim=1), chosen)
    assert "experts.1" not in scores and "ffn.1" in scores


def test_hooks_are_gone_afterwards(folders, alone):
    model = load(open_folder(folders["mixtral"], "model.path"), alone, torch.float32)
    layers = [block.mlp for _, block in model.blocks()]
    with Probes(model, alone, "mean", "l2", LENGTH).attached():
        assert all("combine_postprocess" in vars(layer.token_dispatcher) for layer in layers)
    assert not any("combine_postprocess" in vars(layer.token_dispatcher) for layer in layers)
    assert not any(module._forward_hooks for module in model.modules())
