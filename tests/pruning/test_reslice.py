"""The pruned model against plain indexing of the original's tensors: the same bits, the same logits in `transformers`, at every layout."""

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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
from tests.oracles.models import BIASES, NEMOTRON, UNTIED, hf_model, same_tensors, saved_tensors, tokens_of
from tests.oracles.models import save_model as save_hf
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.slicing import sliced

BIG = {"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48, "intermediate_size": 60, "head_dim": 6}
MODELS = {
    "tied": BIG,
    "untied_biases": {**BIG, **UNTIED, **BIASES, "num_key_value_heads": 3},
    # nothing of this one needs padding on 2 or 4 ranks
    "one_head_groups": {**BIG, "num_key_value_heads": 12, "vocab_size": 60},
}
RESHARDED = {**MODELS, "nemotron": {**BIG, **NEMOTRON}}  # this one is cut in every way in test_layouts.py
TARGETS = {
    "width": Target(hidden_size=24, ffn_hidden_size=36, num_query_groups=0.7),
    "everything": Target(num_layers=4, hidden_size=24, ffn_hidden_size=12, num_query_groups=0.5),
    "one_layer": Target(num_layers=1),
    "without_the_first": Target(num_layers=4, hidden_size=24),
    "without_the_last": Target(num_layers=4, ffn_hidden_size=24),
}
GONE = {"without_the_first": [0, 1], "without_the_last": [4, 5]}  # layers whose score is set to nothing: the others travel over stages
LAYOUTS = [
    Layout(tp=2), Layout(tp=4), Layout(tp=2, sp=True), Layout(tp=3), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=2, dp=2), Layout(pp=4),
    Layout(tp=2, pp=2, sp=True), Layout(cp=2), Layout(tp=2, cp=2), Layout(pp=2, vpp=2), Layout(pp=3),
]  # fmt: skip
SAVED = [Layout(), Layout(tp=2), Layout(tp=3), Layout(tp=2, pp=2), Layout(tp=4)]


def pruned_by(world, folder, target, seed=5, gone=()):
    """The pruned model of a folder, what was kept, and its source."""
    source = open_folder(folder, "model.path")
    arch = target_arch(source.arch, target, Parallel(tp=world.tp, pp=world.pp, vpp=world.vpp))
    scores = random_scores(source.arch, seed)
    scores["layers.bi"][list(gone)] = 0.0
    keep = select(scores, source.arch, arch, merge_heads=target.merge_heads)
    return reslice(load(source, world, torch.float32), keep, arch, world), keep, source


def targets(folder, stages):
    """TARGETS that leave every stage a layer, and half of every group's heads where there are several, alone and with the others merged in."""
    arch = open_folder(folder, "model.path").arch
    found = {name: target for name, target in TARGETS.items() if (target.num_layers or arch.num_layers) >= stages}
    if arch.heads_per_group > 1:
        found["heads"] = Target(num_attention_heads=arch.heads_per_group // 2 * arch.num_query_groups)
        groups = round(0.7 * arch.num_query_groups)
        found["merged"] = Target(num_attention_heads=2 * groups, num_query_groups=groups, merge_heads=True)
    return found


def battery(world, folders, out):
    """Every model cut to every target: its export under `out`, its logits, what was kept, and which units lie out of order."""
    found = {}
    for model, folder in folders.items():
        for name, target in targets(folder, world.pp * world.vpp).items():
            pruned, keep, source = pruned_by(world, folder, target, gone=GONE.get(name, ()))
            export(pruned, world, source.config, folder, out / model / name, torch.float32)
            logits = whole_logits(pruned, tokens_of(source.arch.vocab_size, 1, 12), world)
            found[model, name] = (logits, keep, pruned.unit_order, pruned.arch)
    return found


def saved(world, folders, out):
    """Save every model, cut in width."""
    for model, folder in folders.items():
        save_model(pruned_by(world, folder, TARGETS["width"])[0], out / model, world)


def exported(world, folders, shards, out):
    """Export every model from each of the layouts it was saved at."""
    for layout, (model, folder) in itertools.product(shards, folders.items()):
        config = open_folder(folder, "model.path").config
        export(load_model(shards[layout] / model, world, torch.float32), world, config, folder, out / layout / model, torch.float32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: save_hf(root / name, seed, **changes) for seed, (name, changes) in enumerate(RESHARDED.items())}


def check_export(original, exported, keep, arch, logits):
    """The exported folder holds the sliced tensors bit by bit and gives the pruned model's logits; `arch` counts its parameters."""
    hf = hf_model(exported)
    expected = sliced(saved_tensors(original), hf.config.head_dim, keep)
    assert same_tensors(saved_tensors(exported), expected)
    assert hf.num_parameters() == arch.num_parameters()
    assert hf.config.tie_word_embeddings == ("lm_head.weight" not in expected) == arch.share_embeddings_and_output_weights
    with torch.no_grad():
        assert (hf(tokens_of(arch.vocab_size, 1, 12)).logits - logits).abs().max() < 1e-4


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), *LAYOUTS], ids=str)
def test_the_exported_model_is_the_sliced_original(layout, folders, tmp_path):
    ranks = on_ranks(battery, layout, {name: folders[name] for name in MODELS}, tmp_path)
    for (model, name), (_, keep, _, arch) in ranks[0].items():
        logits = of_last_stage([found[model, name][0] for found in ranks])
        check_export(folders[model], tmp_path / model / name, keep, arch, logits)
        assert all(same_tensors(found[model, name][1].tensors(), keep.tensors()) for found in ranks)
    reordered = [key for found in ranks for key, (*_, order, _) in found.items() if order]
    assert bool(reordered) == (layout.tp > 1)  # the scores leave the ranks with uneven numbers of units


