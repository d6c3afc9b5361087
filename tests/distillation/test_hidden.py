"""Losses between hidden states: training steps against plain `transformers` models, at every layout, kind and split into microbatches."""

import pytest
import torch

from minitron.arch.families import from_hf
from minitron.config.schema import Distill, Hidden, Train
from minitron.distillation.hidden import HiddenLoss, pairs_of, summed
from minitron.distillation.signal import LiveTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.trainer import Trainer
from minitron.errors import RequestError, Stopped
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.engine.runs import Run
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import config_of, save_model, saved_tensors, tokens_of
from tests.oracles.training import distil

BATCH, LENGTH, STEPS, TEMPERATURE, SEED = 8, 12, 3, 2.0, 11
SETTINGS = {"steps": 6, "global_batch_size": BATCH, "seq_length": LENGTH, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_grad": 1.0}
NARROW = {"hidden_size": 36, "intermediate_size": 24}
# Over two stages the teacher's six layers lie three and three, the student's four two and two: both ways between stages, and within each;
# one layer of either side is in two pairs.
PAIRS = {"layers": [2, -2, 4, 2], "teacher_layers": [-3, 2, 6, 2]}
# {name: (student, settings, whether some tokens don't count)}
CASES = {
    "cosine": ("narrow", Hidden(enabled=True, projection=True, embeddings=True, **PAIRS), True),
    "mse": ("narrow", Hidden(enabled=True, kind="mse", projection=True, alpha=0.3, **PAIRS), False),
    "plain": ("wide", Hidden(enabled=True, kind="mse", embeddings=True, **PAIRS), True),
    "usual": ("wide", Hidden(enabled=True, alpha=2.0), False),
    "same size": ("wide", Hidden(enabled=True, projection=True, layers=None, teacher_layers=None, embeddings=True), False),
}
# (layout, sequences of a microbatch)
RUNS = [
    (Layout(), 1), (Layout(), 2), (Layout(), 4), (Layout(tp=2), 4), (Layout(tp=2, sp=True), 4), (Layout(pp=2), 2), (Layout(pp=2, vpp=2), 2),
    (Layout(dp=2), 2), (Layout(cp=2), 2), (Layout(tp=2, pp=2, sp=True), 2),
]  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    students = {"narrow": save_model(root / "narrow", 2, **NARROW), "wide": save_model(root / "wide", 3)}
    return {**students, "teacher": save_model(root / "teacher", 1, num_hidden_layers=6)}


@pytest.fixture(scope="module")
def expected(folders):
    return {
        name: distil(
            folders[student], folders["teacher"], global_batches(), Train(**SETTINGS), TEMPERATURE, hidden, SEED, counted() if masked else None
        )
        for name, (student, hidden, masked) in CASES.items()
    }


def global_batches():
    return [tokens_of(61, BATCH, LENGTH + 1, seed) for seed in range(STEPS)]


def counted():
    """Positions that count: uneven over sequences and parts of a sequence, and in one sequence none."""
    return (tokens_of(3, BATCH, LENGTH, seed=99) > 0) & (torch.arange(BATCH)[:, None] != 3)


def battery(world, folders, micro_batch_size, out):
    """The metrics of every case's steps, and its projection; the students are exported."""
    lines, projections = {}, {}
    for name, (student_name, settings, masked) in CASES.items():
        source = open_folder(folders[student_name], "model.path")
        student = load(source, world, torch.float32)
        teacher = load(open_folder(folders["teacher"], "teacher.path"), world, torch.float32).requires_grad_(False)
        train = Train(**SETTINGS, micro_batch_size=micro_batch_size)
        hidden = HiddenLoss(student, teacher, settings, train, world, SEED)
        trainer = Trainer(student, train, world)
        loss = distillation_loss(student, LiveTeacher(teacher, world, hidden.teacher_states), Distill(temperature=TEMPERATURE), world, hidden)
        lines[name] = []
        for step, tokens in enumerate(global_batches()):
            parts = [part[world.dp_rank :: world.dp].split(micro_batch_size) for part in (tokens, counted())]
            microbatches = [Batch(tokens, mask if masked else None) for tokens, mask in zip(*parts, strict=True)]
            lines[name].append(trainer.update(microbatches, loss(step, microbatches)))
        assert hidden.teacher_states.states == {}
        export(student, world, source.config, folders[student_name], out / name, torch.float32)
        projections[name] = hidden.state_dict().get("projection")
    return lines, projections


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "micro_batch_size"), RUNS, ids=str)
def test_steps_are_those_of_plain_models(layout, micro_batch_size, folders, expected, tmp_path):
    ranks = on_ranks(battery, layout, folders, micro_batch_size, tmp_path)
    for name, (lines, tensors) in expected.items():
        for found, projections in ranks:
            for line, wanted in zip(found[name], lines, strict=True):
                assert line["skipped"] == 0
                assert {key: line[key] for key in wanted} == pytest.approx(wanted, rel=2e-5, abs=1e-7), name
            if "projection" in tensors:
                assert torch.equal(projections[name], ranks[0][1][name])
                start = torch.eye(48, 36 if CASES[name][0] == "narrow" else 48)
                assert (projections[name] - tensors["projection"]).norm() < 1e-3 * (tensors["projection"] - start).norm()
            else:
                assert projections[name] is None
        trained, start = saved_tensors(tmp_path / name), saved_tensors(folders[CASES[name][0]])
        for part, tensor in trained.items():
            assert (tensor - tensors[part]).norm() < 1e-3 * (tensors[part] - start[part]).norm(), (name, part)


