"""`kill -9` at any moment: the same command goes on to bitwise the end of a run that was never killed, and trains on every sample once."""

import functools
import itertools
import json
import os
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from minitron.engine.checkpoint import Checkpoints
from tests.oracles.models import same_tensors, saved_tensors
from tests.stages.commands import write_tales
from tests.stages.watched import ORDERS, Moment, Orders, of_run

REPOSITORY = Path(__file__).parents[2]
STEPS, SAVES, BATCH = 8, 4, 4
SETTINGS = [
    "target.hidden_size=48", "target.ffn_hidden_size=128", "calibrate.samples=8", "calibrate.seq_length=64", f"train.steps={STEPS}",
    f"train.global_batch_size={BATCH}", "train.micro_batch_size=1", "train.seq_length=64", "train.eval_interval=3", "train.eval_tokens=512",
    f"train.save_interval={STEPS // SAVES}", "train.warmup_steps=2", "train.lr=2e-3", "eval.tokens=512", "distill.hidden.enabled=true",
    "distill.hidden.projection=true", "distill.hidden.layers=[-2]", "distill.hidden.teacher_layers=[-2]", "logging.progress=false", "device=cpu",
    "dtype=fp32",
]  # fmt: skip
LAYOUTS = {"alone": (1, []), "tp2": (2, ["parallel.tp=2"]), "dp2": (2, []), "tp2-pp2": (4, ["parallel.tp=2", "parallel.pp=2"]), "dp4": (4, [])}


@pytest.fixture(scope="module")
def settings(stories, tmp_path_factory):
    """Settings of a compression of eight steps."""
    text = write_tales(tmp_path_factory.mktemp("text") / "text.jsonl")
    return [f"model.path={stories}", f"data.train={text}", *SETTINGS]


def start(run: Path, settings: list[str], layout: str, moment: Moment | None = None) -> int:
    """The command, until it ends or, at `moment`, dies; its exit code. What it said is in run.log."""
    ranks, own = LAYOUTS[layout]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    orders = Orders(str(run), f"{run}.notes", moment)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), ORDERS: orders.to_text()}
    command = [sys.executable, *torchrun, "-m", "tests.stages.watched", "compress", f"run.dir={run}", *settings, *own]
    with open(f"{run}.log", "w", encoding="utf-8") as log:
        return subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=300, check=False).returncode


def fired(run: Path) -> list[str]:
    """The places at which the run died."""
    file = Path(f"{run}.notes") / "fired"
    return file.read_text().split() if file.exists() else []


def wait_for_the_end(run: Path) -> None:
    """Return when no process of the run is left; fail, and end them, if some stay."""
    until = time.monotonic() + 90
    while left := of_run(str(run)):
        if time.monotonic() > until:
            for process in left:
                process.kill()
            pytest.fail(f"still there: {left}")
        time.sleep(0.1)


def survive(run: Path, settings: list[str], layout: str, moments: list[Moment]) -> Path:
    """The run, killed at each of the moments and started again, until it is done."""
    for number, moment in enumerate(moments, start=1):
        assert start(run, settings, layout, moment) != 0, moment
        assert fired(run) == [before.place for before in moments[:number]], Path(f"{run}.log").read_text()
        wait_for_the_end(run)
    assert start(run, settings, layout) == 0, Path(f"{run}.log").read_text()
    wait_for_the_end(run)
    return run


def notes(run: Path, name: str) -> list[list]:
    """What each rank noted."""
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(Path(f"{run}.notes").glob(f"{name}.*"))]


def trained(run: Path) -> list[dict[int, list[int]]]:
    """Of each rank the samples that each step was trained on, the last time that it was done."""
    assert not any(skipped for rank in notes(run, "trained") for _, _, skipped in rank)
    return [{step: samples for step, samples, _ in rank} for rank in notes(run, "trained")]


