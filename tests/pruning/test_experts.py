"""Models with experts, from activations to the pruned model at every layout: the book's scores, brute force's tensors, logits in `transformers`."""

import pytest
import torch

from minitron.config.schema import Parallel, Target
from minitron.engine.checkpoint import load_model, save_model
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.exact import compared, oracle_scores
from tests.oracles.experts import save_experts
from tests.oracles.models import same_tensors, saved_tensors
from tests.oracles.slicing import sliced

LAYOUTS = (Layout(), Layout(tp=2, sp=True), Layout(pp=2), Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2, sp=True))
FAST = [("qwen2_moe", LAYOUTS[-1])]
SLOW = [(family, layout) for family in ("mixtral", "qwen3_moe", "qwen2_moe") for layout in LAYOUTS if (family, layout) not in FAST]
SLOW += [
    ("qwen2_moe", Layout(tp=2, dp=2, ep=2)), ("qwen2_moe", Layout(pp=2, dp=2, ep=2)), ("mixtral", Layout(cp=2, ep=2)), ("mixtral", Layout(tp=2)),
    ("qwen3_moe", Layout(pp=2, vpp=2, dp=2, ep=2)), ("qwen3_moe", Layout(dp=2)),
]  # fmt: skip
RUNS = [*FAST, *(pytest.param(*run, marks=pytest.mark.long) for run in SLOW)]
TARGETS = {
    "experts": Target(num_moe_experts=4),
    "neurons": Target(moe_ffn_hidden_size=12),
    "everything": Target(num_moe_experts=4, moe_ffn_hidden_size=8, hidden_size=32, num_query_groups=2, num_layers=3),
    "layers by loss": Target(num_layers=2, layers_by="loss", num_moe_experts=4),
}
OF_QWEN2 = {"shared": Target(moe_shared_expert_intermediate_size=8, ffn_hidden_size=24, moe_ffn_hidden_size=12)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(FAMILY)`: its folder and the scores by the book."""
    known = {}

    def make(family):
        if family not in known:
            folder = save_experts(tmp_path_factory.mktemp(family) / "model", family, 5)
            known[family] = folder, oracle_scores(folder)
        return known[family]

    return make


@pytest.mark.multirank
@pytest.mark.parametrize(("family", "layout"), RUNS, ids=str)
def test_every_axis_at_every_layout(family, layout, made, tmp_path):
    folder, oracle = made(family)
    targets = TARGETS | (OF_QWEN2 if family == "qwen2_moe" else {})
    if layout.pp * layout.vpp > 2:
        targets = {name: target for name, target in targets.items() if target.num_layers is None}
    row = compared(layout, folder, tmp_path, oracle, targets)
    assert row["kept ≠"] == row["tensors ≠"] == 0
    assert row["logits"] < 1e-4
    errors = {axis: error for axis, error in row.items() if axis not in ("layout", "kept ≠", "tensors ≠", "logits")}
    assert {"experts", "expert_ffn", "hidden", "heads", "groups", "layers.bi", "layers.loss"} <= errors.keys()
    assert all(error < 1e-5 for error in errors.values()), errors


def choice(folder):
    """A target of a model that cuts every axis of experts, and what stays of it by chance."""
    source = open_folder(folder, "model.path")
    sizes = Target(num_layers=3, num_moe_experts=4, moe_ffn_hidden_size=12, moe_shared_expert_intermediate_size=16, hidden_size=40)
    arch = target_arch(source.arch, sizes, Parallel())
    return source, arch, select(random_scores(source.arch, 4), source.arch, arch)


def saved(world, folder, shards):
    """Cut a model and save its shards."""
    source, arch, keep = choice(folder)
    save_model(reslice(load(source, world, torch.float32), keep, arch, world), shards, world)


def exported(world, folder, shards, out):
    """Export what was saved."""
    export(load_model(shards, world, torch.float32), world, open_folder(folder, "model.path").config, folder, out, torch.float32)


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Layout(dp=2, ep=2), Layout()),
        pytest.param(Layout(), Layout(tp=2, dp=2, ep=2), marks=pytest.mark.slow),
        pytest.param(Layout(tp=2, dp=2, ep=2, sp=True), Layout(pp=2, dp=2, ep=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_pruned_model_loads_over_another_number_of_expert_ranks(before, after, tmp_path):
    folder = save_experts(tmp_path / "model", "qwen2_moe", 7)
    on_ranks(saved, before, folder, tmp_path / "shards")
    on_ranks(exported, after, folder, tmp_path / "shards", tmp_path / "hf")
    source, _, keep = choice(folder)
    assert same_tensors(saved_tensors(tmp_path / "hf"), sliced(saved_tensors(folder), source.arch.kv_channels, keep))
