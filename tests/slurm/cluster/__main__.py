"""`python -m tests.slurm.cluster COMMAND ...`: the command, in a throw-away namespace in which `Cluster` starts a SLURM.

Processes, network, mounts and the hostname in there are its own: when the command ends, the kernel ends every daemon and job and takes back
every bridge and mount. What is missing of SLURM is installed from Debian's packages. Where that is not possible, one line says why and the exit
code is 77, which stands for a test that was left out.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.slurm.cluster.cluster import INSIDE

LEFT_OUT = 77
PROGRAMS = {  # what is called here -> the package that brings it
    "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client", "munged": "munge", "ip": "iproute2", "unshare": "util-linux",
}  # fmt: skip
NAMESPACES = ("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
POLICY = Path("/usr/sbin/policy-rc.d")  # asked by Debian's packages before they start a daemon


def main(command: list[str]) -> int:
    """Install what is missing, enter the namespace, become the command."""
    reason = prepared()
    if reason is not None:
        print(f"left out, nothing was tested on a SLURM cluster: {reason}", file=sys.stderr)
        return LEFT_OUT
    os.execvpe(NAMESPACES[0], [*NAMESPACES, *command], {**os.environ, INSIDE: "yes"})


def prepared() -> str | None:
    """Why there can be no cluster on this machine, or None once everything is there."""
    if os.geteuid() != 0:
        return "it needs root, for namespaces and for packages"
    missing = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if missing and shutil.which("apt-get") is None:
        return f"{', '.join(missing)} must be installed, and there is no apt-get here"
    if missing and (failure := installed(missing)):
        return f"apt-get could not install {', '.join(missing)}: {failure}"
    tried = subprocess.run([*NAMESPACES, "ip", "link", "add", "slurm0", "type", "bridge"], capture_output=True, text=True, check=False)
    return f"no network of its own can be made ({tried.stderr.strip()})" if tried.returncode else None


def installed(packages: list[str]) -> str | None:
    """The packages from the system's sources; what apt-get said last if it failed."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    with no_daemons():
        for arguments in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
            done = subprocess.run(["apt-get", *arguments], env=environment, capture_output=True, text=True, check=False)
    return (done.stderr.strip().splitlines() or ["no reason given"])[-1] if done.returncode else None


@contextlib.contextmanager
def no_daemons() -> Iterator[None]:
    """Packages that are installed in this block don't start what they bring."""
    if POLICY.exists():
        yield
        return
    POLICY.write_text("#!/bin/sh\nexit 101\n")
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
