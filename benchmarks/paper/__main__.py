"""Try the papers' claims: `python -m benchmarks.paper [SETTING=VALUE ...]`, from the repository's folder.

Every arm is run with every seed; one that was run before with the same settings is not run again, so that the same command goes on where it was
stopped. Arms of one seed share the order of the text, what is calibrated on, and the text that is held out.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.common import machine, test_data
from benchmarks.paper.arms import Remembered, Seed, losses
from benchmarks.paper.claims import ARMS, CLAIMS, TEACHERS, Teacher, needed
from benchmarks.paper.results import Found, rows, table
from benchmarks.paper.teacher import filled, make
from minitron.config.compose import compose
from minitron.data.manifest import Manifest
from minitron.distillation.fused import Scratch
from minitron.distillation.signal import LiveTeacher
from minitron.files import read_object, write_json
from minitron.session import Session, session

FIRST_SEED = 1


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, metavar="CLAIM", default=list(CLAIMS), help=f"of {', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--teacher", choices=TEACHERS, default="openstax", help="the model that is compressed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="where the teacher and the arms' figures are kept (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here too")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE", help="settings of minitron, for all arms")
    options = parser.parse_args()
    if not test_data().is_dir():
        parser.error("MINITRON_TEST_DATA must name the folder with texts and models")
    results = run(
        TEACHERS[options.teacher], options.folder.resolve() / options.teacher, options.claims, options.seeds, options.overrides, options.json
    )
    print(table(results))


def run(teacher: Teacher, folder: Path, claims: list[str], seeds: int, overrides: list[str], json_file: Path | None) -> dict[str, Any]:
    """All arms of these claims with so many seeds; what is known is written after each seed."""
    settings = [*filled(teacher.settings), *make(teacher, folder / "teacher", FIRST_SEED), *overrides, "logging.progress=false", "spec=torch"]
    arms, numbers = needed(claims), range(FIRST_SEED, FIRST_SEED + seeds)
    here = [*settings, f'run.dir="{folder / "run"}"', f"seed={FIRST_SEED}"]
    results: dict[str, Any] = {}
    with session(compose("compress", [*here, *teacher.parts["width"]]), "compress") as opened:
        if teacher.training:
            Manifest.load(folder / "teacher" / "run" / "data").lend(folder / "run" / "data")
        held_out = Remembered(LiveTeacher(opened.teacher, opened.world))
        known = {"params": opened.source.arch.num_parameters(), **of_teacher(opened, held_out)}
        found: dict[str, dict[int, Any]] = {arm: {} for arm in arms}
        for number in numbers:
            seed = Seed(opened, here, number, held_out)
            for arm in arms:
                found[arm][number] = figures(seed, arm, teacher, settings, folder / "arms" / f"{arm}-{number}.json")
            results = collected(claims, found, known, settings)
            if json_file is not None:
                write_json(json_file, results)
    return results


def of_teacher(opened: Session, held_out: Remembered) -> dict[str, Any]:
    """The teacher's own losses; its KL to itself is none."""
    scratch, tokens = Scratch(), opened.cfg.eval.tokens
    texts = {name: losses(opened, opened.teacher, held_out, f"text_{name}", tokens, scratch)["loss"] for name in opened.cfg.eval.texts}
    return {"loss": losses(opened, opened.teacher, held_out, "valid", tokens, scratch)["loss"], "texts": texts}


def figures(seed: Seed, arm: str, teacher: Teacher, settings: list[str], file: Path) -> dict[str, Any]:
    """An arm's figures, from its file where it was run with these settings before."""
    parts = {name: list(part) for name, part in teacher.parts.items() if name in (*ARMS[arm].parts, ARMS[arm].via)}
    made_with = {"arm": repr(ARMS[arm]), "parts": parts, "settings": settings}
    if file.is_file() and (known := read_object(file)).get("made_with") == made_with:
        return dict(known["figures"])
    found = seed.run(arm, dict(teacher.parts))
    write_json(file, {"made_with": made_with, "figures": found})
    after = found.get("after", found["before"])["loss"]
    print(f"seed {seed.number}  {arm:34} {found['before']['loss']:.4f} -> {after:.4f}  {found['processor_seconds']:.1f} s", flush=True)
    return found


def collected(claims: list[str], found: Found, teacher: dict[str, Any], settings: list[str]) -> dict[str, Any]:
    """What the JSON holds."""
    spent = [one for seeds in found.values() for one in seeds.values()]
    return {
        "title": "The papers' claims",
        "teacher": teacher,
        "settings": [one for one in settings if str(test_data()) not in one and "model.path" not in one],
        "claims": rows(claims, found),
        "tokens": sum(one["tokens"] for one in spent),
        "processor_seconds": sum(one["processor_seconds"] for one in spent),
        "arms": {arm: {str(number): one for number, one in seeds.items()} for arm, seeds in found.items()},
        "machine": machine(),
    }


if __name__ == "__main__":
    main()
