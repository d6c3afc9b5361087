"""Writes the tables of README.md and docs/results.md anew from the JSON files of docs/results: `python -m benchmarks.tables` (make tables).

A table stands in the page between two comments, `<!-- table: NAME -->` and `<!-- end -->`. It is what docs/results/NAME.json holds, in
the form that `common.publish` writes with --json: its `columns` say how each figure is printed. Where the page shows something else, as
fewer columns, several files together or a file of another form (which opens as `common.origin` has it), `VIEWS` of views.py has a function of
that name. So a figure is changed by measuring it again, with `--json docs/results/NAME.json`, and never by hand.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, origin
from benchmarks.views import RESULTS, VIEWS, plain
from minitron.files import write_json

PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rewritten(text: str) -> str:
    """The page `text` with every table as the JSON files have it."""
    return MARKED.sub(lambda match: match[1] + (VIEWS[match[2]]() if match[2] in VIEWS else plain(match[2])) + match[3], text)


Columns = dict[str, str]  # heading -> format


def made(title: str, command: str, columns: Columns, rows: Sequence[Sequence[Any]], **more: Any) -> dict[str, Any]:
    """Figures in the form that `publish` writes, of today; what was measured was so on this machine."""
    entries = [dict(zip(columns, row, strict=True)) for row in rows]
    return {**origin(title), "command": command, **more, "columns": columns, "rows": entries, "notes": []}


def of_run(folder: Path, command: str) -> dict[str, Any]:
    """What a finished run came to: the three models on every text."""
    models = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    columns = {"text": "<", "model": "<", "params": ",d", "loss": ".3f", "perplexity": ".2f", "gap closed": ".1%", "tokens/s": ",.0f", "tokens": ",d"}
    rows = []
    for text in ("held-out", *models["student"]["texts"]):
        found = {model: figures if text == "held-out" else figures["texts"][text] for model, figures in models.items()}
        added, left = (found[model]["loss"] - found["teacher"]["loss"] for model in ("pruned", "student"))
        for model, figures in found.items():
            closed = 1 - left / added if model == "student" and added > 0 else None
            speed = figures.get("tokens_per_second")
            rows.append([text, model, models[model]["params"], figures["loss"], figures["perplexity"], closed, speed, figures["tokens"]])
    return made(folder.name, command, columns, rows)


def of_training(folder: Path, command: str) -> dict[str, Any]:
    """The held-out losses of a run on its way."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [[line["step"], line["tokens"], line["loss"], line["valid_loss"]] for line in lines if "valid_loss" in line]
    return made(folder.name, command, {"step": ",d", "tokens": ",d", "loss": ".3f", "held-out loss": ".3f"}, rows)


def of_plan(folder: Path, command: str) -> dict[str, Any]:
    """The architectures that `minitron plan` leaves, with how many it looked at and why the others fell."""
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    rows = [[model["name"], *model["sizes"].values(), int(model["costs"]["params"])] for model in plan["models"]]
    sizes = plan["models"][0]["sizes"]
    return made(folder.name, command, {"name": "<", **dict.fromkeys(sizes, ",d"), "params": ",d"}, rows, grid=plan["grid"], fell=plan["fell"])


KEPT = {"run": of_run, "training": of_training, "plan": of_plan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep",
        nargs=4,
        metavar=("WHAT", "FOLDER", "NAME", "COMMAND"),
        help=f"first write NAME.json from the run in FOLDER, which COMMAND made on this machine; WHAT: {', '.join(KEPT)}",
    )
    options = parser.parse_args()
    if options.keep:
        what, folder, name, command = options.keep
        write_json(RESULTS / f"{name}.json", KEPT[what](Path(folder), command))
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        now = rewritten(text)
        page.write_text(now, encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {'written' if now != text else 'as before'}")


if __name__ == "__main__":
    main()
