"""One GPU: importance and cutting, beside the CPU."""

import numpy as np
import pytest
import torch

from minitron.config.schema import Parallel, Target
from minitron.engine.parallel import world
from minitron.engine.schedule import forward_only
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, magnitude_scores, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import gathered
from minitron.weights.source import open_folder
from tests.oracles.models import save_model, tokens_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
TARGET = Target(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4, num_query_groups=2)
WAYS = [("mean", "l2"), ("l2", "mean"), ("var", "var")]


def measured(folder, device, dtype, over_tokens, over_samples):
    """Scores of all axes."""
    with world(Parallel(), device, 1) as here:
        model = load(open_folder(folder, "model.path"), here, dtype)
        probes = Probes(model, here, over_tokens, over_samples, 32)
        with probes.attached():
            forward_only(model, [tokens_of(61, 2, 32, seed) for seed in range(4)], here, watch=probes)
        return collect(probes, here)


@pytest.mark.parametrize(("over_tokens", "over_samples"), WAYS)
def test_scores_in_fp32_are_those_of_the_cpu(over_tokens, over_samples, tmp_path):
    folder = save_model(tmp_path / "model", 1, **SIZES)
    theirs, ours = (measured(folder, device, torch.float32, over_tokens, over_samples) for device in ("cpu", "cuda"))
    assert theirs.keys() == ours.keys()
    for name, expected in theirs.items():
        assert ((ours[name] - expected).norm() / expected.norm()).item() < 1e-4, name


def test_in_bf16_mostly_the_same_units_stay(tmp_path):
    folder = save_model(tmp_path / "model", 1, **SIZES)
    arch = open_folder(folder, "model.path").arch
    target = target_arch(arch, TARGET, Parallel())
    theirs = select(measured(folder, "cpu", torch.float32, "mean", "l2"), arch, target)
    ours = select(measured(folder, "cuda", torch.bfloat16, "mean", "l2"), arch, target)
    assert len(np.intersect1d(theirs.hidden, ours.hidden)) >= 0.9 * len(theirs.hidden)
    assert all(len(np.intersect1d(theirs.ffn[layer], ours.ffn[layer])) >= 0.85 * len(theirs.ffn[layer]) for layer in theirs.ffn)


def test_magnitudes_and_cuts_are_those_of_the_cpu(tmp_path):
    folder, found = save_model(tmp_path / "model", 1, **SIZES), []
    for device in ("cpu", "cuda"):
        with world(Parallel(), device, 1) as here:
            source = open_folder(folder, "model.path")
            target = target_arch(source.arch, TARGET, Parallel())
            magnitudes = magnitude_scores(load(source, here, torch.float32), here)
            pruned = reslice(load(source, here, torch.float32), select(random_scores(source.arch, 1), source.arch, target), target, here)
            assert {parameter.device.type for parameter in pruned.parameters()} == {device}
            found.append((magnitudes, dict(gathered(pruned, here))))
    (magnitudes, tensors), (other_magnitudes, other_tensors) = found
    assert all(torch.equal(tensors[name], other_tensors[name]) for name in tensors) and tensors.keys() == other_tensors.keys()
    assert all(torch.allclose(magnitudes[name], other_magnitudes[name]) for name in magnitudes)
