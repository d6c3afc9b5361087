"""SIGTERM and SIGUSR1, which reach a process or all of its group, once or several times: a run stops well and the same command finishes it."""

import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from minitron.config.compose import compose
from minitron.engine.checkpoint import Checkpoints
from minitron.errors import RequestError, Stopped
from minitron.session import STOPPING, end_on_signal, on_signal, session
from tests.oracles.metrics import without_costs
from tests.stages.commands import running, wait_until

LAUNCH = Path(__file__).parents[2] / "launch" / "local.sh"
GROUPS = {
    "data": ("model", "data", "device", "dtype"),
    "calibrate": ("model", "data", "calibrate", "logging", "device", "dtype"),
    "prune": ("model", "target", "calibrate", "device", "dtype"),
    "distill": ("model", "data", "train", "logging", "device", "dtype"),
    "evaluate": ("model", "data", "train", "eval", "device", "dtype"),
}
FORWARD = "minitron.engine.schedule:forward_only"
WRITE = "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item"  # one tensor into a checkpoint's file
FLUSH = "minitron.engine.sharded:fsync_path"


def grouped():
    """The rank leads a group of processes, to which all belong that it starts; it finds SIGUSR1 ignored, as the launch scripts leave it."""
    os.setsid()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def signalled(*calls):
    """Its whole group gets SIGTERM each time a rank calls MODULE:FUNCTION, `calls` of (rank, MODULE:FUNCTION, which call)."""
    grouped()
    for rank, name, which in calls:
        module, function = name.split(":")
        module = importlib.import_module(module)
        if os.environ.get("RANK", "0") == str(rank):
            setattr(module, function, counted(getattr(module, function), which))


def counted(original, which):
    calls = itertools.count(1)  # writers are threads

    @functools.wraps(original)
    def call(*args, **kwargs):
        if next(calls) == which:
            os.killpg(0, signal.SIGTERM)
        return original(*args, **kwargs)

    return call


def command(run, verb, settings):
    return [verb, f"run.dir={run}", *[value for value in settings if value.startswith(GROUPS[verb])]]


def codes(log, *arguments, prepare=grouped, size=1):
    """How each rank ended, and all that they said on stderr."""
    with running(log, *arguments, prepare=prepare, size=size) as ranks:
        found = ranks.results(timeout=120)
    return found, said(log, size)


def said(log, size):
    return "".join(Path(f"{log}{rank if size > 1 else ''}.err").read_text() for rank in range(size))


def lines(run):
    """The metrics of a run, without those that tell time."""
    return without_costs(map(json.loads, (run / "metrics.jsonl").read_text().splitlines()))


def partial(run):
    return [path for path in run.rglob("*") if path.name.endswith(".partial")]


def stopped_line(run, step):
    return f"minitron: stopped at step {step}, saved in {run}/checkpoints/step_{step:08d}: the same command continues\n"


