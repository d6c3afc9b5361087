"""Importance in rounds: sizes on the way, what several cuts keep together, and whole rounds against a loop over plain models."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.calibration import importance
from minitron.config.schema import Calibrate, Config, Logging, Model, Parallel, Target
from minitron.data.corpus import Windows
from minitron.data.indexed import IndexedDatasetBuilder
from minitron.errors import RequestError
from minitron.importance.scores import magnitude_scores, random_scores
from minitron.pruning.keep import Keep, select
from minitron.pruning.order import as_laid
from minitron.pruning.rounds import both, sizes_after, way
from minitron.pruning.target import check_rounds, check_ways, target_arch
from minitron.session import Session
from minitron.stages import prune
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.importance import Recorded, magnitudes
from tests.oracles.models import UNTIED, config_of, hf_model, same_tensors, save_model, saved_tensors, tokens_of
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.slicing import best, sliced

# three KV groups, which don't divide by two ranks
SIZES = {"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 48, "intermediate_size": 60, "head_dim": 6}
ROUNDS, SAMPLES, LENGTH = 3, 8, 16
TARGET = Target(num_layers=4, hidden_size=24, ffn_hidden_size=36, num_query_groups=2, num_attention_heads=4, rounds=ROUNDS)
CALIBRATE = Calibrate(samples=SAMPLES, seq_length=LENGTH, micro_batch_size=2)


def test_sizes_go_down_in_equal_steps_that_suit_both_ends():
    assert sizes_after(1536, 1152, 4) == [1440, 1344, 1248, 1152]
    assert sizes_after(14336, 9216, 2) == [11776, 9216]
    assert sizes_after(14336, 9216, 3) == [12800, 10752, 9216]  # of which every one divides by 512
    assert sizes_after(30, 22, 3) == [27, 25, 22]
    assert sizes_after(8, 8, 3) == [8, 8, 8]


@given(st.integers(1, 400), st.integers(1, 400), st.integers(1, 9))
def test_any_sizes_go_down_to_the_target(one, other, rounds):
    before, after = max(one, other), min(one, other)
    sizes = sizes_after(before, after, rounds)
    assert len(sizes) == rounds and sizes[-1] == after
    cuts = [left - right for left, right in zip([before, *sizes], sizes, strict=False)]
    assert all(cut >= 0 for cut in cuts)
    assert all(cut > 0 for cut in cuts) or before - after < rounds
    assert max(abs(cut - (before - after) / rounds) for cut in cuts) <= max(1, (before - after) / (2 * rounds))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "model", 3, **SIZES, **UNTIED)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Prefix of SAMPLES windows of random tokens."""
    prefix = tmp_path_factory.mktemp("text") / "text"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32)
    for document in tokens_of(61, 3, SAMPLES * LENGTH // 3 + 1):
        builder.add_document(document.numpy(), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def windows(text):
    samples = Windows([(text, 1.0)], LENGTH, count=SAMPLES, shuffle_seed=1234, setting="calibrate.samples")
    return torch.stack([samples[number][:-1] for number in range(SAMPLES)])


class Text:
    """Prepared data in the place of a run's."""

    def __init__(self, prefix):
        self.blend = lambda split: [(prefix, 1.0)]


def cut(world, folder, text, out, criterion="activation"):
    """The prune stage's work but for what it writes: what is kept, the export, its logits, and the sizes."""
    layout = Parallel(tp=world.tp, pp=world.pp, vpp=world.vpp, sp=world.sequence_parallel)
    calibrate = Calibrate(samples=SAMPLES, seq_length=LENGTH, micro_batch_size=2, criterion=criterion)
    cfg = Config(model=Model(str(folder)), target=TARGET, calibrate=calibrate, parallel=layout, logging=Logging(progress=False), dtype="fp32")
    opened = Session(cfg, "prune", world, out)
    opened.__dict__["data"] = Text(text)  # in the place of the cached property
    arch = opened.source.arch
    scores = importance(opened, arch, opened.load_source, [])
    pruned, keep = prune.cut(opened, TARGET, scores, way(arch, target_arch(arch, TARGET, layout), ROUNDS))
    export(pruned, world, opened.source.config, folder, out / "hf", torch.float32)
    return keep, whole_logits(pruned, tokens_of(61, 2, 12), world), pruned.arch


def by_hand(folder, tokens, out, measure):
    """The rounds as a loop over plain models, in lists of original numbers: measured, ranked, indexed, saved, loaded again."""
    arch = open_folder(folder, "model.path").arch
    layers, hidden = [*range(6)], [*range(48)]
    ffn, groups = {layer: [*range(60)] for layer in layers}, {layer: [*range(3)] for layer in layers}
    heads = {layer: [*range(12)] for layer in layers}
    model = folder
    for number, sizes in enumerate(way(arch, target_arch(arch, TARGET, Parallel()), ROUNDS)):
        scores = {name: score.tolist() for name, score in measure(model, tokens).items()}
        stay = best(scores["layers.bi"], sizes.num_layers)
        for place in stay:
            layer, per_group = layers[place], len(heads[layers[place]]) // len(groups[layers[place]])
            ffn[layer] = [ffn[layer][unit] for unit in best(scores[f"ffn.{place}"], sizes.ffn_hidden_size)]
            kept = best(scores[f"groups.{place}"], sizes.num_query_groups)
            inside = [range(group * per_group, (group + 1) * per_group) for group in kept]
            chosen = [head for units in inside for head in best(scores[f"heads.{place}"], sizes.heads_per_group, [*units])]
            groups[layer], heads[layer] = [groups[layer][group] for group in kept], [heads[layer][head] for head in chosen]
        hidden = [hidden[unit] for unit in best(scores["hidden"], sizes.hidden_size)]
        layers = [layers[place] for place in stay]

        def whole(units):
            return {layer: np.array(units[layer]) for layer in layers}  # noqa: B023 -- called at once

        keep = Keep(np.array(layers), np.array(hidden), whole(ffn), whole(groups), whole(heads))
        model = out / str(number)
        shape = {"num_hidden_layers": sizes.num_layers, "hidden_size": sizes.hidden_size, "intermediate_size": sizes.ffn_hidden_size,
                 "num_attention_heads": sizes.num_attention_heads, "num_key_value_heads": sizes.num_query_groups}  # fmt: skip
        save_model(model, **{**SIZES, **UNTIED, **shape})
        plain = hf_model(model)
        plain.load_state_dict(sliced(saved_tensors(folder), SIZES["head_dim"], keep))
        plain.save_pretrained(model)
    return keep


MEASURES = {
    "activation": lambda model, tokens: Recorded(model, tokens).scores("l2", "mean"),
    "magnitude": lambda model, tokens: magnitudes(model, hf_model(model).config),
}


@pytest.fixture(scope="module")
def expected(folder, text, tmp_path_factory):
    return {name: by_hand(folder, windows(text), tmp_path_factory.mktemp(name), measure) for name, measure in MEASURES.items()}


def compare(layout, folder, text, out, keep, criterion):
    ranks = on_ranks(cut, layout, folder, text, out, criterion)
    assert all(same_tensors(found[0].tensors(), keep.tensors()) for found in ranks)
    assert same_tensors(saved_tensors(out / "hf"), sliced(saved_tensors(folder), SIZES["head_dim"], keep))
    plain = hf_model(out / "hf")
    assert plain.num_parameters() == ranks[0][2].num_parameters()
    with torch.no_grad():
        assert (plain(tokens_of(61, 2, 12)).logits - of_last_stage([found[1] for found in ranks])).abs().max() < 1e-4


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(pp=2)], ids=str)
def test_rounds_are_those_of_a_loop_over_plain_models(layout, folder, text, expected, tmp_path):
    compare(layout, folder, text, tmp_path, expected["activation"], "activation")


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("criterion", MEASURES)
@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(tp=2, pp=2, sp=True), Layout(tp=2, dp=2), Layout(pp=2, vpp=2)], ids=str)
def test_rounds_at_further_layouts(layout, criterion, folder, text, expected, tmp_path):
    compare(layout, folder, text, tmp_path, expected[criterion], criterion)


