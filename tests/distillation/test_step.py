"""Training steps of the sharded student against plain `transformers` models and torch's AdamW, at every layout and split into microbatches."""

import pytest
import torch

from minitron.config.schema import Distill, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.scoring import language_model_score
from minitron.engine.trainer import Trainer
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, NEMOTRON, UNTIED, hf_model, save_model, saved_tensors, tokens_of
from tests.oracles.training import distil, learning_rate

BATCH, LENGTH, STEPS, TEMPERATURE = 8, 12, 4, 2.0
# clipping acts on some steps only: the norm is about 1 here
SETTINGS = {"steps": 6, "global_batch_size": BATCH, "seq_length": LENGTH, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_grad": 1.0}
SMALLER = {"hidden_size": 36, "num_hidden_layers": 4, "intermediate_size": 24}
# (layout, sequences of a microbatch)
RUNS = [
    (Layout(), 8), (Layout(), 2), (Layout(), 1), (Layout(tp=2), 4), (Layout(tp=2, sp=True), 4), (Layout(tp=3, sp=True), 8), (Layout(dp=2), 2),
    (Layout(pp=2), 2), (Layout(tp=2, pp=2), 1), (Layout(tp=2, dp=2, sp=True), 4), (Layout(pp=3), 4), (Layout(cp=2), 2), (Layout(tp=2, cp=2), 4),
    (Layout(dp=2, cp=2), 1), (Layout(pp=2, vpp=2), 2), (Layout(tp=2, pp=2, vpp=2, sp=True), 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """{student: (its folder, its teacher's)}: a tied one, and one with biases whose head is its own."""
    root = tmp_path_factory.mktemp("models")
    teacher = save_model(root / "teacher", 1)
    return {
        "tied": (save_model(root / "tied", 2, **SMALLER), teacher),
        "biases": (save_model(root / "biases", 3, **SMALLER, **BIASES, **UNTIED, head_dim=10), teacher),
    }


@pytest.fixture(scope="module")
def nemotrons(tmp_path_factory):
    """As `folders`, of another family."""
    root = tmp_path_factory.mktemp("nemotrons")
    return {"nemotron": (save_model(root / "student", 4, **SMALLER, **NEMOTRON), save_model(root / "teacher", 5, **NEMOTRON, **UNTIED))}


@pytest.fixture(scope="module")
def expected(folders):
    return plainly(folders)


def plainly(folders):
    """What `battery` must find."""
    return {name: distil(*pair, global_batches(), Train(**SETTINGS), TEMPERATURE) for name, pair in folders.items()}


def global_batches():
    return [tokens_of(61, BATCH, LENGTH + 1, seed) for seed in range(STEPS)]


def battery(world, folders, micro_batch_size, out):
    """Every student after STEPS steps: the metrics of each, its export, and what of its shard must be dead."""
    lines, dead = {}, {}
    for name, (student_folder, teacher_folder) in folders.items():
        source = open_folder(student_folder, "model.path")
        student = load(source, world, torch.float32)
        teacher = load(open_folder(teacher_folder, "teacher.path"), world, torch.float32).requires_grad_(False)
        trainer = Trainer(student, Train(**SETTINGS, micro_batch_size=micro_batch_size), world)
        loss = distillation_loss(student, LiveTeacher(teacher, world), Distill(temperature=TEMPERATURE, chunk_tokens=5), world)
        lines[name] = []
        for step, tokens in enumerate(global_batches()):
            microbatches = [Batch(part) for part in tokens[world.dp_rank :: world.dp].split(micro_batch_size)]
            lines[name].append(trainer.update(microbatches, loss(step, microbatches)))
        export(student, world, source.config, student_folder, out / name, torch.float32)
        dead[name] = dead_parts(student, world)
    return lines, dead


def dead_parts(model, world):
    """The largest magnitude in the last KV group of every layer and in the last vocabulary row, on the last tensor rank."""
    if world.tp_rank < world.tp - 1:
        return None
    arch, found = model.arch, {"groups": 0.0, "vocab": 0.0}
    group = (arch.heads_per_group + 2) * arch.kv_channels
    for _, layer in model.blocks():
        attention = layer.self_attention
        parts = [attention.linear_qkv.weight[-group:], attention.linear_proj.weight[:, -arch.heads_per_group * arch.kv_channels :]]
        found["groups"] = max([found["groups"], *(part.abs().max().item() for part in parts)])
    for name, parameter in model.named_parameters():
        if "embedding" in name or "output_layer" in name:
            found["vocab"] = max(found["vocab"], parameter[-1].abs().max().item())
    return found


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "micro_batch_size"), RUNS, ids=str)
def test_steps_are_those_of_plain_models_and_adamw(layout, micro_batch_size, folders, expected, tmp_path):
    check_steps(layout, micro_batch_size, folders, expected, tmp_path)


@pytest.mark.multirank
def test_steps_of_another_family(nemotrons, tmp_path):
    check_steps(Layout(tp=2, pp=2, sp=True), 2, nemotrons, plainly(nemotrons), tmp_path)


def check_steps(layout, micro_batch_size, folders, expected, tmp_path):
    """Loss, gradient norm and rate of every step, and the tensors after the last."""
    ranks = on_ranks(battery, layout, folders, micro_batch_size, tmp_path)
    for name, (lines, tensors) in expected.items():
        for rank in ranks:
            for found, line in zip(rank[0][name], lines, strict=True):
                assert found["skipped"] == 0
                assert found["loss"] == found["kd_loss"] == pytest.approx(line["loss"], rel=1e-5)
                assert found["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-5)
                assert found["lr"] == pytest.approx(line["lr"])
        trained, start = saved_tensors(tmp_path / name), saved_tensors(folders[name][0])
        for part, tensor in trained.items():
            moved = (tensors[part] - start[part]).norm()
            assert (tensor - tensors[part]).norm() < 1e-3 * moved, (name, part)


@pytest.mark.multirank
@pytest.mark.parametrize(("tp", "dead_groups"), [(2, True), (3, False)])
def test_what_pads_a_layout_stays_zero_under_training(tp, dead_groups, folders, tmp_path):
    """Three KV groups on two ranks leave one dead, 61 tokens on two or three ranks leave dead rows: weight decay, momentum and gradients leave
    them exactly zero."""
    ranks = on_ranks(battery, Layout(tp=tp), folders, 4, tmp_path)
    for name in folders:
        found = ranks[-1][1][name]
        assert found["vocab"] == 0.0
        assert (found["groups"] == 0.0) == dead_groups


def scored(world, folder):
    """Next-token loss over windows, the last of which only fills up its batch; rows that pad the vocabulary are made to stand out."""
    model = load(open_folder(folder, "model.path"), world, torch.float32)
    with torch.no_grad():
        if world.tp > 1 and world.tp_rank == world.tp - 1:
            for name, parameter in model.named_parameters():
                if "embedding" in name or "output_layer" in name:
                    parameter[-1] = 100.0
    windows, valid = tokens_of(61, 6, LENGTH + 1), torch.tensor([True, True, True, True, True, False])
    mine = [(windows[row : row + 1], valid[row : row + 1]) for row in range(world.dp_rank, 6, world.dp)]
    score = language_model_score(model, mine, world)
    return score.loss, score.tokens


@pytest.mark.multirank
@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2, sp=True), Layout(tp=3), Layout(dp=2), Layout(tp=2, pp=2), Layout(cp=3), Layout(pp=2, vpp=2)], ids=str
)
def test_held_out_loss_counts_every_window_once_and_no_padding(layout, folders):
    folder = folders["biases"][0]
    windows = tokens_of(61, 6, LENGTH + 1)[:5]
    expected = hf_model(folder)(windows, labels=windows).loss.item()
    for loss, tokens in on_ranks(scored, layout, folder):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert tokens == 5 * LENGTH


def test_the_oracle_s_learning_rates():
    settings = Train(**SETTINGS)
    assert [learning_rate(settings, step) for step in (1, 2, 6)] == pytest.approx([1.5e-3, 3e-3, 1e-4])
