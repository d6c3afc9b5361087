"""Where there can be no cluster, `make test-slurm` says so in one line and nothing fails."""

import os
import shutil

import pytest

from tests.slurm.cluster import __main__ as cluster

LACKS = {
    "root": (lambda patch: patch.setattr(os, "geteuid", lambda: 1000), "it needs root"),
    "packages": (lambda patch: patch.setattr(shutil, "which", lambda program: None), "there is no apt-get here"),
    "namespaces": (lambda patch: patch.setattr(cluster, "NAMESPACES", ("false",)), "no network of its own can be made"),
}


@pytest.mark.parametrize("lack", LACKS)
def test_a_machine_that_can_hold_no_cluster(lack, monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda program: f"/usr/sbin/{program}")
    remove, reason = LACKS[lack]
    remove(monkeypatch)
    assert cluster.main(["true"]) == cluster.LEFT_OUT
    said = capsys.readouterr().err
    assert said.startswith("left out, nothing was tested on a SLURM cluster: ")
    assert reason in said
    assert said.count("\n") == 1
