"""The summary of a run: finished, crashed, at work, without a training; and where there is no run."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from minitron.config.schema import Config, Run
from minitron.engine.verified import MARKER, mark, sums
from minitron.errors import RequestError
from minitron.record import LOCK, at_work, locked
from minitron.reporting.runfiles import read_run
from minitron.reporting.summary import Kept, kept_checkpoints, show_summary, stage_states, summarise
from minitron.stages.summary import run as summary
from tests.reporting.searches import search

FIGURES = {"step_seconds": 2.0, "data_seconds": 0.5, "tokens_per_second": 500.0, "peak_memory_gib": 1.5}


def metrics(folder, lines):
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def checkpoint(folder, step, size):
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "shard").write_bytes(bytes(size))
    mark(path, sums(path, [path / "shard"]))


def told(folder, stages=None, who=None):
    return dict(summarise(read_run(folder), stages or {}, who, kept_checkpoints(folder / "checkpoints")))


def printed(folder, width=200):
    to = Console(file=io.StringIO(), width=width)
    show_summary(folder, {"data": "done", "distill": "not finished"}, None, to)
    return to.file.getvalue()


@pytest.fixture
def bare(tmp_path):
    """A run's folder with settings alone."""
    (tmp_path / "config.yaml").write_text("model: {path: hub/Model-1}\ntrain: {steps: 8}\n")
    (tmp_path / "stages.json").write_text("{}")
    return tmp_path


