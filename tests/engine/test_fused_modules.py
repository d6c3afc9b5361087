"""Transformer Engine's modules, which need a GPU: their names, and the way from and to the table of parameters, with a stand-in on the CPU.

The stand-in has the parameters that the package's documentation names. That the package itself computes as torch does is for
tests/gpu/test_families.py to say.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.arch.axes import PARAMETERS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_family_is_read_trained_and_written_by_fused_modules(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.oracles.fused_modules", str(tmp_path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 15
    apart = {name: one for name, one in found.items() if max(one["logits"], one["reread"]) > 1e-5 or one["gradient"] > 1e-4}
    assert apart == {}
    fused = {row.fused.split("{layer}.")[1] for row in PARAMETERS if row.fused}
    assert set().union(*(one["fused"] for one in found.values())) == fused
