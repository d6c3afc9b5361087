"""launch/local.sh, with an nvidia-smi, an nproc and a torchrun that only say what a machine would, and what they were asked for."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch" / "local.sh"
SMI = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-a)\n  MIG 1g.10gb Device 0: (UUID: MIG-b)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-c)\n"
STARTED = "--standalone --nproc-per-node={} -m minitron {}"


@pytest.fixture
def local(tmp_path):
    """Runs the script on a machine of so many cores, with what nvidia-smi prints or without one: what torchrun got, what was said, exit code."""

    def run(*arguments, cores=8, smi=None, **environment):
        commands = {"nproc": f"echo {cores}", "torchrun": 'echo "$@"; echo "$OMP_NUM_THREADS $CUDA_DEVICE_MAX_CONNECTIONS"; trap'}
        # a machine without GPUs may have the program all the same
        commands["nvidia-smi"] = f"printf '{smi}'" if smi else "echo 'NVIDIA-SMI has failed'; exit 9"
        for name, command in commands.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{command}\n")
            (tmp_path / name).chmod(0o755)
        quiet = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_MAX_CONNECTIONS")
        kept = {name: value for name, value in os.environ.items() if name not in quiet}
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, env={**kept, "PATH": f"{tmp_path}:/usr/bin:/bin", **environment})
        return done.stdout.splitlines(), done.stderr, done.returncode

    return run


@pytest.mark.parametrize(
    ("machine", "ranks", "threads", "why"),
    [
        ({"smi": SMI, "cores": 64}, 2, 8, "one per GPU"),
        ({"smi": SMI, "cores": 64, "CUDA_VISIBLE_DEVICES": "1"}, 1, 8, "one per GPU"),
        ({"cores": 6, "CUDA_VISIBLE_DEVICES": "0,1,GPU-c"}, 3, 2, "one per GPU"),
        ({"smi": SMI, "CUDA_VISIBLE_DEVICES": ""}, 4, 2, "no GPU: one per two cores"),
        ({"smi": SMI, "CUDA_VISIBLE_DEVICES": "-1"}, 4, 2, "no GPU: one per two cores"),
        ({"cores": 9}, 4, 2, "no GPU: one per two cores"),
        ({"cores": 1}, 1, 1, "no GPU: one per two cores"),
        ({"cores": 4, "OMP_NUM_THREADS": "3"}, 2, 3, "no GPU: one per two cores"),
    ],
)
def test_there_are_as_many_ranks_as_the_machine_has_use_for(local, machine, ranks, threads, why):
    (started, settings, trap), said, code = local("compress", "run.dir=a b", **machine)
    assert started == STARTED.format(ranks, "compress run.dir=a b")
    assert (settings, code) == (f"{threads} 1", 0)
    assert said == f"local.sh: ranks: {ranks} ({why}), threads of each: {threads}\n"
    assert "trap -- '' SIGUSR1" in trap


def test_so_many_as_asked_and_none_of_the_gpus_where_the_cpu_is_asked_for(local):
    assert local("3", "distill", "device=cpu", smi=SMI, cores=2)[:2] == (
        [STARTED.format(3, "distill device=cpu"), "1 1", "trap -- '' SIGUSR1"],
        "local.sh: ranks: 3 (as asked), threads of each: 1\n",
    )
    assert local("distill", "device=cpu", smi=SMI, cores=12)[0][0] == STARTED.format(6, "distill device=cpu")
    assert local("distill", smi=SMI, CUDA_DEVICE_MAX_CONNECTIONS="32")[0][1] == "4 32"


@pytest.mark.parametrize("arguments", [(), ("4",), ("0", "compress"), ("run.dir=a",), ("--help",)])
def test_without_a_verb_it_says_how(local, arguments):
    lines, said, code = local(*arguments)
    assert (lines, code) == ([], 2)
    assert said.startswith("usage: ")
