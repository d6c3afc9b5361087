"""What an evaluation says, as rows. Pure: the console's table and the report's are made of the same rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODELS = ("teacher", "pruned", "student")  # the keys of eval.json, and what a reader sees
WHOLE = ("original", "trained")  # those where a model was trained whole
STUDENT = "student"
RESULTS = (STUDENT, "trained")  # what a run is for
HELD_OUT = "held-out"

Evals = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one text. `loss` in nats per token; `gap_closed` is a fraction, only the student has one; the speed is
    that on the held-out text, and told there alone."""

    text: str
    model: str
    parameters: int | None
    loss: float | None
    perplexity: float | None
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
            gap_closed=gap_on(evals, text) if key == STUDENT else None,
            tokens_per_second=evals[key].get("tokens_per_second") if text == HELD_OUT else None,
        )
        for text in text_names(evals)
        for key in models_of(evals)
        if measured(evals, key, text)
    ]


def task_rows(evals: Evals) -> list[tuple[str, list[float | None]]]:
    """Every number of every task as (name, one value per model of `models_of`)."""
    found = {key: dict(_numbers(evals.get(key, {}).get("tasks", {}))) for key in models_of(evals)}
    names = dict.fromkeys(name for values in found.values() for name in values)
    return [(name, [values.get(name) for values in found.values()]) for name in names]


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested mapping, each under its path."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
    return found
