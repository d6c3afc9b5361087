"""`minitron submit compress` over two nodes: what comes of it is what one process makes."""

import pytest
import torch
from safetensors.torch import load_file

from minitron.data.corpus import Windows
from minitron.data.manifest import Manifest
from tests.oracles.models import hf_model, saved_tensors, tokens_of
from tests.slurm.jobs import STEPS, leftovers, lines, results

pytestmark = pytest.mark.slurm
LOSSES = ("loss", "kd_loss", "valid_loss", "grad_norm")


def losses(run):
    """What is learnt in each step."""
    return [{name: value for name, value in line.items() if name in LOSSES} for line in lines(run)]


def test_both_make_the_same_cut_and_learn_the_same(unbroken, alone):
    kept = [load_file(run / "keep.safetensors") for run in (unbroken, alone)]
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[1])
    assert len(losses(unbroken)) == STEPS
    for found, expected in zip(losses(unbroken), losses(alone), strict=True):
        assert found == pytest.approx(expected, rel=1e-4)
    for name, expected in results(alone).items():
        assert results(unbroken)[name]["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert leftovers(unbroken) == []


def test_both_export_the_same_model(unbroken, alone):
    found, expected = (saved_tensors(run / "hf") for run in (unbroken, alone))
    assert {name: tensor.shape for name, tensor in found.items()} == {name: tensor.shape for name, tensor in expected.items()}
    tokens = tokens_of(512, 4, 32)
    with torch.no_grad():
        logits, wanted = (hf_model(run / "hf")(tokens).logits for run in (unbroken, alone))
    assert (logits - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_the_export_gives_the_loss_that_was_evaluated(unbroken):
    windows = Windows(Manifest.load(unbroken / "data").blend("valid"), 64, limit_tokens=2048)
    tokens = torch.stack([windows[index] for index in range(len(windows))])
    with torch.no_grad():
        loss = hf_model(unbroken / "hf")(tokens, labels=tokens).loss.item()
    assert results(unbroken)["student"]["loss"] == pytest.approx(loss, rel=1e-4)
