"""Layouts that fit machines: held against what a run itself refuses, and against every other."""

import dataclasses
import itertools

import pytest

from minitron.arch.arch import Arch
from minitron.checks import check_lengths
from minitron.config.planning import Planning
from minitron.config.schema import Config, Distill, Hidden, Parallel, Teacher, TeacherParallel, Train
from minitron.engine.parallel import check_layout as check_ranks
from minitron.errors import RequestError
from minitron.launching.cost import GIB
from minitron.launching.layouts import RULES, check, divisors, lightest, obstacle, ranked, usable_bytes, variants
from minitron.launching.memory import memory
from minitron.launching.traffic import Training
from minitron.pruning.target import check_layout

TEACHER = Arch(family="llama", num_layers=6, hidden_size=48, ffn_hidden_size=36, num_attention_heads=6, num_query_groups=3, kv_channels=8,
               vocab_size=61, max_position_embeddings=64)  # fmt: skip
STUDENT = TEACHER.replace(num_layers=4, hidden_size=40, ffn_hidden_size=24)
TRAIN = Train(steps=5, global_batch_size=24, seq_length=24, warmup_steps=1, eval_tokens=96)

PLAN = Planning()


def training(world, train=TRAIN, its=(None, None), plan=PLAN, **layout):
    cfg = Config(parallel=Parallel(**layout), train=train, teacher=Teacher(parallel=TeacherParallel(*its)), plan=plan)
    return Training(STUDENT, TEACHER, cfg, world)


def refused(action):
    try:
        action()
    except RequestError as error:
        return str(error)
    return None


def test_the_rules_are_those_of_a_run(monkeypatch):
    """Every layout of 1 to 12 processes: refused where a run would refuse it, in the same words where these speak of the same."""
    outcomes = {True: 0, False: 0}
    for world, tp, pp, vpp, sp, cp, size in itertools.product((1, 4, 6, 12), (1, 2, 3, 5), (1, 2, 3), (1, 2), (False, True), (1, 2), (1, 4)):
        one = training(world, dataclasses.replace(TRAIN, micro_batch_size=size), tp=tp, pp=pp, vpp=vpp, sp=sp, cp=cp)
        monkeypatch.setenv("WORLD_SIZE", str(world))
        reasons = [
            refused(lambda one=one: check_ranks(one.layout, one.world_size)),
            refused(lambda one=one: check_layout(STUDENT, one.layout, "the student's")),
            refused(lambda one=one: check_layout(TEACHER, one.layout, "the teacher's")),
            refused(lambda one=one: check_lengths(one.cfg, "distill")),
        ]
        mine = refused(lambda one=one: check(one))
        assert (mine is None) == (reasons == [None] * 4) == (obstacle(one) is None), (one.layout, mine, reasons)
        outcomes[mine is None] += 1
    assert min(outcomes.values()) > 40


def test_a_layout_of_the_teachers_own_must_go_round_too():
    assert refused(lambda: check(training(4, tp=2, its=(4, 1)))) is None
    assert refused(lambda: check(training(4, tp=2, its=(3, 1)))).startswith(
        "teacher.parallel.tp=3: tp x pp x cp = 3 must divide the number of GPUs, 4"
    )


def test_hidden_states_are_not_compared_over_layouts():
    one = training(4, tp=2, its=(4, 1))
    compared = dataclasses.replace(one.cfg, distill=Distill(hidden=Hidden(enabled=True)))
    assert refused(lambda: check(dataclasses.replace(one, cfg=compared))).startswith("distill.hidden.enabled=true: hidden states can't be compared")


def test_all_that_fits_is_found_and_the_fastest_comes_first():
    one = training(8, plan=Planning(nodes=1, micro_batch_sizes=[1, 3]))
    found = ranked(one)
    layouts = {(row.layout["tp"], row.layout["pp"], row.layout["vpp"], row.layout["sp"], row.layout["micro_batch_size"]) for row in found.fitting}
    by_hand = set()
    for tp, pp, vpp, sp, size in itertools.product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8), (False, True), (1, 3)):
        two = training(8, dataclasses.replace(TRAIN, micro_batch_size=size), tp=tp, pp=pp, vpp=vpp, sp=sp)
        if refused(lambda two=two: check(two)) is None:
            by_hand.add((tp, pp, vpp, sp, size))
    assert layouts == by_hand
    assert len(layouts) == len(found.fitting) > 10
    assert found.tried == len(found.fitting) + sum(found.fell.values())
    assert set(found.fell) <= set(RULES)
    times = [row.step_seconds for row in found.fitting]
    assert times == sorted(times)
    assert all(row.layout["recompute"] == "none" for row in found.fitting)


def test_of_what_recompute_saves_the_least_is_taken():
    one = training(1, dataclasses.replace(TRAIN, micro_batch_size=24))
    held = {}
    for recompute in ("none", "selective", "full"):
        cfg = dataclasses.replace(one.cfg, train=dataclasses.replace(one.cfg.train, recompute=recompute))
        held[recompute] = max(rank.total for rank in memory(STUDENT, TEACHER, cfg, 1, "cuda"))
    assert held["full"] < held["selective"] < held["none"]
    for recompute, limit in held.items():
        found, ranks = lightest(one, limit)
        assert (found.cfg.train.recompute, max(rank.total for rank in ranks)) == (recompute, limit)
    assert lightest(one, held["full"] - 1) is None
    assert lightest(dataclasses.replace(one, cfg=dataclasses.replace(one.cfg, train=dataclasses.replace(one.cfg.train, recompute="full"))),
                    held["none"])[0].cfg.train.recompute == "full"  # fmt: skip


def test_what_no_gpu_can_hold_is_told():
    found = ranked(training(4, plan=Planning(nodes=1, gpus_per_node=4, memory_gib=0.01)))
    assert found.fitting == []
    assert found.fell["more than 0.0 GiB on a rank, even with train.recompute=full"] > 0


def test_a_reserve_is_left_free():
    assert usable_bytes(Config(plan=Planning(memory_gib=10, reserve=0.2))) == pytest.approx(8 * GIB)


def test_tensor_ranks_stay_inside_a_machine():
    assert {cfg.parallel.tp for cfg in variants(training(32, plan=Planning(nodes=8, gpus_per_node=4)))} == {1, 2, 4}
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
