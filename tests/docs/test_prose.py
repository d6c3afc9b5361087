"""Figures in the sentences of docs/results.md that a JSON file of docs/results holds: the sentence is there with what the file says."""

import re
import statistics

import pytest

from benchmarks.views import load, rows
from tests.docs.blocks import ROOT

TEXT = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())


def of(name, field, **where):
    """One figure of a file."""
    (row,) = rows(name, **where)
    return row[field]


def numbers(name, word):
    """The figures in that note of a file which has a word in it."""
    (note,) = [note for note in load(name)["notes"] if word in note]
    return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*\.?\d*", note)]


def error(name):
    return 100 * statistics.median(abs(row["error"]) for row in rows(name))


def mended():
    side = {row["side"]: row for row in rows("train_step_mended") if "quickest" not in row["side"]}
    passes = [side[f"{name}, fp32"]["forward, backward"] for name in ("minitron train", "Megatron, fused loss", "Megatron, fused loss, again")]
    quickest = [row["total"] for row in rows("train_step_mended") if "quickest" in row["side"]][:2]
    return [*passes, *quickest]


def faster():
    """How much quicker liger's compiled loss is at 8192 tokens in bf16, and how much larger its error."""
    fused, liger = ({row["side"]: row for row in rows("kd_loss") if row["tokens x hidden x vocabulary"].startswith("8192")}[side] for side in SIDES)
    return fused["seconds"] / liger["seconds"], liger["gradient error"] / fused["gradient error"]


SIDES = ("fused, forward", "liger, compiled")
BOTH = "distill_step_both"
SENTENCES = {
    "In fp32 ([5 turns](results/distill_step_both.json)) the ratios are {:.2f} and {:.2f}.": lambda: (
        of(BOTH, "total", side="transformers / minitron, fp32"),
        of(BOTH, "total", side="minitron / halves alone, fp32"),
    ),
    "passes {:.2f} s, of the plain loops {:.2f} and {:.2f} s; quickest steps {:.2f} and {:.2f};": mended,
    "In bf16 a compiled liger is {:.1f} times as fast as the fused loss at 8192 tokens, at some {:.1f} times its gradient error": faster,
    "{:,.0f} s of processor time against {:,.0f} s, {:.2f} (other work": lambda: numbers("search", "processor time")[-3:],
    "took {:.0f} s by the clock against {:.0f} s, **{:.2f}**": lambda: [numbers("search_few_tokens", "processor time")[at] for at in (0, 2, 3)],
    "(Kendall's tau {:.2f}, then {:.2f})": lambda: numbers("search", "Kendall"),
    "The median error is {:.1f} %, in a run [by processor time](results/latency_processor.json), one thread, beside other work, {:.1f} %": lambda: (
        error("latency"),
        error("latency_processor"),
    ),
    "It took 72 of their {:d} student steps": lambda: (24 * len(rows("search")),),
}


@pytest.mark.parametrize("sentence", SENTENCES)
def test_a_sentence_says_what_its_file_says(sentence):
    assert sentence.format(*SENTENCES[sentence]()) in TEXT
