"""One step under each loss, at several layouts, against plain `transformers` models and float64 losses of whole logits."""

import pytest
import torch

from minitron.config.schema import Distill, Train
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.trainer import Trainer
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.distillation import reference
from tests.oracles.models import hf_model, save_model, tokens_of

BATCH, LENGTH = 4, 12
LOSSES = [
    Distill("reverse_kl", temperature=2.0, cross_entropy=0.7, gradients="recompute", chunk_tokens=5),
    Distill("jsd", beta=0.3, top_k=7, cross_entropy=0.3, chunk_tokens=7),
    Distill("forward_kl", top_k=4, temperature=1.5),
]
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(cp=2), Layout(dp=2), Layout(tp=2, pp=2)]


def batch():
    """Tokens, and which predictions count: more in some sequences than in others."""
    counted = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(2)) > torch.linspace(0.1, 0.8, BATCH)[:, None]
    return tokens_of(61, BATCH, LENGTH + 1), counted


def battery(world, student_folder, teacher_folder):
    """The metrics of one step under each loss."""
    teacher = load(open_folder(teacher_folder, "teacher.path"), world, torch.float32).requires_grad_(False)
    tokens, counted = (whole[world.dp_rank :: world.dp] for whole in batch())
    lines = []
    for settings in LOSSES:
        trainer = Trainer(load(open_folder(student_folder, "model.path"), world, torch.float32), Train(steps=2), world)
        microbatches = [Batch(*parts) for parts in zip(tokens.split(1), counted.split(1), strict=True)]
        loss = distillation_loss(trainer.model, LiveTeacher(teacher, world), settings, world)
        lines.append(trainer.update(microbatches, loss(0, microbatches)))
    return lines


def plain(student_folder, teacher_folder, settings):
    """(loss, kd, ce, gradient norm) per token that counts."""
    tokens, counted = batch()
    student, teacher = hf_model(student_folder), hf_model(teacher_folder)
    with torch.no_grad():
        signal = teacher(tokens[:, :-1]).logits.flatten(0, 1).double()
    whole = student(tokens[:, :-1]).logits.flatten(0, 1).double()
    losses = [loss / counted.sum() for loss in reference(whole, signal, counted.flatten(), settings, tokens[:, 1:].flatten())]
    losses[0].backward()
    norm = torch.stack([tensor.grad.norm() for tensor in student.parameters()]).norm()
    return [*(loss.item() for loss in losses), norm.item()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "student", 2, hidden_size=36, intermediate_size=24), save_model(root / "teacher", 1)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_loss_is_the_same_at_every_layout(layout, folders):
    ranks = on_ranks(battery, layout, *folders)
    for number, settings in enumerate(LOSSES):
        total, kd, ce, norm = plain(*folders, settings)
        for rank in ranks:
            line = rank[number]
            assert (line["loss"], line["kd_loss"], line["grad_norm"]) == pytest.approx((total, kd, norm), rel=2e-5)
            assert line.get("ce_loss") == (pytest.approx(ce, rel=1e-5) if settings.cross_entropy else None)
