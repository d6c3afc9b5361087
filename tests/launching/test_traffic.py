"""Traffic as it is counted from sizes, against what the ranks of a real training step hand to torch's collectives."""

import dataclasses
from collections import Counter

import pytest
import torch

from minitron import engine
from minitron.arch.families import from_hf
from minitron.config.schema import Config, Data, Distill, Hidden, Parallel, Teacher, TeacherCache, TeacherParallel, Train
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.signal import ForeignTeacher, Head, LiveTeacher, NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.launching.traffic import Traffic, Training, buffer_numbers, statistics, teacher_traffic, traffic
from minitron.weights.load import load, load_head
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.collectives import Collectives
from tests.oracles.models import BIASES, UNTIED, config_of, save_model, tokens_of
from tests.oracles.samples import SAMPLES, save_samples
from tests.oracles.samples import config_of as sample

LENGTH, BATCH, RANKS = 24, 8, 4
SMALLER = {"hidden_size": 36, "intermediate_size": 24}
EXPERTS = ("qwen2_moe", "qwen3_moe")  # with a shared expert, and without; by their families
MODELS = {"untied": {**SMALLER, **UNTIED}, "tied": SMALLER, "biases": {**SMALLER, **UNTIED, **BIASES}, "teacher": {}}
TRAIN = {"steps": 9, "global_batch_size": BATCH, "seq_length": LENGTH, "warmup_steps": 2}
LOSS = Distill(chunk_tokens=16)


SAMPLE = {family: f"{family}.{next(iter(SAMPLES[family]))}" for family in EXPERTS}


def config(layout, micro_batch_size=1, loss=LOSS, recompute="none", teacher=None):
    train = Train(**TRAIN, micro_batch_size=micro_batch_size, recompute=recompute)
    return Config(
        parallel=Parallel(**layout), distill=loss, train=train, dtype="fp32", data=Data(separate_documents=True),
        teacher=Teacher(parallel=TeacherParallel(**(teacher or {}))),
    )  # fmt: skip


ALONE = Distill(loss="none", cross_entropy=1.0, chunk_tokens=16)
STATES = Hidden(enabled=True, layers=[1], teacher_layers=[-1], projection=True, alpha=1.0)
CASES = {
    "tp": ("untied", config({"tp": 4}, 2)),
    "tp_pp": ("untied", config({"tp": 2, "pp": 2}, loss=dataclasses.replace(LOSS, loss="jsd", cross_entropy=0.5))),
    "sp_dp": ("untied", config({"tp": 2, "sp": True}, loss=dataclasses.replace(LOSS, loss="reverse_kl", gradients="recompute"))),
    "sp_pp_full": ("biases", config({"tp": 2, "pp": 2, "sp": True}, recompute="full")),
    "sp_selective": ("untied", config({"tp": 2, "sp": True}, recompute="selective")),
    "selective_with_biases": ("biases", config({"tp": 2}, recompute="selective")),
    "dp": ("untied", config({}, 2)),
    "vpp": ("untied", config({"pp": 2, "vpp": 2})),
    "cp_tp": ("untied", config({"cp": 2, "tp": 2}, recompute="selective")),
    "cp_dp": ("untied", config({"cp": 2}, loss=dataclasses.replace(LOSS, top_k=5, cross_entropy=0.1))),
    "top_k": ("untied", config({"tp": 4}, loss=dataclasses.replace(LOSS, top_k=5, cross_entropy=0.1))),
    "experts_alike": ("qwen3_moe", config({}, 2)),
    "ep": ("qwen3_moe", config({"ep": 2}, 2)),
    "ep_tp": ("qwen2_moe", config({"ep": 2, "tp": 2}, recompute="selective")),
    "ep_pp_full": ("qwen2_moe", config({"ep": 2, "pp": 2}, recompute="full")),
    "tied_over_stages": ("tied", config({"pp": 4})),
    "alone": ("untied", config({"tp": 2, "pp": 2}, loss=ALONE)),
    "teacher_over_stages": ("untied", config({"tp": 2}, teacher={"tp": 1, "pp": 2})),
    "teacher_over_tensor_ranks": ("untied", config({"pp": 2}, teacher={"tp": 4, "pp": 1})),
    "hidden": ("untied", config({"pp": 2, "tp": 2, "sp": True}, loss=dataclasses.replace(LOSS, hidden=STATES))),
}
FIRST = ["tp_pp", "sp_dp", "cp_dp", "teacher_over_stages"]
OTHERS = [name for name in CASES if name not in FIRST]


