"""The directional claims of the Minitron papers (arXiv 2407.14679, "P1", and 2408.11796, "P2"), tried out at a size that a laptop can afford.

claims.py is the table of what is tried. Every arm is run with every seed; one that was run before with the same settings is not run again, so
that the same command goes on where it was stopped. Arms of one seed share the order of the text, what is calibrated on, and the held-out text; a
verdict is made of their differences, seed by seed. Arguments after the options are settings of minitron, for all arms.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.common import arguments, origin, publish, test_data
from benchmarks.paper.arms import Remembered, Seed, losses
from benchmarks.paper.claims import ARMS, CLAIMS, TEACHERS, Teacher, needed
from benchmarks.paper.picture import drawn
from benchmarks.paper.results import COLUMNS, Found, rows
from benchmarks.paper.teacher import filled, make
from minitron.config.compose import compose
from minitron.data.manifest import Manifest
from minitron.distillation.fused import Scratch
from minitron.distillation.signal import LiveTeacher
from minitron.files import read_object, write_json, write_text
from minitron.session import Session, session

TITLE = "The papers' claims"
SHOWN = {name: COLUMNS[name] for name in ("claim", "compared", "difference", "low", "high", "outcome", "verdict")}  # on the console
FIRST_SEED = 1


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--claims", nargs="+", choices=CLAIMS, metavar="CLAIM", default=list(CLAIMS), help=f"of {', '.join(CLAIMS)} (default: all)")
    parser.add_argument("--teacher", choices=TEACHERS, default="stories260k", help="the model that is compressed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("runs/paper"), help="where the teacher and the arms' figures are kept (%(default)s)")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="with --json: draw the differences here, as SVG")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    if not test_data().is_dir():
        parser.error("MINITRON_TEST_DATA must name the folder with texts and models")
    teacher, folder = TEACHERS[options.teacher], options.folder.resolve() / options.teacher
    known, found = run(teacher, folder, options.claims, options.seeds, options.overrides)
    made, said = rows(options.claims, found), notes(known, found)
    publish(TITLE, SHOWN, [[row[name] for name in SHOWN] for row in made], said, None)
    if options.json is not None:
        arms = {arm: {str(number): one for number, one in seeds.items()} for arm, seeds in found.items()}
        results = origin(TITLE) | {"columns": COLUMNS, "rows": made, "notes": said, "teacher": known, "arms": arms}
        write_json(options.json, results)
        if options.picture is not None:
            write_text(options.picture, drawn(results))


def run(teacher: Teacher, folder: Path, claims: list[str], seeds: int, overrides: list[str]) -> tuple[dict[str, Any], Found]:
    """What the teacher comes to, and all arms of these claims with so many seeds."""
    settings = [*filled(teacher.settings, test_data()), *make(teacher, folder / "teacher", FIRST_SEED, test_data())]
    settings += [*overrides, "logging.progress=false", "spec=torch"]
    arms, numbers = needed(claims), range(FIRST_SEED, FIRST_SEED + seeds)
    here = [*settings, f'run.dir="{folder / "run"}"', f"seed={FIRST_SEED}"]
    found: dict[str, dict[int, Any]] = {arm: {} for arm in arms}
    with session(compose("compress", [*here, *teacher.parts["width"]]), "compress") as opened:
        if teacher.training:
            Manifest.load(folder / "teacher" / "run" / "data").lend(folder / "run" / "data")
        held_out = Remembered(LiveTeacher(opened.teacher, opened.world))
        known = of_teacher(opened, held_out)
        for number in numbers:
            seed = Seed(opened, here, number, held_out)
            for arm in arms:
                found[arm][number] = figures(seed, arm, teacher, settings, folder / "arms" / f"{arm}-{number}.json")
    return known, found


def of_teacher(opened: Session, held_out: Remembered) -> dict[str, Any]:
    """The teacher's own losses; its KL to itself is none."""
    scratch, tokens = Scratch(), opened.cfg.eval.tokens
    texts = {name: losses(opened, opened.teacher, held_out, f"text_{name}", tokens, scratch)["loss"] for name in opened.cfg.eval.texts}
    return {
        "params": opened.source.arch.num_parameters(),
        "loss": losses(opened, opened.teacher, held_out, "valid", tokens, scratch)["loss"],
        "texts": texts,
    }


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


def notes(teacher: dict[str, Any], found: Found) -> list[str]:
    """What has to be said with the table."""
    spent = [one for seeds in found.values() for one in seeds.values()]
    tokens, seconds = (sum(one[what] for one in spent) for what in ("tokens", "processor_seconds"))
    texts = "".join(f", {name} {loss:.3f}" for name, loss in teacher["texts"].items())
    return [
        "differences of held-out losses in nats per token, or of Kendall's tau; 95 % intervals; claims share arms, a claim's cost is that of its own",
        f"the teacher has {teacher['params'] / 1e6:.2f} M parameters, its held-out loss is {teacher['loss']:.3f}{texts}",
        f"{len(found)} arms, {len(spent)} runs: {tokens / 1e6:.1f} M tokens, {seconds / 60:.0f} minutes of processor time",
    ]


if __name__ == "__main__":
    main()
