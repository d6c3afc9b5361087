"""launch/pipeline.sh, with a `minitron` that only says what it was asked for."""

import subprocess
from pathlib import Path

import pytest

from minitron.config.compose import compose, to_yaml
from minitron.stages.compress import STAGES

SCRIPT = Path(__file__).parents[2] / "launch" / "pipeline.sh"


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """Runs the script with `minitron` replaced by shell commands; what it printed and its exit code."""

    def run(commands, *settings):
        stand_in = tmp_path / "minitron"
        stand_in.write_text(f"#!/bin/sh\n{commands}\n")
        stand_in.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        done = subprocess.run([SCRIPT, *settings], capture_output=True, text=True)
        return done.stdout.splitlines(), done.returncode

    return run


def test_every_stage_is_announced_and_gets_every_setting_as_it_is(pipeline):
    lines, code = pipeline("printf '<%s>' \"$@\"; echo", "run.dir=a b", "data.train='0.7 a 0.3 b'")
    verbs = [*(verb for verb in STAGES if verb not in ("search", "speed")), "report"]
    assert (lines[::2], code) == ([f"== minitron {verb}" for verb in verbs], 0)
    assert lines[1::2] == [f"<{verb}><run.dir=a b><data.train='0.7 a 0.3 b'>" for verb in verbs]


def test_a_budget_is_searched_for_before_the_model_is_cut(pipeline, tmp_path):
    settings = compose("search", ["run.dir=a", "model.path=b", "data.train=c", "search.memory_gb=0.5"])
    (tmp_path / "settings.yaml").write_text(to_yaml(settings))
    lines, code = pipeline(f'case "$*" in *--cfg) cat {tmp_path}/settings.yaml;; esac', "search.memory_gb=0.5")
    assert (lines, code) == ([f"== minitron {verb}" for verb in [*STAGES, "report"] if verb != "speed"], 0)


def test_settings_that_are_refused_end_it(pipeline):
    lines, code = pipeline('case "$*" in *--cfg) exit 2;; esac')
    assert (lines[-1], code) == ("== minitron calibrate", 2)


def test_a_stage_that_fails_ends_it_with_its_code(pipeline):
    lines, code = pipeline('[ "$1" != prune ] || exit 75')
    assert (lines[-1], code) == ("== minitron prune", 75)
