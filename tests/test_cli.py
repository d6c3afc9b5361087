"""The command line: what it prints, what it runs, what it returns."""

import os
import subprocess
import sys
import types
from datetime import timedelta

import pytest

from minitron.cli import main
from minitron.config.compose import compose, from_yaml
from minitron.config.verbs import VERBS
from minitron.errors import RequestError, Stopped

RECIPE = "recipe=smollm2_135m_to_100m"


@pytest.fixture
def stage(monkeypatch):
    """Puts a stage of one's own in the place of a verb's: `stage("prune", function)`."""

    def put(verb, run):
        name = f"minitron.stages.{verb}"
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(__name__=name, __spec__=None, run=run))

    return put


def failing(error):
    def run(config):
        raise error

    return run


def test_a_verb_runs_its_stage_with_the_composed_settings(stage, capsys):
    seen = []
    stage("prune", seen.append)
    assert main(["prune", RECIPE, "seed=7"]) == 0
    assert seen == [compose("prune", [RECIPE, "seed=7"])]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RequestError("parallel.tp=3: a divisor\nof 9 is needed"), 2, "minitron: parallel.tp=3: a divisor of 9 is needed\n"),
        (Stopped("saved at step 7; the same command continues"), 75, "minitron: saved at step 7; the same command continues\n"),
        (KeyboardInterrupt(), 130, "minitron: interrupted: the same command continues\n"),
    ],
)
def test_exit_codes_with_one_line_on_stderr(stage, capsys, error, code, said):
    stage("prune", failing(error))
    assert main(["prune", RECIPE]) == code
    assert capsys.readouterr() == ("", said)


def test_a_defect_shows_its_traceback(stage, capsys):
    stage("prune", failing(ZeroDivisionError("a defect")))
    assert main(["prune", RECIPE]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.endswith("ZeroDivisionError: a defect\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["comprss"], "minitron: comprss: no such verb; did you mean compress?\n"),
        (["zzz"], f"minitron: zzz: no such verb; the verbs are {', '.join(VERBS)}\n"),
        (["prune", "--fast"], "minitron: --fast: no such option; the options are --help, -h, --cfg, --version, everything else is SETTING=VALUE\n"),
        (["prune", RECIPE, "train.steps=0"], "minitron: train.steps=0: at least 1 is needed\n"),
        (["prune", RECIPE, "trian.steps=1"], "minitron: trian.steps=1: there is no such setting; did you mean train.steps?\n"),
    ],
)
def test_wrong_requests_exit_with_2_and_run_nothing(stage, capsys, arguments, said):
    stage("prune", failing(AssertionError("the stage must not run")))
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", said)


def test_cfg_prints_settings_that_read_back_and_runs_nothing(stage, capsys):
    stage("compress", failing(AssertionError("the stage must not run")))
    assert main(["compress", RECIPE, "--cfg", "train.lr=1e-4", "eval.texts.a=b.txt"]) == 0
    assert from_yaml(capsys.readouterr().out) == compose("compress", [RECIPE, "train.lr=1e-4", "eval.texts.a=b.txt"])


def test_cfg_shows_what_is_still_open(capsys):
    assert main(["compress", "--cfg"]) == 0
    assert "run:\n  dir: ???\n" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["-h"], 0), ([], 2)])
def test_the_overview(capsys, arguments, code):
    assert main(arguments) == code
    page = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in page


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(capsys, verb):
    assert main([verb, "--help", "even=nonsense"]) == 0
    assert capsys.readouterr().out.startswith(f"minitron {verb}: ")


def test_the_module_runs_and_outlives_a_reader_that_has_seen_enough():
    command = f"{sys.executable} -m minitron --version; {sys.executable} -m minitron compress --help | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["minitron", "minitron"]


@pytest.mark.multirank
def test_ranks_with_the_same_to_say_say_it_once():
    from torch.distributed import TCPStore

    store = TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    torchrun = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "WORLD_SIZE": "3"}

    def rank(number, override):
        environment = {**os.environ, **torchrun, "RANK": str(number), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "minitron", "compress", override]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    ranks = [rank(0, "train.lrr=3"), rank(1, "train.lrr=3"), rank(2, "seed=-1")]
    said = [line for process in ranks for line in process.communicate()[1].splitlines()]
    assert sorted(said) == ["minitron: seed=-1: at least 0 is needed", "minitron: train.lrr=3: there is no such setting; did you mean train.lr?"]
    assert [process.returncode for process in ranks] == [2, 2, 2]