def cut_in_turn(world, folder):
    """Every target from one model that stays: whether it does, apart from the pruned ones, and whether these are as if each emptied a model."""
    arch = open_folder(folder, "model.path").arch
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    right = []
    for name, target in targets(folder, world.pp * world.vpp).items():
        expected, keep, _ = pruned_by(world, folder, target, gone=GONE.get(name, ()))
        pruned = reslice(model, keep, target_arch(arch, target, Parallel(tp=world.tp, pp=world.pp, vpp=world.vpp)), world, empty=False)
        right.append(same_tensors(dict(pruned.named_parameters()), dict(expected.named_parameters())))
        right.append({*pruned.unit_order} == {*expected.unit_order})
        for parameter in pruned.parameters():
            parameter.data.fill_(7.0)  # had they memory in common, the next cut would show it
    return [*right, same_tensors(dict(model.named_parameters()), before)]


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, pp=2), Layout(pp=2, vpp=2)], ids=str)
def test_many_are_cut_from_one_model_that_stays(layout, folders):
    assert all(itertools.chain(*on_ranks(cut_in_turn, layout, folders["tied"])))


@pytest.fixture(scope="module")
def shards(folders, tmp_path_factory):
    """{layout: where its ranks saved every model}"""
    root = tmp_path_factory.mktemp("shards")
    for layout in SAVED:
        on_ranks(saved, layout, folders, root / str(layout))
    return {str(layout): root / str(layout) for layout in SAVED}


@pytest.mark.multirank
@pytest.mark.parametrize("layout", SAVED, ids=str)
def test_a_pruned_model_saved_at_any_layout_is_loaded_at_another(layout, shards, folders, tmp_path):
    """Units that a layout left out of order, and dead groups that pad it, are not in the way of the next."""
    on_ranks(exported, layout, folders, shards, tmp_path)
    wrong = []
    for model, folder in folders.items():
        keep = select(random_scores(arch := open_folder(folder, "x").arch, 5), arch, target_arch(arch, TARGETS["width"], Parallel()))
        expected = sliced(saved_tensors(folder), arch.kv_channels, keep)
        wrong += [(before, model) for before in shards if not same_tensors(saved_tensors(tmp_path / before / model), expected)]
    assert wrong == []


