"""A run's folder whose files are broken: whatever reads them says so in one line, and no command ends in a traceback."""

import shutil

import pytest

from minitron.cli import main
from minitron.config.verbs import VERBS
from minitron.errors import RequestError
from minitron.reporting.runfiles import read_run

BROKEN = [
    "", "{", "[]", "7", '"text"', "null", "\udcff", "[" * 50_000,
    '{"a": 1}', '{"data": 7}', '{"data": {"done": 1}}', '{"data": {"done": true, "settings": []}}',
]  # fmt: skip
LOOKED_AT = ["stages.json", "arch.json", "eval.json"]  # by report and summary


def names_it(said, path):
    lines = said.splitlines()
    assert len(lines) == 1 and lines[0].startswith("minitron: ") and str(path) in lines[0], said


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.parametrize("name", LOOKED_AT)
def test_who_looks_at_a_broken_run_is_told(run, name, capfd):
    for text in BROKEN:
        (run / name).write_text(text, errors="surrogateescape")
        code = main(["summary", f"run.dir={run}"])
        said = capfd.readouterr().err
        if code:  # what it has no use for may be missing
            assert code == 2
            names_it(said, run / name)
        if not text.startswith("{"):
            assert code == 2
            with pytest.raises(RequestError, match=name):
                read_run(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text", "verb"),
    [
        ("stages.json", "[]", "calibrate"),
        ("stages.json", '{"data": {"done": true, "settings": []}}', "calibrate"),
        ("config.yaml", "- a", "calibrate"),
        ("config.yaml", "model: {path: [", "calibrate"),
        ("data/manifest.json", '{"parts": {"train": {}}, "splits": {}}', "calibrate"),
        ("data/manifest.json", '{"parts": 7, "splits": {}}', "calibrate"),
        ("data/manifest.json", '{"parts": {}, "splits": {"train": [{"part": "a", "weight": "b"}]}}', "calibrate"),
        ("pruned/arch.json", "[]", "distill"),
        ("pruned/unit_order.json", "[]", "distill"),
        ("eval.json", "{", "export"),
        ("eval.json", "[]", "export"),
    ],
)
def test_a_stage_that_needs_a_broken_file_names_it(run, settings, name, text, verb, capfd):
    (run / name).write_text(text)
    shutil.rmtree(run / "checkpoints") if verb == "distill" else None
    capfd.readouterr()
    read = [one for one in settings if one.split(".")[0].split("=")[0] in VERBS[verb].groups]
    assert main([verb, f"run.dir={run}", *read]) == 2
    names_it(capfd.readouterr().err, run / name)
