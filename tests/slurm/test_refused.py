"""What can't be done on this cluster: said in one line, before the job is queued or soon after it begins."""

import os

import pytest

import minitron
from minitron.cli import main
from tests.slurm.cluster.cluster import sh
from tests.slurm.jobs import REPOSITORY, TWO_NODES, nothing_runs, submit

pytestmark = pytest.mark.slurm
SOON = 30  # seconds that a job may take to say what is wrong


@pytest.fixture
def read_only(tmp_path):
    """A folder that not even root can write to."""
    folder = tmp_path / "read_only"
    folder.mkdir()
    sh("mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder)
    yield folder
    sh("umount", folder)


UNFIT = {
    "partition": (["slurm.partition=gpu"], "slurm.partition=gpu: "),
    "nodes of the layout": (["slurm.nodes=1"], "parallel.tp=2: "),
    "nodes of the cluster": (["slurm.nodes=4"], "slurm.nodes=4: "),
    "GPUs of a node": (["slurm.gpus_per_node=4"], "slurm.gpus_per_node=4: "),
}


@pytest.mark.parametrize("unfit", UNFIT)
def test_what_the_cluster_has_no_place_for_is_refused_before_the_queue(unfit, cluster, settings, tmp_path, capsys):
    own, beginning = UNFIT[unfit]
    assert main(["submit", "compress", f"run.dir={tmp_path}/run", *settings, *TWO_NODES, *own]) == 2
    assert_one_line(capsys.readouterr().err, beginning)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_before_the_queue(cluster, settings, read_only, capsys):
    assert main(["submit", "compress", f"run.dir={read_only}/run", *settings, *TWO_NODES]) == 2
    assert_one_line(capsys.readouterr().err, f"run.dir={read_only}/run: ")


def assert_one_line(said: str, beginning: str) -> None:
    assert (said.count("\n"), said[: len(f"minitron: {beginning}")]) == (1, f"minitron: {beginning}"), said
    assert sh("squeue", "--noheader") == ""


@pytest.fixture
def other_folder(cluster, tmp_path):
    """A folder of that name on n2 too, but on a disk of its own."""
    cluster.on("n2", "mount", "-t", "tmpfs", "tmpfs", tmp_path)
    yield
    cluster.on("n2", "umount", tmp_path)


@pytest.fixture
def other_version(cluster, tmp_path):
    """Another version of the project on n2."""
    file = REPOSITORY / "minitron" / "__init__.py"
    other = tmp_path / "other.py"
    other.write_text(file.read_text().replace(minitron.__version__, "0.0.9"))
    cluster.on("n2", "mount", "--bind", other, file)
    yield
    cluster.on("n2", "umount", file)


def test_a_folder_that_is_not_shared_ends_the_job(other_folder, cluster, settings, tmp_path):
    check_refused(cluster, settings, tmp_path / "run", f"run.dir={tmp_path}/run: ")


def test_mixed_versions_end_the_job(other_version, cluster, settings, tmp_path):
    check_refused(cluster, settings, tmp_path / "run", "0.0.9")


def check_refused(cluster, settings, run, reason):
    """The job fails once, soon, and names the node and the reason in one line.

    On a machine that is busy with other things, or that has fewer cores than the job has ranks, all takes as much longer as there are more
    processes than cores: four ranks that load their libraries at the same time take twice as long on two cores.
    """
    (job,) = submit("compress", f"run.dir={run}", *settings, *TWO_NODES)
    assert (job.end(), job.restarts) == ("FAILED", 0), job.log
    busy = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert job.seconds < SOON * busy, f"{busy:.1f} processes per core\n{job.log}"
    # one line, beside the script's own, which says at the end of the log what it did not try again
    said = [line for line in job.log.splitlines() if line.startswith("minitron: ") and "not tried again" not in line and reason in line]
    assert ["n2" in line for line in said] == [True], job.log
    nothing_runs(cluster)
