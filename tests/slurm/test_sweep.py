"""Several recipes as one array of jobs."""

import json

import pytest

from tests.slurm.jobs import JOB, minitron, nothing_runs, results, submit

pytestmark = pytest.mark.slurm
SIZES = (96, 112, 128)


def test_three_runs_and_one_table(cluster, settings, tmp_path):
    root = tmp_path / "sweep"
    shared = ("slurm.nodes=1", "slurm.gpus_per_node=1", "slurm.exclusive=false", "slurm.cpus_per_node=1")  # three at a time on two nodes
    swept = f"target.ffn_hidden_size={','.join(map(str, SIZES))}"
    (job,) = submit("compress", "--sweep", f"run.dir={root}", *settings, *JOB, *shared, "train.steps=2", swept)
    assert job.end() == "COMPLETED", job.log
    nothing_runs(cluster)
    runs = [root / f"ffn_hidden_size-{size}" for size in SIZES]
    assert [json.loads((run / "arch.json").read_text())["pruned"]["ffn_hidden_size"] for run in runs] == [*SIZES]
    table = minitron("summary", f"run.dir={root}")
    assert (table.code, table.err) == (0, "")
    for run in runs:
        (line,) = [line for line in table.out.splitlines() if run.name in line]
        assert f"{results(run)['student']['loss']:.3f}" in line
