"""An open run's models."""

import dataclasses
import os

import pytest

from minitron.config.schema import Config
from minitron.session import Session


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """`converted(FILE, VERB, dtype=)`: the conversions that a verb makes of a .gguf file, in one run's folder."""
    made = []

    def convert(path, folder, dtype):
        folder.mkdir(exist_ok=True)
        made.append((path.name, dtype))

    monkeypatch.setattr("minitron.session.convert_gguf", convert)
    monkeypatch.setattr("minitron.session.open_folder", lambda folder, setting: folder)

    def open_model(file, verb, dtype="bf16"):
        made.clear()
        opened = Session(dataclasses.replace(Config(), dtype=dtype), verb, None, tmp_path)
        assert opened._converted(tmp_path / file, tmp_path / "source", "model.path") == tmp_path / "source"
        return [*made]

    return open_model


def test_a_gguf_file_is_converted_once_and_anew_where_it_is_another(converted, tmp_path):
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_text(name)
    assert converted("a.gguf", "data") == [("a.gguf", "bf16")]
    assert converted("a.gguf", "calibrate") == []
    assert converted("b.gguf", "calibrate") == [("b.gguf", "bf16")]
    assert converted("b.gguf", "calibrate", "fp32") == [("b.gguf", "fp32")]
    assert converted("b.gguf", "data") == []  # reads no weights
    os.utime(tmp_path / "b.gguf", ns=(0, 0))
    assert converted("b.gguf", "data") == [("b.gguf", "bf16")]
    (tmp_path / "source").rmdir()
    assert converted("b.gguf", "data") == [("b.gguf", "bf16")]
