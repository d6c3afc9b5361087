"""The metrics file over a run's life: written, interrupted, resumed, broken; and Weights & Biases beside it."""

import importlib.util
import json
import math
import sys
import types

import pytest

from minitron.config.schema import Logging
from minitron.errors import RequestError
from minitron.reporting.runfiles import read_metrics
from minitron.reporting.tracking import Tracker

QUIET, WANDB = Logging(), Logging(wandb=True, wandb_project="tests")


def tracker(folder, start_step=0, logging=QUIET):
    return Tracker(folder, start_step=start_step, logging=logging, config={"seed": 1})


def strict_lines(folder):
    """The lines as a reader sees them that takes no JSON but the standard's."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path):
    with tracker(tmp_path) as tracked:
        for step in (1, 2, 3):
            tracked.log({"step": step, "loss": 1 / step, "skipped": False})
            assert strict_lines(tmp_path)[-1] == {"step": step, "loss": 1 / step, "skipped": False}
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 2, 3]


def test_resuming_removes_later_steps_and_continues(tmp_path):
    with tracker(tmp_path) as first:
        for step in range(1, 8):
            first.log({"step": step, "loss": 0.1 * step})
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    with tracker(tmp_path, start_step=4) as second:
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == before[:4]
        second.log({"step": 5, "loss": 9.0})
    assert [(line["step"], line["loss"]) for line in strict_lines(tmp_path)[3:]] == [(4, 0.4), (5, 9.0)]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_starting_over_leaves_nothing_of_the_earlier_run(tmp_path):
    with tracker(tmp_path) as first:
        first.log({"step": 1, "loss": 1.0})
    tracker(tmp_path).close()
    assert strict_lines(tmp_path) == []


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0}]
    with tracker(tmp_path, start_step=2) as resumed:
        resumed.log({"step": 3, "loss": 1.0})
    assert [line["step"] for line in strict_lines(tmp_path)] == [1, 3]


@pytest.mark.parametrize("line", ["not json", "[1]", '{"loss": 1.0}', '{"step": "x"}', "3"])
def test_a_broken_line_is_refused_and_the_file_left_alone(tmp_path, line):
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(RequestError, match=r"metrics\.jsonl: line 2"):
        tracker(tmp_path, start_step=1)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_what_is_not_finite_becomes_null(tmp_path):
    with tracker(tmp_path) as tracked:
        tracked.log({"step": 1, "loss": math.nan, "grad_norm": math.inf, "kd_loss": -math.inf, "lr": 0.1})
    assert strict_lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "kd_loss": None, "lr": 0.1}]
    tracker(tmp_path, start_step=1).close()
    assert strict_lines(tmp_path)[0]["loss"] is None


def test_a_folder_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"cannot (write|read)"):
        tracker(tmp_path / "file")


class FakeRun:
    def __init__(self, **settings):
        self.settings, self.logged, self.metrics, self.exit_codes = settings, [], [], []

    def define_metric(self, name, step_metric):
        self.metrics.append((name, step_metric))

    def log(self, metrics):
        self.logged.append(metrics)

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch):
    """A wandb that remembers the runs it started."""
    runs = []

    def init(**settings):
        runs.append(FakeRun(**settings))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=type("Error", (Exception,), {}), runs=runs))
    return sys.modules["wandb"]


def test_wandb_is_off_by_default_and_then_never_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail
    with tracker(tmp_path) as tracked:
        tracked.log({"step": 1, "loss": 1.0})
    assert not (tmp_path / "wandb_id").exists()


def test_wandb_without_the_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(RequestError, match=r"^logging\.wandb=true: .*not installed.*logging\.wandb=false") as refusal:
        tracker(tmp_path, logging=WANDB)
    assert "\n" not in str(refusal.value)


def test_wandb_that_does_not_start_is_refused_in_one_line(tmp_path, fake_wandb):
    def init(**settings):
        raise fake_wandb.Error("no API key\nconfigured")

    fake_wandb.init = init
    with pytest.raises(RequestError, match=r"^logging\.wandb=true: .*no API key configured") as refusal:
        tracker(tmp_path, logging=WANDB)
    assert "\n" not in str(refusal.value)


def test_a_resumed_run_continues_its_wandb_run(tmp_path, fake_wandb):
    with tracker(tmp_path / "mine", logging=WANDB) as first:
        first.log({"step": 1, "loss": 1.0})
    with pytest.raises(ZeroDivisionError), tracker(tmp_path / "mine", start_step=1, logging=WANDB) as second:
        second.log({"step": 2, "loss": 0.5})
        raise ZeroDivisionError
    one, two = fake_wandb.runs
    assert one.settings == two.settings
    assert one.settings["id"] and one.settings["resume"] == "allow" and one.settings["project"] == "tests"
    assert one.settings["name"] == "mine" and one.settings["config"] == {"seed": 1}
    assert one.metrics == [("*", "step")]  # wandb's own counter would refuse a step that was logged before
    assert (one.logged, two.logged) == ([{"step": 1, "loss": 1.0}], [{"step": 2, "loss": 0.5}])
    assert (one.exit_codes, two.exit_codes) == ([0], [1])
    second.close()
    assert two.exit_codes == [1]


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="the package wandb is not installed (pip install minitron[logging])")
def test_wandb_offline_keeps_the_run_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    with tracker(tmp_path, logging=WANDB) as tracked:
        tracked.log({"step": 1, "loss": 1.0})
    identity = (tmp_path / "wandb_id").read_text().strip()
    (record,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert identity in record.name and record.stat().st_size > 0
    assert strict_lines(tmp_path) == [{"step": 1, "loss": 1.0}]
