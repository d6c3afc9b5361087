"""The settings of `minitron submit`: what a job asks SLURM for, and what its script does around the verb."""

import dataclasses
import re

from minitron.config.setting import setting
from minitron.errors import refuse

# minutes, or [days-]hours:minutes:seconds with the parts that sbatch lets one leave out
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<clock>\d+(?::\d+){0,2})")


@dataclasses.dataclass(frozen=True)
class Slurm:
    """What `minitron submit` asks SLURM for. Settings that are null are left to the cluster's own defaults."""

    partition: str | None = setting(None, "partition, or several separated by commas, of which SLURM takes the first that is free")
    account: str | None = setting(None, "account that the job is charged to")
    qos: str | None = setting(None, "quality of service")
    nodes: int = setting(1, "nodes of the job", least=1)
    gpus_per_node: int = setting(8, "GPUs on each node (0: none, the ranks are CPU ranks)", least=0)
    ranks_per_node: int | None = setting(None, "processes on each node (null: one per GPU, or one)", least=1)
    cpus_per_node: int | None = setting(None, "cores on each node (null: all with slurm.exclusive)", least=1)
    memory: str | None = setting(None, "memory on each node, such as 200G (null: all with slurm.exclusive)")
    exclusive: bool = setting(True, "nodes are not shared with other jobs")
    time: str = setting("04:00:00", "time limit, as sbatch takes it: hours:minutes:seconds, days-hours, minutes")
    signal: int = setting(300, "seconds before the time limit at which the run saves and stops, to go on in the next turn of the job", least=10)
    requeue: bool = setting(True, "the job queues itself again after the time limit, pre-emption, a node's or a rank's failure")
    retries: int = setting(3, "attempts in a row that finish and save nothing, after which a job is not queued again", least=0)
    after: str | None = setting(None, "ids of jobs, separated by colons, which must have ended well before this one begins")
    job_name: str | None = setting(None, "name of the job (null: minitron-VERB, or minitron-STAGE)")
    stages: dict[str, str] = setting(
        {},
        "minitron compress as a chain of jobs, each after the one before, as stage: its settings, such as 'calibrate: slurm.nodes=1 parallel.tp=2'; "
        "a job does what is left up to its stage, the last one all that is left",
    )
    array_limit: int | None = setting(None, "runs of a sweep at the same time (null: as many as there is room for)", least=1)
    container: str | None = setting(None, "image to run in: for pyxis a .sqsh file or a registry's name, for apptainer a .sif file (null: none)")
    runtime: str = setting("pyxis", "what starts the container: NVIDIA's pyxis and enroot, or apptainer", allowed=("pyxis", "apptainer"))
    mounts: str | list[str] | None = setting(None, "folders to mount in the container besides run.dir and this one: FROM:TO, or one name for both")
    python: str | None = setting(None, "interpreter that has minitron, on every node (null: the one that submits; in a container: python)")
    modules: str | list[str] | None = setting(None, "environment modules to load")
    env: dict[str, int | float | bool | str | None] = setting({}, "environment variables of the ranks, as NAME: value")
    setup: str | list[str] | None = setting(None, "lines of shell that the script runs before it starts the ranks")
    options: str | list[str] | None = setting(None, "further options of sbatch, one each, such as 'slurm.options=[\"--constraint=h100\"]'")
    check: bool = setting(
        True, "look at all that the verb would refuse before queueing: false where models, texts or packages are only found on the nodes"
    )

    def __post_init__(self) -> None:
        if not TIME.fullmatch(self.time):
            raise refuse("slurm.time", self.time, "hours:minutes:seconds, days-hours[:minutes[:seconds]] or minutes are needed")
        if self.signal >= self.seconds:
            raise refuse("slurm.signal", self.signal, f"fewer seconds than slurm.time={self.time} are needed")
        for name in self.env:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise refuse("slurm.env", name, "a variable's name is needed: letters, digits and _")
        for option in texts(self.options):
            if not option.startswith("-"):
                raise refuse("slurm.options", option, "an option of sbatch is needed, as '--constraint=h100'")
        if self.mounts and self.container is None:
            raise refuse("slurm.mounts", self.mounts, "slurm.container is needed with it")

    @property
    def seconds(self) -> int:
        """The time limit in seconds."""
        match = TIME.fullmatch(self.time)
        assert match is not None  # as __post_init__ saw
        parts = [int(part) for part in match["clock"].split(":")]
        if match["days"] is None and len(parts) < 3:
            parts = [0, *parts] if len(parts) == 2 else [0, *parts, 0]  # minutes first
        hours, minutes, seconds = (*parts, 0, 0)[:3]
        return ((int(match["days"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def ranks(self) -> int:
        """Processes on each node."""
        return self.ranks_per_node or self.gpus_per_node or 1

    @property
    def world_size(self) -> int:
        """Processes of the job."""
        return self.nodes * self.ranks


def texts(value: str | list[str] | None) -> list[str]:
    """One text, several or none, as a list."""
    return [] if value is None else [value] if isinstance(value, str) else value
