"""Several documents in a window, prompts and padding, at every layout and split: against plain `transformers` models on each document alone."""

import math

import pytest
import torch

from minitron.config.schema import Distill, Train
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.trainer import Trainer
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.distillation.test_teacher_layouts import teacher_on
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, UNTIED, hf_model, save_model, tokens_of
from tests.oracles.sharded import of_last_stage, whole_logits

LENGTH, TEMPERATURE = 16, 1.5
# windows of 17 tokens: (tokens of the prompt, tokens) of each document; what they leave is padding
WINDOWS = [
    [(2, 5), (0, 4), (1, 8)], [(6, 17)], [(0, 1), (0, 2), (3, 9)], [(17, 17)], [(0, 17)], [(0, 3)], [(4, 6), (11, 11)], [(0, 2)] * 8,
]  # fmt: skip
PAIRED = [window if number % 2 == 0 else [(17, 17)] for number, window in enumerate(WINDOWS)]  # every second counts nothing: one of two replicas
BATCHES = [WINDOWS, PAIRED, [[(17, 17)], [(3, 3), (8, 8)]] * 4]  # and a whole batch of nothing
# no step changes a weight by so little, so every batch is seen by the same model
SETTINGS = {"steps": 6, "global_batch_size": 8, "seq_length": LENGTH, "lr": 1e-15, "min_lr": 1e-15, "warmup_steps": 0, "clip_grad": 0.0}
SMALLER = {"hidden_size": 36, "num_hidden_layers": 4, "intermediate_size": 24}
RUNS = [
    (Layout(), 1), (Layout(), 2), (Layout(), 4), (Layout(dp=2), 1), (Layout(dp=2), 4), (Layout(cp=2), 2), (Layout(tp=2), 4),
    (Layout(tp=2, sp=True), 2), (Layout(pp=2), 2), (Layout(dp=2, cp=2), 2), (Layout(tp=2, cp=2, sp=True), 4), (Layout(pp=2, vpp=2), 2),
    (Layout(tp=2, pp=2), 1),
]  # fmt: skip
# (layout of the student, (tp, pp) of the teacher)
OWN = [(Layout(tp=2), (1, 1)), (Layout(dp=2), (1, 2)), (Layout(tp=2, cp=2, sp=True), (1, 2))]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return save_model(root / "student", 3, **SMALLER, **BIASES, **UNTIED), save_model(root / "teacher", 1)


def batch_of(windows, seed, padding=None):
    """Random tokens in windows like these; `padding`: the tokens that fill them up."""
    tokens_BT = tokens_of(61, len(windows), LENGTH + 1, seed)
    counted_BS = torch.zeros(len(windows), LENGTH, dtype=torch.bool)
    documents_BS = torch.full((len(windows), LENGTH), 99)
    for row, window in enumerate(windows):
        at = 0
        for number, (prompt, length) in enumerate(window):
            documents_BS[row, at : at + length] = number
            counted_BS[row, at + max(prompt, 1) - 1 : at + length - 1] = True
            at += length
        if padding is not None:
            tokens_BT[row, at:] = padding
    return Batch(tokens_BT, counted_BS, documents_BS)


def texts_of(windows, batch):
    """(row, first position, its tokens, its prompt) of every document."""
    for row, window in enumerate(windows):
        at = 0
        for prompt, length in window:
            yield row, at, batch.tokens_BT[row, at : at + length], prompt
            at += length


@pytest.fixture(scope="module")
def expected(folders):
    """(loss, gradient norm, predictions that count) of each batch, from documents read one at a time."""
    student, teacher = map(hf_model, folders)
    found = []
    for seed, windows in enumerate(BATCHES):
        total, count = torch.zeros(()), 0
        for _, _, tokens, prompt in texts_of(windows, batch_of(windows, seed)):
            first = max(prompt, 1) - 1
            if len(tokens) - 1 > first:
                with torch.no_grad():
                    log_teacher = (teacher(tokens[None, :-1]).logits[0, first:] / TEMPERATURE).log_softmax(-1)
                log_student = (student(tokens[None, :-1]).logits[0, first:] / TEMPERATURE).log_softmax(-1)
                total = total + torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * TEMPERATURE**2
                count += len(log_student)
        student.zero_grad()
        if count:
            (total / count).backward()
        norm = math.sqrt(sum(float(tensor.grad.square().sum()) for tensor in student.parameters() if tensor.grad is not None))
        found.append((float(total.detach()) / max(count, 1), norm, count))
    return found


def trained(world, folders, micro_batch_size, padding=None, own=None):
    """The metrics of a step on each batch; `own`: (tp, pp) of the teacher."""
    student = load(open_folder(folders[0], "model.path"), world, torch.float32)
    teacher, _ = teacher_on(world, folders[1], *(own or (world.tp, world.pp)))
    trainer = Trainer(student, Train(**SETTINGS, micro_batch_size=micro_batch_size), world)
    loss = distillation_loss(student, teacher, Distill(temperature=TEMPERATURE, chunk_tokens=5), world)
    lines = []
    for step, windows in enumerate(BATCHES):
        parts = [field[world.dp_rank :: world.dp].split(micro_batch_size) for field in batch_of(windows, step, padding)]
        microbatches = [Batch(*fields) for fields in zip(*parts, strict=True)]
        lines.append(trainer.update(microbatches, loss(step, microbatches)))
    return lines


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "micro_batch_size"), RUNS, ids=str)
def test_a_step_is_that_of_documents_read_alone(layout, micro_batch_size, folders, expected):
    assert [count for _, _, count in expected] == [
        13 + 11 + 7 + 0 + 16 + 2 + 2 + 8,
        13 + 7 + 16 + 2,
        0,
    ]  # by hand, so that the oracle counts what is meant
    check(on_ranks(trained, layout, folders, micro_batch_size), expected)


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "own"), OWN, ids=str)
def test_a_teacher_in_a_layout_of_its_own_is_told_of_documents(layout, own, folders, expected):
    check(on_ranks(trained, layout, folders, 2, None, own), expected)


def check(ranks, expected):
    """Every rank's metrics are those of documents read alone."""
    for lines in ranks:
        for line, (loss, norm, count) in zip(lines, expected, strict=True):
            assert (line["counted_tokens"], line["skipped"]) == (count, 0)
            assert line["loss"] == pytest.approx(loss, rel=1e-5)
            assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_padding_leaves_no_trace(folders, alone):
    one, other = (trained(alone, folders, 4, padding) for padding in (0, 60))
    assert [(line["loss"], line["grad_norm"]) for line in one] == [(line["loss"], line["grad_norm"]) for line in other]


def logits(world, folder):
    batch = batch_of(WINDOWS, 0)
    return whole_logits(load(open_folder(folder, "model.path"), world, torch.float32), batch.inputs_BS, world, batch.documents_BS)


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(cp=2), Layout(pp=2), Layout(tp=2, cp=2, sp=True), Layout(pp=2, vpp=2)], ids=str)
def test_a_packed_document_is_read_as_if_it_were_alone(layout, folders):
    found_BSV, batch, model = of_last_stage(on_ranks(logits, layout, folders[0])), batch_of(WINDOWS, 0), hf_model(folders[0])
    for row, start, tokens, _ in texts_of(WINDOWS, batch):
        inputs = tokens[: LENGTH - start]  # a window's last token is only predicted
        if len(inputs):
            with torch.no_grad():
                expected_SV = model(inputs[None]).logits[0]
            found_SV = found_BSV[row, start : start + len(inputs)]
            assert (found_SV - expected_SV).norm() < 1e-5 * expected_SV.norm()
