"""`minitron compress`: the whole pipeline in one group of processes; stages that are finished are not done again."""

from __future__ import annotations

from collections.abc import Callable

from minitron import engine
from minitron.checks import searches
from minitron.config.schema import Config
from minitron.files import read_object
from minitron.reporting.console import final_table, say, stage_banner
from minitron.reporting.report import write_report
from minitron.session import Session, session
from minitron.stages import calibrate, data, distill, evaluate, export, prune, search, speed
from minitron.teaching import fitting_cache

STAGES: dict[str, Callable[[Session], object]] = {
    "data": data.work, "calibrate": calibrate.work, "search": search.work, "prune": prune.work, "distill": distill.work, "evaluate": evaluate.work,
    "export": export.work, "speed": speed.work,
}  # fmt: skip


def stages_of(cfg: Config) -> dict[str, Callable[[Session], object]]:
    """Those that these settings ask for, in their order."""
    needless = {"search": not searches(cfg, "compress"), "speed": not cfg.speed.enabled}
    return {verb: stage for verb, stage in STAGES.items() if not needless.get(verb)}


def run(cfg: Config) -> None:
    """Open the run and compress."""
    with session(cfg, "compress") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Do the stages in order, up to run.until or with the report."""
    stages, until = stages_of(opened.cfg), opened.cfg.run.until
    for number, (verb, stage) in enumerate(stages.items(), start=1):
        # a stage that begins anew marks those after it as out of date
        done = opened.is_done(verb)
        if opened.world.is_main:
            stage_banner(number, len(stages) + 1, verb, "done before" if done else "")
        if not done:
            if verb != "data":
                opened.data  # noqa: B018 -- texts that are too short for a later stage are refused before any work
            stage(opened)
        if verb == "data" and opened.cfg.teacher.cache.folder is not None and not opened.is_done("distill"):
            fitting_cache(opened)  # a cache of another text is refused before any work
        if verb == until:
            if opened.world.is_main:
                say(f"run.until={until}: this is done, the same command without it goes on")
            return
    engine.on_main(opened.world, lambda: finish(opened, len(stages) + 1))


def finish(opened: Session, number: int) -> None:
    """The report, the table, and how to load the result."""
    stage_banner(number, number, "report")
    page = write_report(opened.folder)
    model = opened.folder / "hf"
    final_table(
        read_object(opened.folder / evaluate.FILE),
        {
            "results": str(opened.folder / evaluate.FILE),
            "report": str(page),
            "model": str(model),
            "load it": f'AutoModelForCausalLM.from_pretrained("{model}")',
        },
    )
