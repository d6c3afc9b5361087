"""What is said of a rank's memory, against models that are really built, tensors that autograd really keeps, and what must be more or less."""

import dataclasses

import pytest
import torch

from minitron.arch.arch import Arch, Layer
from minitron.config.compose import compose
from minitron.config.schema import Parallel
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import empty_model
from minitron.engine.model import skeleton
from minitron.engine.parallel import beside
from minitron.engine.schedule import run_chunk
from minitron.errors import RequestError
from minitron.launching import preflight
from minitron.launching.activations import Pass, block_bytes, most_in_flight, norm_bytes
from minitron.launching.memory import NCCL_COMMUNICATOR, PARTS, held_parameters, memory
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import tokens_of
from tests.oracles.resident import CASES, compared

# odd sizes: dead groups and dead rows of the vocabulary at every layout of several tensor ranks
TINY = Arch(family="llama", num_layers=4, hidden_size=48, ffn_hidden_size=36, num_attention_heads=6, num_query_groups=3, kv_channels=8,
            vocab_size=61, max_position_embeddings=64)  # fmt: skip
ARCHS = {
    "untied": TINY,
    "tied": TINY.replace(share_embeddings_and_output_weights=True),
    "biases": TINY.replace(add_bias_linear=True, num_query_groups=1),
    "nemotron": TINY.replace(normalization="LayerNorm", layernorm_zero_centered_gamma=True, activation_func="squared_relu", gated_linear_unit=False),
    "experts": TINY.replace(num_moe_experts=6, moe_router_topk=2, moe_ffn_hidden_size=20, moe_layers=(True, False, True, True)),
    "shared": TINY.replace(
        num_moe_experts=4,
        moe_router_topk=3,
        moe_ffn_hidden_size=12,
        moe_shared_expert_intermediate_size=28,
        moe_shared_expert_gate=True,
        moe_router_pre_softmax=True,
    ),
    "uneven": TINY.replace(layers=(Layer(36, 6, 3), Layer(24, 4, 2), Layer(12, 2, 1), Layer(36, 6, 3))),
}
LAYOUTS = [Parallel(tp=2, pp=2), Parallel(tp=4), Parallel(pp=4), Parallel(pp=2, vpp=2), Parallel(), Parallel(tp=2, cp=2),
           Parallel(ep=2), Parallel(tp=2, ep=2), Parallel(pp=2, ep=2)]  # fmt: skip


def built(world):
    """{(architecture, layout): (stage, parameters of this rank)} of skeletons."""
    found = {}
    for number, layout in enumerate(LAYOUTS):
        here = beside(world, layout)
        for name, arch in ARCHS.items():
            if layout.ep > 1 and arch.num_moe_experts is None:
                continue
            found[name, number] = here.pp_rank, sum(parameter.numel() for parameter in skeleton(arch, here, torch.float32).parameters())
    return found


def test_parameters_are_those_of_the_built_models():
    for rank in on_ranks(built, Layout(dp=4)):
        for (name, number), (stage, numbers) in rank.items():
            assert held_parameters(ARCHS[name], LAYOUTS[number], stage) == numbers, (name, LAYOUTS[number], stage)


def test_parameters_of_one_rank_are_the_whole_model():
    for arch in ARCHS.values():
        assert held_parameters(arch, Parallel(), 0) == arch.num_parameters()


