"""The one script for a GPU without a network (benchmarks/gpu.py), on a machine that has none."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from minitron.reporting.results import gap_closed
from tests.stages.commands import write_tales

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("benchmarks_gpu", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = gpu  # a dataclass looks for its module there
SPEC.loader.exec_module(gpu)

PROGRAMS = {
    "good": gpu.Part("-c 'import json, sys; json.dump(dict(rows=[1]), open(sys.argv[1], \"w\"))' {out}", "", 1),
    "bad": gpu.Part("-c 'raise SystemExit(\"nothing goes\")'", "", 1),
    "slow": gpu.Part("-c 'import time; print(\"begun\", flush=True); time.sleep(60)'", "", 0.1),
    "silent": gpu.Part("-c pass {out}", "", 1),
    "greedy": gpu.Part("-c pass {model} {text}", "", 1),
    "last": gpu.Part("-c 'import json, sys; json.dump(dict(rows=[2]), open(sys.argv[1], \"w\"))' {out}", "", 1),
}


@pytest.fixture
def programs(monkeypatch, tmp_path):
    """Runs the script on PROGRAMS; returns its exit status and what it wrote."""
    monkeypatch.setattr(gpu, "PARTS", PROGRAMS)
    monkeypatch.setattr(gpu, "machine", lambda environment: {})
    monkeypatch.setattr(gpu, "NEEDED", ("json",))

    def start(*arguments):
        status = gpu.main(["--device", "cpu", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *arguments])
        file = tmp_path / "out" / "results.json"
        return status, json.loads(file.read_text())["parts"] if file.exists() else None

    return start


def test_a_part_that_fails_does_not_keep_the_others_from_running(programs, tmp_path, capsys):
    status, parts = programs()
    assert status == 1
    assert {name: part["status"] for name, part in parts.items()} == {
        "good": "done", "bad": "failed", "slow": "too long", "silent": "failed", "greedy": "left out", "last": "done",
    }  # fmt: skip
    assert parts["good"]["result"] == {"rows": [1]} and parts["last"]["result"] == {"rows": [2]}
    assert parts["bad"]["why"] == "it ended with 1" and parts["bad"]["tail"] == ["nothing goes"]
    assert parts["slow"]["why"] == "not done after 0.1 minutes" and parts["slow"]["tail"] == ["begun"]
    assert "can't be read" in parts["silent"]["why"]
    assert parts["greedy"]["why"] == "needs --model and --text"
    assert capsys.readouterr().out.splitlines()[-1] == f"failed: bad, slow, silent; see {tmp_path / 'out' / 'log.txt'}"
    assert "nothing goes" in (tmp_path / "out" / "log.txt").read_text()


def test_a_later_run_adds_to_what_is_there(programs):
    status, parts = programs("--only", "good")
    assert status == 0 and list(parts) == ["good"]
    status, parts = programs("--only", "last")
    assert status == 0 and sorted(parts) == ["good", "last"]
    status, parts = programs("--only", "good", "--minutes", "0.5")
    assert status == 0 and parts["good"]["status"] == "done" and parts["good"]["result"] == {"rows": [1]}
    status, parts = programs("--only", "greedy", "--minutes", "0.5")
    assert status == 0 and parts["greedy"]["status"] == "left out"


def test_a_part_that_fails_tells_nothing_of_an_earlier_run(programs, monkeypatch, tmp_path):
    again = gpu.Part("-c 'raise SystemExit(3)'", "", 1, "compression")
    monkeypatch.setattr(gpu, "PARTS", {"again": again})
    (tmp_path / "work" / "again").mkdir(parents=True)
    losses = {name: {"loss": 1.0} for name in ("teacher", "pruned", "student")}
    for name, text in (("metrics.jsonl", ""), ("report.html", "old"), ("eval.json", json.dumps(losses))):
        (tmp_path / "work" / "again" / name).write_text(text)
    status, parts = programs("--only", "again")
    assert status == 1 and "result" not in parts["again"] and not (tmp_path / "out" / "report.html").exists()


def test_a_dry_run_runs_nothing(programs, capsys):
    assert programs("--dry-run", "--only", "good", "bad") == (0, None)
    assert "bad: python -c 'raise SystemExit(\"nothing goes\")'" in capsys.readouterr().out.splitlines()


def test_what_is_not_installed_is_said_before_anything_is_run(programs, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "NEEDED", ("json", "no_such_package", "no.such.part"))
    assert programs() == (2, None)
    assert capsys.readouterr().err == "not installed here: no_such_package, no.such.part; put their wheels into --wheels\n"


def test_a_file_goes_in_parts(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(range(256)) * 12288)  # 3 MiB
    parts = gpu.split(file, tmp_path / "parts", 1.25)
    assert [part.stat().st_size for part in parts] == [1310720, 1310720, 524288]
    assert gpu.joined(tmp_path / "parts", tmp_path / "work").read_bytes() == file.read_bytes()
    content = parts[1].read_bytes()
    parts[1].write_bytes(content[::-1])
    with pytest.raises(ValueError, match="are not what was split"):
        gpu.joined(tmp_path / "parts", tmp_path / "work")
    parts[1].unlink()
    with pytest.raises(ValueError, match=r"holds 2 of the 3 parts of model\.gguf"):
        gpu.joined(tmp_path / "parts", tmp_path / "work")
    with pytest.raises(ValueError, match="holds 0 files of a checksum"):
        gpu.joined(tmp_path, tmp_path / "work")


def test_the_gap_that_is_closed_is_the_report_s():
    losses = {"teacher": 2.0, "pruned": 4.0, "student": 2.5}
    assert gpu.gap_closed({name: {"loss": loss} for name, loss in losses.items()}) == gap_closed(*losses.values()) == 0.75
    assert gpu.gap_closed({name: {"loss": 4.0} for name in losses}) is None


def test_outcomes_of_tests_are_read(tmp_path):
    (tmp_path / "x.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one" time="1.5"/>'
        '<testcase classname="a" name="two"><skipped message="no GPU"/></testcase>'
        '<testcase classname="b" name="three"><failure message="assert 1&#10;more"/></testcase></testsuite></testsuites>'
    )
    assert gpu.tests(tmp_path / "x.xml", tmp_path, tmp_path) == [
        {"test": "a::one", "outcome": "passed", "seconds": 1.5},
        {"test": "a::two", "outcome": "skipped", "seconds": 0.0, "why": "no GPU"},
        {"test": "b::three", "outcome": "failure", "seconds": 0.0, "why": "assert 1"},
    ]


def test_every_part_names_what_it_needs():
    assert {name for name, part in gpu.PARTS.items() if part.needs()} == {"calibrate", "distill_step", "kept", "compress"}
    assert all("{out}" in part.command or part.collect == "compression" for part in gpu.PARTS.values())
    scripts = {part.command.split()[0] for part in gpu.PARTS.values() if not part.command.startswith("-m")}
    assert all((ROOT / script).is_file() for script in scripts)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_the_parts_run_with_nothing_of_size(stories, tmp_path):
    out, text = tmp_path / "out", write_tales(tmp_path / "tales.jsonl")
    wanted = ["tests", "loss", "trace", "shapes_1b", "kept", "compress"]
    given = ["--device", "cpu", "--tiny", "--model", str(stories), "--text", str(text), "--data", str(stories.parent)]
    status = gpu.main([*given, "--out", str(out), "--work", str(tmp_path / "work"), "--only", *wanted])
    found = json.loads((out / "results.json").read_text())
    parts = found["parts"]
    assert status == 0, {name: (part["why"], part["tail"]) for name, part in parts.items() if "tail" in part}
    assert list(parts) == wanted and found["machine"]["gpu"] is None
    assert {one["outcome"] for one in parts["tests"]["result"]} == {"skipped"}
    assert [row["side"] for row in parts["loss"]["result"]["rows"]] == ["unfused", "floor", "fused, forward"]
    assert [row["what"].split()[0] for row in parts["shapes_1b"]["result"]["rows"]] == ["distill", "calibrate", "cut"]
    assert {row["axis"] for row in parts["kept"]["result"]["rows"]} == {"hidden", "ffn"}
    compressed = parts["compress"]["result"]
    assert [line["step"] for line in compressed["curve"]] == [1, 2, 3, 4, 5, 6]
    assert compressed["eval"]["student"]["loss"] < compressed["eval"]["pruned"]["loss"]
    assert {"trace.png", "report.html", "log.txt"} <= {path.name for path in out.iterdir()}
