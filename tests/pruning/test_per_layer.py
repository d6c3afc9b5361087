"""Sizes that differ between layers: the pruned model against a `transformers` model whose blocks were replaced one by one."""

import copy

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from minitron.arch.arch import Arch
from minitron.config.schema import Parallel, Target
from minitron.engine.checkpoint import load_model, save_model
from minitron.errors import RequestError
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, saved_tensors, tokens_of
from tests.oracles.models import save_model as save_hf
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.slicing import sliced

SIZES = {"num_hidden_layers": 5, "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48, "intermediate_size": 60, "head_dim": 6}
TARGET = Target(num_layers=4, hidden_size=36, ffn_hidden_size=[12, 60, 24, 36], num_query_groups=[4, 2, 3, 1], num_attention_heads=[8, 6, 3, 2])
LAYOUTS = [Layout(), Layout(tp=2), Layout(tp=3, sp=True), Layout(pp=2), Layout(tp=2, pp=2), Layout(pp=2, vpp=2), Layout(cp=2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hf(tmp_path_factory.mktemp("model") / "model", 7, **SIZES)


def chosen(folder, world=None):
    source = open_folder(folder, "model.path")
    parallel = Parallel() if world is None else Parallel(tp=world.tp, pp=world.pp, vpp=world.vpp)
    arch = target_arch(source.arch, TARGET, parallel)
    return source, arch, select(random_scores(source.arch, 2), source.arch, arch)


def pruned_and_saved(world, folder, out):
    source, arch, keep = chosen(folder, world)
    pruned = reslice(load(source, world, torch.float32), keep, arch, world)
    save_model(pruned, out, world)
    return whole_logits(pruned, tokens_of(61, 2, 12), world)


def loaded(world, saved):
    return {name: whole_logits(load_model(folder, world, torch.float32), tokens_of(61, 2, 12), world) for name, folder in saved.items()}


def expected_logits(folder):
    """Logits of a plain model whose blocks are made one by one, each of its own sizes, from sliced tensors; and its number of parameters."""
    _, arch, keep = chosen(folder)
    tensors = sliced(saved_tensors(folder), arch.kv_channels, keep)
    model = hf_model(folder)
    config = copy.deepcopy(model.config)
    config.hidden_size, config.num_hidden_layers = arch.hidden_size, arch.num_layers
    blocks = []
    for number, sizes in enumerate(arch.layers):
        own = copy.deepcopy(config)
        own.intermediate_size, own.num_attention_heads, own.num_key_value_heads = (
            sizes.ffn_hidden_size, sizes.num_attention_heads, sizes.num_query_groups,
        )  # fmt: skip
        blocks.append(LlamaDecoderLayer(own, number))
    model.model.layers = torch.nn.ModuleList(blocks)
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data[:, : arch.hidden_size]
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.norm.weight.data = model.model.norm.weight.data[: arch.hidden_size]
    model.config.num_hidden_layers = arch.num_layers
    model.load_state_dict({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]})
    with torch.no_grad():
        return model(tokens_of(61, 2, 12), use_cache=False).logits, sum(p.numel() for p in model.parameters())


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    """{layout: where its ranks saved the pruned model}; its logits are those of the plain model at each."""
    root, (logits, parameters) = tmp_path_factory.mktemp("shards"), expected_logits(folder)
    assert chosen(folder)[1].num_parameters() == parameters
    for layout in LAYOUTS:
        found = on_ranks(pruned_and_saved, layout, folder, root / str(layout))
        assert (of_last_stage(found) - logits).abs().max() < 1e-4, layout
    return {str(layout): root / str(layout) for layout in LAYOUTS}, logits


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_model_of_uneven_layers_is_the_same_at_every_layout_it_is_read_at(layout, saved):
    folders, logits = saved
    ranks = on_ranks(loaded, layout, folders)
    for name in folders:
        assert (of_last_stage([found[name] for found in ranks]) - logits).abs().max() < 1e-4, name


def test_arch_json_holds_the_sizes_of_every_layer(folder):
    arch = chosen(folder)[1]
    assert Arch.from_dict(arch.to_dict()) == arch
    assert [layer.ffn_hidden_size for layer in arch.layers] == TARGET.ffn_hidden_size
    assert (arch.layer(1).num_query_groups, arch.layer(1).num_attention_heads, arch.layer(None)) == (2, 6, arch)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(ffn_hidden_size=[8, 8]), r"target.ffn_hidden_size=\[8, 8\]: one size for each of the 5 layers that are kept is needed"),
        (Target(ffn_hidden_size=[8, 8, 8, 8, 61]), r"target.ffn_hidden_size=\[8, 8, 8, 8, 61\]: 61 in it: the model has 60"),
        (Target(num_query_groups=[4, 4, 4, 4, 2], num_attention_heads=[12, 12, 12, 12, 5]), "heads=.*, 5.: 5 in it: .* a multiple of 2"),
    ],
)
def test_lists_that_do_not_fit(target, said, folder):
    with pytest.raises(RequestError, match=said):
        target_arch(open_folder(folder, "model.path").arch, target, Parallel())


def test_a_list_of_equal_sizes_is_one_size(folder):
    arch = open_folder(folder, "model.path").arch
    assert target_arch(arch, Target(ffn_hidden_size=[24] * 5), Parallel(), exported=True) == target_arch(arch, Target(ffn_hidden_size=24), Parallel())


def test_transformers_cannot_express_it(folder, alone, tmp_path):
    source, arch, keep = chosen(folder)
    with pytest.raises(RequestError, match=r"target.ffn_hidden_size=\[12, 60, 24, 36\]: no llama model of transformers has sizes that differ"):
        target_arch(source.arch, TARGET, Parallel(), exported=True)
    pruned = reslice(load(source, alone, torch.float32), keep, arch, alone)
    with pytest.raises(RequestError, match="sizes that differ between layers can't be written for transformers"):
        export(pruned, alone, source.config, folder, tmp_path / "hf", torch.float32)
    assert list(tmp_path.iterdir()) == []
