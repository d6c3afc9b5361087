"""Which units stay, against a ranking by sorting pairs."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.arch.arch import Arch
from minitron.errors import RequestError
from minitron.importance.scores import expected_shapes, random_scores
from minitron.pruning.keep import Keep, select
from minitron.pruning.rounds import both
from tests.oracles.slicing import best


@st.composite
def requests(draw):
    """An architecture, a smaller one, and scores of which many are equal."""
    groups, per_group = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    original = Arch("llama", draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 9)), groups * per_group, groups, 2, 8, 8)
    new_groups = draw(st.integers(1, groups))
    target = original.replace(
        num_layers=draw(st.integers(1, original.num_layers)),
        hidden_size=draw(st.integers(1, original.hidden_size)),
        ffn_hidden_size=draw(st.integers(1, original.ffn_hidden_size)),
        num_query_groups=new_groups,
        num_attention_heads=new_groups * draw(st.integers(1, per_group)),
    )
    draw_scores = st.integers(-2, 2).map(float)
    scores = {name: torch.tensor(draw(st.lists(draw_scores, min_size=size, max_size=size))) for name, (size,) in expected_shapes(original).items()}
    return original, target, scores


@given(requests())
def test_the_best_units_stay_and_of_equals_the_first(request):
    original, target, scores = request
    keep = select(scores, original, target)
    plain = {name: tensor.tolist() for name, tensor in scores.items()}
    layers = best(plain["layers.bi"], target.num_layers)
    assert keep.layers.tolist() == layers
    assert keep.hidden.tolist() == best(plain["hidden"], target.hidden_size)
    assert list(keep.ffn) == list(keep.groups) == list(keep.heads) == layers
    for layer in layers:
        assert keep.ffn[layer].tolist() == best(plain[f"ffn.{layer}"], target.ffn_hidden_size)
        groups = best(plain[f"groups.{layer}"], target.num_query_groups)
        heads = []
        for group in groups:
            members = list(range(group * original.heads_per_group, (group + 1) * original.heads_per_group))
            heads += best(plain[f"heads.{layer}"], target.heads_per_group, members)
        assert keep.groups[layer].tolist() == groups
        assert keep.heads[layer].tolist() == heads
        inside = keep.heads_in_groups(layer, original)
        assert inside.shape == (target.num_query_groups, target.heads_per_group)
        assert (inside + np.array(groups)[:, None] * original.heads_per_group).flatten().tolist() == heads


@given(requests())
def test_keeping_everything_keeps_everything(request):
    original, _, scores = request
    keep = select(scores, original, original)
    assert keep.hidden.tolist() == list(range(original.hidden_size))
    assert all(keep.heads[layer].tolist() == list(range(original.num_attention_heads)) for layer in range(original.num_layers))


def test_scores_that_are_not_finite_are_refused():
    original = Arch("llama", 2, 4, 4, 2, 1, 2, 8, 8)
    scores = {name: torch.ones(shape) for name, shape in expected_shapes(original).items()}
    scores["ffn.1"][2] = float("nan")
    with pytest.raises(RequestError, match=r"ffn.1"):
        select(scores, original, original.replace(ffn_hidden_size=2))


def test_the_file_holds_what_was_kept_under_the_names_of_the_scores(tmp_path):
    original = Arch("llama", 3, 6, 5, 4, 2, 2, 8, 8)
    scores = {name: torch.rand(shape, generator=torch.Generator().manual_seed(0)) for name, shape in expected_shapes(original).items()}
    keep = select(scores, original, original.replace(num_layers=2, hidden_size=3, ffn_hidden_size=2, num_attention_heads=2))
    keep.save(tmp_path / "keep.safetensors")
    again = Keep.load(tmp_path / "keep.safetensors")
    assert (
        again.tensors().keys()
        == keep.tensors().keys()
        == {"layers", "hidden", *(f"{a}.{n}" for a in ("ffn", "heads", "groups") for n in keep.layers)}
    )
    assert all(torch.equal(again.tensors()[name], units) for name, units in keep.tensors().items())


def test_a_file_that_is_no_keep_file_is_refused(tmp_path):
    (tmp_path / "keep.safetensors").write_bytes(b"nothing")
    with pytest.raises(RequestError, match=r"cannot read .*keep.safetensors.*minitron prune makes it"):
        Keep.load(tmp_path / "keep.safetensors")


def measured(layers, **values):
    """Scores of a model of which only the layers differ."""
    arch = Arch("llama", layers, 1, 1, 1, 1, 2, 8, 8)
    scores = {name: torch.zeros(size) for name, (size,) in expected_shapes(arch).items()}
    return arch, scores | {name.replace("_", "."): torch.tensor(tensor) for name, tensor in values.items()}


@pytest.mark.parametrize(
    ("by", "count", "kept"),
    [
        ("bi", 3, [0, 1, 2]),
        ("loss", 3, [0, 2, 4]),
        ("loss", 2, [0, 2]),  # of equal ones the first stays
        ("choices", 3, [0, 1, 4]),
        ("choices", 2, [0, 4]),  # as many right answers without 4 as without 1, and a higher loss
        ("block", 3, [0, 3, 4]),
        ("block_choices", 3, [0, 1, 4]),  # as many without 2 and 3 as without the first two, and a lower loss
        ("block_choices", 5, [0, 1, 2, 3, 4]),
    ],
)
def test_layers_by_what_is_missed_without_them(by, count, kept):
    arch, scores = measured(
        5, layers_loss_1=[9.0, 3.5, 4.0, 2.0, 4.0], layers_choices_1=[0.2, 0.5, 0.6, 0.7, 0.5], layers_loss_2=[9.0, 3.0, 4.0, 5.0],
        layers_choices_2=[0.4, 0.3, 0.4, 0.2],
    )  # fmt: skip
    assert select(scores, arch, arch.replace(num_layers=count), by).layers.tolist() == kept


@pytest.mark.parametrize(
    ("by", "count", "said"),
    [
        ("block", 2, "without 3 at a time: calibrate with calibrate.skip_layers=3"),
        ("loss", 2, "without 1 at a time: calibrate with calibrate.skip_layers=1"),
        ("block_choices", 3, "no questions were answered without 2 at a time: calibrate with calibrate.choices and calibrate.skip_layers=2"),
    ],
)
def test_layers_by_what_was_not_measured_are_refused(by, count, said):
    arch, scores = measured(5, layers_loss_2=[1.0, 2.0, 3.0, 4.0])
    with pytest.raises(RequestError, match=f"target.layers_by={by}: .*{said}"):
        select(scores, arch, arch.replace(num_layers=count), by)


EXPERTS = {"num_moe_experts": 5, "moe_router_topk": 2, "moe_ffn_hidden_size": 6, "moe_shared_expert_intermediate_size": 4}


def test_the_best_experts_stay_and_of_each_of_them_the_best_neurons(tmp_path):
    original = Arch("qwen2_moe", 3, 4, 8, 2, 1, 2, 8, 8, **EXPERTS, moe_layers=(True, False, True))
    target = original.replace(num_layers=2, ffn_hidden_size=5, num_moe_experts=3, moe_ffn_hidden_size=2, moe_shared_expert_intermediate_size=1)
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.randint(0, 4, shape, generator=generator).float() for name, shape in expected_shapes(original).items()}
    scores["layers.bi"] = torch.tensor([0.0, 1.0, 1.0])
    keep = select(scores, original, target)
    plain = {name: tensor.tolist() for name, tensor in scores.items()}
    assert (list(keep.ffn), list(keep.experts), list(keep.expert_ffn), list(keep.shared_ffn)) == ([1], [2], [2], [2])
    assert keep.ffn[1].tolist() == best(plain["ffn.1"], 5)
    assert keep.experts[2].tolist() == best(plain["experts.2"], 3)
    assert keep.expert_ffn[2].tolist() == [best(plain["expert_ffn.2"][expert], 2) for expert in keep.experts[2]]
    assert keep.shared_ffn[2].tolist() == best(plain["shared_ffn.2"], 1)
    keep.save(tmp_path / "keep.safetensors")
    again = Keep.load(tmp_path / "keep.safetensors").tensors()
    assert all(torch.equal(again[name], units) for name, units in keep.tensors().items())
    assert {"experts.2", "expert_ffn.2", "shared_ffn.2", "ffn.1"} <= again.keys()


def test_what_two_cuts_keep_of_experts_together():
    original = Arch("qwen2_moe", 3, 4, 8, 2, 1, 2, 8, 8, **EXPERTS)
    sizes = [original.replace(num_layers=layers, num_moe_experts=experts, moe_ffn_hidden_size=ffn) for layers, experts, ffn in ((3, 4, 5), (2, 2, 3))]
    first = select(random_scores(original, 1), original, sizes[0])
    second = select(random_scores(sizes[0], 2), *sizes)
    keep = both(first, second)
    for number, layer in enumerate(keep.layers.tolist()):
        assert layer == first.layers[second.layers[number]]
        place = int(second.layers[number])
        assert keep.experts[layer].tolist() == [first.experts[layer][expert] for expert in second.experts[place]]
        neurons = [[first.expert_ffn[layer][expert][unit] for unit in row]
                   for expert, row in zip(second.experts[place], second.expert_ffn[place], strict=True)]  # fmt: skip
        assert keep.expert_ffn[layer].tolist() == neurons
