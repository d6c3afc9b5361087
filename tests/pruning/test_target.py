"""Sizes that can be pruned to, and those that are refused in one line that names the setting."""

import pytest

from minitron.arch.families import from_hf
from minitron.config.schema import Parallel, Target
from minitron.errors import RequestError
from minitron.pruning.target import check_layout, check_rounds, check_smaller, check_ways, target_arch
from tests.oracles.experts import MODELS as EXPERTS
from tests.oracles.models import BIASES, config_of

ARCH = from_hf(
    config_of(num_attention_heads=12, num_key_value_heads=4, head_dim=8, hidden_size=96, intermediate_size=240, num_hidden_layers=6).to_dict(), "x"
)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"num_layers": 7}, "target.num_layers=7: the model has 6: pruning can only make it smaller"),
        ({"hidden_size": 97}, "target.hidden_size=97: the model has 96"),
        ({"ffn_hidden_size": 10**9}, "target.ffn_hidden_size=1000000000: the model has 240"),
        ({"num_attention_heads": 13}, "target.num_attention_heads=13: the model has 12"),
        ({"num_query_groups": 5}, "target.num_query_groups=5: the model has 4"),
        ({"hidden_size": 1.0}, "target.hidden_size=1.0: a whole number, or a fraction below 1, is needed"),
        ({"ffn_hidden_size": 1.5}, "target.ffn_hidden_size=1.5: a whole number, or a fraction below 1"),
        ({"num_layers": 3.0}, "target.num_layers=3.0: a whole number, or a fraction below 1"),
        ({"num_attention_heads": 10}, "target.num_attention_heads=10: every KV group keeps the same number of heads: a multiple of 4 is needed"),
        ({"num_attention_heads": 4, "num_query_groups": 3}, "target.num_attention_heads=4: .*a multiple of 3 is needed"),
        ({"num_attention_heads": 12, "num_query_groups": 2}, "target.num_attention_heads=12: a KV group has 3 heads: at most 6"),
        ({"num_attention_heads": 0.6}, "^target.num_attention_heads=0.6: comes to 7: every KV group keeps the same number of heads: a multiple of 4"),
        ({"num_attention_heads": 0.5, "num_query_groups": 0.25}, "^target.num_attention_heads=0.5: comes to 6: a KV group has 3 heads: at most 3$"),
        ({"num_moe_experts": 4}, "target.num_moe_experts=4: must be null: this model has no experts"),
    ],
    ids=str,
)
def test_impossible_targets(target, said):
    with pytest.raises(RequestError, match=said) as refusal:
        target_arch(ARCH, Target(**target), Parallel())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("target", "parallel", "said"),
    [
        ({"ffn_hidden_size": 63}, {"tp": 2}, "target.ffn_hidden_size=63: must be divisible by parallel.tp=2"),
        ({"hidden_size": 48}, {"tp": 7}, "^parallel.tp=7: must divide the model's ffn_hidden_size=240$"),
        ({"ffn_hidden_size": 0.26}, {"tp": 5}, "^target.ffn_hidden_size=0.26: comes to 64: must be divisible by parallel.tp=5$"),
        ({"num_layers": 3}, {"pp": 4}, "^parallel.pp=4: stages need a layer each: at most the target's number of layers, 3$"),
        ({"num_layers": 3}, {"pp": 2, "vpp": 2}, "^parallel.vpp=2: pp x vpp = 4 stages need a layer each: at most the target's number of layers, 3$"),
        ({"hidden_size": 48}, {"pp": 7}, "^parallel.pp=7: stages need a layer each: at most the model's number of layers, 6$"),
        ({"hidden_size": 48}, {"tp": 60}, "^parallel.tp=60: the last rank would have none of the 61 tokens of the vocabulary$"),
    ],
    ids=str,
)
def test_targets_that_do_not_divide_over_the_ranks(target, parallel, said):
    with pytest.raises(RequestError, match=said):
        target_arch(ARCH, Target(**target), Parallel(**parallel))


# 6 experts, of 28 neurons and 2 for a token; of 20 and 2, with a shared one of 24, and dense blocks of 36
MIXTRAL, QWEN = (from_hf(EXPERTS[name].to_dict(), "x") for name in ("mixtral", "qwen2_moe"))


