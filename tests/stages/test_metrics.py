"""What a training tells of its steps, and of one that it stops at."""

import json
import re
import shutil

import pytest

from minitron.arch.arch import Arch
from minitron.arch.counts import count
from tests.stages.commands import minitron

GROUPS = ("model", "data", "train", "logging", "device", "dtype")


@pytest.fixture
def distill(finished, settings, tmp_path):
    """`distill(SETTING=VALUE, ...)` on a run that is pruned: what the command said, and the lines of metrics."""
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()

    def command(*changes):
        done = minitron(tmp_path / "log", "distill", f"run.dir={run}", *[value for value in settings if value.startswith(GROUPS)], *changes)
        return done, [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

    return command


def test_the_figures_of_a_step(distill, finished):
    done, lines = distill("train.steps=3", "logging.peak_tflops=0.5")
    assert (done.code, done.err) == (0, "")
    arch = json.loads((finished / "arch.json").read_text())
    original, pruned = (count(Arch.from_dict(arch[name]), 64).flops_per_token for name in ("original", "pruned"))
    for line in lines:
        assert line["tokens_per_second"] == line["tokens_per_second_per_rank"] == pytest.approx(8 * 64 / line["step_seconds"])
        assert line["tflop_per_second_per_rank"] * 1e12 == pytest.approx((3 * pruned + original) * line["tokens_per_second"])
        assert line["mfu"] == pytest.approx(line["tflop_per_second_per_rank"] / 0.5)
        assert 0 < line["data_seconds"] < line["step_seconds"] and line["peak_memory_gib"] > 0 and line["skipped_steps"] == 0


def test_a_step_that_the_training_stops_at_is_told_with_its_text(distill, settings):
    """The first loss that is above the one before it counts as a spike."""
    done, lines = distill("train.spike_factor=1.000001", "train.spike_window=1", "train.max_bad_steps=1", "train.lr=0.05", "train.min_lr=0.05")
    text = next(value.removeprefix("data.train=") for value in settings if value.startswith("data.train="))
    step, last = len(lines), lines[-1]
    assert done.code == 2
    samples = rf"samples {8 * step - 8} to {8 * step - 1} of {re.escape(text)}"
    reason = rf"its loss of {last['loss']:.4g} was more than train\.spike_factor=1\.000001 times [\d.]+, the median before it"
    advice = r"lower train\.lr=0\.05, raise train\.spike_factor, or look at the data there"
    assert re.fullmatch(rf"minitron: step {step} \({samples}\) was left out: {reason}; {advice}\n", done.err), done.err
    assert [line["skipped"] for line in lines] == [0] * (step - 1) + [1]
