"""From the figures of all arms and seeds to rows, one for each comparison of a claim, and to the table in docs/results.md. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper.claims import CLAIMS, Figures, Settles
from benchmarks.paper.verdicts import interval, together, verdict

Found = Mapping[str, Mapping[int, Figures]]  # by arm and seed


def rows(names: Sequence[str], found: Found) -> list[dict[str, Any]]:
    """Of each claim: what was published, its comparisons with the differences of all seeds that all its arms have, its verdict, its cost."""
    made = []
    for name in names:
        claim = CLAIMS[name]
        arms = list(dict.fromkeys(arm for comparison in claim.comparisons for arm in comparison.arms))
        seeds = sorted(set.intersection(*(set(found.get(arm, {})) for arm in arms)))
        if not seeds:
            continue
        comparisons = []
        for comparison in claim.comparisons:
            differences = [comparison.difference(lambda arm, seed=seed: found[arm][seed]) for seed in seeds]  # type: ignore[misc]
            within = interval(differences)
            comparisons.append(
                {
                    "compared": comparison.words,
                    "unit": "tau" if isinstance(comparison, Settles) else "nats",
                    "margin": comparison.margin,
                    "differences": differences,
                    **{key: value if math.isfinite(value) else None for key, value in dataclasses.asdict(within).items()},
                    "verdict": verdict(within, comparison.margin),
                }
            )
        spent = [found[arm][seed] for arm in arms for seed in seeds]
        made.append(
            {
                "name": name,
                "claim": claim.words,
                "published": claim.published,
                "seeds": seeds,
                "comparisons": comparisons,
                "verdict": together([comparison["verdict"] for comparison in comparisons]),
                "tokens": sum(one["tokens"] for one in spent),
                "processor_seconds": sum(one["processor_seconds"] for one in spent),
            }
        )
    return made


def ours(comparison: Mapping[str, Any]) -> str:
    """A comparison in a cell."""
    digits = 2 if comparison["unit"] == "tau" else 3
    ends = "no interval" if comparison["low"] is None else f"{comparison['low']:+.{digits}f} to {comparison['high']:+.{digits}f}"
    margin = "" if comparison["margin"] is None else f", within ±{comparison['margin']}"
    return f"{comparison['compared']}: {comparison['mean']:+.{digits}f} ({ends}{margin})"


def table(results: Mapping[str, Any]) -> str:
    """The claims as Markdown. A claim of several comparisons has a line for each, and its verdict on the first."""
    lines = ["| claim | published | ours: difference (95 % interval) | | verdict | tokens | minutes |", "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in results["claims"]:
        for number, comparison in enumerate(row["comparisons"]):
            first = number == 0
            cells = [
                row["claim"] if first else "",
                row["published"] if first else "",
                ours(comparison),
                comparison["verdict"] if len(row["comparisons"]) > 1 else "",
                f"**{row['verdict']}**" if first else "",
                f"{row['tokens'] / 1e6:.1f} M" if first else "",
                f"{row['processor_seconds'] / 60:.1f}" if first else "",
            ]
            lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines)


def arms_table(results: Mapping[str, Any]) -> str:
    """Means over the seeds of what each arm came to, as Markdown."""
    lines = [
        "| arm | parameters | as pruned | loss | KL to the teacher | WikiText-2: loss | KL |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, seeds in results["arms"].items():
        figures = list(seeds.values())
        after = [one.get("after") for one in figures]

        def mean(values: list[float]) -> str:
            return f"{sum(values) / len(values):.3f}"

        cells = [name, f"{figures[0]['params'] / 1e6:.2f} M", mean([one["before"]["loss"] for one in figures])]
        if all(after):
            texts = [one["texts"].get("wikitext2") for one in after]
            cells += [mean([one[key] for one in after]) for key in ("loss", "kl")]
            cells += [mean([one[key] for one in texts]) for key in ("loss", "kl")] if all(texts) else ["", ""]
        else:
            cells += [""] * 4
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
