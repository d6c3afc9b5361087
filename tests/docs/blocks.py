"""The commands of the documents, as a shell reads them: every block is run by bash with programs that only say what they were called with."""

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "docker" / "README.md"]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PROGRAMS = (".venv/bin/python", ".venv/bin/minitron", "launch/local.sh", "launch/pipeline.sh")  # those that blocks call by a path
# no program is found, so bash calls the function; descriptor 3 gets the number of words and the words, each ended by a zero
RECORDER = 'command_not_found_handle() { printf "%s\\0" "$#" "$@" >&3; }\n'
STUB = '#!/bin/bash\nprintf "%s\\0" "$(($# + 1))" "$0" "$@" >&3\n'


class Block(NamedTuple):
    """A fenced block: its page, the line that it begins after, its language (none: a shell's commands), its text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def every_block() -> list[Block]:
    """All fenced blocks."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in FENCED.finditer(text)]
    return found


def blocks(*languages: str) -> list[Block]:
    """Those in these languages."""
    return [block for block in every_block() if block.language in languages]


def commands(text: str, scratch: Path) -> list[list[str]]:
    """The words of every command that bash would run for `text`, in order; `scratch` becomes the folder it runs in. Loops are gone through."""
    for program in PROGRAMS:
        (scratch / program).parent.mkdir(parents=True, exist_ok=True)
        (scratch / program).write_text(STUB)
        (scratch / program).chmod(0o755)
    (scratch / ".venv" / "bin" / "activate").touch()
    said = scratch / "said"
    # standard input closed, and no folder of programs: nothing but bash itself can be run
    script = f"exec 3>{said}\n{RECORDER}{text}"
    done = subprocess.run(
        ["/bin/bash", "-c", script], cwd=scratch, env={"PATH": "/nonexistent"}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), f"{done.stderr}\n{text}"
    words = said.read_text(encoding="utf-8").split("\0")[:-1]
    found = []
    while words:
        count = int(words[0])
        found.append(words[1 : count + 1])
        words = words[count + 1 :]
    return found
