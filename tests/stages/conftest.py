"""A small compression of a real model, and its finished run."""

from pathlib import Path

import pytest

from tests.stages.commands import minitron, small_compression


@pytest.fixture(scope="session")
def settings(stories: Path, tales: Path) -> list[str]:
    """Settings of a small compression on the CPU."""
    return [*small_compression(stories, tales), "device=cpu", "dtype=fp32"]


@pytest.fixture(scope="session")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through without a break."""
    root = tmp_path_factory.mktemp("finished")
    done = minitron(root / "compress", "compress", f"run.dir={root / 'run'}", *settings)
    assert (done.code, done.err) == (0, ""), done
    return root / "run"
