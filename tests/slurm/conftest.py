"""One cluster for all tests, and the runs that several of them look at."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster.cluster import INSIDE, Cluster
from tests.slurm.jobs import COMPRESSION, STEPS, TWO_NODES, minitron, nothing_runs, submit
from tests.stages.commands import write_tales


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Two nodes that wait for work. Started once; the end of the namespace is theirs."""
    if INSIDE not in os.environ:
        pytest.skip("a cluster needs a namespace of its own: make test-slurm")
    here = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        here.start()
    except AssertionError as error:
        raise AssertionError(f"{error}\n{here.logs()}") from None
    return here


@pytest.fixture(autouse=True)
def cleared(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test that failed left in the queue is not in the way of the next one."""
    yield
    if "cluster" in request.fixturenames:
        request.getfixturevalue("cluster").clear()


@pytest.fixture(scope="session")
def settings(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings of a small compression on the CPU."""
    return [f"model.path={stories}", f"data.train={write_tales(tmp_path_factory.mktemp('text') / 'text.jsonl')}", *COMPRESSION]


@pytest.fixture(scope="session")
def alone(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one process, without SLURM."""
    run = tmp_path_factory.mktemp("alone") / "run"
    done = minitron("compress", f"run.dir={run}", *settings)
    assert (done.code, done.err) == (0, ""), done
    return run


@pytest.fixture(scope="session")
def unbroken(cluster: Cluster, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run on both nodes, two ranks each, that nothing happened to."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    (job,) = submit("compress", f"run.dir={run}", *settings, *TWO_NODES)
    assert job.end() == "COMPLETED", job.log
    assert (job.restarts, len(job.log.split(f"{STEPS} steps were done before"))) == (0, 1)
    nothing_runs(cluster)
    return run