def test_the_loss_acts(expected):
    """The cases differ from each other, alpha moves where it is dynamic, and starts at 0 there."""
    alphas = {name: [line["alpha"] for line in lines] for name, (lines, _) in expected.items()}
    assert alphas["mse"] == [0.3] * STEPS
    assert alphas["cosine"][0] == 0.0
    assert len(set(alphas["cosine"])) == STEPS


FIGURES = ("step", "loss", "kd_loss", "hidden_loss", "alpha", "grad_norm", "projection_grad_norm", "lr")
LEARNED = {"projection": True, "embeddings": True, "layers": [1, -1], "teacher_layers": [3, -2]}


def unbroken_and_resumed(world, folder, out, dtype):
    """Lines and projection of a run in one piece, and of one that is stopped after step 1 and step 3."""
    whole = Run(world, folder, dtype=dtype, hidden=LEARNED).fit(out / "whole")
    lines = []
    for stop_after in (1, 3, None):
        run = Run(world, folder, dtype=dtype, hidden=LEARNED)
        assert Checkpoints(out / "broken").resume(run.trainer) == (stop_after != 1)
        try:
            run.fit(out / "broken", stop_after)
        except Stopped:
            assert run.trainer.step == stop_after
        lines += run.lines
    weights = [run.trainer.extras["hidden"].projection.weight_GH.detach() for run in (whole, run)]
    return *([{key: line[key] for key in FIGURES} for line in part] for part in (whole.lines, lines)), *weights


@pytest.mark.multirank
@pytest.mark.parametrize(("layout", "dtype"), [(Layout(), torch.bfloat16), (Layout(tp=2, pp=2, sp=True), torch.float32)], ids=str)
def test_a_run_that_was_stopped_goes_on_bit_by_bit(layout, dtype, folders, tmp_path):
    ranks = on_ranks(unbroken_and_resumed, layout, folders["wide"], tmp_path, dtype)
    whole, broken, *_ = ranks[0]
    assert len({line["alpha"] for line in whole}) == 6
    assert whole == broken
    for *_, weight, weight_of_broken in ranks:
        assert torch.equal(weight, weight_of_broken)


def first_half(world, folder, out):
    with pytest.raises(Stopped):
        Run(world, folder, hidden=LEARNED).fit(out, stop_after=3)


def second_half(world, folder, out):
    run = Run(world, folder, hidden=LEARNED)
    if out is None:
        return [run.step() for _ in range(5)][3:]
    assert Checkpoints(out).resume(run.trainer)
    return [run.step() for _ in range(2)]


