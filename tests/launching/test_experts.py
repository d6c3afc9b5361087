"""Plans of models with experts: published ones by their counts, the layouts that share experts out, and what these change."""

import dataclasses
import functools

import pytest
from rich.console import Console

from minitron.arch.counts import count
from minitron.config.compose import compose
from minitron.config.layout import check_expert_ranks
from minitron.config.planning import Planning
from minitron.config.schema import Parallel
from minitron.errors import RequestError
from minitron.launching.activations import Pass, block_bytes
from minitron.launching.cost import Cluster, block_flops, estimate, least_seconds
from minitron.launching.layouts import check, obstacle, variants
from minitron.launching.traffic import Traffic, Training, traffic
from minitron.reporting.plan import show_plan
from minitron.stages.plan import planned, shape_of

MODELS = {"qwen3_30b_a3b": (30.5, 3.3), "mixtral_8x7b": (46.7, 12.9)}  # billions of parameters, and of those that a token makes use of


def plan_of(model, *settings):
    cfg = compose("plan", [f"model={model}", "train.seq_length=4096", "train.global_batch_size=64", "train.micro_batch_size=1", *settings])
    return cfg, planned(shape_of(cfg), cfg)


@pytest.mark.parametrize("model", MODELS)
def test_published_models_have_the_published_counts(model):
    cfg, plan = plan_of(model, "target.num_layers=16", "plan.nodes=8", "plan.layouts=0", "parallel.ep=8")
    total, active = MODELS[model]
    assert round(plan.original.costs["params"] / 1e9, 1) == total
    assert plan.original.costs["active_params"] / 1e9 == pytest.approx(active, abs=0.06)  # the first was cut off after this digit
    assert plan.models[0].costs["active_params"] < plan.original.costs["active_params"]
    (run,) = plan.launch["runs"]
    assert run["layout"]["ep"] == 8 and run["seconds"]["experts"] > 0
    assert {"student's tokens for experts", "teacher's tokens for experts", "experts' gradients"} <= {one["what"] for one in run["traffic"]}
    assert run["flops"] == pytest.approx(
        64 * 4096 * (3 * count(plan_arch(cfg, 16), 4096).flops_per_token + count(shape_of(cfg), 4096).flops_per_token)
    )
    with (console := Console(width=150, force_terminal=False)).capture() as capture:
        show_plan(plan, console=console)
    assert (
        "active" in capture.get()
        and all(
            f"{name}: {plan.arch.num_moe_experts:,} experts of {plan.arch.moe_ffn_hidden_size:,}" in capture.get() for name in ("original", "target")
        )
        and "8 expert ranks" in capture.get()
        and "MLP" not in capture.get().split("on 64 x H100")[0]
    )


def plan_arch(cfg, layers):
    return shape_of(cfg).replace(num_layers=layers)


@functools.cache
def training(model="qwen3_30b_a3b", world=16, **layout):
    settings = [f"parallel.{name}={str(size).lower()}" for name, size in layout.items()]
    cfg = compose("plan", [f"model={model}", "train.global_batch_size=64", "train.seq_length=4096", "train.micro_batch_size=1", *settings])
    arch = shape_of(cfg).replace(num_layers=8)
    return Training(arch, arch, dataclasses.replace(cfg, plan=Planning(nodes=world // 8)), world)


def test_layouts_share_experts_out_in_every_way_that_divides():
    ways = {(cfg.parallel.tp, cfg.parallel.pp, cfg.parallel.ep) for cfg in variants(training())}
    assert {ep for tp, pp, ep in ways if (tp, pp) == (1, 1)} == {1, 2, 4, 8, 16}
    assert {ep for tp, pp, ep in ways if (tp, pp) == (2, 4)} == {1, 2}
    dense = training()
    dense = dataclasses.replace(dense, student=dense.student.layer(0).replace(**DENSE), teacher=None)
    assert {cfg.parallel.ep for cfg in variants(dense)} == {1}


DENSE = {"num_moe_experts": None, "moe_router_topk": None, "moe_ffn_hidden_size": None}


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"ep": 3}, r"^parallel.ep=3: must divide dp x cp = 16, the processes over tp x pp$"),
        ({"ep": 16, "tp": 2}, r"^parallel.ep=16: must divide dp x cp = 8, the processes over tp x pp$"),
    ],
)
def test_expert_ranks_that_do_not_go_are_refused(layout, message):
    one = training(**layout)
    with pytest.raises(RequestError, match=message):
        check(one)
    assert "ep" in obstacle(one)
    uneven = training("mixtral_8x7b", ep=16)
    with pytest.raises(RequestError, match=r"parallel.ep=16: must divide the student's num_moe_experts=8"):
        check(uneven)


