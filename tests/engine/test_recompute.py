"""Activations that are made once more in the backward pass: the same training, in less memory."""

import dataclasses

import pytest
import torch

from minitron.config.schema import Train
from minitron.engine.schedule import run_chunk
from tests.engine.runs import SIZES, Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, NEMOTRON, UNTIED, save_model

SETTINGS = Train(**{**SIZES, "micro_batch_size": 1}, save_interval=10, eval_interval=10)
HOW = ("none", "selective", "full")
HIDDEN = {"layers": [1, 3, -1], "teacher_layers": [2, 2, -1], "embeddings": True, "projection": True, "alpha": 0.5}
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(pp=2, vpp=2), Layout(cp=2)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    models = {"tied": {}, "biases": {**BIASES, **UNTIED}, "nemotron": NEMOTRON}
    return {name: save_model(root / name, seed, **changes) for seed, (name, changes) in enumerate(models.items(), start=4)}


def trained(world, folder):
    """By train.recompute: the lines of two steps, and every parameter of this rank after them."""
    found = {}
    for how in HOW:
        run = Run(world, folder, dataclasses.replace(SETTINGS, recompute=how), hidden=HIDDEN)
        lines = [run.step() for _ in range(2)]
        found[how] = lines, [parameter.detach().clone() for parameter in run.trainer.model.parameters()]
        run.trainer.close()
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_training_is_the_same_to_the_bit_with_losses_inside_the_model_too(layout, folders):
    for rank in on_ranks(trained, layout, folders["tied"]):
        lines, parameters = rank["none"]
        assert all(line["hidden_loss"] > 0 and line["projection_grad_norm"] > 0 for line in lines)
        for how in HOW[1:]:
            assert rank[how][0] == lines
            assert all(map(torch.equal, rank[how][1], parameters)), how


@pytest.mark.parametrize("model", ["biases", "nemotron"])
def test_it_is_the_same_with_other_parts(model, folders, alone):
    found = trained(alone, folders[model])
    assert found["selective"][0] == found["full"][0] == found["none"][0]


def held(world, folder, how):
    """Bytes that a forward pass of the first microbatch holds for the backward pass, parameters left out."""
    run = Run(world, folder, dataclasses.replace(SETTINGS, recompute=how))
    parameters = {parameter.untyped_storage()._cdata for parameter in run.trainer.model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    chunk = run.trainer.wrapped[0]
    chunk.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run_chunk(chunk, (run.microbatches(0)[0].inputs_BS, None), world)
    return sum(storage.nbytes() for storage in saved.values())


def test_less_is_held_for_the_backward_pass(folders, alone):
    none, selective, full = (held(alone, folders["tied"], how) for how in HOW)
    arch_bytes = SETTINGS.seq_length * 48 * 4  # one block's input
    assert selective < 0.8 * none
    # each block's input, and what lies outside the blocks: the embedding's and the final norm's
    assert 4 * arch_bytes <= full < 0.2 * none
