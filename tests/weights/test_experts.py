"""Families whose blocks have experts, at every kind of layout, expert-parallel ranks among them: against `transformers`."""

from pathlib import Path

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from transformers.core_model_loading import revert_weight_conversion

from minitron.arch.families import FAMILIES
from minitron.engine.attention import sequence_part
from minitron.engine.batch import Batch
from minitron.engine.judging import write_greedily
from minitron.engine.schedule import forward_backward
from minitron.engine.scoring import language_model_score
from minitron.importance.depth import losses_without
from minitron.weights.load import load
from minitron.weights.save import export, gathered
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, same_tensors, saved_tensors, tokens_of
from tests.oracles.samples import names, save_samples
from tests.oracles.sharded import of_last_stage, whole_logits

LENGTH, VOCAB = 24, 61
FIRST = Layout(dp=2, ep=2)
OTHERS = (Layout(), Layout(tp=2, sp=True), Layout(tp=2), Layout(pp=2))
FURTHER = (
    Layout(tp=2, pp=2), Layout(tp=2, pp=2, sp=True), Layout(tp=2, dp=2, ep=2, sp=True), Layout(tp=2, dp=2, ep=2), Layout(pp=2, dp=2, ep=2),
    Layout(cp=2, ep=2), Layout(dp=3, ep=3), Layout(pp=2, vpp=2), Layout(dp=4, ep=2), Layout(tp=3, sp=True),
)  # fmt: skip


def long(layouts):
    return [pytest.param(layout, marks=pytest.mark.long) for layout in layouts]


def with_experts():
    return [name for name in names() if "num_moe_experts" in FAMILIES[name.split(".")[0]].sizes]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_samples(tmp_path_factory.mktemp("samples"), wanted=with_experts())


def logits_of(folder):
    with torch.no_grad():
        return hf_model(folder)(tokens_of(VOCAB, 2, LENGTH)).logits


def logits_at(world, folders: dict[str, Path], out: Path | None):
    """Every model's logits at a layout, and how many experts of its last layer this rank holds; what is exported goes under `out`."""
    logits, held = {}, {}
    for name, folder in folders.items():
        source = open_folder(folder, "model.path")
        model = load(source, world, torch.float32)
        logits[name] = whole_logits(model, tokens_of(VOCAB, 2, LENGTH), world)
        held[name] = sum(part.endswith("linear_fc2.weight") and ".local_experts." in part for part, _ in model.named_parameters())
        if out is not None:
            export(model, world, source.config, folder, out / name, torch.float32)
    return logits, held


def check(ranks, expected):
    """Within 1e-4; where logits are above 20, within as much of them."""
    wrong = {name: (of_last_stage([logits[name] for logits, _ in ranks]) - wanted).abs().max().item() for name, wanted in expected.items()}
    assert {name: difference for name, difference in wrong.items() if not difference < 1e-4 * max(1.0, expected[name].abs().max().item() / 20)} == {}


@pytest.fixture(scope="module")
def expected(folders):
    return {name: logits_of(folder) for name, folder in folders.items()}


@pytest.mark.multirank
def test_over_expert_ranks_logits_are_those_of_transformers_and_what_goes_in_comes_out(folders, expected, tmp_path):
    """Bit by bit, under the names by which transformers saves; the exported folder is a model of the same kind and sizes."""
    ranks = on_ranks(logits_at, FIRST, folders, tmp_path)
    check(ranks, expected)
    for name, folder in folders.items():
        arch = open_folder(folder, "x").arch
        blocks = sum(arch.routes(number) for number in range(arch.num_layers))
        assert [held[name] for _, held in ranks] == [blocks * arch.num_moe_experts // 2] * 2
        assert same_tensors(saved_tensors(folder), saved_tensors(tmp_path / name)), name
        assert torch.equal(logits_of(tmp_path / name), expected[name]), name
        assert open_folder(tmp_path / name, "x").arch == arch


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [*OTHERS, *long(FURTHER)], ids=str)
def test_every_layout_gives_the_logits_of_transformers(layout, folders, expected):
    check(on_ranks(logits_at, layout, folders, None), expected)