def test_expert_ranks_and_context_ranks_that_overlap_are_refused():
    """Groups that are neither inside of each other nor apart wait for each other in turn."""
    for cp, ep in [(1, 4), (2, 2), (4, 2), (2, 6), (3, 6), (6, 3), (3, 1)]:
        check_expert_ranks(Parallel(cp=cp, ep=ep), 24)
    for cp, ep in [(3, 2), (2, 3), (4, 6), (6, 4)]:
        with pytest.raises(RequestError, match=rf"^parallel.ep={ep}: must divide parallel.cp={cp} or be a multiple of it$"):
            check_expert_ranks(Parallel(cp=cp, ep=ep), 24)
    assert {cfg.parallel.ep for cfg in variants(training(world=24, cp=3)) if (cfg.parallel.tp, cfg.parallel.pp) == (1, 1)} == {1}
    assert {cfg.parallel.ep for cfg in variants(training(world=16, cp=4)) if (cfg.parallel.tp, cfg.parallel.pp) == (1, 1)} == {1, 2, 4, 8, 16}


def test_arithmetic_is_that_of_the_experts_of_a_token():
    arch = training().student
    whole, _, mlp = block_flops(arch.layer(0), 1, 4096)
    assert mlp == 2 * 3 * 2048 * 8 * 768
    dense = arch.layer(0).replace(**DENSE, ffn_hidden_size=8 * 768)
    assert whole - block_flops(dense, 1, 4096)[0] == 2 * 128 * 2048  # the router
    assert (
        least_seconds([arch.layer(0)], training().layout)
        > least_seconds([arch.layer(0)], training(ep=8).layout)
        > least_seconds([dense], training().layout)
    )


def test_all_to_all_goes_through_each_gpus_own_card():
    one, cluster = training(ep=16), Cluster.of(Planning(nodes=2), "bf16")
    here, far = (cluster.link("ep", ranks, one.layout, 16, ring=False) for ranks in (8, 16))
    assert here[0] == "nvlink" and far[0] == "network"
    assert far[1] == 1e9 * 50 * 0.8 < cluster.link("dp", 16, one.layout, 16)[1]
    assert Traffic("x", "all-to-all", "ep", 4, 1, 1000).sent == 750


def test_expert_ranks_trade_memory_for_traffic():
    cluster = Cluster.of(Planning(nodes=2), "bf16")
    alone, shared = (estimate(training(ep=ep), cluster) for ep in (1, 8))
    assert shared.peak_bytes < 0.6 * alone.peak_bytes
    assert alone.seconds["experts"] == 0 < shared.seconds["experts"]


def test_sequence_parallel_ranks_send_a_part_of_the_tokens_each():
    plain, parted = (training(tp=2, ep=4, sp=sp) for sp in (False, True))

    def bytes_of(one, operation):
        return sum(found.bytes for found in traffic(one, 0) if (found.what, found.operation) == ("student's tokens for experts", operation))

    assert bytes_of(parted, "all-to-all") == bytes_of(plain, "all-to-all") / 2
    assert bytes_of(plain, "all-gather") == 0 < bytes_of(parted, "all-gather")
    assert {one.ranks for one in traffic(parted, 0) if one.what == "numbers of tokens by expert"} == {8}
    way = Pass(1, 4096, 2, 1, False, 2, "cuda")
    block = plain.student.layer(0)
    assert block_bytes(block, dataclasses.replace(way, sequence_parallel=True)).kept < block_bytes(block, way).kept


def test_without_machines_as_many_gpus_are_planned_as_share_the_experts_out():
    (run,) = plan_of("mixtral_8x7b", "target.num_layers=16", "parallel.ep=4")[1].launch["runs"]
    assert run["gpus"] == 4