@pytest.fixture
def pruned(finished, tmp_path):
    """The folder of a run up to pruning."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    return run


def saved(run):
    return Checkpoints(run / "checkpoints").latest() or 0


def check_goes_on(run, log, arguments, finished, size=1):
    """The same command comes to the end that a run without a break has."""
    stopped_at = saved(run)
    assert 0 < stopped_at < 16
    assert [line["step"] for line in lines(run)] == list(range(1, stopped_at + 1))
    assert codes(log, *arguments, size=size) == ([0] * size, "")
    assert partial(run) == []
    if size == 1:
        assert lines(run) == lines(finished)
    else:
        assert [line["loss"] for line in lines(run)] == pytest.approx([line["loss"] for line in lines(finished)], rel=1e-4)


@pytest.mark.multirank
@pytest.mark.parametrize(("size", "number"), [(1, signal.SIGUSR1), (2, signal.SIGTERM)])
def test_a_signal_to_the_whole_group_of_a_training_saves_and_stops(pruned, finished, settings, tmp_path, size, number):
    arguments = [*command(pruned, "distill", settings), f"parallel.tp={size}"]
    with running(tmp_path / "log", *arguments, prepare=grouped, size=size) as ranks:
        wait_until(lambda: saved(pruned) > 0, ranks)
        for process in ranks.processes:
            os.killpg(process.pid, number)
        assert ranks.results(timeout=120) == [75] * size
    assert said(tmp_path / "log", size) == stopped_line(pruned, saved(pruned))
    check_goes_on(pruned, tmp_path / "log", arguments, finished, size)


@pytest.mark.multirank
def test_signals_in_the_middle_of_saving_do_not_break_it(pruned, settings, tmp_path):
    """The first one while the checkpoint of step 4 is written: step 5 is the last. Then more, while that is saved."""
    arguments = [*command(pruned, "distill", settings), "parallel.tp=2"]
    prepare = functools.partial(signalled, *[(1, WRITE, which) for which in (2, 60, 61)], (0, FLUSH, 2), (0, FLUSH, 9))
    assert codes(tmp_path / "log", *arguments, prepare=prepare, size=2) == ([75, 75], stopped_line(pruned, 5))
    assert Checkpoints(pruned / "checkpoints").steps() == [4, 5]
    assert partial(pruned) == []


STAGES = {  # a moment in the middle of a stage, and what the stage makes
    "data": ("minitron.data.prepare:hold_out", 1, "data/train.bin"),
    "calibrate": (FORWARD, 3, "importance.safetensors"),
    "prune": (WRITE, 5, "pruned"),
    "evaluate": ("minitron.engine.scoring:forward_only", 3, "eval.json"),
}


@pytest.mark.multirank
@pytest.mark.parametrize(("verb", "size"), [("data", 1), ("calibrate", 2), ("prune", 1), ("evaluate", 1)])
def test_a_signal_ends_the_other_stages_and_they_start_over(verb, size, finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    name, which, made = STAGES[verb]
    shutil.rmtree(run / made) if (run / made).is_dir() else (run / made).unlink()
    arguments = [*command(run, verb, settings), f"parallel.tp={size}"]
    prepare = functools.partial(signalled, *((rank, name, which) for rank in range(size)))
    line = f"minitron: stopped in {verb}: the same command continues\n"
    assert codes(tmp_path / "log", *arguments, prepare=prepare, size=size) == ([75] * size, line)
    assert not (run / made).exists()
    assert codes(tmp_path / "log", *arguments, size=size) == ([0] * size, "")
    assert (run / made).exists()
    assert partial(run) == []


@pytest.mark.multirank
def test_a_signal_to_one_rank_ends_a_calibration_on_all(finished, settings, tmp_path):
    arguments = [*command(shutil.copytree(finished, tmp_path / "run"), "calibrate", settings), "parallel.tp=2"]
    found, line = codes(tmp_path / "log", *arguments, prepare=functools.partial(signalled, (1, FORWARD, 3)), size=2)
    assert found == [75, 75]
    assert "minitron: stopped in calibrate: the same command continues\n" in line
    assert "Traceback" not in line


@pytest.mark.slow
@pytest.mark.multirank
def test_torchrun_and_its_ranks_are_signalled_by_all_means(pruned, settings, tmp_path):
    """SIGUSR1 to every process, as SLURM does it, of which torchrun must not die; then SIGTERM to torchrun's group, which it passes to its ranks'."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LAUNCH.parents[1]), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    arguments = [str(LAUNCH), "2", *command(pruned, "distill", settings), "parallel.tp=2"]
    with open(tmp_path / "err", "w") as err, subprocess.Popen(arguments, env=environment, stderr=err, start_new_session=True) as torchrun:
        try:
            while not saved(pruned):
                assert torchrun.poll() is None, (tmp_path / "err").read_text()
                time.sleep(0.01)
            for process in (psutil.Process(torchrun.pid), *psutil.Process(torchrun.pid).children(recursive=True)):
                process.send_signal(signal.SIGUSR1)
            os.killpg(torchrun.pid, signal.SIGTERM)
            assert torchrun.wait(timeout=60) == 1  # whatever its ranks' exit codes are
        finally:
            torchrun.kill()
    assert [line for line in (tmp_path / "err").read_text().splitlines(keepends=True) if "minitron:" in line] == [stopped_line(pruned, saved(pruned))]
    assert 4 <= saved(pruned) < 16
    assert partial(pruned) == []


