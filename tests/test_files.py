"""Files that are complete or absent: their permissions."""

import os

import pytest
import torch
from safetensors.torch import save_file

from minitron.files import atomic_path, write_text


@pytest.fixture
def umask():
    """Sets this process's umask until the test ends."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_what_is_written_follows_the_umask_whoever_writes_it(mask, file, folder, umask, tmp_path):
    umask(mask)
    with atomic_path(tmp_path / "scores.safetensors") as temporary:
        save_file({"x": torch.zeros(2)}, temporary)
    with atomic_path(tmp_path / "hf") as temporary:
        (temporary / "more").mkdir(parents=True)
        save_file({"x": torch.zeros(2)}, temporary / "more" / "model.safetensors")
        (temporary / "tokenizer.json").write_text("{}")
        (temporary / "tokenizer.json").chmod(0o400)  # copied from a folder that is not to be changed
    write_text(tmp_path / "config.yaml", "")
    files = ["scores.safetensors", "hf/more/model.safetensors", "hf/tokenizer.json", "config.yaml"]
    assert [mode(tmp_path / name) for name in files] == [file] * 4
    assert [mode(tmp_path / name) for name in ("hf", "hf/more")] == [folder] * 2
    assert os.umask(mask) == mask  # as it was


def test_what_a_killed_removal_left_goes_with_the_next(tmp_path):
    for _ in range(2):
        (tmp_path / ".hf.removed").mkdir()
        with atomic_path(tmp_path / "hf") as temporary:
            temporary.mkdir()
        assert [path.name for path in tmp_path.iterdir()] == ["hf"]
