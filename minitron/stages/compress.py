"""`minitron compress`: the whole pipeline in one group of processes; stages that are finished are not done again."""

from __future__ import annotations

from collections.abc import Callable

from minitron import engine
from minitron.config.schema import Config
from minitron.files import read_json
from minitron.reporting.console import final_table, stage_banner
from minitron.reporting.report import write_report
from minitron.session import Session, session
from minitron.stages import calibrate, data, distill, evaluate, export, prune

# verb, its work, and the file whose absence means that the work is to be done again
STAGES: tuple[tuple[str, Callable[[Session], object], str], ...] = (
    ("data", data.work, "data/manifest.json"),
    ("calibrate", calibrate.work, "importance.safetensors"),
    ("prune", prune.work, "pruned/arch.json"),
    ("distill", distill.work, "checkpoints/latest"),
    ("evaluate", evaluate.work, "eval.json"),
    ("export", export.work, "hf/config.json"),
)


def run(cfg: Config) -> None:
    """Open the run, do its stages in order, report."""
    with session(cfg, "compress") as opened:
        for number, (verb, work, artifact) in enumerate(STAGES, start=1):
            # a stage that begins anew marks those after it as out of date
            done = opened.is_done(verb, artifact)
            if opened.world.is_main:
                stage_banner(number, len(STAGES) + 1, verb, "done before" if done else "")
            if not done:
                work(opened)
        engine.on_main(opened.world, lambda: finish(opened, len(STAGES) + 1))


def finish(opened: Session, number: int) -> None:
    """The report, the table, and how to load the result."""
    stage_banner(number, number, "report")
    page = write_report(opened.folder)
    model = opened.folder / "hf"
    final_table(
        read_json(opened.folder / evaluate.FILE),
        {"report": str(page), "model": str(model), "load it": f'AutoModelForCausalLM.from_pretrained("{model}")'},
    )
