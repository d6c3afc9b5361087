"""What a run prints, on terminals of several widths and where there is none."""

import dataclasses
import io
import json
import re

import pytest
from rich.console import Console

from minitron.reporting.console import counter, final_table, progress, say, show_candidates, show_rung, show_search, stage_banner
from tests.reporting.searches import search


def console(width=80, terminal=False):
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, legacy_windows=False)


def printed(to):
    """Everything printed, without the codes of colours and cursor moves."""
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", to.file.getvalue())


@pytest.mark.parametrize("total", [10, 47, 1000])
def test_without_a_terminal_progress_is_ten_plain_lines(total):
    to = console()
    with progress("calibrate", total, True, console=to) as advance:
        for turn in range(total):
            advance(**{"loss": 3.5 - turn / total, "tokens/s": 12345.6})
    lines = printed(to).splitlines()
    assert len(lines) == 10
    assert all(line.startswith("calibrate ") and "tokens/s 12,346" in line for line in lines)
    done = [int(re.search(r" ([\d,]+)/", line).group(1).replace(",", "")) for line in lines]
    assert done == [-(-total * tenth // 10) for tenth in range(1, 11)]
    assert "(100 %)" in lines[-1] and "ETA 0:00:00" in lines[-1]
    assert "\x1b" not in to.file.getvalue() and "\r" not in to.file.getvalue()


def test_few_turns_make_few_lines_and_none_makes_none():
    to = console()
    with progress("prune", 3, True, console=to) as advance:
        for _ in range(3):
            advance()
    assert [line.split()[1] for line in printed(to).splitlines()] == ["1/3", "2/3", "3/3"]
    with progress("prune", 0, True, console=to):
        pass
    assert len(printed(to).splitlines()) == 3


def test_progress_continues_where_it_was_and_takes_many_turns_at_once():
    to = console()
    with progress("distill", 100, True, start=60, console=to) as advance:
        advance(20)
        advance(20)
    assert [line.split(" elapsed")[0] for line in printed(to).splitlines()] == ["distill 80/100 (80 %)", "distill 100/100 (100 %)"]


def test_a_field_stays_until_it_changes():
    to = console()
    with progress("distill", 2, True, console=to) as advance:
        advance(**{"valid loss": 2.71828})
        advance(loss=1.5, note="late")
    assert printed(to).splitlines()[1].endswith("valid loss 2.718 · loss 1.500 · note late")


def test_disabled_progress_prints_nothing():
    for terminal in (False, True):
        to = console(terminal=terminal)
        with progress("distill", 5, False, console=to) as advance:
            advance(loss=1.0)
        assert to.file.getvalue() == ""


@pytest.mark.parametrize("width", [80, 100, 140])
def test_on_a_terminal_progress_is_a_bar_that_fits(width):
    to = console(width, terminal=True)
    with progress("distill [x]", 200, True, console=to) as advance:
        advance(200, **{"loss": 1.234, "kd loss": 0.25, "tokens/s": 1500.0})
    last = [line for line in re.split(r"[\r\n]+", printed(to)) if line.strip()][-2:]
    assert last[0].startswith("distill [x] ━") and "100 %" in last[0] and "200/200" in last[0] and "ETA" in last[0]
    assert len(last[0].rstrip()) <= width and last[0].count("━") >= width // 3
    assert last[1].strip() == "loss 1.234 · kd loss 0.2500 · tokens/s 1,500"


@pytest.mark.parametrize("width", [32, 44, 60, 76])
def test_a_narrow_terminal_cuts_no_number_of_a_bar(width):
    to = console(width, terminal=True)
    numbers = {"distillation loss": 1.234, "tokens/s": 269.2, "held-out loss": 3.962}
    with progress("student on held-out text", 20000, True, console=to) as advance:
        advance(10000, **numbers)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", printed(to)) if line.strip()]
    last = lines[max(at for at, line in enumerate(lines) if line.startswith("student on held-out text")) :]
    assert "…" not in printed(to) and max(map(len, last)) <= width
    assert last[0].endswith("50 %") or re.search(r"50 %.* ETA \S:\S\S:\S\S$", last[0])
    assert [part.strip() for line in last[1:] for part in line.split("·")] == ["distillation loss 1.234", "tokens/s 269.2", "held-out loss 3.962"]


class Clock:
    """Time that passes when the test says so."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr("minitron.reporting.console.time.monotonic", lambda: self.now)


def test_a_slow_loop_without_a_terminal_is_not_silent(monkeypatch):
    """Turns of 12 seconds, of which a tenth takes 20 minutes: a line at the first turn after 30 seconds without one."""
    clock, to = Clock(monkeypatch), console()
    with progress("distill", 1000, True, console=to) as advance:
        for _ in range(12):
            clock.now += 12
            advance()
    lines = printed(to).splitlines()
    assert [line.split(" elapsed ")[0] for line in lines] == [f"distill {done}/1,000 (0 %)" for done in (3, 6, 9)] + ["distill 12/1,000 (1 %)"]
    assert lines[0].endswith("elapsed 0:00:36 ETA 3:19:24")  # 997 turns of 12 seconds


def test_a_counter_speaks_at_once_and_then_now_and_then(monkeypatch):
    clock, to = Clock(monkeypatch), console()
    with counter("tokenise", True, console=to) as count:
        for now, what, documents in ((0, "train", 1), (1, "train", 2), (5, "train", 3), (6, "valid", 1), (7, "train", 4)):
            clock.now = now
            count(what, documents, 1000 * documents, None)
    assert printed(to).splitlines() == [
        "tokenise train: 1 document, 1,000 tokens", "tokenise train: 3 documents, 3,000 tokens tokens/s 400.0",
        "tokenise valid: 1 document, 1,000 tokens",
    ]  # fmt: skip
    with counter("tokenise", False, console=to) as count:
        count("train", 1, 1, None)
    assert len(printed(to).splitlines()) == 3


def test_a_counter_that_knows_the_share_tells_what_is_left(monkeypatch):
    """A restart passed over 40 % in no time; the other 60 % take 0.1 % a second."""
    clock, to = Clock(monkeypatch), console()
    with counter("tokenise", True, console=to) as count:
        for now, share in ((0, None), (6, 0.4), (106, 0.5)):
            clock.now = now
            count("train", 7, 1000 + 10 * now, share)
    assert printed(to).splitlines()[1:] == [
        "tokenise train: 7 documents, 1,060 tokens, 40% of the text",
        "tokenise train: 7 documents, 2,060 tokens, 50% of the text tokens/s 10.00 · ETA 0:08:20",
    ]


def test_a_counter_on_a_terminal_is_a_bar_for_each_part():
    to = console(100, terminal=True)
    with counter("tokenise", True, console=to) as count:
        count("train", 7, 1000, 0.25)
        count("valid", 3, 500, None)
    shown = printed(to)
    assert "tokenise train" in shown and "25 %" in shown and "tokenise valid" in shown and "documents 3 · tokens 500" in shown


def test_an_outcome_is_a_line_of_its_own_however_long():
    to = console(20)
    say("a/long/path/[red]: the student after 20 steps", console=to)
    assert printed(to) == "  a/long/path/[red]: the student after 20 steps\n"


def test_banner_tells_stage_and_detail():
    plain, rich = console(), console(terminal=True)
    for to in (plain, rich):
        stage_banner(2, 6, "prune", "hidden 576 → 512 [bold]", console=to)
    assert printed(plain) == "[2/6] prune: hidden 576 → 512 [bold]\n"
    assert printed(rich).strip().startswith("2/6 prune  hidden 576 → 512 [bold] ─")


@pytest.mark.parametrize("width", [80, 100, 140])
@pytest.mark.parametrize("terminal", [True, False])
def test_final_table_has_every_number(run_dir, width, terminal):
    to = console(width, terminal)
    final_table(json.loads((run_dir / "eval.json").read_text()), {"report": "runs/a/report.html"}, console=to)
    lines = printed(to).splitlines()
    cells = [line.split() for line in lines]
    assert max(map(len, lines)) <= width
    assert ["held-out", "teacher", "134.5", "M", "2.650", "14.15", "1,210"] in cells
    assert ["pruned", "101.9", "M", "4.380", "79.84", "1,530"] in cells
    assert ["student", "101.9", "M", "2.950", "19.11", "82.7", "%", "1,530"] in cells
    assert ["text", "model", "params", "loss", "perplexity", "gap", "closed", "tokens/s"] in cells
    assert ["wikitext2", "teacher", "134.5", "M", "3.480", "32.46"] in cells  # the speed is that on the held-out text
    assert ["student", "101.9", "M", "4.020", "55.70", "74.5", "%"] in cells
    assert cells[-1] == ["report", "runs/a/report.html"]


@pytest.mark.parametrize(
    ("width", "left_out"),
    [(66, {"tokens/s"}), (60, {"tokens/s", "params"}), (48, {"tokens/s", "params", "perplexity"}),
     (34, {"tokens/s", "params", "perplexity", "gap closed"})],
)  # fmt: skip
def test_a_narrow_table_leaves_columns_out_and_cuts_no_number(run_dir, width, left_out):
    to = console(width)
    final_table(json.loads((run_dir / "eval.json").read_text()), console=to)
    values = {"tokens/s": "1,530", "params": "101.9 M", "perplexity": "19.11", "gap closed": "82.7 %", "loss": "2.950", "model": "student"}
    assert "…" not in printed(to) and max(map(len, printed(to).splitlines())) <= width
    assert {heading for heading, value in values.items() if heading not in printed(to) or value not in printed(to)} == left_out


def test_a_long_name_of_a_text_is_folded_and_leaves_the_numbers_alone():
    to, name = console(80), "a_text_with_a_name_that_is_far_too_long"
    final_table({"teacher": {"params": 1000, "loss": 2.0, "tokens_per_second": 5.0, "texts": {name: {"loss": 1.0}}}}, console=to)
    assert "tokens/s" in printed(to) and "…" not in printed(to)
    assert "".join(line[1:12].strip() for line in printed(to).splitlines() if "_" in line) == name


def answered(value, stderr, num_fewshot=0):
    return {"metrics": {"acc": {"value": value, "stderr": stderr, "higher_is_better": True}}, "rows": 9, "num_fewshot": num_fewshot, "group": None}


def test_final_table_of_a_partial_evaluation():
    to = console()
    final_table({"teacher": {"params": 1000, "loss": 2.0, "perplexity": 7.389, "tasks": {"piqa": answered(0.6432, 0.0123)}}}, console=to)
    cells = [line.split() for line in printed(to).splitlines()]
    assert ["held-out", "teacher", "1.0", "K", "2.000", "7.39", "–"] in cells
    assert ["piqa", "acc", "0.643", "±0.012", "–", "–", "–"] in cells


def test_standard_errors_and_words_give_way_where_there_is_no_room():
    entry = {"params": 1000, "loss": 2.0, "perplexity": 7.389, "word_perplexity": 31.5, "tokens_per_second": 9.0, "seq_length": 1024, "stride": 512,
             "tasks": {"hellaswag": answered(0.5, 0.0123), "gsm8k": answered(0.25, None, 8)}}  # fmt: skip
    evals = {"teacher": entry, "student": {**entry, "tasks": {"hellaswag": answered(0.4, 0.011)}}}
    wide, narrow = console(110), console(54)
    for to in (wide, narrow):
        final_table(evals, console=to)
    lines = [line.split() for line in printed(wide).splitlines()]
    assert ["hellaswag", "acc", "0.500", "±0.012", "–", "0.400", "±0.011", "80.0", "%"] in lines
    assert ["gsm8k", "(8-shot)", "acc", "0.250", "–", "–", "–"] in lines
    assert "per word" in printed(wide) and "31.50" in printed(wide)
    assert "perplexity of windows of 1,024 tokens, one every 512" in printed(wide)
    assert "±" not in printed(narrow) and "per word" not in printed(narrow) and "80.0 %" in printed(narrow)


def test_names_from_files_are_shown_as_they_are():
    to, name = console(140), "[red]x[/red] [/]"
    final_table(
        {"teacher": {"params": 1, "loss": 1.0, "perplexity": 2.7, "texts": {name: {"loss": 1.0}}, "tasks": {name: answered(0.5, None)}}},
        {name: name},
        console=to,
    )
    assert printed(to).count(name) == 4


def test_the_time_to_come_is_told_of_turns_that_take_minutes():
    now = [0.0]
    to = Console(file=io.StringIO(), width=120, force_terminal=True, legacy_windows=False, get_time=lambda: now[0])
    with progress("train", 10, True, console=to) as advance:
        for _ in range(4):
            now[0] += 90
            advance()
    assert "ETA 0:09:00" in printed(to)


def cells(to):
    """What stands between the columns of a table, line by line."""
    return [re.split(r" {2,}", line.strip()) for line in printed(to).splitlines()]


def test_candidates_with_what_they_cost():
    to = console(140)
    show_candidates(search(0), console=to)
    rows = cells(to)
    assert ["candidate", "layers", "hidden", "MLP", "heads", "params", "non-embedding", "memory", "GFLOP/token", "latency"] in rows
    assert ["L30-H512-F896-A9-G3", "30", "512", "896", "9", "90.1 M", "64.9 M", "0.216 GB", "0.198", "60.02 ms"] in rows
    assert ["Every candidate keeps KV groups 3."] in rows
    assert ["12 candidates of 2,912 points of the grid; the others: parameters above 105.0 M: 2,841; dominated: 59."] in rows


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_rung_with_the_losses_of_every_seed(seeds):
    to, found = console(140), search(3, seeds=seeds)
    show_rung(found, console=to)
    rung = found.rungs[2]
    expected = [
        [name, *(f"{loss:.4f}" for loss in rung.losses[name] if seeds > 1), f"{sum(rung.losses[name]) / seeds:.4f}", "stays" if at < 2 else "out"]
        for at, name in enumerate(sorted(rung.losses, key=lambda name: sum(rung.losses[name])))
    ]
    rows = cells(to)
    assert [[row[0], *row[6:]] for row in rows if row[0] in rung.losses] == expected
    assert rows[0] == ["after 100 steps, 1.6 M tokens each"]
    assert ["Kendall's tau 0.70 with the rung before" + ("; 0.90 between seeds." if seeds > 1 else ".")] in rows


def test_a_rung_under_way_has_no_verdict():
    to = console(140)
    show_rung(search(3, partial=True), console=to)
    assert "stays" not in printed(to) and " out" not in printed(to) and "tau" not in printed(to)


@pytest.mark.parametrize("width", [46, 60, 80, 140])
@pytest.mark.parametrize("show", [show_candidates, show_rung, show_search])
def test_a_narrow_terminal_cuts_nothing_of_a_search(width, show):
    to, found = console(width), search(seeds=2)
    show(found, console=to)
    assert "…" not in printed(to) and max(map(len, printed(to).splitlines())) <= width
    names = {row[0] for row in cells(to)}
    assert names >= {*(found.rungs[-1].losses if show is show_rung else (one.name for one in found.candidates))}


def test_the_outcome_of_a_search():
    to = console(160)
    show_search(search(), console=to)
    rows = cells(to)
    assert rows[1:3] == [
        ["50", "100", "200", "400"],
        ["candidate", "layers", "hidden", "MLP", "heads", "params", "untrained", "steps", "steps", "steps", "steps"],
    ]
    assert ["L26-H576-F1024-A6-G3", "26", "576", "1,024", "6", "91.6 M", "5.916", "4.431", "3.737", "3.264", "3.167", "chosen"] in rows
    assert ["L28-H576-F768-A9-G3", "28", "576", "768", "9", "90.3 M", "6.948", "out", "before training"] in rows
    assert ["chosen", "L26-H576-F1024-A6-G3: layers 26, hidden 576, MLP 1,024, heads 6, 91.6 M params"] in rows
    to = console(160)
    show_search(search(2), console=to)
    assert ["best yet", "L24-H576-F1152-A6-G3: layers 24, hidden 576, MLP 1,152, heads 6, 92.0 M params"] in cells(to)


def test_a_terminal_of_80_columns_has_the_losses_of_every_rung():
    to = console(80)
    show_search(search(), console=to)
    rows = cells(to)
    assert rows[1] == ["50", "100", "200", "400"] and rows[2][0] == "candidate" and "untrained" in rows[2]
    assert [row[0] for row in rows if row[-2:] == ["6.948", "out"]] == ["L28-H576-F768-A9-G3"]


def test_names_of_candidates_are_shown_as_they_are():
    to, found = console(), search()
    odd = dataclasses.replace(found.candidates[0], name="[red]x[/red] [/]")
    show_search(dataclasses.replace(found, candidates=[odd]), console=to)
    assert odd.name in printed(to)
