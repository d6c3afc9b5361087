"""What the verbs print: each tells what it made, evaluate the table of results."""

import json
import re
import shutil

from minitron.config.build import from_yaml
from tests.stages.commands import minitron


def told(done):
    """The lines of a command that went well."""
    assert (done.code, done.err) == (0, ""), done
    return done.out.splitlines()


def test_a_compression_tells_what_its_stages_made(finished):
    lines = (finished.parent / "compress.out").read_text().splitlines()
    cut = lines.index("[3/7] prune")
    assert lines[cut + 1 : cut + 3] == ["  260.0 K -> 163.3 K parameters (62.8 % kept)", "  hidden size 64 -> 48, MLP neurons per layer 172 -> 128"]
    assert f"  {finished}/importance.safetensors: a score for every unit, by activation" in lines
    assert f"  {finished}/checkpoints/step_00000016: the student after 16 steps" in lines
    assert f"  {finished}/hf: the student after 16 steps" in lines
    assert [line.split()[0] for line in lines if line.startswith(f" results  {finished}/eval.json")] == ["results"]


def test_a_finished_training_says_that_nothing_is_left(finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    lines = told(minitron(tmp_path / "log", "distill", f"run.dir={run}", *settings))
    assert lines == ["  16 of 16 steps were done before: nothing is left to do", f"  {run}/checkpoints/step_00000016: the student after 16 steps"]


def test_evaluate_prints_the_table_and_where_its_figures_are(finished, settings, tmp_path):
    """Without the settings of the training, of which it reads the length of a sequence alone; those stay as they were."""
    run = shutil.copytree(finished, tmp_path / "run")
    needed = [setting for setting in settings if not setting.startswith("train.") or setting.startswith("train.seq_length=")]
    assert len(needed) < len(settings)
    lines = told(minitron(tmp_path / "log", "evaluate", f"run.dir={run}", *needed))
    assert from_yaml((run / "config.yaml").read_text()).train == from_yaml((finished / "config.yaml").read_text()).train
    figures = json.loads((run / "eval.json").read_text())
    cells = [line.split() for line in lines]
    assert ["text", "model", "params", "loss", "perplexity", "gap", "closed", "tokens/s"] in cells
    for name, size in (("teacher", "260.0"), ("pruned", "163.3"), ("student", "163.3")):
        row = next(row for row in cells if name in row)
        assert row[row.index(name) + 1 :][:3] == [size, "K", f"{figures[name]['loss']:.3f}"]
    assert lines[-1] == f" results  {run}/eval.json"
    assert not any("not here yet" in line for line in lines)


def test_evaluate_alone_says_that_there_is_but_a_teacher(settings, tmp_path):
    lines = told(minitron(tmp_path / "log", "evaluate", f"run.dir={tmp_path / 'run'}", *settings))
    assert lines[0] == "  evaluates teacher alone; not here yet: pruned (minitron prune makes it), student (minitron distill makes it)"
    assert list(json.loads((tmp_path / "run" / "eval.json").read_text())) == ["teacher"]


def test_calibrate_alone_tells_what_it_tokenised(settings, tales, tmp_path):
    asked = [value for value in settings if not value.startswith(("target", "logging"))]
    lines = told(minitron(tmp_path / "log", "calibrate", f"run.dir={tmp_path / 'run'}", *asked))
    assert re.match(r"tokenise train: [1-9]\d* documents, [\d,]+ tokens", lines[0])
    assert next(line for line in lines if line.startswith("  train: ")).endswith(f" tokens from {tales}")