def uneven_work(world, folder):
    """The loss of three batches, of layers left out too, and what is written after one prompt: less than two replicas can share evenly."""
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    windows = [tokens_of(VOCAB, 2, LENGTH - 4 * number + 1, number) for number in range(3)]
    mine = [(tokens_BT, torch.ones(2, dtype=torch.bool)) for tokens_BT in windows][world.dp_rank :: world.dp]
    score = language_model_score(model, mine, world)
    without = losses_without(model, mine, world, [1])[1]
    written = write_greedily(model, [[3, 1, 4, 1, 5]], world, lambda number, tokens: len(tokens) == 3, tokens=64, multiple_of=4)
    return score.loss, score.tokens, without.tolist(), written


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(dp=2, ep=2), *long([Layout(dp=2, ep=2, pp=2), Layout(dp=2, ep=2, tp=2, sp=True)])], ids=str)
def test_replicas_with_less_to_do_pass_along_with_those_that_share_their_experts(layout, folders, alone):
    folder = folders["qwen2_moe.mixed"]
    loss, tokens, without, written = uneven_work(alone, folder)
    for found in on_ranks(uneven_work, layout, folder):
        assert (found[0], found[1:2], found[3]) == (pytest.approx(loss, rel=1e-5), (tokens,), written)
        assert found[2] == pytest.approx(without, rel=1e-5)


def weights_of_hidden(hidden_size, batch):
    return torch.randn(LENGTH, 2, hidden_size, generator=torch.Generator().manual_seed(batch))


def gradients_at(world, folders: dict[str, Path], recompute: str):
    """Of the mean of the last hidden states times fixed numbers, over four microbatches: by the names on disk, on rank 0."""
    found = {}
    for name, folder in folders.items():
        model = load(open_folder(folder, "model.path"), world, torch.float32, recompute=recompute)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        wrapped = [DistributedDataParallel(model.config, settings, chunk, pg_collection=world.groups) for chunk in model.chunks]
        model.config.finalize_model_grads_func = finalize_model_grads
        mine = range(world.dp_rank, 4, world.dp)

        def loss(microbatch, hidden_SBH, mine=mine):
            whole_SBH = weights_of_hidden(hidden_SBH.size(-1), mine[microbatch])
            part_SBH = sequence_part(whole_SBH, 0, world.cp, world.cp_rank)
            if world.sequence_parallel:
                part_SBH = part_SBH.chunk(world.tp)[world.tp_rank]
            return (hidden_SBH * part_SBH).sum(), torch.tensor(2 * LENGTH // world.cp, dtype=torch.int), {}

        forward_backward(wrapped, [Batch(tokens_of(VOCAB, 2, LENGTH + 1, number)) for number in mine], world, loss)
        for parameter in model.parameters():
            parameter.data = parameter.main_grad
        found[name] = {part: tensor.clone() for part, tensor in gathered(model, world)}
    return found


def gradients_of(folder):
    model, total = hf_model(folder), 0.0
    for number in range(4):
        hidden_BSH = model.model(tokens_of(VOCAB, 2, LENGTH + 1, number)[:, :-1]).last_hidden_state
        total = total + (hidden_BSH.transpose(0, 1) * weights_of_hidden(hidden_BSH.size(-1), number)).sum() / (4 * 2 * LENGTH)
    total.backward()
    return revert_weight_conversion(model, {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()})


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("layout", "recompute"),
    [
        (Layout(dp=2, ep=2), "none"),
        (Layout(tp=2, sp=True), "none"),
        *(
            pytest.param(layout, recompute, marks=pytest.mark.long)
            for layout, recompute in (
                (Layout(), "none"), (Layout(tp=2), "selective"), (Layout(dp=2, ep=2), "selective"), (Layout(dp=2, ep=2), "full"),
                (Layout(dp=2), "none"), (Layout(dp=4, ep=2), "none"), (Layout(tp=2, dp=2, ep=2), "none"), (Layout(tp=2, dp=2, ep=2, sp=True), "none"),
                (Layout(pp=2, dp=2, ep=2), "none"), (Layout(cp=2, ep=2), "none"), (Layout(tp=2, pp=2, sp=True), "none"),
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_gradients_are_those_of_transformers(layout, recompute, folders):
    """Of every tensor, experts and routers too, each against its own size (that of a router whose weights are always one is nothing)."""
    found = on_ranks(gradients_at, layout, folders, recompute)[0]
    for name, folder in folders.items():
        wanted = gradients_of(folder)
        assert found[name].keys() == wanted.keys()
        off = {part: ((found[name][part] - g).norm() / (g.norm() + 1e-2)).item() for part, g in wanted.items()}
        assert {part: share for part, share in off.items() if not share < 1e-4} == {}, name