def kept_by_autograd(model, batch, world):
    """Bytes of all storages that a forward pass leaves for its way back, but those of parameters and of the tokens; each once."""
    sizes, known = {}, {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known and tensor.is_floating_point():
            sizes[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run_chunk(model.chunks[0], (batch.inputs_BS, batch.documents_BS), world)
    sizes.pop(out.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["untied", "biases", "nemotron", "experts", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("documents", [False, True])
def test_activations_are_the_tensors_that_autograd_keeps(alone, name, recompute, dtype, documents):
    arch = ARCHS[name].replace(hidden_size=80, ffn_hidden_size=112, vocab_size=16)
    tokens = tokens_of(16, 2, 41)
    batch = Batch(tokens, None, torch.zeros(2, 40, dtype=torch.int) if documents else None)
    model = empty_model(arch, alone, dtype, recompute=recompute).train()
    way = Pass(2, 40, 1, 1, False, dtype.itemsize, "cpu", recompute, documents)
    expected = (
        sum(block_bytes(arch.layer(number), way).kept for number in range(arch.num_layers))
        + norm_bytes(arch, way)
        - dtype.itemsize * way.tokens * arch.hidden_size
    )
    expected += 4 * 40 * arch.kv_channels if recompute == "full" else 0  # the rotary angles, one for all blocks
    assert kept_by_autograd(model, batch, alone) == expected


@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("microbatches", [1, 3, 8])
def test_a_stage_holds_as_many_microbatches_as_there_are_stages_from_it_on(stages, microbatches):
    for stage in range(stages):
        assert most_in_flight([7.0], stage, stages, microbatches) == 7.0 * min(stages - stage, microbatches)


def test_virtual_stages_hold_more():
    # 2 x (4 - 1) + (2 - 1) x 4 ahead of the first way back, and the one that goes before it
    assert most_in_flight([1.0, 1.0], 0, 4, 8) == 11
    assert most_in_flight([1.0, 1.0], 3, 4, 8) == 5
    assert most_in_flight([1.0, 0.0], 0, 4, 4) == 4  # all of them through the first chunk
    assert most_in_flight([1.0, 1.0], 0, 4, 4) == 8


LLAMA = Arch(family="llama", num_layers=32, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128,
             vocab_size=128256, max_position_embeddings=131072)  # fmt: skip
SMALL = LLAMA.replace(num_layers=28, hidden_size=3072, ffn_hidden_size=9216)


def said(overrides="", ranks=8, teacher=LLAMA, **device):
    settings = "run.dir=run model.path=model data.train=text train.seq_length=4096 train.global_batch_size=64"
    return memory(SMALL, teacher, compose("distill", f"{settings} {overrides}".split()), ranks, **device)


def test_every_part_of_every_stage_is_told_in_order():
    found = said("parallel.tp=2 parallel.pp=4")
    assert [rank.stage for rank in found] == [0, 1, 2, 3]
    for rank in found:
        assert [*rank.parts] == [*PARTS]
        assert all(size >= 0 for size in rank.parts.values())
        assert rank.total == sum(rank.parts.values())
    assert [rank.parts["loss"] > 0 for rank in found] == [False, False, False, True]
    assert [rank.parts["signals"] > 0 for rank in found] == [False, False, False, True]
    assert found[0].parts["activations"] > found[1].parts["activations"] > found[3].parts["activations"]


@pytest.mark.parametrize(
    ("less", "more", "parts"),
    [
        ("parallel.tp=8", "parallel.tp=4", "teacher student gradients activations"),
        ("parallel.tp=4 parallel.sp=true", "parallel.tp=4", "activations"),
        ("train.recompute=selective", "train.recompute=none", "activations"),
        ("train.recompute=full", "train.recompute=selective", "activations"),
        ("train.micro_batch_size=1", "train.micro_batch_size=2", "activations"),
        ("train.seq_length=2048", "train.seq_length=4096", "activations signals"),
        ("parallel.cp=2", "parallel.cp=1", "activations"),
        ("dtype=bf16", "dtype=fp32", "teacher student activations signals"),
        ("dtype=fp32", "dtype=bf16", "optimizer"),
        ("train.global_batch_size=32", "train.global_batch_size=64", "signals"),
        ("distill.chunk_tokens=128", "distill.chunk_tokens=256", "loss"),
        ("teacher.offload=true", "teacher.offload=false", "teacher"),
        ("teacher.parallel.tp=8", "parallel.tp=1", "teacher"),
        ("distill.hidden.enabled=false", "distill.hidden.enabled=true distill.hidden.projection=true", "signals"),
    ],
)
def test_what_a_setting_saves(less, more, parts):
    (one,), (other,) = said(less), said(more)
    for part in parts.split():
        assert one.parts[part] < other.parts[part], part


MIXED = LLAMA.replace(num_moe_experts=8, moe_router_topk=2, moe_ffn_hidden_size=4096)


def test_expert_ranks_hold_their_experts_and_share_their_optimizer_with_fewer():
    def of(overrides):
        settings = "run.dir=run model.path=model data.train=text train.seq_length=4096 train.global_batch_size=64"
        return memory(MIXED, None, compose("train", f"{settings} {overrides}".split()), 8)[0].parts

    one, four = of(""), of("parallel.ep=4")
    experts = 2 * 32 * 8 * 3 * 4096 * 4096  # bytes of all
    assert one["student"] - four["student"] == experts * 3 / 4
    assert four["optimizer"] == one["optimizer"]  # of four times as few numbers, shared by four times as few ranks
    assert four["activations"] == one["activations"]
    with pytest.raises(RequestError, match=r"parallel.ep=3: must divide dp x cp = 8, the processes over tp x pp"):
        of("parallel.ep=3")


def test_replicas_share_the_optimizer_alone():
    (one,), (other,) = said("parallel.tp=8", 8), said("parallel.tp=8", 16)
    assert other.parts["optimizer"] == one.parts["optimizer"] / 2
    assert all(one.parts[part] == other.parts[part] for part in ("student", "gradients", "activations", "teacher"))


def test_what_waits_in_host_memory_is_told_beside_that_of_the_gpu():
    (one,), (other,) = said("teacher.offload=true train.async_save=false"), said("train.async_save=false")
    assert one.host == other.parts["teacher"]
    assert other.host == 0
    (on_cpu,) = said("teacher.offload=true", device="cpu")
    assert on_cpu.host == 0
    assert on_cpu.parts["copies"] > 0
    assert on_cpu.parts["teacher"] == other.parts["teacher"]


@pytest.mark.parametrize(
    ("overrides", "ranks", "groups"),
    [
        ("", 1, 0),
        ("", 8, 3),  # all, replicas, with context ranks or without
        ("parallel.tp=2 parallel.pp=2", 8, 8),  # all, tp, pp, replicas twice, model, first and last stage twice
        ("parallel.cp=2", 8, 4),
        ("parallel.tp=8", 8, 3),  # all, tp, model
        ("parallel.tp=8 teacher.parallel.tp=4 teacher.parallel.pp=2", 8, 3 + 5),  # its tp, pp, model, first and last stage twice
    ],
)
def test_every_group_of_a_gpu_has_its_buffers(overrides, ranks, groups):
    found = said(overrides, ranks, device="cuda")
    assert {rank.parts["communication"] for rank in found} == {groups * NCCL_COMMUNICATOR}


@pytest.mark.parametrize(("dtype", "each"), [("fp32", 16), ("bf16", 14)])
def test_a_checkpoint_holds_weights_and_the_whole_state_of_the_optimizer(dtype, each, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "models", lambda cfg, verb: (TINY, None))
    cfg = compose("train", [f"run.dir={tmp_path}", "model.path=model", "data.train=text", f"dtype={dtype}"])
    assert preflight.needs(cfg, "train", 1, "cpu").checkpoint == each * TINY.num_parameters()


def test_train_has_no_teacher():
    (rank,) = said(teacher=None)
    assert rank.parts["teacher"] == rank.parts["signals"] == 0


def test_a_layout_that_does_not_fit_is_refused():
    with pytest.raises(RequestError, match=r"parallel.tp=3: tp x pp x cp = 3 must divide"):
        said("parallel.tp=3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train, tied", "one rank, full", "one rank, bf16", "tp2, sp", "pp2, vpp3", "dp2", "ep2"])
def test_what_is_said_is_within_15_percent_of_what_processes_take(name, tmp_path):
    for expected, real in compared(CASES[name], tmp_path):
        predicted = expected.total - expected.parts["runtime"]
        assert predicted == pytest.approx(real.peak, rel=0.15), (expected.stage, dataclasses.asdict(expected))
