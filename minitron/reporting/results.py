"""What an evaluation says, as rows. Pure: the console's table and the report's are made of the same rows."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

MODELS = ("teacher", "pruned", "student")  # the keys of eval.json, and what a reader sees
WHOLE = ("original", "trained")  # those where a model was trained whole
STUDENT = "student"
RESULTS = (STUDENT, "trained")  # what a run is for
HELD_OUT = "held-out"

Evals = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one text. `loss` in nats per token; `perplexity` per token, and per word where words were counted; `gap_closed` is a fraction,
    only the student has one; the speed is that on the held-out text, and told there alone."""

    text: str
    model: str
    parameters: int | None
    loss: float | None
    perplexity: float | None
    word_perplexity: float | None
    gap_closed: float | None
    tokens_per_second: float | None


def gap_closed(teacher: float | None, pruned: float | None, student: float | None) -> float | None:
    """The fraction of the loss that pruning added which distillation took back: 1 is the teacher's loss, 0 the pruned model's.

    None where a loss is missing or not finite, or where pruning added no loss: there is no gap to close then.
    """
    if teacher is None or pruned is None or student is None or not all(map(math.isfinite, (teacher, pruned, student))):
        return None
    return (pruned - student) / (pruned - teacher) if pruned > teacher else None


def models_of(evals: Evals) -> tuple[str, ...]:
    """The keys that these evaluations are of, in their order."""
    return WHOLE if WHOLE[0] in evals else MODELS


def text_names(evals: Evals) -> list[str]:
    """The texts that any of the models was measured on, the held-out one first."""
    names = dict.fromkeys(name for key in models_of(evals) for name in evals.get(key, {}).get("texts", {}))
    return [HELD_OUT, *names]


def measured(evals: Evals, key: str, text: str) -> Mapping[str, Any]:
    """The measurements of one model on one text; empty if there are none."""
    model = evals.get(key, {})
    return model if text == HELD_OUT else model.get("texts", {}).get(text, {})


def gap_on(evals: Evals, text: str) -> float | None:
    """`gap_closed` on one text."""
    return gap_closed(*(measured(evals, key, text).get("loss") for key in MODELS))


def rows(evals: Evals) -> list[Row]:
    """Every model on every text, text by text, in the order of `models_of`; models without measurements are left out."""
    return [
        Row(
            text=text,
            model=key,
            parameters=evals[key].get("params"),
            loss=measured(evals, key, text).get("loss"),
            perplexity=measured(evals, key, text).get("perplexity"),
            word_perplexity=measured(evals, key, text).get("word_perplexity"),
            gap_closed=gap_on(evals, text) if key == STUDENT else None,
            tokens_per_second=evals[key].get("tokens_per_second") if text == HELD_OUT else None,
        )
        for text in text_names(evals)
        for key in models_of(evals)
        if measured(evals, key, text)
    ]


def windows_told(evals: Evals) -> str:
    """How the texts were cut for their perplexities: "windows of 1,024 tokens, no overlap"; empty where nothing says."""
    for key in models_of(evals):
        if (length := evals.get(key, {}).get("seq_length")) is not None:
            stride = evals[key]["stride"]
            return f"windows of {length:,} tokens, " + ("no overlap" if stride == length else f"one every {stride:,}")
    return ""


@dataclasses.dataclass(frozen=True)
class TaskRow:
    """One metric of a benchmark task: of each of `models_of` its value and standard error, None where there is none."""

    task: str
    metric: str
    rows: int | None
    num_fewshot: int | None
    values: tuple[tuple[float, float | None] | None, ...]
    retained: float | None  # the last model's value as a fraction of the first one's, where more is better

    @property
    def name(self) -> str:
        """The task, and how many solved examples stood before its questions."""
        return f"{self.task} ({self.num_fewshot}-shot)" if self.num_fewshot else self.task


def task_rows(evals: Evals) -> list[TaskRow]:
    """Every metric of every task; of tasks whose group has metrics itself, the group's alone."""
    found = [evals.get(key, {}).get("tasks", {}) for key in models_of(evals)]
    entries = {name: entry for tasks in reversed(found) for name, entry in tasks.items() if entry.get("group") is None}
    names = dict.fromkeys(name for tasks in found for name in tasks if name in entries)
    return [_task_row(name, metric, entries[name], found) for name in names for metric in entries[name]["metrics"]]


def _task_row(name: str, metric: str, entry: Mapping[str, Any], found: Sequence[Mapping[str, Any]]) -> TaskRow:
    one_by_one = [tasks.get(name, {}).get("metrics", {}).get(metric) for tasks in found]
    values = tuple(None if one is None else (one["value"], one["stderr"]) for one in one_by_one)
    first, last = values[0], values[-1]
    more_is_better = entry["metrics"][metric]["higher_is_better"]
    retained = last[0] / first[0] if first is not None and last is not None and more_is_better and first[0] > 0 else None
    return TaskRow(name, metric, entry["rows"], entry["num_fewshot"], values, retained)
