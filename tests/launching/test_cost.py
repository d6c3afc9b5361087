"""Time and cost of a training: the arithmetic against counts made elsewhere, the pipeline against one that is played through."""

import dataclasses
import random

import pytest

from minitron.arch.counts import training_flops
from minitron.arch.families import from_hf
from minitron.config.planning import Planning
from minitron.config.schema import Config, Parallel, Teacher, TeacherParallel, Train
from minitron.hardware import MACHINES
from minitron.launching.cost import (
    BLOCK_SECONDS,
    CALL_SECONDS,
    LINK_SHARE,
    SECONDS,
    Cluster,
    estimate,
    pipeline,
    student_seconds,
    teacher_seconds,
    update_seconds,
)
from minitron.launching.traffic import Training, teacher_traffic, traffic
from tests.oracles.published import CONFIGS

STUDENT, TEACHER = (from_hf(CONFIGS[name], "x") for name in ("Llama-3.1-Minitron-4B-Width", "Llama-3.1-8B"))
TRAIN = Train(steps=100, global_batch_size=96, seq_length=4096)


def training(world=8, teacher=TEACHER, train=TRAIN, its=None, **layout):
    cfg = Config(parallel=Parallel(**layout), teacher=Teacher(parallel=TeacherParallel(**(its or {}))), train=train)
    return Training(STUDENT, teacher, cfg, world)


def cluster(**plan):
    return Cluster.of(Planning(**plan), "bf16")


def endless(machine):
    """Without links or memories that take time."""
    return dataclasses.replace(machine, machine=dataclasses.replace(machine.machine, hbm=1e30, nvlink=1e30, network=1e30))


@pytest.mark.parametrize("layout", [{}, {"tp": 4}, {"pp": 4}, {"tp": 2, "pp": 2, "vpp": 2}, {"cp": 2}, {"tp": 2, "its": {"tp": 1, "pp": 4}}], ids=str)
@pytest.mark.parametrize("teacher", [None, TEACHER], ids=["alone", "taught"])
def test_the_ranks_of_a_replica_do_the_models_arithmetic_between_them(layout, teacher):
    one, machine = training(teacher=teacher, **layout), endless(cluster())
    mine = sum(
        seconds["student"] + seconds["recompute"] + seconds["loss"]
        for stage in range(one.layout.pp)
        for seconds in [student_seconds(one, machine, stage, traffic(one, stage))]
    )
    its = 0.0
    if teacher is not None:
        stages = range(one.teacher_layout.pp)
        its = sum(teacher_seconds(one, machine, stage, teacher_traffic(one, stage))["teacher"] for stage in stages) * one.teacher_layout.tp
    flops = (mine * one.layout.tp + its) * machine.flops * one.layout.cp
    assert flops == pytest.approx(training_flops(STUDENT, 4096, teacher) * 4096, rel=1e-9)


def test_a_gpu_is_no_faster_than_its_kernels_are_started():
    small = training(train=dataclasses.replace(TRAIN, seq_length=64))
    assert student_seconds(small, endless(cluster()), 0, [])["student"] == 3 * 32 * BLOCK_SECONDS
    assert teacher_seconds(small, endless(cluster()), 0, [])["teacher"] == 32 * BLOCK_SECONDS


def test_what_is_made_once_more_is_a_forward_pass_of_the_blocks():
    machine = endless(cluster())
    parts = {
        recompute: student_seconds(one, machine, 0, traffic(one, 0))
        for recompute in ("none", "selective", "full")
        for one in [training(pp=2, train=dataclasses.replace(TRAIN, recompute=recompute))]
    }
    assert parts["none"]["recompute"] == 0 < parts["selective"]["recompute"] < parts["full"]["recompute"]
    assert parts["full"]["recompute"] == pytest.approx(parts["full"]["student"] / 3)


def played(forward, backward, microbatches):
    """When the last rank of a pipeline is done, each doing one forward and one backward in turn once it has run ahead (1F1B)."""
    stages = len(forward)
    orders = []
    for stage in range(stages):
        ahead = min(stages - stage - 1, microbatches)
        order = [("f", n) for n in range(ahead)]
        for n in range(microbatches - ahead):
            order += [("f", ahead + n), ("b", n)]
        orders.append(order + [("b", n) for n in range(microbatches - ahead, microbatches)])
    done, free = {}, [0.0] * stages
    while any(orders):
        for stage, order in enumerate(orders):
            while order:
                kind, number = order[0]
                before = (kind, number, stage - 1 if kind == "f" else stage + 1)
                if (kind == "f" and stage == 0) or (kind == "b" and stage == stages - 1):
                    before = ("f", number, stage) if kind == "b" else None
                if before is not None and before not in done:
                    break
                start = max(free[stage], done[before] if before is not None else 0.0)
                free[stage] = done[kind, number, stage] = start + (forward if kind == "f" else backward)[stage]
                order.pop(0)
    return max(free)


@pytest.mark.parametrize("stages", [1, 2, 4, 7])
@pytest.mark.parametrize("microbatches", [1, 3, 8, 20])
def test_a_pipeline_of_equal_stages_takes_what_one_played_through_takes(stages, microbatches):
    parts = pipeline([{"student": 3.0}] * stages, microbatches, 1)
    assert sum(parts.values()) == pytest.approx(played([1.0] * stages, [2.0] * stages, microbatches))
    assert parts["waiting"] == 3.0 * (stages - 1)


