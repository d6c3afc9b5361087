"""Arithmetic of evaluation results, against values worked out by hand."""

import math

import pytest

from minitron.reporting.results import gap_closed, rows, task_rows, text_names, windows_told

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


def metric(value, stderr=None, more_is_better=True):
    return {"value": value, "stderr": stderr, "higher_is_better": more_is_better}


def task(rows=10, num_fewshot=0, group=None, **metrics):
    return {"metrics": metrics, "rows": rows, "num_fewshot": num_fewshot, "group": group}


TASKS = {
    "teacher": {"tasks": {
        "mmlu": task(rows=40, num_fewshot=5, acc=metric(0.6, 0.02)),
        "mmlu_law": task(rows=20, num_fewshot=5, group="mmlu", acc=metric(0.5, 0.03)),
        "piqa": task(acc=metric(0.8, 0.01), acc_norm=metric(0.0)),
        "wikitext": task(word_perplexity=metric(20.0, more_is_better=False)),
    }},
    "student": {"tasks": {"piqa": task(acc=metric(0.6, 0.04), acc_norm=metric(0.1)), "mmlu": task(acc=metric(0.3)),
                          "wikitext": task(word_perplexity=metric(25.0, more_is_better=False)), "arc": task(rows=None, acc=metric(0.5))}},
}  # fmt: skip


def test_tasks_are_told_metric_by_metric_side_by_side():
    found = [(row.name, row.metric, row.rows, row.values, row.retained) for row in task_rows(TASKS)]
    assert found == [
        ("mmlu (5-shot)", "acc", 40, ((0.6, 0.02), None, (0.3, None)), 0.5),
        ("piqa", "acc", 10, ((0.8, 0.01), None, (0.6, 0.04)), pytest.approx(0.75)),
        ("piqa", "acc_norm", 10, ((0.0, None), None, (0.1, None)), None),  # nothing to retain
        ("wikitext", "word_perplexity", 10, ((20.0, None), None, (25.0, None)), None),  # less is better
        ("arc", "acc", None, (None, None, (0.5, None)), None),
    ]
    assert task_rows(EVALS) == []


@pytest.mark.parametrize(
    ("entry", "told"),
    [({}, ""), ({"seq_length": 1024, "stride": 1024}, "windows of 1,024 tokens, no overlap"),
     ({"seq_length": 1024, "stride": 256}, "windows of 1,024 tokens, one every 256")],
)  # fmt: skip
def test_how_texts_were_cut_is_told(entry, told):
    assert windows_told({"teacher": {**EVALS["teacher"], **entry}, "student": EVALS["student"]}) == told


def test_the_speed_is_told_where_it_was_measured():
    assert [row.tokens_per_second for row in rows(EVALS)] == [10.0, 12.0, 12.0, None, None, None]
