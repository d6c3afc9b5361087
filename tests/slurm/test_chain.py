"""Stages with different numbers of nodes, each a job that waits for the one before."""

import json

import pytest

from minitron.arch.arch import Arch
from tests.slurm.cluster.cluster import Cluster, sh
from tests.slurm.jobs import JOB, nothing_runs, results, submit
from tests.stages.commands import write_tales

pytestmark = pytest.mark.slurm
SEARCH = [
    "search.params=200e3", "search.num_layers=[5]", "search.hidden_size=[48,56]", "search.ffn_hidden_size=[128,144,172]", "search.tokens=512",
    "search.rungs=[2]", "search.finalists=2", "train.steps=4",
]  # fmt: skip
ONE_NODE, TWO_NODES = "slurm.nodes=1 parallel.tp=2", "slurm.nodes=2 parallel.tp=2 parallel.pp=2"


def chain(**stages: str) -> list[str]:
    """The settings that make jobs of stages."""
    return [*JOB, *(f'slurm.stages.{stage}="{settings}"' for stage, settings in stages.items())]


def test_a_chain_of_one_one_and_two_nodes(cluster, settings, tmp_path):
    run = tmp_path / "run"
    sized = [value for value in settings if not value.startswith(("target.", "train.steps"))]
    stages = chain(calibrate=ONE_NODE, search=ONE_NODE, distill=TWO_NODES)
    calibrate, search, distill = submit("compress", f"run.dir={run}", *sized, *SEARCH, *stages)
    assert f"afterok:{search.number}" in distill.facts()["Dependency"]
    assert [job.end() for job in (calibrate, search, distill)] == ["COMPLETED"] * 3, distill.log
    assert [job.facts()["NumNodes"] for job in (calibrate, search, distill)] == ["1", "1", "2"]
    assert (run / "hf" / "config.json").exists()
    pruned = Arch.from_dict(json.loads((run / "arch.json").read_text())["pruned"])
    assert results(run)["student"]["params"] == pruned.num_parameters()
    assert abs(pruned.num_parameters() - 200e3) < 0.05 * 200e3
    nothing_runs(cluster)


def test_a_stage_that_fails_ends_the_chain_and_says_why(cluster, settings, tmp_path):
    """The text is taken away between the look at it and the first job, for which the nodes are not to be had until then."""
    run, text = tmp_path / "run", write_tales(tmp_path / "text.jsonl")
    set_nodes(cluster, "drain")
    stages = chain(calibrate=ONE_NODE, distill=TWO_NODES)
    calibrate, distill = submit("compress", f"run.dir={run}", *settings, f"data.train={text}", *stages)
    text.unlink()
    set_nodes(cluster, "resume")
    assert [job.end() for job in (calibrate, distill)] == ["FAILED", "CANCELLED"], calibrate.log
    assert [line for line in calibrate.log.splitlines() if line.startswith(f"minitron: data.train={text}: ")], calibrate.log
    assert (calibrate.restarts, distill.log) == (0, "")
    nothing_runs(cluster)


def set_nodes(cluster: Cluster, state: str) -> None:
    """Take all nodes out, or give them back."""
    for node in cluster.addresses:
        sh("scontrol", "update", f"nodename={node}", f"state={state}", *(["reason=test"] if state == "drain" else []))
