"""What the report shows of models with experts."""

from xml.etree import ElementTree

import pytest

from minitron.arch import Arch
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.reporting.pictures import blueprint, importance_pictures
from minitron.reporting.wording import changes

SIZES = {"num_moe_experts": 6, "moe_router_topk": 2, "moe_ffn_hidden_size": 12, "moe_shared_expert_intermediate_size": 20}
ALL = Arch("qwen2_moe", 4, 32, 40, 4, 2, 8, 64, 64, **SIZES)
SMALLER = {"num_layers": 3, "num_moe_experts": 4, "moe_ffn_hidden_size": 8, "moe_shared_expert_intermediate_size": 16}


@pytest.mark.parametrize(
    ("original", "drawn"),
    [(ALL, ["Experts"]), (ALL.replace(moe_layers=(True, False, True, True)), [])],
    ids=["experts in every block", "a dense block among them"],
)
def test_experts_are_drawn_and_told(original, drawn):
    pruned, scores = original.replace(**SMALLER), random_scores(original, 3)
    keep = {name: units.numpy() for name, units in select(scores, original, pruned).tensors().items()}
    pictures = importance_pictures({name: score.numpy() for name, score in scores.items()}, keep)
    assert [picture.title for picture in pictures if picture.title in ("Experts", "MLP neurons")] == drawn
    plan = blueprint(original, pruned, keep)
    for picture in (plan, *pictures):
        assert ElementTree.fromstring(picture.svg).tag == "{http://www.w3.org/2000/svg}svg"
    assert ">experts</text>" in plan.svg and ">6 → 4</text>" in plan.svg
    assert (">MLP neurons</text>" in plan.svg) == original.has_dense_blocks


def test_sizes_of_experts_are_told():
    said = ["layers 4 -> 3", "experts per layer 6 -> 4", "neurons per expert 12 -> 8", "neurons of the shared expert 20 -> 16"]
    assert changes(ALL, ALL.replace(**SMALLER)) == said
    assert changes(ALL, ALL.replace(ffn_hidden_size=8)) == []  # no block has such neurons
