"""Arithmetic of evaluation results, against values worked out by hand."""

import math

import pytest

from minitron.reporting.results import gap_closed, rows, task_rows, text_names

EVALS = {
    "teacher": {
        "params": 200,
        "loss": 2.0,
        "perplexity": 7.4,
        "tokens_per_second": 10.0,
        "texts": {"wiki": {"loss": 3.0, "perplexity": 20.1}},
        "tasks": {},
    },
    "pruned": {
        "params": 150,
        "loss": 4.0,
        "perplexity": 54.6,
        "tokens_per_second": 12.0,
        "texts": {"wiki": {"loss": 5.0, "perplexity": 148.4}},
        "tasks": {},
    },
    "student": {
        "params": 150,
        "loss": 2.5,
        "perplexity": 12.2,
        "tokens_per_second": 12.0,
        "texts": {"wiki": {"loss": 4.5, "perplexity": 90.0}},
        "tasks": {},
    },
}


@pytest.mark.parametrize(
    ("teacher", "pruned", "student", "expected"),
    [
        (2.0, 4.0, 2.5, 0.75),
        (2.0, 4.0, 4.0, 0.0),
        (2.0, 4.0, 2.0, 1.0),
        (2.0, 4.0, 1.5, 1.25),  # better than the teacher
        (2.0, 4.0, 5.0, -0.5),  # worse than no distillation
    ],
)
def test_gap_closed(teacher, pruned, student, expected):
    assert gap_closed(teacher, pruned, student) == pytest.approx(expected)


@pytest.mark.parametrize(
    "losses", [(None, 4.0, 2.5), (2.0, None, 2.5), (2.0, 4.0, None), (2.0, 2.0, 2.0), (2.0, 1.9, 1.8), (2.0, math.inf, 2.5), (2.0, 4.0, math.nan)]
)
def test_no_gap_no_share(losses):
    assert gap_closed(*losses) is None


def test_rows_go_text_by_text():
    found = [(row.text, row.model, row.parameters, row.loss, row.gap_closed) for row in rows(EVALS)]
    assert found == [
        ("held-out", "teacher", 200, 2.0, None),
        ("held-out", "pruned", 150, 4.0, None),
        ("held-out", "student", 150, 2.5, 0.75),
        ("wiki", "teacher", 200, 3.0, None),
        ("wiki", "pruned", 150, 5.0, None),
        ("wiki", "student", 150, 4.5, 0.25),
    ]


def test_models_and_texts_that_were_not_measured_have_no_row():
    evals = {"teacher": EVALS["teacher"], "student": {"params": 150, "loss": 2.5, "perplexity": 12.2}}
    assert [(row.text, row.model, row.gap_closed) for row in rows(evals)] == [
        ("held-out", "teacher", None),
        ("held-out", "student", None),
        ("wiki", "teacher", None),
    ]
    assert rows({}) == [] and text_names({}) == ["held-out"]


def test_tasks_are_told_number_by_number():
    evals = {"teacher": {"tasks": {"piqa": {"acc": 0.643, "alias": "piqa"}, "arc": 0.5}}, "student": {"tasks": {"piqa": {"acc": 0.6}}}}
    assert task_rows(evals) == [("piqa acc", [0.643, None, 0.6]), ("arc", [0.5, None, None])]


def test_the_speed_is_told_where_it_was_measured():
    assert [row.tokens_per_second for row in rows(EVALS)] == [10.0, 12.0, 12.0, None, None, None]
