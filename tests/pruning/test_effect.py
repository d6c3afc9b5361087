"""Does measuring pay? What activations keep must be worth more, before any retraining, than what weights or chance keep."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from minitron.config.schema import Parallel, Target
from minitron.engine.schedule import forward_only
from minitron.engine.scoring import language_model_score
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, magnitude_scores, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.source import open_folder

LENGTH = 128


@pytest.fixture
def windows(stories, tales):
    """Tokens [B, S + 1] to measure importance on, and others to measure loss on."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    told = [json.loads(line)["text"] for line in tales.read_text(encoding="utf-8").splitlines()]
    tokens = torch.tensor([token for text in told for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    windows_BS = tokens[: len(tokens) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return windows_BS[:64], windows_BS[64:112]


@pytest.mark.parametrize(
    ("sizes", "beats_magnitude"),
    [
        ({"hidden_size": 48, "ffn_hidden_size": 128}, True),
        ({"ffn_hidden_size": 128}, True),
        ({"hidden_size": 48}, False),  # on so narrow a model the largest weights mark the same channels
    ],
    ids=str,
)
def test_activations_keep_more_than_weights_or_chance(stories, windows, alone, sizes, beats_magnitude):
    source = open_folder(stories, "model.path")
    target = target_arch(source.arch, Target(**sizes), Parallel())

    def loss(model):
        held_out = windows[1]
        return language_model_score(model, [(held_out, torch.ones(len(held_out), dtype=torch.bool))], alone).loss

    def pruned(scores):
        return reslice(load(source, alone, torch.float32), select(scores, source.arch, target), target, alone)

    model = load(source, alone, torch.float32)
    probes = Probes(model, alone, "mean", "l2", LENGTH)
    with probes.attached():
        for microbatch in windows[0].split(8):
            forward_only(model, [microbatch[:, :-1]], alone, watch=probes)
    teacher, activation = loss(model), loss(pruned(collect(probes, alone)))
    magnitude = loss(pruned(magnitude_scores(model, alone)))
    chance = [loss(pruned(random_scores(source.arch, seed))) for seed in range(3)]
    assert activation > teacher
    assert activation < min(chance) - 0.1
    if beats_magnitude:
        assert activation < magnitude - 0.1