@pytest.mark.multirank
def test_training_goes_on_at_another_layout(folders, tmp_path):
    on_ranks(first_half, Layout(pp=2), folders["wide"], tmp_path)
    wanted = on_ranks(second_half, Layout(), folders["wide"], None)[0]
    for lines in on_ranks(second_half, Layout(tp=2, sp=True), folders["wide"], tmp_path):
        assert lines == [pytest.approx(line, rel=1e-5) for line in wanted]


def test_a_checkpoint_without_a_projection_is_not_taken_for_one_with_it(folders, alone, tmp_path):
    Run(alone, folders["wide"]).fit(tmp_path, stop_after=6)
    with pytest.raises(RequestError, match=r"^the checkpoint holds nothing beside the model, and this training \['hidden'\]$"):
        Checkpoints(tmp_path).resume(Run(alone, folders["wide"], hidden=LEARNED).trainer)


def test_a_skipped_step_leaves_projection_and_alpha(folders, alone):
    run = Run(alone, folders["wide"], hidden=LEARNED)
    run.step()
    hidden = run.trainer.extras["hidden"]
    alpha, weight = hidden.alpha, hidden.projection.weight_GH.detach().clone()
    with torch.no_grad():
        next(run.trainer.model.parameters())[0] = torch.nan
    assert run.step()["skipped"] == 1
    assert hidden.alpha == alpha > 0
    assert torch.equal(hidden.projection.weight_GH, weight)


STUDENT, TEACHER = (from_hf(config_of(**changes).to_dict(), "x") for changes in ({"num_hidden_layers": 3}, {"num_hidden_layers": 5}))
NARROWER = from_hf(config_of(hidden_size=36).to_dict(), "x")


def test_layers_are_counted_from_1_or_from_the_end():
    settings = Hidden(enabled=True, layers=[1, 3, -3, -1], teacher_layers=[5, -1, -5, 1], embeddings=True)
    assert pairs_of(settings, STUDENT, TEACHER) == [(0, 0), (1, 5), (3, 5), (1, 1), (3, 1)]
    assert pairs_of(Hidden(enabled=True), STUDENT, TEACHER) == [(1, 3)]


@pytest.mark.parametrize(
    ("settings", "student", "said"),
    [
        ({"layers": [0]}, STUDENT, "distill.hidden.layers=[0]: the student has the layers 1 to 3, from the end -1 to -3"),
        ({"layers": [-4]}, STUDENT, "distill.hidden.layers=[-4]: the student has the layers 1 to 3, from the end -1 to -3"),
        ({"teacher_layers": [6]}, STUDENT, "distill.hidden.teacher_layers=[6]: the teacher has the layers 1 to 5, from the end -1 to -5"),
        ({}, NARROWER, "distill.hidden.projection=false: the student's hidden size is 36, the teacher's 48; true is needed"),
    ],
)
def test_what_cannot_be_compared_is_refused(settings, student, said):
    with pytest.raises(RequestError) as refusal:
        pairs_of(Hidden(enabled=True, **settings), student, TEACHER)
    assert str(refusal.value) == said


@pytest.mark.parametrize("what", [torch.nan, torch.inf, 1e38])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "mse"])
def test_what_a_token_that_does_not_count_has_reaches_nothing(kind, projected, what):
    """Loss and gradients are those of the others, bit for bit, and its own gradient is 0."""
    generator = torch.Generator().manual_seed(2)
    student, teacher, weight = (torch.randn(shape, generator=generator) for shape in ((5, 3, 6), (5, 3, 6), (6, 6)))
    mask, found = torch.arange(15).view(5, 3) % 4 > 0, []
    for filling in (0.0, what):
        states = student.masked_fill(~mask[..., None], filling).requires_grad_()
        weights = [weight.clone().requires_grad_()] if projected else []
        loss = summed(kind, states, teacher.masked_fill(~mask[..., None], filling), mask, *weights)
        found.append((loss.detach(), *torch.autograd.grad(loss, [states, *weights])))
    for clean, dirty in zip(*found, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert dirty.isfinite().all() and dirty.count_nonzero()
    assert found[1][1][~mask].count_nonzero() == 0