def test_measuring_again_decides_otherwise(folder, expected):
    """The rounds are no detour: one cut by the first scores keeps other units."""
    arch = open_folder(folder, "model.path").arch
    scores = {name: torch.from_numpy(score) for name, score in magnitudes(folder, config_of(**SIZES, **UNTIED)).items()}
    once = select(scores, arch, target_arch(arch, TARGET, Parallel()))
    assert not same_tensors(once.tensors(), expected["magnitude"].tensors())


def test_two_cuts_keep_what_their_numbers_say(folder):
    """Numbers themselves are cut, as if they were the units."""
    arch = open_folder(folder, "model.path").arch
    first_target, target = way(arch, target_arch(arch, TARGET, Parallel()), 2)
    first = select(random_scores(arch, 1), arch, first_target)
    second = select(random_scores(first_target, 2), first_target, target)
    keep = both(first, second)
    assert keep.layers.tolist() == [int(first.layers[place]) for place in second.layers]
    for place in map(int, second.layers):
        layer = int(first.layers[place])
        assert keep.heads[layer].tolist() == [first.heads[layer].tolist()[place] for place in second.heads[place]]
        assert {head // arch.heads_per_group for head in keep.heads[layer].tolist()} == {*keep.groups[layer].tolist()}
        assert keep.ffn[layer].tolist() == [first.ffn[layer].tolist()[unit] for unit in second.ffn[place]]
    assert len(keep.ffn) == target.num_layers


def test_places_of_units_that_lie_out_of_order(folder):
    arch = open_folder(folder, "model.path").arch
    keep = select(random_scores(arch, 1), arch, target_arch(arch, TARGET, Parallel()))
    layer = int(keep.layers[0])
    order = np.array([40, 7, 12])  # of groups that have other numbers elsewhere: 2, 0, 1
    laid = as_laid(keep, {f"groups.{layer}": order, f"ffn.{layer}": np.arange(60)[::-1]}, arch)
    assert laid.ffn[layer].tolist() == sorted(59 - keep.ffn[layer])
    places = {2: 0, 0: 1, 1: 2}
    assert laid.groups[layer].tolist() == sorted(places[int(group)] for group in keep.groups[layer])
    assert sorted(laid.heads[layer].tolist()) == sorted(places[int(head) // 4] * 4 + int(head) % 4 for head in keep.heads[layer])
    assert laid.heads[layer].tolist() == sorted(laid.heads[layer].tolist())
    assert as_laid(keep, {}, arch).tensors().keys() == keep.tensors().keys()


@pytest.mark.parametrize(
    ("target", "parallel", "line"),
    [
        (Target(num_layers=4, rounds=3), Parallel(), "target.rounds=3: a round would cut nothing: at most 2 with these targets"),
        (Target(ffn_hidden_size=[60, 60, 60, 60, 60, 24], rounds=2), Parallel(), "target.rounds=2: 1 is needed with sizes that differ"),
        (Target(num_attention_heads=6, rounds=2, merge_heads=True), Parallel(), "target.merge_heads=true: must be false with target.rounds above 1"),
        (Target(ffn_hidden_size=36, rounds=3), Parallel(tp=3), "target.rounds=3: comes to ffn_hidden_size=52 on the way, which parallel.tp=3"),
    ],
)  # fmt: skip
def test_refusals(target, parallel, line, folder):
    arch = open_folder(folder, "model.path").arch
    with pytest.raises(RequestError) as caught:
        check_rounds(arch, target_arch(arch, target, parallel), target, parallel)
    assert str(caught.value).startswith(line)


def test_layers_by_loss_need_what_the_first_round_drops(folder):
    arch = open_folder(folder, "model.path").arch
    target = Target(num_layers=2, rounds=2, layers_by="block")
    with pytest.raises(RequestError, match=r"calibrate\.skip_layers=2 is needed with it"):
        check_ways(arch, target_arch(arch, target, Parallel()), target, [4])
    check_ways(arch, target_arch(arch, target, Parallel()), target, [2, 4])


def test_magnitudes_of_a_cut_model_are_in_ascending_order(folder, alone):
    """On one rank nothing lies out of order, so the scores of a model with an order of its own are those of the plain one, sorted."""
    from minitron.weights.load import load

    model = load(open_folder(folder, "model.path"), alone, torch.float32)
    plain = magnitude_scores(model, alone)
    model.unit_order = {"groups.2": np.array([2, 0, 1]), "ffn.1": np.arange(60)[::-1].copy()}
    found = magnitude_scores(model, alone)
    assert torch.equal(found["ffn.1"], plain["ffn.1"].flip(0))
    assert torch.equal(found["groups.2"], plain["groups.2"][[1, 2, 0]])
    assert torch.equal(found["heads.2"], plain["heads.2"].view(3, 4)[[1, 2, 0]].flatten())
