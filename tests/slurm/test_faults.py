"""What happens to jobs on a cluster, one after another to one job: it goes on by itself each time, and ends as one that nothing happened to."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.oracles.metrics import without_costs
from tests.oracles.models import same_tensors, saved_tensors
from tests.slurm.cluster.cluster import Cluster, sh, wait_until
from tests.slurm.jobs import STEPS, TWO_NODES, Job, leftovers, lines, nothing_runs, results, saved, submit, trained

pytestmark = pytest.mark.slurm
STEP = 1.0  # seconds that a step lasts at least
RESUMED = re.compile(rf"([\d,]+) of {STEPS} steps were done before: goes on from there")


class Scene(NamedTuple):
    """Where a fault happens. `pace`: the file that says how many seconds a step lasts at least."""

    cluster: Cluster
    job: Job
    pace: Path


def tell_the_script(scene: Scene) -> None:
    """What SLURM does before the limit, without the wait for it."""
    sh("scancel", "--batch", "--signal=USR1", scene.job.number)


def reach_the_time_limit(scene: Scene) -> None:
    """SLURM itself sends the warning that --signal asks for; it looks twice a minute."""
    scene.pace.write_text(str(4 * STEP))
    minutes = math.ceil(scene.job.seconds / 60 + 1)  # of the whole attempt; SLURM knows no shorter limits, and looks early enough for 30 s of warning
    sh("scontrol", "update", f"jobid={scene.job.number}", f"timelimit={minutes}")


def extend_the_time_limit(scene: Scene) -> None:
    scene.pace.write_text(str(STEP))
    sh("scontrol", "update", f"jobid={scene.job.number}", "timelimit=30")


def pre_empt(scene: Scene) -> None:
    """Another job wants both nodes, in a partition that goes before."""
    sh("sbatch", "--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")


def requeue(scene: Scene) -> None:
    sh("scontrol", "requeue", scene.job.number)


def set_down(scene: Scene) -> None:
    """As an operator, or a health check, takes a node out."""
    sh("scontrol", "update", "nodename=n2", "state=down", "reason=test")


def set_up(scene: Scene) -> None:
    sh("scontrol", "update", "nodename=n2", "state=resume")


def cut_power(scene: Scene) -> None:
    """On the node that has the batch script, rank 0, and the place where ranks meet."""
    scene.cluster.cut_power("n1")


def switch_on(scene: Scene) -> None:
    scene.cluster.switch_on("n1")


def kill_a_rank(scene: Scene) -> None:
    """The last one, so that neither the node of the batch script nor rank 0 is concerned."""
    ranks(scene.cluster)["3"].kill()


class Fault(NamedTuple):
    """What happens, what mends it once the job is in the queue again, and whether the run is told before, so that it saves."""

    happen: Callable[[Scene], None]
    mend: Callable[[Scene], None] = lambda scene: None
    told: bool = False


FAULTS = {
    "USR1": Fault(tell_the_script, told=True),
    "time limit": Fault(reach_the_time_limit, extend_the_time_limit, told=True),
    "pre-emption": Fault(pre_empt, told=True),
    "requeue": Fault(requeue),
    "node set down": Fault(set_down, set_up),
    "power cut": Fault(cut_power, switch_on),
    "kill -9": Fault(kill_a_rank),
}


def ranks(cluster: Cluster) -> dict[str, psutil.Process]:
    """The processes that train, by their rank: what torchrun started, without what they started themselves."""
    ranked = {process: rank for node in cluster.power for process in cluster.processes(node) if (rank := process.environ().get("RANK"))}
    return {rank: process for process, rank in ranked.items() if process.parent() not in ranked}


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still run."""
    return [process for process in processes if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_a_job_survives_all_that_can_happen(cluster, settings, unbroken, tmp_path):
    run, pace = tmp_path / "run", tmp_path / "pace"
    pace.write_text(str(STEP))
    (job,) = submit("compress", f"run.dir={run}", *settings, *TWO_NODES, pace=pace)
    scene = Scene(cluster, job, pace)
    for number, (name, fault) in enumerate(FAULTS.items()):
        begun = saved(run)
        # in the middle of a step: the first rank waits in it, the others for that one
        job.wait(lambda begun=begun: trained(run) > saved(run) > begun, f"a step after a checkpoint, before the {name}")
        before, done, processes = saved(run), trained(run), [process for node in cluster.power for process in cluster.processes(node)]
        assert {*ranks(cluster)} == {"0", "1", "2", "3"}
        fault.happen(scene)
        job.wait(lambda number=number: job.restarts > number, f"queued again after the {name}")
        fault.mend(scene)
        job.wait(lambda: job.state == "RUNNING", f"runs again after the {name}")
        wait_until(lambda processes=processes: not alive(processes), f"no process is left of before the {name}")
        job.wait(lambda number=number: len(RESUMED.findall(job.log)) > number, f"goes on after the {name}")
        resumed = int(RESUMED.findall(job.log)[-1])
        assert resumed >= (done if fault.told else before), f"the {name} lost steps: {done} were done, {before} in a checkpoint, {resumed} in the end"
    pace.write_text("0")
    assert job.end() == "COMPLETED", job.log
    assert job.restarts == len(FAULTS)
    nothing_runs(cluster)
    assert without_costs(lines(run)) == without_costs(lines(unbroken))
    assert results(run) == results(unbroken)
    assert same_tensors(saved_tensors(run / "hf"), saved_tensors(unbroken / "hf"))
    assert leftovers(run) == []
