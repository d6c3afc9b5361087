"""The lines that the guide quotes under Troubleshooting are those that the program says: their fixed words stand together in its sources."""

import ast
import errno
import os
import re

import pytest

from minitron.config.verbs import VERBS
from tests.docs.blocks import ROOT

GUIDE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
SECTION = GUIDE[GUIDE.index("## Troubleshooting") : GUIDE.index("## Extending")]
ROWS = [cells[1] for line in SECTION.splitlines() if len(cells := re.split(r" ?(?<!\\)\| ?", line)) == 4]
QUOTED = [quote for cell in ROWS[2:] for quote in re.findall(r"`([^`]+)`", cell) if " " in quote]
REMARKS = re.findall(r"^- \*\*`([^`]+)`", SECTION, re.MULTILINE)
GAP = "\0"  # what a message is filled in with
WORD = r"[\w'/.-]*\w"


def pieces() -> list[str]:
    """All texts of the sources, cut where something is filled in; the launch scripts', and what the system says of a full disk, beside them."""
    found = [os.strerror(errno.ENOSPC)]
    for path in sorted((ROOT / "minitron").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found += "".join(part.value if isinstance(part, ast.Constant) else GAP for part in node.values).split(GAP)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    found += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "launch").iterdir())]
    return [f" {' '.join(re.findall(WORD, text))} " for text in found]


PIECES = pieces()
SAID = "\n".join(PIECES)
ENDS, STARTS = "".join(f"{piece}\n" for piece in PIECES), "".join(f"\n{piece}" for piece in PIECES)


def is_said(run: str) -> bool:
    """Whether a run of words stands in one piece of a text, or at the end of one and, after at most three words that are filled in, goes on
    where another begins."""
    words = re.findall(WORD, run)
    if f" {' '.join(words)} " in SAID:
        return True
    for cut in range(1, len(words)):
        if f" {' '.join(words[:cut])} \n" in ENDS:
            if cut > 2 and cut == len(words) - 1:
                return True
            for filled in range(min(4, len(words) - cut)):
                rest = words[cut + filled :]
                if f"\n {' '.join(rest)} " in STARTS or (len(rest) > 2 and is_said(" ".join(rest))):
                    return True
    return False


def fixed(quote: str) -> list[str]:
    """The runs of words of a quoted line that are the same whatever it is filled in with: without names, numbers, values and `...`."""
    runs, run = [], []
    for word in quote.replace("'...'", "...").replace("...", " ... ").split():
        filled = word == "..." or re.search(r"\d|=|\w[./]\w|^[A-Z_]+$", word) or word in VERBS
        if filled:
            runs.append(run)
            run = []
        else:
            run.append(word)
    return [" ".join(run).strip(" :;,()") for run in (*runs, run) if " ".join(run).strip(" :;,()")]


def test_lines_are_found_at_all():
    assert len(QUOTED) > 60
    assert len(REMARKS) == 2


@pytest.mark.parametrize("quote", [*QUOTED, *REMARKS])
def test_a_quoted_line_is_one_that_is_said(quote):
    runs = fixed(quote)
    assert sum(map(len, runs)) >= 8, "too little to be known by"
    missing = [run for run in runs if not is_said(run)]
    assert not missing, f"no source says {missing}"


def test_what_nobody_says_is_seen():
    assert fixed("parallel.tp=3: a divisor of 9 is wanted, N of them") == ["a divisor of", "is wanted", "of them"]
    assert is_said("must divide the model's ffn_hidden_size")
    assert not is_said("a divisor of nine is wanted")
    assert not is_said("must divide the model's number of brains")