@pytest.mark.parametrize(
    ("arch", "target", "parallel", "said"),
    [
        (ARCH, {"moe_ffn_hidden_size": 8}, {}, "^target.moe_ffn_hidden_size=8: must be null: this model has no experts$"),
        (ARCH, {"moe_shared_expert_intermediate_size": 8}, {}, "must be null: this model has no experts$"),
        (ARCH, {"hidden_size": 48}, {"ep": 2}, "^parallel.ep=2: must be 1: the model's blocks have no experts$"),
        (MIXTRAL, {"moe_shared_expert_intermediate_size": 8}, {}, "must be null: this model has no shared expert$"),
        (MIXTRAL, {"ffn_hidden_size": 8}, {}, "^target.ffn_hidden_size=8: must be null: .* target.moe_ffn_hidden_size is of its experts$"),
        (MIXTRAL, {"num_moe_experts": 7}, {}, "^target.num_moe_experts=7: the model has 6: pruning can only make it smaller$"),
        (MIXTRAL, {"num_moe_experts": 1}, {}, "^target.num_moe_experts=1: a token goes to moe_router_topk=2 of them: at least so many must stay$"),
        (MIXTRAL, {"num_moe_experts": 0.1}, {}, "^target.num_moe_experts=0.1: comes to 1: a token goes to moe_router_topk=2 of them"),
        (MIXTRAL, {"num_moe_experts": 3}, {"ep": 2}, "^target.num_moe_experts=3: must be divisible by parallel.ep=2$"),
        (MIXTRAL, {"num_moe_experts": 4}, {"ep": 4}, "^parallel.ep=4: must divide the model's num_moe_experts=6$"),
        (MIXTRAL, {"moe_ffn_hidden_size": 27}, {"tp": 2}, "^target.moe_ffn_hidden_size=27: must be divisible by parallel.tp=2$"),
        (QWEN, {"moe_shared_expert_intermediate_size": 7}, {"tp": 2}, "_expert_intermediate_size=7: must be divisible by parallel.tp=2$"),
        (QWEN, {"ffn_hidden_size": 35}, {"tp": 2}, "^target.ffn_hidden_size=35: must be divisible by parallel.tp=2$"),
    ],
    ids=str,
)
def test_impossible_targets_of_experts(arch, target, parallel, said):
    with pytest.raises(RequestError, match=said):
        target_arch(arch, Target(**target), Parallel(**parallel))


def test_sizes_of_experts():
    target = Target(num_moe_experts=0.5, moe_ffn_hidden_size=0.6, moe_shared_expert_intermediate_size=0.4, ffn_hidden_size=24, num_layers=3)
    sizes = {"num_moe_experts": 3, "moe_ffn_hidden_size": 16, "moe_shared_expert_intermediate_size": 8, "ffn_hidden_size": 24, "num_layers": 3}
    arch = target_arch(QWEN, target, Parallel())
    assert arch == QWEN.replace(**sizes)
    assert arch.moe_layers == (True, False, True)
    with pytest.raises(RequestError, match=r"target.num_moe_experts=6: nothing to prune"):
        check_smaller(MIXTRAL, target_arch(MIXTRAL, target := Target(num_moe_experts=6), Parallel()), target)
    with pytest.raises(RequestError, match=r"target.rounds=2: comes to num_moe_experts=5 on the way, which parallel.ep=2 must divide"):
        check_rounds(MIXTRAL, MIXTRAL.replace(num_moe_experts=4, num_layers=2), Target(num_moe_experts=4, num_layers=2, rounds=2), Parallel(ep=2))


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ({"tp": 4, "sp": True}, "^parallel.tp=4: must divide the model's moe_ffn_hidden_size=18$"),
        ({"tp": 9, "sp": True}, "^parallel.tp=9: must divide the model's moe_shared_expert_intermediate_size=30$"),
        ({"ep": 4}, "^parallel.ep=4: must divide the model's num_moe_experts=6$"),
    ],
    ids=str,
)
def test_experts_that_do_not_divide_over_the_ranks(layout, said):
    arch = ARCH.replace(num_moe_experts=6, moe_router_topk=2, moe_ffn_hidden_size=18, moe_shared_expert_intermediate_size=30)
    check_layout(arch, Parallel(tp=2, ep=3), "the model's")  # of no use to it is the size of an MLP, as every block has experts
    check_layout(arch.replace(ffn_hidden_size=7), Parallel(tp=2), "the model's")
    with pytest.raises(RequestError, match=said):
        check_layout(arch, Parallel(**layout), "the model's")
    with pytest.raises(RequestError, match=r"^parallel.tp=2: must divide the model's ffn_hidden_size=7$"):
        check_layout(arch.replace(ffn_hidden_size=7, moe_layers=(True, False) * 3), Parallel(tp=2), "the model's")
    with pytest.raises(RequestError, match=r"^teacher.parallel.ep=2: must be 1: the teacher's blocks have no experts$"):
        check_layout(ARCH, Parallel(ep=2), "the teacher's", "teacher.parallel")


