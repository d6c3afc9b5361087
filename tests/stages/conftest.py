"""A small compression of a real model, and its finished run."""

from pathlib import Path

import pytest

from tests.stages.commands import minitron


@pytest.fixture(scope="session")
def settings(stories: Path, docstrings: Path) -> list[str]:
    """Settings of a compression that takes seconds: a quarter of the width, sixteen steps."""
    return [
        f"model.path={stories}", f"data.train={docstrings}", "target.hidden_size=48", "target.ffn_hidden_size=128",
        "calibrate.samples=32", "calibrate.seq_length=64", "train.steps=16", "train.global_batch_size=8", "train.micro_batch_size=4",
        "train.seq_length=64", "train.eval_interval=8", "train.eval_tokens=2048", "train.save_interval=4", "train.warmup_steps=2", "train.lr=2e-3",
        "eval.tokens=4096", "logging.progress=false", "device=cpu", "dtype=fp32",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def finished(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that went through without a break."""
    root = tmp_path_factory.mktemp("finished")
    done = minitron(root / "log", "compress", f"run.dir={root / 'run'}", *settings)
    assert (done.code, done.err) == (0, ""), done
    return root / "run"
