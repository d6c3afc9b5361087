"""Several recipes as one array of jobs."""

import json

import pytest

from tests.slurm.jobs import JOB, minitron, nothing_runs, results, submit

pytestmark = pytest.mark.slurm
RECIPES = ("smollm2_135m_to_100m", "smollm2_135m_to_106m_depth", "llama31_8b_to_4b")
# what a recipe says of its own model and machines
SMALL = (
    "parallel.tp=1",
    "parallel.pp=1",
    "train.steps=2",
    "train.warmup_steps=1",
    "target.num_layers=4",
    "calibrate.micro_batch_size=1",
    "data.text_key=text",
)


def test_three_runs_and_one_table(cluster, settings, tmp_path):
    root = tmp_path / "sweep"
    shared = ("slurm.nodes=1", "slurm.gpus_per_node=1", "slurm.exclusive=false", "slurm.cpus_per_node=1")  # three at a time on two nodes
    swept = f"recipe={','.join(RECIPES)}"
    (job,) = submit("compress", "--sweep", f"run.dir={root}", *settings, *JOB, *shared, *SMALL, swept)
    assert job.end() == "COMPLETED", job.log
    nothing_runs(cluster)
    runs = [root / recipe for recipe in RECIPES]
    assert [json.loads((run / "arch.json").read_text())["pruned"]["num_layers"] for run in runs] == [4, 4, 4]
    table = minitron("summary", f"run.dir={root}")
    assert (table.code, table.err) == (0, "")
    for run in runs:
        (line,) = [line for line in table.out.splitlines() if run.name in line]
        assert f"{results(run)['student']['loss']:.3f}" in line