def test_a_pipeline_of_uneven_stages_takes_about_that():
    rng = random.Random(3)
    for _ in range(200):
        stages, microbatches = rng.randint(2, 6), rng.randint(6, 30)
        forward = [rng.uniform(1.0, 1.5) for _ in range(stages)]
        real = played(forward, [2 * one for one in forward], microbatches)
        parts = pipeline([{"student": 3 * one} for one in forward], microbatches, 1)
        assert sum(parts.values()) == pytest.approx(real, rel=0.08)


def test_virtual_stages_shorten_the_wait():
    busy = [{"student": 3.0}] * 4
    assert [pipeline(busy, 8, chunks)["waiting"] for chunks in (1, 2, 3)] == [9.0, 4.5, 3.0]


@pytest.mark.parametrize(
    ("group", "ranks", "layout", "replicas", "expected"),
    [
        ("tp", 8, {"tp": 8}, 4, ("nvlink", 450)),
        ("tp", 16, {"tp": 16}, 2, ("network", 400)),
        ("dp", 4, {"tp": 8}, 4, ("network", 50)),
        ("dp", 16, {"tp": 2}, 16, ("network", 200)),  # four of each machine's eight cards
        ("dp", 32, {}, 32, ("network", 400)),
        ("dp", 2, {"tp": 4, "pp": 2}, 2, ("nvlink", 450)),
        ("pp", 2, {"tp": 4, "pp": 2}, 2, ("network", 50)),
        ("pp", 2, {"tp": 4, "pp": 2}, 1, ("nvlink", 450)),
        ("cp", 2, {"tp": 4, "cp": 2}, 4, ("nvlink", 450)),
        ("ends", 2, {"tp": 2, "pp": 4}, 1, ("nvlink", 450)),
        ("ends", 2, {"tp": 4, "pp": 4}, 1, ("network", 50)),
    ],
    ids=str,
)
def test_the_link_that_a_group_goes_over(group, ranks, layout, replicas, expected):
    name, speed = cluster().link(group, ranks, Parallel(**layout), replicas)
    assert (name, speed) == (expected[0], pytest.approx(expected[1] * 1e9 * LINK_SHARE))


def test_what_is_measured_or_rented_takes_the_place_of_what_is_assumed():
    assert cluster().flops == 0.5 * 989e12
    assert cluster(hardware="A100", efficiency=0.4).flops == pytest.approx(0.4 * 312e12)
    assert cluster(tflops=400.0).flops == 400e12
    assert cluster(network_gbits=100.0).machine == dataclasses.replace(MACHINES["H100"], network=12.5)
    assert cluster(memory_gib=40.0).machine.memory_gib == 40
    assert Cluster.of(Planning(), "fp32").flops == 0.5 * 67e12


def test_figures_of_a_run():
    found = estimate(training(16, tp=4, pp=2), cluster(price=2.0))
    figures, step = found.figures, sum(found.seconds.values())
    assert [*found.seconds] == [*SECONDS]
    assert figures["step_seconds"] == step
    assert figures["tokens"] == 100 * 96 * 4096
    assert figures["tokens_per_day"] == pytest.approx(96 * 4096 * 86400 / step)
    assert figures["days"] == pytest.approx(100 * step / 86400)
    assert figures["gpu_hours"] == pytest.approx(16 * 100 * step / 3600)
    assert figures["cost"] == pytest.approx(2 * figures["gpu_hours"])
    assert figures["tflop_per_second_per_gpu"] == pytest.approx(training_flops(STUDENT, 4096, TEACHER) * 96 * 4096 / step / 16 / 1e12)
    assert figures["tflop_per_second_per_gpu"] < 0.5 * 989
    assert 0 < found.bubble < 1
    assert estimate(training(16, tp=4, pp=2), cluster()).figures["cost"] is None


def test_traffic_of_a_run_takes_its_calls_and_its_bytes():
    found = {(one["what"], one["operation"]): one for one in estimate(training(16, tp=4), cluster()).traffic}
    gradients = found["gradients", "reduce-scatter"]
    assert (gradients["ranks"], gradients["link"], gradients["sent"]) == (4, "network", pytest.approx(gradients["bytes"] * 3 / 4))
    assert gradients["seconds"] == pytest.approx(gradients["sent"] / (2 * 50e9 * LINK_SHARE) + CALL_SECONDS["network"])
    assert gradients["bytes"] / 4 >= STUDENT.num_parameters() / 4


def test_replicas_hide_behind_passes_where_the_settings_say_so():
    overlapped = dataclasses.replace(TRAIN, overlap_grad_reduce=True, overlap_param_gather=True)
    one, other = (estimate(training(64, tp=8, train=train), cluster()).seconds["replicas"] for train in (TRAIN, overlapped))
    assert 0 <= other < one


def test_an_update_is_shared_out_between_replicas():
    alone, shared = (update_seconds(training(world, tp=4), cluster(), 0) for world in (4, 32))
    assert shared < alone / 2


def test_a_teacher_from_the_host_and_one_in_a_layout_of_its_own_take_their_time():
    plain = estimate(training(tp=2), cluster())
    own = estimate(training(tp=2, its={"tp": 8}), cluster())
    assert plain.seconds["relay"] == plain.seconds["offload"] == 0 < own.seconds["relay"]
    away = training(tp=2)
    away = dataclasses.replace(away, cfg=dataclasses.replace(away.cfg, teacher=Teacher(offload=True)))
    assert estimate(away, cluster()).seconds["offload"] == pytest.approx(TEACHER.num_parameters() / 2 * 2 / 64e9, rel=0.01)