def test_a_rank_that_is_killed_leaves_no_process(pruned, settings, tmp_path):
    with running(tmp_path / "log", *command(pruned, "distill", settings), prepare=grouped) as ranks:
        session = ranks.processes[0].pid
        wait_until(lambda: saved(pruned) > 0, ranks)
        ranks.kill()
    assert [pid for pid in psutil.pids() if session_of(pid) == session] == []


def session_of(pid):
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.fixture
def handlers():
    """What this process does on a signal; the same again after the test."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


def handled():
    return {number: signal.getsignal(number) for number in STOPPING}


def test_a_signal_that_the_training_was_too_far_to_ask_about_ends_what_follows(handlers):
    went_on = False
    with pytest.raises(Stopped, match=r"^stopped in compress: the same command continues$"), end_on_signal("compress"):
        with on_signal(lambda: None):
            signal.raise_signal(signal.SIGUSR1)
        went_on = True
    assert not went_on
    assert handled() == dict.fromkeys(STOPPING, signal.SIG_IGN)  # the process is about to end


def test_an_error_that_a_signal_leads_to_is_not_told(handlers):
    with pytest.raises(Stopped, match=r"^stopped in prune"), end_on_signal("prune"):
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RequestError("cannot write pruned") from error


def test_a_signal_before_ranks_have_joined_ends_the_command(handlers, monkeypatch, tmp_path):
    monkeypatch.setattr("minitron.session.preflight", lambda *given: signal.raise_signal(signal.SIGTERM))
    cfg = compose("data", [f"run.dir={tmp_path / 'run'}", "model.path=/m", "data.train=/t"])
    with pytest.raises(Stopped, match=r"^stopped in data: the same command continues$"), session(cfg, "data"):
        pass
    assert not (tmp_path / "run").exists()


def test_without_a_signal_nothing_is_changed(handlers):
    with end_on_signal("data"), on_signal(lambda: None):
        pass
    with pytest.raises(RequestError, match="no text"), end_on_signal("data"):
        raise RequestError("no text")
    assert handled() == handlers


def test_a_signal_to_a_block_around_another_is_told_by_the_one_that_it_meets(handlers):
    with pytest.raises(Stopped, match=r"^stopped in compress"), end_on_signal("family"), end_on_signal("compress"):
        signal.raise_signal(signal.SIGTERM)
    assert handled() == dict.fromkeys(STOPPING, signal.SIG_IGN)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    with pytest.raises(Stopped, match=r"^stopped in family"), end_on_signal("family"):
        with end_on_signal("compress"):
            pass
        signal.raise_signal(signal.SIGTERM)
    assert handled() == dict.fromkeys(STOPPING, signal.SIG_IGN)


def test_a_signal_ends_a_chain_while_its_steps_are_looked_at(settings, tmp_path):
    run = tmp_path / "run"
    arguments = ["family", f"run.dir={run}", *settings, 'family.steps.one="train.steps=2"', 'family.steps.two="target.hidden_size=40"']
    prepare = functools.partial(signalled, (0, "minitron.stages.family:check", 2))
    assert codes(tmp_path / "log", *arguments, prepare=prepare) == ([75], "minitron: stopped in family: the same command continues\n")
    assert not run.exists()


def test_a_forked_child_dies_of_a_signal(handlers):
    with on_signal(lambda: None) as seen:
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
        assert seen == []
