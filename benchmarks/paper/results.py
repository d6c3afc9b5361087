"""From the figures of all arms and seeds to rows, one for each comparison of a claim, and to the tables in docs/results.md. Pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paper.claims import CLAIMS, Figures, Settles
from benchmarks.paper.verdicts import interval, together, verdict

Found = Mapping[str, Mapping[int, Figures]]  # by arm and seed
Row = dict[str, Any]
# of a row, with how each is printed; "outcome" is the verdict on the comparison, "verdict" that on the claim
COLUMNS = {
    "claim": "", "published": "", "compared": "", "unit": "<", "difference": "+.3f", "low": "+.3f", "high": "+.3f", "margin": ".2f", "seeds": "d",
    "outcome": "", "verdict": "", "M tokens": ".2f", "minutes": ".1f",
}  # fmt: skip


def rows(names: Sequence[str], found: Found) -> list[Row]:
    """Of each claim its comparisons, with the seeds that all its arms have, and its verdict and cost; nothing of one without any seed."""
    made = []
    for name in names:
        claim = CLAIMS[name]
        arms = list(dict.fromkeys(arm for comparison in claim.comparisons for arm in comparison.arms))
        seeds = sorted(set.intersection(*(set(found.get(arm, {})) for arm in arms)))
        if not seeds:
            continue
        spent = [found[arm][seed] for arm in arms for seed in seeds]
        whole = {"M tokens": sum(one["tokens"] for one in spent) / 1e6, "minutes": sum(one["processor_seconds"] for one in spent) / 60}
        compared = []
        for comparison in claim.comparisons:
            within = interval([comparison.difference(lambda arm, seed=seed: found[arm][seed]) for seed in seeds])  # type: ignore[misc]
            ends = {key: value if math.isfinite(value) else None for key, value in (("low", within.low), ("high", within.high))}
            what = {"compared": comparison.words, "unit": "tau" if isinstance(comparison, Settles) else "nats", "margin": comparison.margin}
            outcome = verdict(within, comparison.margin)
            compared.append({**what, "difference": within.mean, **ends, "seeds": len(seeds), "outcome": outcome})
        whole |= {"claim": claim.words, "published": claim.published, "verdict": together([one["outcome"] for one in compared])}
        made += [{**one, **whole} for one in compared]
    return made


def ours(row: Row) -> str:
    """A comparison in a cell."""
    form = "+.2f" if row["unit"] == "tau" else "+.3f"
    ends = "no interval" if row["low"] is None else f"{row['low']:{form}} to {row['high']:{form}}"
    margin = "" if row["margin"] is None else f", within ±{row['margin']}"
    return f"{row['compared']}: {row['difference']:{form}} ({ends}{margin})"


def markdown(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table, its last line ended."""
    return "".join("|" + "".join(f" {text} |" if text else " |" for text in line) + "\n" for line in (headings, ["---"] * len(headings), *lines))


def table(results: Mapping[str, Any]) -> str:
    """The claims. One of several comparisons has a line for each, and its verdict on the first."""
    lines, before = [], None
    for row in results["rows"]:
        first, several = row["claim"] != before, sum(other["claim"] == row["claim"] for other in results["rows"]) > 1
        whole = [f"**{row['verdict']}**", f"{row['M tokens']:.1f} M", f"{row['minutes']:.1f}"] if first else [""] * 3
        lines.append([*([row["claim"], row["published"]] if first else ["", ""]), ours(row), row["outcome"] if several else "", *whole])
        before = row["claim"]
    return markdown(["claim", "published", "ours: difference (95 % interval)", "", "verdict", "tokens", "minutes"], lines)


def arms_table(results: Mapping[str, Any]) -> str:
    """Means over the seeds of what each arm came to; of those that were retrained."""

    def mean(values: list[float]) -> str:
        return f"{statistics.fmean(values):.3f}"

    teacher = results["teacher"]
    texts = teacher["texts"]
    losses = [cell for loss in (teacher["loss"], *texts.values()) for cell in (f"{loss:.3f}", "")]
    lines = [["*teacher*", f"{teacher['params'] / 1e6:.2f} M", "", *losses]]
    for name, seeds in results["arms"].items():
        figures = list(seeds.values())
        if "after" not in figures[0]:
            continue
        after = [one["after"] for one in figures]
        places = [after, *([one["texts"][text] for one in after] for text in texts)]
        cells = [mean([one[key] for one in place]) for place in places for key in ("loss", "kl")]
        lines.append([name, f"{figures[0]['params'] / 1e6:.2f} M", mean([one["before"]["loss"] for one in figures]), *cells])
    headings = ["arm", "parameters", "as pruned", "held-out loss", "KL to the teacher", *(cell for text in texts for cell in (f"{text}: loss", "KL"))]
    return markdown(headings, lines)


# table in docs/results.md -> (file in docs/results, what is made of it)
VIEWS = {
    "paper": ("paper", table),
    "paper_arms": ("paper", arms_table),
    "paper_openstax": ("paper_openstax", table),
    "paper_openstax_arms": ("paper_openstax", arms_table),
}
