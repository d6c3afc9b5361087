"""A SLURM cluster on one machine: every node has its own name, address, processes and /dev/shm, and a power button.

Made for the namespace that `python -m tests.slurm.cluster` opens; nothing here is undone, the end of the namespace does that.
"""

import getpass
import os
import re
import stat
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
INSIDE = "MINITRON_TEST_CLUSTER"  # in the environment where this process may change the network and the mounts: they are its own
NETWORK, BRIDGE = "10.213.77", "slurm0"
CPUS, GPUS = 4, 2  # of a node; both are pretended
NODE_NAMESPACES = ("unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")


def sh(*command: str | Path) -> str:
    """What a command prints; AssertionError with what it said where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def wait_until(condition: Callable[[], Any], what: str, timeout: float = 180, every: float = 0.1) -> Any:
    """The first result of `condition` that is true; fails after a long time with what was waited for."""
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"in vain for {timeout:g} s: {what}"
        time.sleep(every)
    return found


class Cluster:
    """Nodes n1, n2, ... of the partitions `main`, from which `high` takes nodes away. Its files are in `folder`."""

    def __init__(self, folder: Path, size: int = 2) -> None:
        self.folder = folder
        self.addresses = {f"n{number}": f"{NETWORK}.{10 + number}" for number in range(1, size + 1)}
        self.power: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Up to the moment where every node waits for work."""
        self.configure()
        self.connect()
        sh("munged", "--force", f"--key-file={self.folder}/munge.key", f"--socket={self.folder}/munge.socket", f"--pid-file={self.folder}/munged.pid",
           f"--log-file={self.folder}/log/munged", f"--seed-file={self.folder}/munged.seed")  # fmt: skip  # --force: in a folder of root's alone
        sh("slurmctld")
        for node in self.addresses:
            self.switch_on(node)
        wait_until(self.is_idle, "all nodes wait for work")

    def configure(self) -> None:
        """The cluster's files; this process finds them by its environment, and so does what it starts."""
        for name in ("state", "log", *(f"spool/{node}" for node in self.addresses)):
            (self.folder / name).mkdir(parents=True)
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        sh("mungekey", "--create", f"--keyfile={self.folder}/munge.key")
        lines = [(HERE / "slurm.conf").read_text().format(folder=self.folder, user=getpass.getuser(), head=f"{NETWORK}.1")]
        lines += [
            f"NodeName={node} NodeAddr={address} CPUs={CPUS} RealMemory=4000 Gres=gpu:{GPUS} State=UNKNOWN"
            for node, address in self.addresses.items()
        ]
        (self.folder / "slurm.conf").write_text("\n".join(lines) + "\n")
        for number in range(GPUS):
            os.mknod(self.folder / f"gpu{number}", 0o600 | stat.S_IFCHR, os.makedev(1, 3))  # SLURM wants devices: these are /dev/null
        (self.folder / "gres.conf").write_text(f"Name=gpu Count={GPUS} File={self.folder}/gpu[0-{GPUS - 1}]\n")
        names = {"localhost": "127.0.0.1", "head": f"{NETWORK}.1", **self.addresses}
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for name, address in names.items()))
        (self.folder / "nsswitch.conf").write_text(re.sub(r"(?m)^hosts:.*", "hosts: files", Path("/etc/nsswitch.conf").read_text()))

    def connect(self) -> None:
        """Names and cables: a network namespace for each node, which outlives its power."""
        sh("hostname", "head")
        for name in ("hosts", "nsswitch.conf"):
            sh("mount", "--bind", self.folder / name, f"/etc/{name}")
        sh("mount", "-t", "tmpfs", "tmpfs", "/run")  # where `ip netns` keeps its names
        sh("ip", "link", "set", "lo", "up")
        sh("ip", "link", "add", BRIDGE, "type", "bridge")
        sh("ip", "addr", "add", f"{NETWORK}.1/24", "dev", BRIDGE)
        sh("ip", "link", "set", BRIDGE, "up")
        for node, address in self.addresses.items():
            sh("ip", "netns", "add", node)
            sh("ip", "link", "add", node, "type", "veth", "peer", "name", "eth0", "netns", node)
            sh("ip", "link", "set", node, "master", BRIDGE)
            sh("ip", "-n", node, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                sh("ip", "-n", node, "link", "set", device, "up")

    def switch_on(self, node: str) -> None:
        """Boot a node."""
        sh("ip", "link", "set", node, "up")
        with open(self.folder / "log" / f"console.{node}", "ab") as console:
            self.power[node] = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{node}", *NODE_NAMESPACES, str(HERE / "node.sh"), node],
                stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
            )  # fmt: skip

    def cut_power(self, node: str) -> None:
        """Everything on a node is gone at once, and nobody is told: the cable goes first, over which the kernel would say goodbye."""
        sh("ip", "link", "set", node, "down")
        button = self.power.pop(node)
        button.kill()
        button.wait()

    def state(self, node: str) -> str:
        """As SLURM sees it: idle, allocated, down, ..."""
        return sh("sinfo", "--noheader", "--partition=main", f"--nodes={node}", "--format=%T").strip()

    def is_idle(self) -> bool:
        """Whether every node waits for work. False while no controller answers."""
        done = subprocess.run(["sinfo", "--noheader", "--partition=main", "--format=%T %D"], capture_output=True, text=True, check=False)
        return done.stdout.strip() == f"idle {len(self.addresses)}"

    def clear(self) -> None:
        """No jobs, all nodes on and waiting: as it was in the beginning."""
        if self.is_idle() and not sh("squeue", "--noheader"):
            return
        sh("scancel", f"--user={getpass.getuser()}")
        for node in self.addresses:
            if node not in self.power:
                self.switch_on(node)
            if self.state(node).startswith(("down", "drain")):
                sh("scontrol", "update", f"nodename={node}", "state=resume")
        wait_until(self.is_idle, "all nodes wait for work again")

    def first_process(self, node: str) -> int:
        """Of a node that is on, the number that its process 1 has outside."""
        return psutil.Process(self.power[node].pid).children()[0].pid

    def processes(self, node: str) -> list[psutil.Process]:
        """All that runs on a node for jobs: neither its first process nor slurmd."""
        first = self.first_process(node)
        inside = os.stat(f"/proc/{first}/ns/pid").st_ino
        found = []
        for process in psutil.process_iter():
            try:
                if os.stat(f"/proc/{process.pid}/ns/pid").st_ino == inside and process.pid != first and process.name() != "slurmd":
                    found.append(process)
            except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                continue
        return found

    def on(self, node: str, *command: str | Path) -> str:
        """What a command prints that sees a node's files and processes."""
        return sh("nsenter", f"--target={self.first_process(node)}", "--mount", "--uts", "--pid", "--net", *command)

    def logs(self) -> str:
        """The ends of what its daemons wrote, for the message of a failure."""
        return "\n".join(f"== {file.name}\n" + "\n".join(file.read_text(errors="replace").splitlines()[-25:])
                         for file in sorted((self.folder / "log").iterdir()))  # fmt: skip