def figures(run: Path) -> list[dict]:
    """All of metrics.jsonl that does not tell of time or the machine."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = ("step", "lr", "grad_norm", "alpha", "skipped", "tokens", "counted_tokens")
    return [{name: value for name, value in line.items() if name in said or "loss" in name} for line in lines]


def evaluation(run: Path) -> dict:
    """eval.json without speeds."""
    found = json.loads((run / "eval.json").read_text())
    return {model: {name: value for name, value in entry.items() if "second" not in name} for model, entry in found.items()}


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*")}


def check_same(run: Path, unbroken: Path, layout: str) -> None:
    """The run came to the end of the unbroken one."""
    assert figures(run) == figures(unbroken)
    assert [line["step"] for line in figures(run)] == [*range(1, STEPS + 1)]
    assert evaluation(run) == evaluation(unbroken)
    assert same_tensors(saved_tensors(run / "hf"), saved_tensors(unbroken / "hf"))
    assert trained(run) == trained(unbroken)
    copies = 2 if layout == "tp2" else 1  # tensor ranks read the same
    numbers = [number for rank in trained(run) for samples in rank.values() for number in samples]
    assert sorted(numbers) == sorted([*range(STEPS * BATCH)] * copies)
    assert files(unbroken) <= files(run)
    # a checkpoint that was about to be forgotten may stay
    assert [name for name in files(run) - files(unbroken) if not name.startswith("checkpoints/step_")] == []
    assert [name for name in files(run) if name.endswith((".partial", ".removed", ".tmp", ".lock"))] == []


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory):
    """`unbroken(LAYOUT)`: the folder of a run that was never killed."""

    @functools.cache
    def make(layout):
        return survive(tmp_path_factory.mktemp("unbroken") / layout, settings, layout, [])

    return make


def drawn(draw: random.Random, counts: list[dict[str, int]], place: str, how: str) -> Moment:
    """A moment of the place, as the unbroken run's ranks counted them; in training, one that comes before the first save is over."""
    rank = draw.choice([rank for rank, found in enumerate(counts) if found.get(place)])
    there = counts[rank][place] // (SAVES if place.startswith("distill:") else 1)
    return Moment(place, draw.randint(1, there), how, rank)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_a_run_that_is_killed_in_a_step_and_in_a_save(seed, settings, unbroken, tmp_path):
    counts, draw = [rank[-1] for rank in notes(unbroken("alone"), "counts")], random.Random(seed)
    moments = [drawn(draw, counts, "distill:forward", "all"), drawn(draw, counts, "distill:checkpoints", "rank")]
    check_same(survive(tmp_path / "run", settings, "alone", moments), unbroken("alone"), "alone")


MOMENTS = {  # in the order of the stages, so that each is still to come when the ones before it have passed
    "tp2": [
        ("start:import", "rank"), ("data:data", "rank"), ("calibrate:forward", "rank"), ("prune:pruned", "all"), ("distill:forward", "rank"),
        ("distill:checkpoints", "rank"), ("distill:update", "all"), ("distill:checkpoints", "write"), ("distill:checkpoints", "all"),
        ("evaluate:forward", "rank"),
    ],
    "dp2": [
        ("start:stages.json", "all"), ("data:data", "write"), ("calibrate:importance.safetensors", "all"), ("prune:keep.safetensors", "rank"),
        ("prune:pruned", "write"), ("distill:checkpoints", "all"), ("distill:update", "rank"), ("distill:checkpoints", "rank"),
        ("distill:metrics.jsonl", "all"), ("export:hf", "rank"),
    ],
}  # fmt: skip


@pytest.mark.long
@pytest.mark.multirank
@pytest.mark.timeout(1800)  # four minutes on two cores of its own
def test_twenty_moments(settings, unbroken, tmp_path):
    """Two runs at a time, ten moments each."""

    def lane(layout):
        counts, draw = [rank[-1] for rank in notes(unbroken(layout), "counts")], random.Random(f"20 {layout}")
        moments = [drawn(draw, counts, *row) for row in MOMENTS[layout]]
        check_same(survive(tmp_path / layout, settings, layout, moments), unbroken(layout), layout)

    with ThreadPoolExecutor(2) as lanes:
        assert [*lanes.map(lane, MOMENTS)] == [None, None]


@pytest.mark.slow
@pytest.mark.multirank
@pytest.mark.timeout(900)
def test_a_run_that_is_killed_goes_on_at_another_layout(settings, unbroken, tmp_path):
    """From two tensor ranks by two stages to four replicas: each step reads the samples that it would have read."""
    run, steps = tmp_path / "run", STEPS // SAVES * 2 + 1
    assert start(run, settings, "tp2-pp2", Moment("distill:update", 2 * steps, "all", 3)) != 0
    wait_for_the_end(run)
    assert fired(run) == ["distill:update"]
    resumed = Checkpoints(run / "checkpoints").latest()  # the save that was on its way may have been lost
    assert resumed in (STEPS // SAVES, steps - 1)
    assert start(run, settings, "dp4") == 0, Path(f"{run}.log").read_text()
    for line, expected in zip(figures(run), figures(unbroken("alone")), strict=True):
        assert line == pytest.approx(expected, rel=1e-4)
    for step in range(STEPS):
        batch = [*range(step * BATCH, (step + 1) * BATCH)]
        found = [rank[step] for rank in trained(run)]
        assert found == [batch] * 4 if step < resumed else sorted(itertools.chain(*found)) == batch
