"""Gradients and parameters that travel while passes go on: the same training."""

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch

from minitron.config.schema import Train
from minitron.engine import trainer
from minitron.engine.checkpoint import Checkpoints, load_model
from minitron.engine.scoring import language_model_score
from tests.engine.runs import SIZES, Run
from tests.engine.test_trainer import spoiled
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.metrics import without_costs
from tests.oracles.models import UNTIED, save_model, tokens_of

SETTINGS = Train(**{**SIZES, "global_batch_size": 8, "micro_batch_size": 1}, save_interval=3, eval_interval=2)
OVERLAPS = [{}, {"overlap_grad_reduce": True}, {"overlap_grad_reduce": True, "overlap_param_gather": True}]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"tied": save_model(root / "tied", 4), "untied": save_model(root / "untied", 5, **UNTIED)}


class Trained(NamedTuple):
    """Of one rank: how many buckets there were, the lines, held-out losses between the steps, the parameters at the end, and whether these
    were saved."""

    buckets: int
    lines: list
    losses: list
    parameters: list
    saved_is_trained: bool


def in_each_way(world, folder, root):
    # these models fit in one bucket of Megatron's usual size; with this one an untied head has a bucket to itself
    trainer.DistributedDataParallelConfig = functools.partial(trainer.DistributedDataParallelConfig, bucket_size=2000)
    return [trained(world, folder, overlap, root) for overlap in OVERLAPS]


def trained(world, folder, overlap, root):
    """A run whose third step is spoiled."""
    run = Run(world, folder, dataclasses.replace(SETTINGS, **overlap))
    buckets = sum(len(wrapped.bucket_groups) for wrapped in run.trainer.wrapped)
    held_out = [(tokens_of(61, 2, 13, seed=99), torch.ones(2, dtype=torch.bool))]
    losses = []

    def loss(step, batches):
        losses.append(language_model_score(run.trainer.model, held_out, world).loss)  # between steps, where nothing has settled
        return (spoiled(run.task.loss, "gradient") if step == 2 else run.task.loss)(step, batches)

    kept = root / str(len(overlap))
    run.fit(kept, loss=loss, validate=lambda: {"valid_loss": language_model_score(run.trainer.model, held_out, world).loss})
    lines = without_costs(run.lines)
    run.trainer.close()
    parameters = [parameter.detach().clone() for parameter in run.trainer.model.parameters()]
    saved = load_model(Checkpoints(kept).path(6), world, torch.float32)
    return Trained(buckets, lines, losses, parameters, all(map(torch.equal, saved.parameters(), parameters)))


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("layout", "name"),
    [(Layout(dp=2), "untied"), (Layout(pp=2, dp=2), "untied"), pytest.param(Layout(pp=2, vpp=2, dp=2), "tied", marks=pytest.mark.slow)],
    ids=str,
)
def test_it_trains_scores_and_saves_the_same(layout, name, folders, tmp_path):
    plain, *overlapped = zip(*on_ranks(in_each_way, layout, folders[name], tmp_path), strict=True)
    assert [line["skipped"] for line in plain[0].lines] == [0, 0, 1, 0, 0, 0]
    for ranks in overlapped:
        assert any(rank.buckets > 2 for rank in ranks)
        for mine, theirs in zip(ranks, plain, strict=True):
            assert mine.saved_is_trained and theirs.saved_is_trained
            assert mine.losses == pytest.approx(theirs.losses, rel=1e-6)
            assert len(mine.lines) == len(theirs.lines)
            for line, expected in zip(mine.lines, theirs.lines, strict=True):
                assert line == pytest.approx(expected, rel=1e-6, nan_ok=True)
            for parameter, expected in zip(mine.parameters, theirs.parameters, strict=True):
                assert torch.allclose(parameter, expected, rtol=1e-5, atol=1e-6)
