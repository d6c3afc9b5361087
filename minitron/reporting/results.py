"""What an evaluation says, as rows and as text. Pure: the console's table and the report's are made of the same rows."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MODELS = {"teacher": "teacher", "pruned": "pruned", "student": "distilled"}  # key of eval.json -> what a reader sees
HELD_OUT = "held-out"
ABSENT = "–"
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))

Evals = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Row:
    """One model on one text. `loss` in nats per token; `gap_closed` is a fraction, only the distilled model has one."""

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


def text_names(evals: Evals) -> list[str]:
    """The texts that any of the models was measured on, the held-out one first."""
    names = dict.fromkeys(name for key in MODELS for name in evals.get(key, {}).get("texts", {}))
    return [HELD_OUT, *names]


def measured(evals: Evals, key: str, text: str) -> Mapping[str, Any]:
    """The measurements of one model on one text; empty if there are none."""
    model = evals.get(key, {})
    return model if text == HELD_OUT else model.get("texts", {}).get(text, {})


def gap_on(evals: Evals, text: str) -> float | None:
    """`gap_closed` on one text."""
    return gap_closed(*(measured(evals, key, text).get("loss") for key in MODELS))


def rows(evals: Evals) -> list[Row]:
    """Every model on every text, text by text, in the order teacher, pruned, distilled; models without measurements are left out."""
    return [
        Row(
            text=text,
            model=shown,
            parameters=evals[key].get("params"),
            loss=measured(evals, key, text).get("loss"),
            perplexity=measured(evals, key, text).get("perplexity"),
            gap_closed=gap_on(evals, text) if key == "student" else None,
            tokens_per_second=evals[key].get("tokens_per_second"),
        )
        for text in text_names(evals)
        for key, shown in MODELS.items()
        if measured(evals, key, text)
    ]


def task_rows(evals: Evals) -> list[tuple[str, list[float | None]]]:
    """Every number of every task as (name, one value per model of `MODELS`)."""
    found = {key: dict(_numbers(evals.get(key, {}).get("tasks", {}))) for key in MODELS}
    names = dict.fromkeys(name for values in found.values() for name in values)
    return [(name, [found[key].get(name) for key in MODELS]) for name in names]


def _numbers(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a nested mapping, each under its path."""
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += _numbers(value, f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", float(value)))
    return found


def size(count: float | None) -> str:
    """A count as people say it: 134515008 -> "134.5 M"."""
    if count is None:
        return ABSENT
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if abs(count) >= scale), (1.0, ""))
    return f"{count / scale:.1f} {unit}" if unit else f"{count:,.0f}"


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals and thousands separated."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent: 0.827 -> "82.7 %"."""
    return ABSENT if fraction is None else f"{100 * fraction:.{digits}f} %"


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, None where either is missing or the whole is zero."""
    return None if part is None or not whole else part / whole
