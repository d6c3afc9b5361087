"""The whole chain on a real model: what it leaves, what it does not do twice, where it goes on, what it does on two ranks."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.arch.arch import Arch
from tests.oracles.metrics import without_costs
from tests.oracles.models import same_tensors, saved_tensors
from tests.oracles.slicing import best, sliced
from tests.stages.commands import minitron, running, wait_until

ARTIFACTS = (
    "config.yaml", "stages.json", "data", "importance.safetensors", "keep.safetensors", "arch.json", "pruned", "checkpoints", "metrics.jsonl",
    "eval.json", "hf", "report.html",
)  # fmt: skip


def lines(run):
    """The metrics of a run, without those that tell time."""
    with open(run / "metrics.jsonl", encoding="utf-8") as handle:
        return without_costs(map(json.loads, handle))


def results(run):
    """eval.json without speeds."""
    found = json.loads((run / "eval.json").read_text())
    return {name: {key: value for key, value in entry.items() if key != "tokens_per_second"} for name, entry in found.items()}


def snapshot(run):
    """When each artifact was written, and its size."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name not in ("report.html", "config.yaml")]
    return {str(path.relative_to(run)): (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def partial(run):
    return [path for path in run.rglob("*") if path.name.endswith(".partial")]


def test_every_artifact_is_there_and_nothing_half_written(finished):
    assert {path.name for path in finished.iterdir()} == set(ARTIFACTS)
    assert partial(finished) == []
    assert all(entry["done"] for entry in json.loads((finished / "stages.json").read_text()).values())


def test_what_the_artifacts_say_fits_together(finished, stories):
    architectures = {name: Arch.from_dict(sizes) for name, sizes in json.loads((finished / "arch.json").read_text()).items()}
    pruned = architectures["pruned"]
    assert pruned == architectures["original"].replace(hidden_size=48, ffn_hidden_size=128)

    found = results(finished)
    assert {name: entry["params"] for name, entry in found.items()} == {
        "teacher": architectures["original"].num_parameters(), "pruned": pruned.num_parameters(), "student": pruned.num_parameters(),
    }  # fmt: skip
    assert found["teacher"]["loss"] < 2  # it knows its own tales
    assert found["pruned"]["loss"] > found["teacher"]["loss"] + 1
    assert found["student"]["loss"] < found["pruned"]["loss"] - 0.5

    steps = lines(finished)
    assert [line["step"] for line in steps] == list(range(1, 17))
    assert [line["step"] for line in steps if "valid_loss" in line] == [4, 8, 12, 16]  # at every save
    assert steps[-1]["loss"] < 0.7 * steps[0]["loss"]
    assert {"loss", "kd_loss", "lr", "grad_norm", "tokens"} <= set(steps[0])


def test_the_kept_units_are_those_of_the_highest_scores_and_the_weights_theirs(finished, stories):
    """keep.safetensors against importance.safetensors, and the pruned model (exported anew) against plain indexing of the original."""
    from minitron.pruning.keep import Keep

    scores = {name: tensor.tolist() for name, tensor in load_file(finished / "importance.safetensors").items()}
    keep = Keep.load(finished / "keep.safetensors")
    assert keep.hidden.tolist() == best(scores["hidden"], 48)
    assert all(keep.ffn[layer].tolist() == best(scores[f"ffn.{layer}"], 128) for layer in range(5))
    copy = finished.parent / "pruned_only"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("checkpoints", "hf"))
    done = minitron(copy.with_name("log"), "export", f"run.dir={copy}", f"model.path={stories}", "device=cpu", "dtype=fp32")
    assert (done.code, done.err) == (0, "")
    assert same_tensors(saved_tensors(copy / "hf"), sliced(saved_tensors(stories), 8, keep))


def test_the_exported_student_gives_the_loss_that_was_evaluated(finished):
    from minitron.data.corpus import Windows
    from minitron.data.manifest import Manifest

    model = AutoModelForCausalLM.from_pretrained(finished / "hf", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(finished / "hf").vocab_size == 512
    assert model.num_parameters() == results(finished)["student"]["params"]
    windows = Windows(Manifest.load(finished / "data").blend("valid"), 64, limit_tokens=4096)
    tokens = torch.stack([windows[index] for index in range(len(windows))])
    assert tokens.numel() > 1000
    with torch.no_grad():
        loss = model(tokens, labels=tokens).loss.item()
    assert results(finished)["student"]["loss"] == pytest.approx(loss, rel=1e-4)


def test_the_same_command_again_does_nothing_again(finished, settings, tmp_path):
    before = snapshot(finished)
    done = minitron(tmp_path / "log", "compress", f"run.dir={finished}", *settings)
    assert (done.code, done.err) == (0, "")
    assert snapshot(finished) == before


def test_other_evaluations_evaluate_again_and_nothing_else(finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = snapshot(run)
    done = minitron(tmp_path / "log", "compress", f"run.dir={run}", *settings, "eval.tokens=1024")
    assert (done.code, done.err) == (0, "")
    changed = {name for name, written in snapshot(run).items() if written != before[name]}
    assert changed - {"data/manifest.json"} == {"eval.json", "stages.json"}
    assert (run / "data" / "manifest.json").read_bytes() == (finished / "data" / "manifest.json").read_bytes()
    assert results(run)["student"]["tokens"] == 1024


def test_a_stage_that_is_done_anew_puts_those_after_it_out_of_date(finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    done = minitron(tmp_path / "log", "calibrate", f"run.dir={run}", *settings)
    assert (done.code, done.err) == (0, "")
    record = json.loads((run / "stages.json").read_text())
    assert [name for name, entry in record.items() if entry["done"]] == ["data", "calibrate"]
    before = (run / "keep.safetensors").stat().st_mtime_ns
    assert minitron(tmp_path / "log", "compress", f"run.dir={run}", *settings).code == 0
    assert (run / "keep.safetensors").stat().st_mtime_ns > before
    assert (results(run), lines(run)) == (results(finished), lines(finished))


def test_the_stages_one_by_one_make_the_same(finished, settings, tmp_path):
    run = tmp_path / "run"
    needed = {
        "data": ("model", "data"),
        "calibrate": ("model", "data", "calibrate", "logging", "device", "dtype"),
        "prune": ("model", "target", "calibrate", "device", "dtype"),
        "distill": ("model", "data", "train", "logging", "device", "dtype"),
        "evaluate": ("model", "data", "train", "eval", "device", "dtype"),
        "export": ("model", "device", "dtype"),
    }
    for verb, groups in needed.items():
        done = minitron(tmp_path / "log", verb, f"run.dir={run}", *[value for value in settings if value.startswith(groups)])
        assert (done.code, done.err) == (0, ""), (verb, done)
    assert minitron(tmp_path / "log", "report", f"run.dir={run}").code == 0
    assert (results(run), lines(run)) == (results(finished), lines(finished))
    assert same_tensors(saved_tensors(run / "hf"), saved_tensors(finished / "hf"))
    assert (run / "report.html").stat().st_size > 10_000


@pytest.mark.slow
def test_importance_in_rounds(finished, settings, tmp_path):
    """`prune` alone and in `compress`, at two tensor ranks: what is kept is the same, and other than in one round."""
    run, pruned = tmp_path / "run", tmp_path / "run" / "keep.safetensors"
    rounds = [*settings, "target.rounds=3", "train.steps=1"]
    given = {group: [value for value in rounds if value.startswith(group)] for group in ("model", "data", "calibrate", "target", "device", "dtype")}
    prune = ["prune", f"run.dir={run}", *(value for values in given.values() for value in values)]
    assert [minitron(tmp_path / "log", verb, *prune[1:]).code for verb in ("data", "calibrate")] == [0, 0]
    done = minitron(tmp_path / "log", *[value for value in prune if not value.startswith("data")])
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "data.train=???: importance is measured again with target.rounds=3" in done.err
    done = minitron(tmp_path / "log", *prune)
    assert (done.code, done.err) == (0, "")
    assert "  round 3 of 3: importance of what is left, " in done.out
    assert same_tensors(*(load_file(folder / "importance.safetensors") for folder in (run, finished)))
    assert not same_tensors(load_file(pruned), load_file(finished / "keep.safetensors"))
    before = pruned.stat().st_mtime_ns
    with running(tmp_path / "log", "compress", f"run.dir={run}", *rounds, "parallel.tp=2", size=2) as ranks:
        assert ranks.results(timeout=240) == [0, 0]
    assert pruned.stat().st_mtime_ns == before
    other = tmp_path / "other"
    with running(tmp_path / "log", "compress", f"run.dir={other}", *rounds, "parallel.tp=2", size=2) as ranks:
        assert ranks.results(timeout=240) == [0, 0]
    assert same_tensors(load_file(other / "keep.safetensors"), load_file(pruned))
    assert (other / "arch.json").read_bytes() == (finished / "arch.json").read_bytes()


def finished_stage(run, verb):
    """A stage is done."""
    try:
        return json.loads((run / "stages.json").read_text())[verb]["done"]
    except (OSError, KeyError):
        return False


def saved_step(run):
    """The newest checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")), default=0)


def stopped_line(run, step):
    return f"minitron: stopped at step {step}, saved in {run}/checkpoints/step_{step:08d}: the same command continues\n"


def test_a_run_that_is_killed_and_stopped_goes_on_to_the_same_end(finished, settings, tmp_path):
    """Killed while it calibrates, then while it trains, then asked to stop: each time the same command goes on."""
    run = tmp_path / "run"
    command = ["compress", f"run.dir={run}", *settings]
    with running(tmp_path / "log", *command) as ranks:
        wait_until(lambda: finished_stage(run, "data"), ranks)
    assert not (run / "keep.safetensors").exists()

    with running(tmp_path / "log", *command) as ranks:
        wait_until(lambda: saved_step(run) > 0, ranks)
    killed_after = saved_step(run)
    assert 0 < killed_after < 16
    kept = (run / "keep.safetensors").stat().st_mtime_ns

    with running(tmp_path / "log", *command) as ranks:
        wait_until(lambda: saved_step(run) > killed_after, ranks)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        assert ranks.results(timeout=120) == [75]
    stopped_at = lines(run)[-1]["step"]
    assert killed_after < stopped_at < 16
    assert (tmp_path / "log.err").read_text() == stopped_line(run, stopped_at)

    done = minitron(tmp_path / "log", *command)
    assert (done.code, done.err) == (0, "")
    assert (run / "keep.safetensors").stat().st_mtime_ns == kept
    assert (results(run), lines(run)) == (results(finished), lines(finished))
    assert same_tensors(saved_tensors(run / "hf"), saved_tensors(finished / "hf"))
    assert partial(run) == []


@pytest.mark.multirank
def test_a_signal_to_one_rank_stops_all_at_the_same_step(finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with running(tmp_path / "log", "compress", f"run.dir={run}", *settings, "parallel.tp=2", size=2) as ranks:
        wait_until(lambda: saved_step(run) > 0, ranks)
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        assert ranks.results(timeout=120) == [75, 75]
    stopped_at = saved_step(run)
    assert 0 < stopped_at < 16
    assert lines(run)[-1]["step"] == stopped_at
    assert (tmp_path / "log0.err").read_text() + (tmp_path / "log1.err").read_text() == stopped_line(run, stopped_at)


@pytest.mark.multirank
def test_a_teacher_in_another_layout_trains_and_scores_the_same(finished, settings, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    for name in ("checkpoints", "metrics.jsonl", "eval.json"):
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    own = ("parallel.pp=2", "teacher.parallel.tp=2", "teacher.parallel.pp=1", "teacher.offload=true")
    with running(tmp_path / "log", "compress", f"run.dir={run}", *settings, *own, size=2) as ranks:
        assert ranks.results(timeout=240) == [0, 0]
    alone, both = results(finished), results(run)
    for name in ("teacher", "student"):
        assert both[name]["loss"] == pytest.approx(alone[name]["loss"], rel=1e-5)
    for one, two in zip(lines(finished), lines(run), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.multirank
def test_two_tensor_ranks_under_torchrun_make_the_same(finished, settings, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minitron"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "compress", f"run.dir={run}", *settings, "parallel.tp=2"], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (run / "keep.safetensors").read_bytes() == (finished / "keep.safetensors").read_bytes()
    alone, both = results(finished), results(run)
    for name in alone:
        assert both[name]["loss"] == pytest.approx(alone[name]["loss"], rel=1e-5)
        assert both[name]["params"] == alone[name]["params"]
    for one, two in zip(lines(finished), lines(run), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
    exported = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    assert exported.num_parameters() == alone["student"]["params"]
