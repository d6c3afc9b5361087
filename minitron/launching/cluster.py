"""What SLURM is asked: which partitions, accounts and nodes there are, and to queue a script."""

import dataclasses
import getpass
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from minitron.config.cluster import TIME, Slurm
from minitron.errors import RequestError, refuse

UNBOUNDED = ("UNLIMITED", "INFINITE", "ALL", "N/A", "(null)", "NONE", "")


@dataclasses.dataclass(frozen=True)
class Partition:
    """What a partition allows; None: anything. `gpus`, `cpus`: those of each of its nodes."""

    name: str
    default: bool
    up: bool
    max_nodes: int | None
    max_time: str | None
    accounts: tuple[str, ...] | None
    qos: tuple[str, ...] | None
    gpus: tuple[int, ...]
    cpus: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Cluster:
    """What SLURM says of itself; `accounts` and `qos`: those that this user may name, None where that is not kept."""

    partitions: tuple[Partition, ...]
    accounts: tuple[str, ...] | None = None
    qos: tuple[str, ...] | None = None


def ask() -> Cluster:
    """Ask scontrol, sinfo and sacctmgr. Raises RequestError where SLURM is not there or does not answer."""
    partitions = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in told("scontrol", "show", "partition", "--oneliner").splitlines() if line]
    nodes = [line.split("|") for line in told("sinfo", "--noheader", "--Node", "--format=%R|%G|%c").splitlines()]
    try:
        rows = told("sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={getpass.getuser()}", "format=account,qos").splitlines()
        associations = [line.split("|") for line in rows if "|" in line]
    except RequestError:  # clusters without an accounting database take any name
        associations = []
    return Cluster(
        tuple(partition(fields, [(gpus, cpus) for name, gpus, cpus in nodes if name == fields["PartitionName"]]) for fields in partitions),
        tuple(dict.fromkeys(account for account, _ in associations)) or None,
        tuple(dict.fromkeys(one for _, names in associations for one in names.split(",") if one)) or None,
    )


def partition(fields: dict[str, str], nodes: Sequence[tuple[str, str]]) -> Partition:
    """A partition from what `scontrol show partition` says of it, and generic resources and cores of its nodes, as sinfo writes them."""
    listed = {name: None if (value := fields.get(name, "")) in UNBOUNDED else tuple(value.split(",")) for name in ("AllowAccounts", "AllowQos")}
    most = fields.get("MaxNodes", "")
    return Partition(
        name=fields["PartitionName"], default=fields.get("Default") == "YES", up=fields.get("State", "UP") == "UP",
        max_nodes=int(most) if most.isdigit() else None, max_time=None if (limit := fields.get("MaxTime", "")) in UNBOUNDED else limit,
        accounts=listed["AllowAccounts"], qos=listed["AllowQos"], gpus=tuple(gpus_of(gpus) for gpus, _ in nodes),
        cpus=tuple(int(re.sub(r"\D.*", "", cpus) or 0) for _, cpus in nodes),
    )  # fmt: skip


def gpus_of(resources: str) -> int:
    """The GPUs among a node's generic resources: gpu:8, gpu:a100:8(S:0-1), gpu:a100:4,gpu:h100:2."""
    return sum(int(count) for count in re.findall(r"(?:^|,)gpu(?::[^:,(]+)?:(\d+)", resources))


def check_cluster(slurm: Slurm, cluster: Cluster) -> None:
    """Refuse what the cluster has no place for, or does not know."""
    by_name = {one.name: one for one in cluster.partitions}
    asked = slurm.partition.split(",") if slurm.partition else [name for name, one in by_name.items() if one.default]
    for name in asked:
        if name not in by_name:
            raise refuse("slurm.partition", slurm.partition, f"the cluster's partitions are {', '.join(by_name)}")
    if not asked:
        raise refuse("slurm.partition", None, f"the cluster has no default; its partitions are {', '.join(by_name)}")
    known(cluster.accounts, "slurm.account", slurm.account, "accounts of yours")
    known(cluster.qos, "slurm.qos", slurm.qos, "qualities of service of yours")
    refusals = [refusal for name in asked if (refusal := no_place(slurm, by_name[name]))]
    if len(refusals) == len(asked):  # of several partitions one is enough
        raise refusals[0]


def known(names: tuple[str, ...] | None, setting: str, value: str | None, what: str) -> None:
    """Refuse a name that is not among those there are, where these are known."""
    if value is not None and names is not None and value not in names:
        raise refuse(setting, value, f"{what} are {', '.join(names)}")


def no_place(slurm: Slurm, place: Partition) -> RequestError | None:
    """Why a partition never runs the job, None where it may."""
    nodes = min(len(place.gpus), place.max_nodes or len(place.gpus))
    enough = sum(gpus >= slurm.gpus_per_node for gpus in place.gpus)
    cores = sum(cpus >= (slurm.cpus_per_node or 0) for cpus in place.cpus)
    try:
        known(place.accounts, "slurm.account", slurm.account, f"partition {place.name} is for accounts that")
        known(place.qos, "slurm.qos", slurm.qos, f"partition {place.name} is for qualities of service that")
    except RequestError as error:
        return error
    if not place.up:
        return refuse("slurm.partition", place.name, "this partition is closed at the moment")
    if slurm.nodes > nodes:
        return refuse("slurm.nodes", slurm.nodes, f"partition {place.name} gives a job at most {nodes} nodes")
    if slurm.nodes > enough:
        return refuse("slurm.gpus_per_node", slurm.gpus_per_node, f"partition {place.name} has {enough} nodes with as many GPUs (0: CPU ranks)")
    if slurm.nodes > cores:
        return refuse("slurm.cpus_per_node", slurm.cpus_per_node, f"partition {place.name} has {cores} nodes with as many cores")
    if place.max_time and TIME.fullmatch(place.max_time) and slurm.seconds > Slurm(time=place.max_time, signal=10).seconds:
        return refuse("slurm.time", slurm.time, f"partition {place.name} gives a job at most {place.max_time}")
    return None


def queue(script: Path, after: str | None) -> str:
    """Have SLURM queue a script, to begin after `after` (a kind of dependency and the ids of jobs) has ended well; the new job's id."""
    dependency = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
    return told("sbatch", "--parsable", *dependency, str(script)).strip().split(";")[0]


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue again."""
    told("scancel", *jobs)


def told(*command: str) -> str:
    """What a command of SLURM's prints. Raises RequestError, with its own words in one line, where it is not there or fails."""
    if shutil.which(command[0]) is None:
        raise RequestError(f"{command[0]} is not found: minitron submit is for a machine of a SLURM cluster (--dry-run prints its scripts anywhere)")
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RequestError(f"{command[0]}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
