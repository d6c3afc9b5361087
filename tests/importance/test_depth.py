"""Losses without runs of layers, in one walk, against a full pass for each and plain `transformers` models with layers taken out."""

import numpy as np
import pytest
import torch

from minitron.engine.probing import Scored
from minitron.engine.probing import losses_without as sums_without
from minitron.importance.depth import losses_without
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.depth import losses_by_full_passes
from tests.oracles.models import hf_model, save_model, tokens_of

LAYERS, SAMPLES, LENGTH, MICROBATCH, VOCAB = 7, 10, 24, 2, 61
LENGTHS = [2, 1, 4]  # more than one stage holds, of most layouts, and not in order
SLOW = Layout(pp=4), Layout(pp=3, vpp=2), Layout(tp=2, pp=2, sp=True), Layout(pp=2, cp=2)
LAYOUTS = (
    Layout(), Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(dp=2), Layout(cp=2), Layout(tp=2, sp=True), Layout(pp=2, vpp=2),
    *(pytest.param(layout, marks=pytest.mark.slow) for layout in SLOW),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(
        tmp_path_factory.mktemp("model") / "model", 5, num_hidden_layers=LAYERS, hidden_size=24, num_attention_heads=2, num_key_value_heads=2
    )


@pytest.fixture(scope="module")
def expected(folder):
    """The losses of plain models, by length."""
    windows = tokens_of(VOCAB, SAMPLES, LENGTH + 1)
    found = {}
    for length in LENGTHS:
        losses = []
        for first in range(LAYERS - length + 1):
            model = hf_model(folder).double()
            model.model.layers = torch.nn.ModuleList(block for n, block in enumerate(model.model.layers) if not first <= n < first + length)
            for number, block in enumerate(model.model.layers):
                block.self_attn.layer_idx = number
            model.config.num_hidden_layers -= length
            with torch.no_grad():
                losses.append(model(windows, labels=windows, use_cache=False).loss.item())
        found[length] = np.array(losses)
    return found


def evaluated(model, world):
    """A list that counts the streams of a microbatch that every one of this rank's blocks sees from now on."""
    seen = []
    for _, block in model.blocks():
        block.register_forward_hook(lambda _, args, kwargs, out: seen.append(kwargs["hidden_states"].shape[1] // MICROBATCH), with_kwargs=True)
    return seen


def both_ways(world, folder):
    """Losses in one walk and by full passes, and how many microbatches a walk for single layers takes through blocks, of how many a replica has."""
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    parts = tokens_of(VOCAB, SAMPLES, LENGTH + 1)[world.dp_rank :: world.dp].split(MICROBATCH)
    # the last microbatch of the last replica is filled up with what does not count
    batches = [(part.repeat(2, 1)[:MICROBATCH], torch.arange(MICROBATCH) < len(part)) for part in parts]
    done = []
    walked = losses_without(model, batches, world, LENGTHS, done.append)
    naive = {length: losses_by_full_passes(model, lambda: batches, world, length) for length in LENGTHS}
    seen = evaluated(model, world)
    losses_without(model, batches, world, [1])
    return walked, naive, sum(done), len(batches), sum(seen)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_one_walk_gives_the_losses_of_full_passes(layout, folder, expected):
    ranks = on_ranks(both_ways, layout, folder)
    for walked, naive, done, batches, _ in ranks:
        assert walked.keys() == expected.keys() and done == batches
        for length, losses in walked.items():
            assert losses.dtype == torch.float32 and losses.shape == expected[length].shape
            torch.testing.assert_close(losses, naive[length], rtol=1e-6, atol=0)
            np.testing.assert_allclose(losses, expected[length], rtol=1e-6)
    # of each microbatch: the walk to the last probe's beginning, and each probe from behind its layer; tensor and context ranks share in each
    filled_up = -(-ranks[0][3] // layout.pp) * layout.pp if layout.vpp > 1 else ranks[0][3]
    evaluations = sum(seen for *_, seen in ranks) / (layout.tp * layout.cp * layout.dp)
    assert evaluations == filled_up * ((LAYERS - 1) + LAYERS * (LAYERS - 1) // 2)


def test_the_whole_model_and_sums_by_rows(folder, alone):
    model = load(open_folder(folder, "model.path"), alone, torch.float32)
    tokens, rows = tokens_of(VOCAB, 6, LENGTH + 1), torch.tensor([2, 0, 2, 1, 1, 4])
    counted = torch.rand(6, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.5
    batches = [Scored(tokens[part], counted[part], rows[part]) for part in (slice(0, 4), slice(4, 6))]
    runs = [range(3, 5), range(LAYERS, LAYERS), range(0, 1)]
    sums, counts = sums_without(model, batches, alone, runs, 5)
    assert counts.tolist() == [counted[rows == row].sum() for row in range(5)]
    with torch.no_grad():
        logits = hf_model(folder)(tokens[:, :-1]).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none") * counted
    torch.testing.assert_close(sums[1], torch.stack([losses[rows == row].sum() for row in range(5)]).double(), rtol=1e-6, atol=0)
    again, _ = sums_without(model, batches, alone, runs[::-1], 5)
    torch.testing.assert_close(again.flip(0), sums, rtol=1e-6, atol=0)
    assert not model.config.variable_seq_lengths
