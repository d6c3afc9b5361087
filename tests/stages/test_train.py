"""`minitron train`: a model trained whole, and what its folder is good for afterwards."""

import json

import pytest
import torch

from minitron.config.schema import Distill, Train
from minitron.distillation.signal import NoTeacher
from minitron.distillation.step import distillation_loss
from minitron.engine.batch import Batch
from minitron.engine.trainer import Trainer
from minitron.session import Session
from minitron.stages.train import NEXT_TOKEN
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import BIASES, UNTIED, hf_model, same_tensors, save_model, saved_tensors, tokens_of
from tests.oracles.training import next_token
from tests.stages.commands import minitron

BATCH, LENGTH, STEPS = 8, 12, 5
SETTINGS = {"steps": 6, "global_batch_size": BATCH, "seq_length": LENGTH, "lr": 3e-3, "min_lr": 1e-4, "warmup_steps": 2, "clip_grad": 1.0}
LAYOUTS = [Layout(), Layout(tp=2, sp=True), Layout(pp=2, dp=2), Layout(tp=2, cp=2), Layout(pp=2, vpp=2)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"tied": save_model(root / "tied", 2), "biases": save_model(root / "biases", 3, **BIASES, **UNTIED)}


def global_batches():
    return [tokens_of(61, BATCH, LENGTH + 1, seed) for seed in range(STEPS)]


def steps(world, models):
    """The lines of STEPS steps of each model."""
    found = {}
    for name, folder in models.items():
        model = load(open_folder(folder, "model.path"), world, torch.float32)
        trainer = Trainer(model, Train(**SETTINGS, micro_batch_size=2), world)
        loss = distillation_loss(model, NoTeacher(), NEXT_TOKEN, world)
        found[name] = []
        for step, tokens in enumerate(global_batches()):
            batches = [Batch(part) for part in tokens[world.dp_rank :: world.dp].split(2)]
            found[name].append(trainer.update(batches, loss(step, batches)))
        trainer.close()
    return found


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_five_steps_are_those_of_a_plain_model_and_adamw(layout, models):
    ranks = on_ranks(steps, layout, models)
    for name, folder in models.items():
        expected = next_token(folder, global_batches(), Train(**SETTINGS))
        for rank in ranks:
            for line, by_hand in zip(rank[name], expected, strict=True):
                assert line["loss"] == line["ce_loss"] == pytest.approx(by_hand["loss"], rel=1e-5)
                assert line["grad_norm"] == pytest.approx(by_hand["grad_norm"], rel=1e-5)
                assert line["lr"] == pytest.approx(by_hand["lr"])
                assert "kd_loss" not in line


def test_the_weight_of_the_loss_is_that_of_the_cross_entropy(models, alone):
    model = load(open_folder(models["tied"], "model.path"), alone, torch.float32)
    batches = [Batch(global_batches()[0])]
    lines = []
    for settings in (NEXT_TOKEN, Distill(loss="none", cross_entropy=0.5)):
        trainer = Trainer(model, Train(**{**SETTINGS, "lr": 1e-12, "min_lr": 0.0}), alone)
        lines.append(trainer.update(batches, distillation_loss(model, NoTeacher(), settings, alone)(0, batches)))
        trainer.close()
    whole, half = lines
    assert half["ce_loss"] == pytest.approx(whole["ce_loss"]) and half["loss"] == pytest.approx(whole["loss"] / 2)
    assert half["grad_norm"] == pytest.approx(whole["grad_norm"] / 2, rel=1e-5)


@pytest.fixture(scope="module")
def folder(stories, tales, tmp_path_factory):
    """(the folder of a finished `train`, its settings)"""
    root = tmp_path_factory.mktemp("whole")
    usual = [f"model.path={stories}", "device=cpu", "dtype=fp32"]
    data = [f"data.train={tales}", "train.seq_length=32", "train.steps=6", "train.global_batch_size=4", "train.warmup_steps=1", "train.lr=1e-3",
            "train.eval_interval=3", "train.save_interval=3", "train.eval_tokens=64", "logging.progress=false"]  # fmt: skip
    done = minitron(root / "log", "train", f"run.dir={root / 'run'}", *usual, *data)
    assert (done.code, done.err) == (0, ""), done
    assert "step_00000006: the model after 6 steps; minitron export makes a folder of it" in done.out
    return root / "run", usual, data


def without_teacher():
    def fail(self):
        raise AssertionError("a teacher is loaded")

    Session.teacher = property(fail)


def test_what_it_made_is_measured_exported_and_compressed(folder, tmp_path):
    run, usual, data = folder
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "valid_loss" in line] == [3, 6]
    for verb, settings in (("evaluate", [*usual, *data[:-1], "eval.tokens=64"]), ("export", usual), ("report", [])):
        done = minitron(tmp_path / verb, verb, f"run.dir={run}", *settings)
        assert (done.code, done.err) == (0, ""), done
    evals = json.loads((run / "eval.json").read_text())
    assert list(evals) == ["original", "trained"] and evals["trained"]["loss"] == pytest.approx(lines[-1]["valid_loss"], rel=1e-6)
    hf = hf_model(run / "hf")  # as transformers loads it: bitwise what was written, and the loss is the same
    assert same_tensors({name: hf.state_dict()[name] for name in saved_tensors(run / "hf")}, saved_tensors(run / "hf"))
    report = (run / "report.html").read_text()
    assert "Training report" in report and "Importance" not in report and "took the held-out loss from" in report
    # how it runs is free to change, what it makes is not
    again = minitron(tmp_path / "again", "train", f"run.dir={run}", *usual, *data, "train.recompute=full", "train.overlap_grad_reduce=true")
    assert again.code == 0 and "nothing is left to do" in again.out
    pruned = [f"model.path={run / 'hf'}", "device=cpu", "dtype=fp32", "target.hidden_size=48", "calibrate.criterion=magnitude"]
    for verb in ("calibrate", "prune"):
        done = minitron(tmp_path / verb, verb, f"run.dir={tmp_path / 'compression'}", *pruned, *(data[:1] if verb == "calibrate" else []))
        assert (done.code, done.err) == (0, ""), done
    taught = [*pruned[:3], *data, "distill.loss=none", "distill.cross_entropy=1", "train.schedule=wsd", "train.decay_steps=2"]
    done = minitron(tmp_path / "distill", "distill", f"run.dir={tmp_path / 'compression'}", *taught, prepare=without_teacher)
    assert (done.code, done.err) == (0, ""), done
    lines = [json.loads(line) for line in (tmp_path / "compression" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines[:4]] == [1e-3] * 4 and lines[-1]["lr"] == pytest.approx(1e-5)
    assert all(line["loss"] == line["ce_loss"] and "kd_loss" not in line for line in lines)


def test_a_folder_is_that_of_one_model_or_of_a_compression(folder, finished, tmp_path):
    run, usual, data = folder
    done = minitron(tmp_path / "a", "prune", f"run.dir={run}", *usual, "target.hidden_size=48")
    assert done.code == 2 and done.err == (
        f"minitron: run.dir={run}: it holds a training of the whole model (minitron train): use another run.dir, with what minitron export makes of "
        "this one as model.path or teacher.path\n"
    )
    done = minitron(tmp_path / "b", "train", f"run.dir={finished}", *usual, *data)
    assert done.code == 2 and done.err == (
        f"minitron: run.dir={finished}: it holds a pruned model, and train is for the whole model of model.path: use another run.dir "
        "(minitron distill retrains the pruned one, with distill.loss=none distill.cross_entropy=1 as this verb would)\n"
    )
