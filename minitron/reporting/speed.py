"""How fast a training was, from its metrics. Pure."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from minitron.reporting.wording import decimal, percent


def speed(metrics: Sequence[Mapping[str, Any]]) -> str:
    """A training's speed in words: means over all steps of what is known. Seconds are averaged, as speeds must not be."""
    per_step = [line["tokens_per_second"] * line["step_seconds"] for line in metrics if line.get("tokens_per_second") and line.get("step_seconds")]
    seconds, waited = values(metrics, "step_seconds"), values(metrics, "data_seconds")
    if not per_step:
        return f"{decimal(metrics[-1].get('tokens_per_second'), 0)} tokens/s at the end"
    parts = [f"{fmean(per_step) / fmean(seconds):,.0f} tokens/s"]
    figures = {"tflop_per_second_per_rank": lambda value: f"{value:,.4g} TFLOP/s per rank", "mfu": lambda value: f"{percent(value)} of its peak"}
    parts += [show(fmean(found)) for name, show in figures.items() if (found := values(metrics, name))]
    if waited:
        parts.append(f"{percent(fmean(waited) / fmean(seconds))} of the time waiting for data")
    if memory := values(metrics, "peak_memory_gib"):
        parts.append(f"{max(memory):.2f} GiB on rank 0")
    return ", ".join(parts)


def values(metrics: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """A figure of every line that has it."""
    return [line[name] for line in metrics if line.get(name) is not None]
