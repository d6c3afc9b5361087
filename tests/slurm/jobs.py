"""Jobs of the cluster as a test sees them: submitted as a user would, followed through SLURM's own commands and the files of the run."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minitron.engine.checkpoint import Checkpoints
from tests.slurm.cluster.cluster import Cluster, sh, wait_until
from tests.stages.commands import Done

REPOSITORY = Path(__file__).parents[2]
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
STEPS, SAVES = 48, 2  # of the training, and the steps between checkpoints
COMPRESSION = [
    "target.hidden_size=48", "target.ffn_hidden_size=128", "calibrate.samples=8", "calibrate.seq_length=64", f"train.steps={STEPS}",
    "train.global_batch_size=4", "train.micro_batch_size=1", "train.seq_length=64", "train.eval_interval=100", "train.eval_tokens=512",
    f"train.save_interval={SAVES}", "train.warmup_steps=2", "train.lr=2e-3", "eval.tokens=2048", "logging.progress=false", "device=cpu", "dtype=fp32",
]  # fmt: skip
JOB = ("slurm.gpus_per_node=2", "slurm.time=00:30:00", "slurm.signal=30")
TWO_NODES = (*JOB, "slurm.nodes=2", "parallel.tp=2", "parallel.pp=2")
PATIENCE = 600.0  # seconds that a test waits for what takes one minute on an idle machine


def environment(pace: Path | None = None) -> dict[str, str]:
    """What a user has activated; with `pace`, a file that says how many seconds a step lasts at least."""
    slowed = [str(REPOSITORY / "tests" / "slurm" / "pace")] if pace else []
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([*slowed, str(REPOSITORY)]), "MINITRON_TEST_PACE": str(pace or ""),
    }  # fmt: skip


def minitron(*arguments: str | Path, pace: Path | None = None) -> Done:
    """`minitron ARGUMENTS` on the machine that jobs are submitted from."""
    command = [sys.executable, "-m", "minitron", *map(str, arguments)]
    done = subprocess.run(command, env=environment(pace), capture_output=True, text=True, timeout=PATIENCE, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def submit(*arguments: str | Path, pace: Path | None = None) -> list["Job"]:
    """The jobs that `minitron submit ARGUMENTS` queues, in its order."""
    done = minitron("submit", *arguments, pace=pace)
    assert done.code == 0, done
    found = [Job(int(number)) for number in re.findall(r"(?m)^\s*job (\d+): ", done.out)]
    assert found, done.out
    return found


@dataclasses.dataclass(frozen=True)
class Job:
    """A job by its number."""

    number: int

    def records(self) -> list[dict[str, str]]:
        """What SLURM knows of it, of an array of each task."""
        return [dict(re.findall(r"(?:^|\s)(\w+)=(\S*)", line)) for line in sh("scontrol", "--oneliner", "show", "job", self.number).splitlines()]

    def facts(self) -> dict[str, str]:
        """What SLURM knows of it, of an array of one task."""
        return self.records()[0]

    @property
    def state(self) -> str:
        """RUNNING, PENDING, COMPLETED, ...; several with + between them where the tasks of an array differ."""
        return "+".join(sorted({record["JobState"] for record in self.records()}))

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen."""
        return {*self.state.split("+")} <= OVER

    @property
    def restarts(self) -> int:
        """How often it was queued again."""
        return int(self.facts()["Restarts"])

    @property
    def log(self) -> str:
        """All that it wrote, in all its attempts."""
        files = [Path(record["StdOut"]) for record in self.records()]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    @property
    def seconds(self) -> float:
        """How long it ran, or has run so far, in this attempt."""
        hours, minutes, seconds = map(int, self.facts()["RunTime"].split(":"))
        return (hours * 60 + minutes) * 60 + seconds

    def wait(self, condition: Callable[[], object], what: str) -> None:
        """Return as soon as `condition` holds; fail with the log where it does not, or where the job is over before."""

        def look() -> bool:
            if condition():
                return True
            assert not self.is_over or condition(), f"job {self.number} is {self.state} before: {what}\n{self.log}"
            return False

        try:
            wait_until(look, what, PATIENCE)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.facts()}\n{self.log}") from None

    def end(self) -> str:
        """Its last state, once it is over."""
        wait_until(lambda: self.is_over, f"job {self.number} ends", PATIENCE)
        return self.state


def nothing_runs(cluster: Cluster) -> None:
    """Return once no process of a job is left on any node; fail where some stay."""
    left: list[str] = []

    def look() -> bool:
        left[:] = [str(process) for node in cluster.addresses for process in cluster.processes(node)]
        return not left and cluster.is_idle()

    try:
        wait_until(look, "the nodes are empty", 120)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{left}") from None


def lines(run: Path) -> list[dict]:
    """metrics.jsonl, as far as it is written."""
    file = run / "metrics.jsonl"
    written = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in written if line.endswith("\n")]


def trained(run: Path) -> int:
    """Steps that are in metrics.jsonl."""
    return lines(run)[-1]["step"] if lines(run) else 0


def saved(run: Path) -> int:
    """The step of the newest complete checkpoint."""
    return Checkpoints(run / "checkpoints").latest() or 0


def results(run: Path) -> dict:
    """eval.json without speeds."""
    found = json.loads((run / "eval.json").read_text())
    return {name: {key: value for key, value in entry.items() if "second" not in key} for name, entry in found.items()}


def leftovers(run: Path) -> list[Path]:
    """Files that only a run at work may have."""
    return [path for path in run.rglob("*") if path.name.endswith((".partial", ".removed", ".tmp", ".lock"))]
