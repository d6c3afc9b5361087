"""One GPU: a search, with its latencies measured there, and the walk that leaves layers out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from minitron.search.candidates import Results
from tests.stages.commands import minitron

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]
SEARCH = [
    "search.params=200e3", "search.latency_ms=1e6", "search.batch_size=2", "search.seq_length=64", "search.num_layers=[4,5]",
    "search.hidden_size=[48,56,64]", "search.ffn_hidden_size=[96,112,128,144,172]", "search.tokens=1024", "search.rungs=[2,4]", "search.finalists=3",
    "calibrate.samples=16", "calibrate.seq_length=64", "calibrate.skip_layers=1", "target.layers_by=loss", "train.global_batch_size=8",
    "train.micro_batch_size=4", "train.seq_length=64", "train.eval_tokens=1024", "train.warmup_steps=1", "train.lr=2e-3", "train.steps=4",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_compression_within_budgets(dtype, stories, tales, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "minitron", "compress", f"run.dir={run}", f"model.path={stories}", f"data.train={tales}", *SEARCH]
    done = subprocess.run([*command, "device=cuda", f"dtype={dtype}"], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = Results.load(run)
    assert all(candidate.costs["latency_ms"] > 0 for candidate in results.candidates)
    assert json.loads((run / "arch.json").read_text())["pruned"]["hidden_size"] == results.candidate(results.chosen).sizes["hidden_size"]


def test_losses_in_fp32_are_those_of_the_cpu(stories, tales, tmp_path):
    settings = [f"model.path={stories}", f"data.train={tales}", *SEARCH, "search.latency_ms=null", "logging.progress=false", "dtype=fp32"]
    found = []
    for device in ("cpu", "cuda"):
        for verb in ("calibrate", "search"):
            verb_settings = [one for one in settings if verb == "search" or not one.startswith(("search", "target", "train"))]
            done = minitron(tmp_path / f"{device}.log", verb, f"run.dir={tmp_path / device}", *verb_settings, f"device={device}")
            assert done.code == 0, done.err
        found.append(Results.load(tmp_path / device))
    ours, theirs = found
    assert ours.candidates == theirs.candidates
    for name, losses in theirs.rungs[0].losses.items():
        assert ours.rungs[0].losses[name] == pytest.approx(losses, abs=1e-3)
