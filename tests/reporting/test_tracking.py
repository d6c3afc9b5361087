"""The metrics file over a run's life: written, interrupted, resumed, broken; Weights & Biases and TensorBoard beside it."""

import importlib.util
import json
import math
import os
import signal
import sys
import time
import types

import pytest

from minitron.config.schema import Logging
from minitron.errors import RequestError
from minitron.reporting.runfiles import read_metrics
from minitron.reporting.tracking import Tracker
from tests.multirank.ranks import Died, started
from tests.oracles.wandb_server import uploaded

QUIET, WANDB, TB = Logging(), Logging(wandb=True, wandb_project="tests"), Logging(tensorboard=True)
needs_tensorboard = pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed (minitron[logging])")


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
def test_wandb_offline_holds_the_metrics_of_the_file(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false", "CONSOLE": "off"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    long = {f"figure_{number}": number / 7 for number in range(400)}
    for start, end in ((0, 6), (4, 8)):  # the second goes on from a checkpoint
        time.sleep(1.1)  # wandb names a run's folder by the second that it began in
        with tracker(tmp_path, start_step=start, logging=WANDB) as tracked:
            for step in range(start + 1, end + 1):
                tracked.log({"step": step, "loss": 1 / (step + start), "skipped": 0, **long})
    identity = (tmp_path / "wandb_id").read_text().strip()
    records = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(records) == 2 and all(identity in path.name for path in records)
    shown = uploaded(*(path.parent for path in records))
    told = strict_lines(tmp_path)
    assert [line["step"] for line in told] == [*range(1, 9)]
    assert [row["step"] for row in shown] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]  # what was done again is told again
    assert shown[:4] + shown[6:] == told


def scalars(folder):
    """What TensorBoard itself would show: by name, its (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_shows_the_metrics_of_the_file_once(tmp_path):
    for start, end in ((0, 6), (4, 8)):
        with tracker(tmp_path, start_step=start, logging=TB) as tracked:
            for step in range(start + 1, end + 1):
                tracked.log({"step": step, "loss": 1 / (step + start), "skipped": 0, "note": "text"} | ({"valid_loss": 9.0} if step == 6 else {}))
    told, shown = strict_lines(tmp_path), scalars(tmp_path)
    assert {*shown} == {"loss", "skipped", "valid_loss"}
    for name in shown:
        assert shown[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in told if name in line]


@needs_tensorboard
def test_a_run_that_starts_over_leaves_tensorboard_nothing_of_the_earlier_one(tmp_path):
    for value in (1.0, 2.0):
        with tracker(tmp_path, logging=TB) as tracked:
            tracked.log({"step": 1, "loss": value})
    assert scalars(tmp_path) == {"loss": [(1, 2.0)]}


def logging_until_killed(folder):
    """Three steps, half a fourth, and then the process is no more."""
    tracked = tracker(folder, logging=TB)
    for step in (1, 2, 3):
        tracked.log({"step": step, "loss": 1 / step})
    tracked._file.write('{"step": 4, "lo')
    tracked._file.flush()
    os.kill(os.getpid(), signal.SIGKILL)


@needs_tensorboard
@pytest.mark.multirank
def test_a_killed_run_leaves_files_that_can_be_read_and_gone_on_with(tmp_path):
    with started(logging_until_killed, 1, tmp_path) as ranks, pytest.raises(Died, match="exit code -9"):
        ranks.results(timeout=60)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [step for step, _ in scalars(tmp_path)["loss"]] == [1, 2, 3]
    time.sleep(1.1)  # event files are put in order by the second that they were begun in, and then by the process
    with tracker(tmp_path, start_step=2, logging=TB) as resumed:
        resumed.log({"step": 3, "loss": 5.0})
    assert scalars(tmp_path)["loss"] == [(1, 1.0), (2, 0.5), (3, 5.0)]
    assert strict_lines(tmp_path)[-1] == {"step": 3, "loss": 5.0}


def test_tensorboard_without_the_package_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RequestError, match=r"^logging\.tensorboard=true: .*not installed.*logging\.tensorboard=false$"):
        tracker(tmp_path, logging=TB)