def test_a_width_that_transformers_cannot_load_is_refused_before_any_work():
    biased = from_hf(config_of(**BIASES).to_dict(), "x")
    with pytest.raises(RequestError, match="hidden_size=40, num_attention_heads=6, num_query_groups=3: transformers loads no such llama model"):
        target_arch(biased, Target(hidden_size=40), Parallel())
    assert target_arch(biased, Target(hidden_size=42), Parallel()).hidden_size == 42


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"hidden_size": 96}, "^target.hidden_size=96: nothing to prune: the model has these sizes already$"),
        ({"hidden_size": 96, "num_layers": 6}, "^target.num_layers=6: nothing to prune: "),
        ({"ffn_hidden_size": 0.999}, "^target.ffn_hidden_size=0.999: comes to 240: nothing to prune: "),
        ({"num_query_groups": [4] * 6}, r"^target.num_query_groups=\[4, 4, 4, 4, 4, 4\]: 4 in it: nothing to prune: "),
    ],
    ids=str,
)
def test_a_target_that_leaves_nothing_to_prune(target, said):
    target = Target(**target)
    with pytest.raises(RequestError, match=said):
        check_smaller(ARCH, target_arch(ARCH, target, Parallel()), target)


def test_any_size_that_is_smaller_is_something_to_prune():
    for sizes in ({"hidden_size": 95, "num_layers": 6}, {"num_query_groups": [4] * 5 + [3]}):
        check_smaller(ARCH, target_arch(ARCH, target := Target(**sizes), Parallel()), target)


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ({}, {}),
        ({"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 100}, {"num_layers": 3, "hidden_size": 64, "ffn_hidden_size": 100}),
        ({"num_attention_heads": 8}, {"num_attention_heads": 8}),
        ({"num_query_groups": 2}, {"num_query_groups": 2, "num_attention_heads": 6}),  # whole groups go, with their heads
        ({"num_query_groups": 3, "num_attention_heads": 6}, {"num_query_groups": 3, "num_attention_heads": 6}),
        ({"hidden_size": 0.5, "ffn_hidden_size": 0.5}, {"hidden_size": 48, "ffn_hidden_size": 120}),
        ({"hidden_size": 0.66}, {"hidden_size": 64}),  # 63.4 rounded to a multiple of 8
        ({"hidden_size": 0.66, "multiple_of": 1}, {"hidden_size": 63}),
        ({"hidden_size": 0.01}, {"hidden_size": 8}),  # never nothing
        ({"ffn_hidden_size": 0.999, "multiple_of": 64}, {"ffn_hidden_size": 240}),  # never more than there is
        ({"num_layers": 0.5}, {"num_layers": 3}),
        ({"num_layers": 0.9}, {"num_layers": 5}),
        ({"num_query_groups": 0.5}, {"num_query_groups": 2, "num_attention_heads": 6}),
    ],
    ids=str,
)
def test_sizes_and_fractions(target, sizes):
    assert target_arch(ARCH, Target(**target), Parallel()) == ARCH.replace(**sizes)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ({"hidden_size": 48, "merge_heads": True}, "target.merge_heads=true: no KV group loses query heads"),
        ({"hidden_size": 48, "layers_by": "loss"}, "target.layers_by=loss: no layers are cut"),
        ({"num_layers": 4, "layers_by": "loss"}, "target.layers_by=loss: calibrate.skip_layers=1 is needed with it"),
        ({"num_layers": 4, "layers_by": "block"}, "target.layers_by=block: calibrate.skip_layers=2 is needed with it"),
    ],
    ids=str,
)
def test_ways_of_cutting_that_have_nothing_to_do_or_nothing_to_go_by(target, said):
    wanted = Target(**target)
    with pytest.raises(RequestError, match=said):
        check_ways(ARCH, target_arch(ARCH, wanted, Parallel()), wanted, [])
    wanted = Target(num_layers=4, layers_by="block_choices")
    with pytest.raises(RequestError, match=r"target.layers_by=block_choices: calibrate.choices is needed with it"):
        check_ways(ARCH, target_arch(ARCH, wanted, Parallel()), wanted, [2])
    check_ways(ARCH, target_arch(ARCH, wanted, Parallel()), wanted, [2], "allenai/winogrande")
    check_ways(ARCH, target_arch(ARCH, Target(num_layers=4), Parallel()), Target(num_layers=4, layers_by="block"), [1, 2])
