"""Distillation on hidden states as a user asks for it."""

import json
import math
import shutil

from minitron.record import RECORD
from tests.stages.commands import minitron

NEEDED = "distill.hidden.projection=false: the student's hidden size is 48, the teacher's 64; true is needed"


def test_a_compression_with_hidden_states(settings, tmp_path):
    asked = ["distill.hidden.enabled=true", "distill.hidden.projection=true", "distill.hidden.embeddings=true", "target.num_layers=4"]
    small = [*settings, "train.steps=3", "train.warmup_steps=1", "train.eval_tokens=64", "eval.tokens=64"]
    done = minitron(tmp_path / "log", "compress", f"run.dir={tmp_path / 'run'}", *small, *asked)
    assert (done.code, done.err) == (0, ""), done
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["alpha"] for line in lines] == [0.0, *(before["kd_loss"] / before["hidden_loss"] for before in lines[:-1])]
    for line in lines:
        assert math.isclose(line["loss"], line["kd_loss"] + line["alpha"] * line["hidden_loss"], rel_tol=1e-6)
    assert "projection" not in {file.stem for file in (tmp_path / "run" / "hf").iterdir()}


def test_sizes_that_nothing_bridges_are_refused_before_any_work(settings, finished, tmp_path):
    done = minitron(tmp_path / "log", "compress", f"run.dir={tmp_path / 'run'}", *settings, "distill.hidden.enabled=true")
    assert (done.code, done.err) == (2, f"minitron: {NEEDED}\n")
    assert not (tmp_path / "run" / "data").exists()
    # a verb that is not told the target asks the pruned model
    shutil.copytree(finished, tmp_path / "pruned")
    shutil.rmtree(tmp_path / "pruned" / "checkpoints")
    record = tmp_path / "pruned" / RECORD
    record.write_text(json.dumps({verb: entry for verb, entry in json.loads(record.read_text()).items() if verb in ("calibrate", "data", "prune")}))
    own = [setting for setting in settings if not setting.startswith(("target", "calibrate", "eval"))]
    done = minitron(tmp_path / "log", "distill", f"run.dir={tmp_path / 'pruned'}", *own, "distill.hidden.enabled=true")
    assert (done.code, done.err) == (2, f"minitron: {NEEDED}\n")
