"""The pictures of a search and its part of the report: what they show, also of a search that has not ended; and that their SVG is sound."""

import dataclasses
import math
import re
from xml.etree import ElementTree

import pytest

from minitron.errors import RequestError
from minitron.reporting import searched, standing
from minitron.reporting.drawing import COLORS
from minitron.reporting.report import write_report
from minitron.reporting.runfiles import read_run
from minitron.search.candidates import FILE, Rung
from tests.reporting.searches import GRID, search
from tests.reporting.test_report import HOSTILE, page_of

STATES = {"ended": {}, "seeds": {"seeds": 3}, "under way": {"rungs": 3, "partial": True}, "measured": {"rungs": 1}, "begun": {"rungs": 0}}


def drawn(results):
    """The pictures by title."""
    return {picture.title: picture for pictures in searched.search_pictures(results) for picture in pictures}


def hints(picture):
    return [title.text for title in ElementTree.fromstring(picture.svg).iter("{http://www.w3.org/2000/svg}title")]


def texts(picture):
    return [text.text for text in ElementTree.fromstring(picture.svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize(
    ("state", "titles"),
    [
        ("ended", ["Loss against parameters", "Rungs", "What each candidate keeps"]),
        ("seeds", ["Loss against parameters", "Rungs", "What each candidate keeps"]),
        ("under way", ["Loss against parameters", "Rungs", "What each candidate keeps"]),
        ("measured", ["Loss against parameters", "What each candidate keeps"]),
        ("begun", ["What each candidate keeps"]),
    ],
)
def test_what_was_measured_so_far_is_drawn_in_the_colours_of_the_page(state, titles):
    pictures = drawn(search(**STATES[state]))
    assert [*pictures] == titles
    for picture in pictures.values():
        root = ElementTree.fromstring(picture.svg)
        assert root.get("viewBox").startswith("0 0 400 ")
        assert not re.search(r"(fill|stroke)[:=]\s*\"?#", picture.svg)
        assert set(re.findall(r"var\(--(\w+)\)", picture.svg)) <= set(COLORS)
        assert "Diamond" not in picture.caption or state in ("ended", "seeds")


def test_every_point_has_its_name_to_a_pointer_and_the_best_are_named():
    results = search()
    picture = drawn(results)["Loss against parameters"]
    measured = [name for at in (0, 1, 4) for name in results.rungs[at].losses]  # before training, on the first and the last rung
    assert sorted(hint.split(":")[0] for hint in hints(picture)) == sorted(measured)
    one = next(one for one in standing.standings(results) if one.chosen)
    for at in (0, 1, 4):
        assert f"{one.name}: 91.6 M params, loss {one.losses[at]:.3f} {standing.when(results.rungs[at])}, chosen" in hints(picture)
    assert texts(picture).count(one.name) == 3
    assert [text for text in texts(picture) if text.startswith(("before", "after"))] == ["before training", "after 50 steps", "after 400 steps"]
    fell = results.rungs[1].losses.keys() - set(results.rungs[1].stayed)
    front = searched.front_of(searched.points_of(results, standing.standings(results), "params", 4))
    assert fell and len(front) == 1  # the chosen one alone: it is the smallest of the last two too


def test_a_scatter_for_every_budget():
    results = search()
    bound = dataclasses.replace(results, settings={**results.settings, "latency_ms": 60.0, "memory_gb": 0.25})
    assert [*drawn(bound)][:3] == [
        "Loss against parameters",
        "Loss against GB of weights and key/value cache",
        "Loss against milliseconds per forward pass",
    ]


def test_figures_of_a_narrow_axis_differ_and_are_whole():
    close = search(grid=[(30, 512, 1152, 9, 3), (28, 512, 1280, 9, 3), (26, 512, 1408, 9, 3), (24, 512, 1536, 9, 3)])
    written = texts(drawn(close)["Loss against parameters"])
    figures = [text for text in written if re.fullmatch(r"1\d\d(\.\d+)?", text)]  # 100.7 to 102.3 million
    assert len(figures) == len({*figures}) >= 3


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_line_for_each_that_was_distilled(seeds):
    results = search(seeds=seeds)
    picture = drawn(results)["Rungs"]
    ways = [hint for hint in hints(picture) if "params" not in hint]
    assert sorted(way.split(":")[0] for way in ways) == sorted(results.rungs[1].losses)
    chosen = next(one for one in standing.standings(results) if one.chosen)
    told = ", ".join(f"{chosen.losses[at]:.3f} after {steps} steps" for at, steps in ((1, 50), (2, 100), (3, 200), (4, 400)))
    assert f"{chosen.name}: {told}" in ways and chosen.name in texts(picture)
    assert ("Strokes: from seed to seed." in picture.caption) == (seeds == 2)
    assert "4 of 12 candidates were not distilled." in picture.caption and "Before training the losses were 5.11 to 7.61." in picture.caption


def test_what_candidates_keep_is_written_in_their_order():
    results = search()
    written = texts(drawn(results)["What each candidate keeps"])
    names = [one.name for one in standing.standings(results)]
    assert [text for text in written if text in names] == names
    assert written[:2] == ["layers", "of 30"] and "of 134.5 M" in written and "KV groups" not in written
    many = search(grid=[(layers, 512, 896 + 128 * ffn, 9, 3) for layers in range(24, 31) for ffn in range(4)])
    picture = drawn(many)["What each candidate keeps"]
    assert "The best 24 of 28; the table has all." in picture.caption and len([text for text in texts(picture) if text.startswith("L")]) == 24


def test_losses_that_are_not_finite_can_be_drawn():
    results = search()
    names = [*results.rungs[0].losses]
    rungs = [
        Rung(0, 0, {name: [math.inf] for name in names}, names[:3]),
        Rung(50, 5000, {names[0]: [math.nan], names[1]: [2.0], names[2]: [math.inf]}),
    ]
    for rungs_so_far in (rungs[:1], rungs, [rungs[0], Rung(50, 5000, {names[0]: [math.nan]})]):
        for picture in drawn(dataclasses.replace(results, rungs=rungs_so_far, chosen=None)).values():
            ElementTree.fromstring(picture.svg)


def test_no_candidate_is_no_picture():
    assert drawn(dataclasses.replace(search(0), candidates=[])) == {}


@pytest.mark.parametrize("state", STATES)
def test_the_report_has_every_candidate(tmp_path, state):
    results = search(**STATES[state])
    results.save(tmp_path)
    page = page_of(tmp_path)
    rows = {row[0]: row for row in page.rows}
    assert {one.name for one in results.candidates} <= rows.keys()
    losses = ["untrained", "50 steps", "100 steps", "200 steps", "400 steps"][: len(results.rungs)]
    ranks, sizes = ["ranks"] if results.rungs else [], ["layers", "hidden", "MLP", "heads"]
    head = ["Candidate", "", *ranks, *losses, *sizes, "params", "non-embedding", "memory", "GFLOP/token", "latency"]
    assert rows["Candidate"] == head
    if state == "ended":
        assert rows["L26-H576-F1024-A6-G3"][:8] == ["L26-H576-F1024-A6-G3", "chosen", "3·3·2·1·1", "5.916", "4.431", "3.737", "3.264", "3.167"]
        assert "Kendall's tau 0.55, 0.70, 0.85, 1.00 with the rung before; the order of the last ones had settled" in page.text
    assert ("A search chose the sizes from 12 candidates." in page.text) == (results.chosen is not None)
    assert "the others: parameters above 105.0 M: 2,841; dominated: 59" in page.text
    assert len(page.ids) == len(set(page.ids))


def test_a_run_without_a_search_has_no_word_of_it_and_one_with_a_budget_says_who_makes_it(tmp_path):
    assert 'id="search"' not in write_report(tmp_path).read_text()
    (tmp_path / "config.yaml").write_text("model: {path: m}\nsearch: {latency_ms: 30.0}\n")
    assert "This run has no candidates.json yet: minitron search writes it." in page_of(tmp_path).text


def test_a_broken_file_is_refused_and_hostile_names_are_not_obeyed(tmp_path):
    results = search(1)
    odd = dataclasses.replace(results.candidates[0], name=HOSTILE)
    rung = dataclasses.replace(results.rungs[0], losses={HOSTILE: [1.0], **results.rungs[0].losses}, stayed=[HOSTILE])
    dataclasses.replace(results, candidates=[odd, *results.candidates[1:]], rungs=[rung], chosen=HOSTILE, fell={HOSTILE: 3}).save(tmp_path)
    page = page_of(tmp_path)
    assert not {"script", "img"} & set(page.tags) and not [name for name, _ in page.attributes if name.startswith("on")]
    assert HOSTILE in [row[0] for row in page.rows]
    (tmp_path / FILE).write_text("{}")
    with pytest.raises(RequestError, match=FILE):
        read_run(tmp_path)


def test_the_made_up_candidates_are_smaller_than_the_model():
    assert len({*GRID}) == len(GRID) == len({one.name for one in search(0).candidates})
