"""Figures in README.md and docs/results.md are those of the JSON files in docs/results, which name the commands that made them."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import common, tables, views

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "results").glob("*.json"))
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
FENCED = re.compile(r"^```\w*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WORDS = {"| what | how it ended |", "| what the tests hold | bound | seen |"}  # tables of what tests found, which no file holds


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_table_is_what_the_files_say(page):
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text) == text, "make tables"


def test_a_figure_that_was_changed_by_hand_is_seen():
    text = PAGES[0].read_text(encoding="utf-8")
    assert "| 18.72 |" in text
    assert tables.rewritten(text.replace("| 18.72 |", "| 17.72 |")) == text


def test_a_table_of_no_file_is_an_error():
    with pytest.raises(FileNotFoundError, match="nothing_of_this_name"):
        tables.rewritten("<!-- table: nothing_of_this_name -->\n<!-- end -->")


def test_no_table_of_figures_is_outside_the_markers():
    text = re.sub(r"<!-- table: .*?<!-- end -->", "", PAGES[1].read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = {before for before, line in zip(text.splitlines(), text.splitlines()[1:], strict=False) if line.startswith("| ---")}
    assert headings <= WORDS


def commands():
    """The commands of docs/results.md's blocks, without where their JSON goes."""
    blocks = FENCED.findall(PAGES[1].read_text(encoding="utf-8"))
    return {re.sub(r" --json \S+", "", line).strip() for block in blocks for line in block.splitlines()}


def test_every_file_is_shown_or_named_where_its_command_stands(monkeypatch):
    shown, load = set(), views.load
    monkeypatch.setattr(views, "load", lambda name: (shown.add(name), load(name))[1])
    text = PAGES[1].read_text(encoding="utf-8")
    tables.rewritten(text)
    known = commands()
    for path in RESULTS:
        assert path.stem in shown or f"(results/{path.name})" in text, f"{path.name} is neither shown nor named"
        command = json.loads(path.read_text(encoding="utf-8"))["command"]
        assert command in known, f"{path.name}: no block of docs/results.md has {command!r}"


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_file_says_where_it_comes_from(path):
    text = path.read_text(encoding="utf-8")
    found = json.loads(text)
    assert {"title", "command", "date"} <= set(found)
    assert "machine" in found or "minitron plan" in found["command"], "figures that were measured have a machine"
    if path.stem not in views.VIEWS:
        assert found["rows"] and all(set(row) == set(found["columns"]) for row in found["rows"])
    assert not re.search(r"[\"= ]/\w+/", text), "no path of one machine"


def test_a_benchmark_writes_such_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "criteria.py"), "--json", str(tmp_path / "out.json"), "seed=3"])
    monkeypatch.setattr(common, "THREADS", "1")
    common.publish("A title", {"what": "<", "share": ".1%"}, [["half", 0.5], ["nothing", None]], ["a note"], tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert found["command"] == "OMP_NUM_THREADS=1 .venv/bin/python benchmarks/criteria.py seed=3"
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "paper" / "__main__.py"), "--seeds", "3"])
    assert common.command() == "OMP_NUM_THREADS=1 .venv/bin/python -m benchmarks.paper --seeds 3"
    monkeypatch.setattr(views, "RESULTS", tmp_path)
    assert tables.rewritten("<!-- table: out -->\nold\n<!-- end -->") == (
        "<!-- table: out -->\n| what | share |\n| --- | --- |\n| half | 50.0 % |\n| nothing | |\n<!-- end -->"
    )


def test_what_a_run_came_to_is_kept(tmp_path):
    figures = {"params": 10, "loss": 2.0, "perplexity": 7.4, "tokens": 64, "texts": {"novel": {"loss": 3.0, "perplexity": 20.1, "tokens": 32}}}
    models = {"teacher": figures, "pruned": {**figures, "loss": 6.0}, "student": {**figures, "loss": 3.0}}
    (tmp_path / "eval.json").write_text(json.dumps(models), encoding="utf-8")
    lines = [{"step": 1, "tokens": 8, "loss": 1.5}, {"step": 2, "tokens": 16, "loss": 1.0, "valid_loss": 3.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    found = tables.of_run(tmp_path, "make demo")
    assert found["command"] == "make demo" and {"title", "date", "machine"} <= set(found)
    rows = found["rows"]
    assert [(row["text"], row["model"], row["gap closed"]) for row in rows] == [
        ("held-out", "teacher", None),
        ("held-out", "pruned", None),
        ("held-out", "student", 0.75),
        ("novel", "teacher", None),
        ("novel", "pruned", None),
        ("novel", "student", None),
    ]
    assert tables.of_training(tmp_path, "make demo")["rows"] == [{"step": 2, "tokens": 16, "loss": 1.0, "held-out loss": 3.5}]