def one_step(world, student_folder, teacher_folder, cfg):
    """(calls, bytes) of a step of a training, as the collectives of this rank saw them."""
    here = engine.beside(world, cfg.parallel)
    theirs = here if cfg.teacher_parallel == cfg.parallel else engine.beside(world, cfg.teacher_parallel)
    with engine.inside(here):
        student = load(open_folder(student_folder, "x"), here, torch.float32, recompute=cfg.train.recompute)
        trainer = engine.Trainer(student, cfg.train, here)
    hidden = None
    if cfg.distill.loss == "none":
        teacher = NoTeacher()
    else:
        source = open_folder(teacher_folder, "x")
        with engine.inside(theirs):
            model = load(source, theirs, torch.float32).requires_grad_(False)
        if cfg.distill.hidden.enabled:
            hidden = HiddenLoss(student, model, cfg.distill.hidden, cfg.train, here, 0)
        watch = hidden.teacher_states if hidden else None
        head = None if theirs is here else Head(*load_head(source, here, torch.float32))
        teacher = LiveTeacher(model, here, watch) if theirs is here else ForeignTeacher(model, theirs, head, here)
    loss = distillation_loss(student, teacher, cfg.distill, here, hidden)
    tokens = tokens_of(61, BATCH, LENGTH + 1)
    # with a mask of documents: what attends without one under context parallelism can't be looked at from a dispatch mode
    parts = tokens[here.dp_rank :: here.dp].split(cfg.train.micro_batch_size)
    batches = [engine.Batch(part, documents_BS=torch.zeros_like(part[:, :-1])) for part in parts]
    with engine.inside(here), Collectives() as seen:
        trainer.update(batches, loss(0, batches))
    trainer.close()
    return (here.pp_rank, theirs.pp_rank), dict(seen.calls), dict(seen.bytes)


def teacher_of(name):
    """Who teaches: expert ranks are for models with experts, which teach themselves here."""
    return CASES[name][0] if CASES[name][0] in EXPERTS else "teacher"


def every_case(world, folders, names):
    return {name: one_step(world, folders[CASES[name][0]], folders[teacher_of(name)], CASES[name][1]) for name in names}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    mixed = save_samples(root, wanted=[*SAMPLE.values()])
    return {name: save_model(root / name, **changes) for name, changes in MODELS.items()} | {name: mixed[one] for name, one in SAMPLE.items()}


@pytest.fixture(scope="module")
def seen(folders):
    """Of a few cases, what each rank saw."""
    return on_ranks(every_case, Layout(dp=RANKS), folders, FIRST)


@pytest.fixture(scope="module")
def seen_later(folders):
    """Of the others."""
    return on_ranks(every_case, Layout(dp=RANKS), folders, OTHERS)


def training_of(name):
    student, cfg = CASES[name]
    archs = {one: from_hf(config_of(**changes).to_dict(), "x") for one, changes in MODELS.items()}
    archs |= {one: from_hf(sample(name).to_dict(), "x") for one, name in SAMPLE.items()}
    return Training(archs[student], None if cfg.distill.loss == "none" else archs[teacher_of(name)], cfg, RANKS)


def check(name, ranks):
    """What is counted for each rank is what it saw; of experts, who get what tokens is the router's affair, what they all get together."""
    training = training_of(name)
    found = []
    for rank in ranks:
        (stage, its_stage), calls, sizes = rank[name]
        counted_calls, counted_sizes = Counter(), Counter()
        for one in [*traffic(training, stage), *teacher_traffic(training, its_stage)]:
            word = one.operation.replace("all-to-all", "send")
            counted_calls[word, one.ranks] += one.calls
            counted_sizes[word, one.ranks] += one.bytes
        assert dict(counted_calls) == calls, (stage, its_stage)
        assert training.layout.ep > 1 or dict(counted_sizes) == sizes, (stage, its_stage)
        found.append((counted_sizes, Counter(sizes)))
    counted, seen = (sum(sizes, Counter()) for sizes in zip(*found, strict=True))
    assert counted == seen


@pytest.mark.multirank
@pytest.mark.parametrize("name", FIRST)
def test_traffic_is_what_the_collectives_of_a_step_see(name, seen):
    check(name, seen)


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.parametrize("name", OTHERS)
def test_traffic_of_other_layouts_and_losses(name, seen_later):
    check(name, seen_later)


def test_numbers_per_token_of_each_collective_of_the_loss():
    """As distillation/rows.py stacks them: statistics, the labels' with the last ones."""
    loss = dataclasses.replace(LOSS, cross_entropy=0.5)
    assert statistics(LOSS, True, 64) == [3]
    assert statistics(loss, True, 64) == [5]
    assert statistics(dataclasses.replace(loss, loss="jsd"), True, 64) == [2, 4]
    assert statistics(dataclasses.replace(loss, top_k=10), True, 64) == [20, 14]
    assert statistics(LOSS, False, 64) == [65]
    assert statistics(ALONE, False, 64) == [2]


def test_what_a_ring_sends():
    assert [Traffic("x", operation, "tp", 4, 1, 1000).sent for operation in ("all-reduce", "all-gather", "reduce-scatter", "send")] == [
        1500, 750, 750, 1000,
    ]  # fmt: skip


def test_buffers_are_padded_as_the_distributed_optimizer_needs_them():
    assert buffer_numbers([1], 1) == 128
    assert buffer_numbers([64, 65], 1) == 256
    assert buffer_numbers([100, 100], 3) == 384


def test_a_cache_in_the_teachers_place_leaves_its_passes_out():
    one = training_of("tp")
    cached = dataclasses.replace(one, teacher=None, cfg=dataclasses.replace(one.cfg, teacher=Teacher(cache=TeacherCache(folder="x", top_k=7))))
    assert teacher_traffic(cached, 0) == []
    sizes = {two.what: two.bytes for two in traffic(cached, 0)}
    assert sizes["the loss' statistics"] == 8 * LENGTH * 4 * 8 * 8