@st.composite
def cases(draw, layers=3):
    """A model's config and a target that is smaller in any number of ways."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads, biased, nemotron = groups * per_group, draw(st.booleans()), draw(st.booleans())
    config = {
        "num_hidden_layers": draw(st.integers(1, layers)), "hidden_size": heads * draw(st.integers(2, 6)),
        "intermediate_size": draw(st.integers(2, 20)), "num_attention_heads": heads, "num_key_value_heads": groups,
        "head_dim": 2 * draw(st.integers(1, 4)), "vocab_size": draw(st.integers(2, 30)),
        "tie_word_embeddings": draw(st.booleans()), **(BIASES if biased else {}), **(NEMOTRON if nemotron else {}),
    }  # fmt: skip
    new_groups = draw(st.integers(1, groups))
    new_heads = new_groups * draw(st.integers(1, per_group))
    # transformers loads a Llama with biases only if the heads divide the width
    widths = st.integers(1, config["hidden_size"]).filter(lambda width: nemotron or not biased or width % new_heads == 0)
    target = Target(
        num_layers=draw(st.integers(1, config["num_hidden_layers"])),
        hidden_size=draw(widths),
        ffn_hidden_size=draw(st.integers(1, config["intermediate_size"])),
        num_query_groups=new_groups,
        num_attention_heads=new_heads,
    )
    return config, target, draw(st.integers(0, 99))


def test_any_shape_cut_in_any_way(alone):
    @given(cases())
    @settings(max_examples=25)
    def holds(case):
        config, target, seed = case
        with tempfile.TemporaryDirectory() as root:
            original, out = save_hf(Path(root) / "original", seed, **config), Path(root) / "exported"
            pruned, keep, source = pruned_by(alone, original, target, seed)
            export(pruned, alone, source.config, original, out, torch.float32)
            check_export(original, out, keep, pruned.arch, whole_logits(pruned, tokens_of(config["vocab_size"], 1, 12), alone))

    holds()


def cut_all(world, folders, drawn, out):
    """Every drawn case, exported under `out`, with its logits and what was kept."""
    found = []
    for number, (folder, (_, target, seed)) in enumerate(zip(folders, drawn, strict=True)):
        pruned, keep, source = pruned_by(world, folder, target, seed)
        export(pruned, world, source.config, folder, out / str(number), torch.float32)
        found.append((whole_logits(pruned, tokens_of(source.arch.vocab_size, 1, 12), world), keep, pruned.arch))
    return found


def fits(case, layout):
    """Whether a layout can hold the model before and after."""
    config, target, _ = case
    depth, vocab = min(config["num_hidden_layers"], target.num_layers), config["vocab_size"]
    divides = config["intermediate_size"] % layout.tp == target.ffn_hidden_size % layout.tp == 0
    return depth >= layout.pp * layout.vpp and divides and -(-vocab // layout.tp) * (layout.tp - 1) < vocab


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2), Layout(tp=3, sp=True), Layout(pp=2, vpp=2)], ids=str)
def test_any_shape_cut_in_any_way_at_any_layout(layout, tmp_path):
    drawn = []

    @given(cases(layers=6).filter(lambda case: fits(case, layout)))
    @settings(max_examples=12, derandomize=True, suppress_health_check=list(HealthCheck), deadline=None, database=None)
    def draw(case):
        drawn.append(case)

    draw()
    folders = [save_hf(tmp_path / "originals" / str(number), case[2], **case[0]) for number, case in enumerate(drawn)]
    ranks = on_ranks(cut_all, layout, folders, drawn, tmp_path)
    for number, (_, keep, arch) in enumerate(ranks[0]):
        check_export(folders[number], tmp_path / str(number), keep, arch, of_last_stage([found[number][0] for found in ranks]))
    assert len(drawn) >= 10


def test_the_original_is_emptied_as_it_is_cut(folders, alone):
    """No two models at a time: what was cut has given its memory back."""
    source = open_folder(folders["tied"], "model.path")
    model = load(source, alone, torch.float32)
    arch = target_arch(source.arch, Target(hidden_size=24), Parallel())
    reslice(model, select(random_scores(source.arch, 0), source.arch, arch), arch, alone)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_what_depends_on_the_order_of_scores_alone_depends_on_nothing_else(folders, alone):
    """Scores that rank alike keep alike, whatever their size."""
    arch = open_folder(folders["tied"], "model.path").arch
    target = arch.replace(hidden_size=24, ffn_hidden_size=24, num_layers=2)
    scores = random_scores(arch, 1)
    one, other = select(scores, arch, target), select({name: 1e-6 * score**3 for name, score in scores.items()}, arch, target)
    assert all(np.array_equal(one.tensors()[name], units) for name, units in other.tensors().items())