def test_a_training_in_its_middle(bare):
    lines = [{"step": step, "loss": 1 / step, "tokens": 1000 * step, **FIGURES, "skipped_steps": step // 3} for step in (1, 2, 3, 4)]
    lines[1] |= {"valid_loss": 2.5}
    lines[2] |= {"loss": None, "step_seconds": 4.0, "tokens_per_second": 250.0, "mfu": 0.5}
    lines[3] |= {"valid_loss": 2.75}
    metrics(bare, lines)
    checkpoint(bare, 2, 3000)
    checkpoint(bare, 4, 5_000_000)
    (bare / "checkpoints" / ".step_00000006.partial").mkdir()
    assert told(bare, {"data": "done", "distill": "not finished"}, "process 7 on node3") == {
        "model": "Model-1",
        "stages": "data done · distill not finished",
        "at work": "process 7 on node3",
        "training": "step 4 of 8 (50 %)",
        "tokens": "4.0 K",
        "time": "0:00:10 in steps, about 0:00:10 to come",
        "speed": "400 tokens/s, 50.0 % of its peak, 20.0 % of the time waiting for data, 1.50 GiB on rank 0",
        "loss": "first 1 (step 1), last 0.25 (step 4), best 0.25 (step 4)",
        "held-out loss": "first 2.5 (step 2), last 2.75 (step 4), best 2.5 (step 2)",
        "skipped": "1 step",
        "checkpoints": "step 2 (3.1 KB, the best of them), step 4 (5.0 MB)",
    }


def test_a_folder_without_a_training(bare):
    assert told(bare) == {"model": "Model-1", "stages": "none was begun"}
    assert "report" in printed(bare)


def test_metrics_that_are_logged_now_and_then_tell_the_time_of_all_steps(bare):
    metrics(bare, [{"step": step, "loss": 1.0, "tokens": 9, **FIGURES} for step in (4, 8)])
    assert told(bare)["time"] == "0:00:16 in steps"
    assert told(bare)["checkpoints"] == "none"


def test_a_finished_run(run_dir):
    found = told(run_dir)
    assert found["parameters"] == "134.5 M -> 101.9 M (75.7 % kept)"
    assert found["sizes"] == "hidden size 576 -> 512, MLP neurons per layer 1,536 -> 1,152"
    assert found["training"] == "step 1,200 of 1,200 (100 %)"
    assert found["skipped"] == "1 step"
    text = printed(run_dir)
    assert "held-out" in text and "wikitext2" in text and "82.7 %" in text  # the table of the evaluation, with the gap closed
    assert f"none yet: minitron report run.dir={run_dir} makes it" in text
    (run_dir / "report.html").write_text("")
    assert "none yet" not in printed(run_dir)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_no_figure_is_cut_on_a_narrow_terminal(run_dir, width):
    squeezed = "".join("".join(line.split()) for line in printed(run_dir, width).splitlines())
    assert "134.5M->101.9M(75.7%kept)" in squeezed
    assert "…" not in squeezed


def test_a_crash_in_the_middle_of_a_line(bare):
    metrics(bare, [{"step": 1, "loss": 1.0, "tokens": 9, **FIGURES}])
    with open(bare / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert told(bare)["training"] == "step 1 of 8 (12 %)"


def test_a_checkpoint_that_goes_away_meanwhile_is_left_out(tmp_path, monkeypatch):
    checkpoint(tmp_path, 2, 3000)
    checkpoint(tmp_path, 4, 3000)
    look = Path.rglob

    def late(path, pattern):
        if path.name == "step_00000002":
            shutil.rmtree(path)
            return iter([path / "shard", path.stat()])
        return look(path, pattern)

    size = 3000 + (tmp_path / "checkpoints" / "step_00000002" / MARKER).stat().st_size
    assert kept_checkpoints(tmp_path / "checkpoints") == [Kept(2, size), Kept(4, size)]
    monkeypatch.setattr(Path, "rglob", late)
    assert kept_checkpoints(tmp_path / "checkpoints") == [Kept(4, size)]
    assert kept_checkpoints(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("harm", "wrong"),
    [
        (lambda path: (path / "shard").write_bytes(b"123"), r"damaged: shard: it has 3 bytes, and 3,000 were written"),
        (lambda path: (path / "shard").unlink(), r"damaged: shard: No such file or directory"),
        (lambda path: (path / MARKER).unlink(), r"damaged: manifest.json: No such file or directory"),
        (lambda path: (path / MARKER).write_text("{}"), r"damaged: manifest.json: it is not what was written"),
    ],
)
def test_a_damaged_checkpoint_is_told_and_is_not_the_best(bare, harm, wrong):
    metrics(bare, [{"step": step, "loss": 1.0, "valid_loss": float(4 - step), "tokens": 9} for step in (1, 2)])
    for step in (1, 2):
        checkpoint(bare, step, 3000)
    assert "step 2 (3.1 KB, the best of them)" in told(bare)["checkpoints"]
    harm(bare / "checkpoints" / "step_00000002")
    shown = told(bare)["checkpoints"]
    assert shown.startswith("step 1 (3.1 KB, the best of them), step 2 (") and shown.endswith(f"{wrong})")


def test_stages_tell_of_which_checkpoint_they_are(bare):
    record = {
        "data": {"done": True, "inputs": {"model": "x"}},
        "distill": {"done": False, "inputs": {}},
        "evaluate": {"done": True, "inputs": {"checkpoint": "1200"}},
        "export": {"done": True, "inputs": {"checkpoint": "best"}},
        "prune": {"done": True},
    }
    assert stage_states(bare, record) == {
        "data": "done", "distill": "not finished", "evaluate": "done, of step 1,200", "export": "done, of the best checkpoint", "prune": "done",
    }  # fmt: skip
    assert stage_states(bare, {"export": {"done": True, "inputs": {"checkpoint": "None"}}}) == {"export": "done, before any training"}


def test_a_data_that_was_killed_was_begun(bare):
    (bare / "data" / "train.pieces").mkdir(parents=True)
    assert stage_states(bare, {}) == {}
    for number in (1, 2):
        (bare / "data" / "train.pieces" / f"{number:08}.safetensors").touch()
    assert stage_states(bare, {}) == {"data": "begun; 2 pieces of text under way"}
    states = stage_states(bare, {"calibrate": {"done": False}, "data": {"done": True}})  # another text is being added
    assert [*states.items()] == [("data", "done; 2 pieces of text under way"), ("calibrate", "not finished")]


@pytest.mark.parametrize(
    ("state", "line"),
    [
        ({"rungs": 0}, "12 candidates; none was measured yet"),
        ({"rungs": 1}, r"12 candidates; before training \(12 candidates measured\); best so far: L24-.* params, loss 5.1059 before training"),
        (
            {"rungs": 3, "partial": True},
            r"12 candidates; rung 2 of 4, after 100 steps \(2 candidates measured\); best so far: L24-.* loss 3.6469 .*",
        ),
        ({}, r"12 candidates; chosen: L26-H576-F1024-A6-G3: layers 26, .* heads 6, 91.6 M params, loss 3.1670 after 400 steps"),
    ],
)
def test_how_far_a_search_has_come(bare, state, line):
    search(**state).save(bare)
    assert re.fullmatch(line, told(bare)["search"])


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(RequestError, match=rf"^run\.dir={folder}: the folder of a run is needed$"):
            summary(Config(run=Run(dir=str(folder))))


def test_who_is_at_work_is_told_without_disturbing_them(bare):
    assert at_work(bare) is None
    with locked(bare):
        assert at_work(bare).startswith("process ")
        with pytest.raises(RequestError, match="at work in it"), locked(bare):
            pass
    (bare / LOCK).write_text("process 1 on a machine that lost its power")
    assert at_work(bare) is None
    with locked(bare):
        pass


def test_it_needs_neither_torch_nor_megatron(bare):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(["torch", "megatron", "transformers"]))
from minitron.cli import main
sys.exit(main(["summary", "run.dir={bare}"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Model-1" in done.stdout
