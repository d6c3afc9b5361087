"""The table of a sweep: runs that are done, at work, not begun."""

import io
import json

import pytest
from rich.console import Console

from minitron.config.schema import Config, Run
from minitron.reporting.sweep import entry, read_sweep, show_sweep, write_sweep
from minitron.stages.summary import run as summary

DONE = {"done": True}
EVALS = {
    "teacher": {"params": 100, "loss": 2.0, "perplexity": 7.4},
    "pruned": {"params": 50, "loss": 4.0, "perplexity": 54.6},
    "student": {"params": 50, "loss": 2.5, "perplexity": 12.2},
}


def made(folder, record, evals=None, lines=()):
    folder.mkdir()
    (folder / "stages.json").write_text(json.dumps(record))
    (folder / "config.yaml").write_text("train: {steps: 8}\n")
    if evals:
        (folder / "eval.json").write_text(json.dumps(evals))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    """Three runs: one done, one in its training, one that was not begun."""
    steps = [{"step": step, "loss": 3.0, "tokens": 1000 * step, "step_seconds": 10.0, "valid_loss": 3.5} for step in range(1, 9)]
    made(tmp_path / "a", {"distill": DONE, "evaluate": DONE, "export": DONE}, EVALS, steps)
    made(tmp_path / "b", {"prune": DONE, "distill": {"done": False}}, None, steps[:4])
    write_sweep(tmp_path, {"b": {"recipe": "b"}, "a": {"recipe": "a"}, "c": {"recipe": "c"}})
    return tmp_path


def test_what_each_run_came_to(folder):
    done, at_work, absent = (entry(folder / name, {}) for name in "abc")
    assert (done.state, done.params, done.step, done.steps, done.tokens, done.seconds) == ("done", 50, 8, 8, 8000, 80.0)
    assert (done.pruned_loss, done.loss, done.perplexity, done.gap) == (4.0, 2.5, 12.2, 0.75)
    assert (at_work.state, at_work.step, at_work.seconds, at_work.loss, at_work.gap) == ("distill not finished", 4, 40.0, 3.5, None)
    assert (absent.state, absent.loss) == ("not begun", None)


def test_a_model_that_was_trained_whole_has_no_gap(tmp_path):
    made(tmp_path / "a", {"train": DONE, "evaluate": DONE}, {"original": EVALS["teacher"], "trained": EVALS["student"]})
    one = entry(tmp_path / "a", {})
    assert (one.pruned_loss, one.loss, one.gap, one.state) == (2.0, 2.5, None, "evaluate done")


def test_the_table_has_the_best_first_and_what_a_narrow_terminal_has_room_for(folder, capsys):
    for width, there in ((200, ["params", "tokens", "1:20", "75.0 %", "4 of 8", "12.20"]), (60, ["loss", "2.500"])):
        to = Console(file=io.StringIO(), width=width)
        show_sweep(folder, to)
        shown = to.file.getvalue()
        rows = [line.split()[0] for line in shown.splitlines() if line.strip() and line.split()[0] in "abc"]
        assert rows == ["a", "b", "c"]
        assert all(word in shown for word in there)
    summary(Config(run=Run(dir=str(folder))))
    assert "not begun" in capsys.readouterr().out


def test_what_a_run_is_called_by_is_not_said_twice_and_long_names_stay_whole(tmp_path):
    names = ["smollm2_135m_to_100m", "smollm2_135m_to_106m_depth"]
    for name in names:
        made(tmp_path / name, {"distill": DONE, "evaluate": DONE, "export": DONE}, EVALS)
    write_sweep(tmp_path, {name: {"recipe": name} for name in names})
    show_sweep(tmp_path, to := Console(file=io.StringIO(), width=80))
    assert "recipe" not in to.file.getvalue() and all(name in to.file.getvalue() for name in names)
    write_sweep(tmp_path, {"lr-1e-4": {"train.lr": "1e-4"}})
    show_sweep(tmp_path, to := Console(file=io.StringIO(), width=200))
    assert "recipe" in to.file.getvalue() and "train.lr" in to.file.getvalue()


def test_runs_of_an_earlier_sweep_stay_in_the_table(folder):
    write_sweep(folder, {"d": {"seed": "1"}})
    assert [*read_sweep(folder)] == ["b", "a", "c", "d"]
    assert read_sweep(folder / "a") == {}
