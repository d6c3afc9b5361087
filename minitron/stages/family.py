"""`minitron family`: several models in a chain, each compressed from the one before, every one in a run of its own below run.dir.

A step is a whole `compress`, so a chain goes on wherever it was stopped (arXiv 2407.14679, best practices 1 and 8).
"""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from pathlib import Path

from minitron import engine
from minitron.arch.arch import Arch
from minitron.checks import check, check_hidden, check_teacher, known_arch
from minitron.config.compose import compose
from minitron.config.schema import Config, Family, Model, Target
from minitron.config.setting import flat
from minitron.data.manifest import Manifest
from minitron.errors import RequestError, refuse
from minitron.pruning.target import target_arch
from minitron.record import BEFORE, RECORD
from minitron.reporting.console import stage_banner
from minitron.reporting.family import FILE, Member, member, original, show_family, write_family
from minitron.session import end_on_signal, session
from minitron.stages import compress
from minitron.weights.source import locate

ORIGINAL = "original"


def run(cfg: Config) -> None:
    """Look at all steps first, then compress one after another; show all models."""
    with end_on_signal("family"):  # also while the steps are looked at, and between them
        steps = plan(cfg)
        for number in range(len(steps)):
            take(cfg, steps, number)


def take(cfg: Config, steps: dict[str, Config], number: int) -> None:
    """One step, in a session of its own, of which nothing stays in memory."""
    name, step = list(steps.items())[number]
    folder, first = Path(cfg.run.dir), next(iter(steps.values()))

    def begin() -> None:
        cut_from, taught_by = relations(cfg, step)
        stage_banner(number + 1, len(steps), name, f"cut from {cut_from}, taught by {taught_by}")
        write_family(folder, members(cfg, steps))  # makes the folder a chain's
        if number:
            Manifest.load(Path(first.run.dir) / "data").lend(Path(step.run.dir) / "data")

    def end() -> None:
        write_family(folder, members(cfg, steps))
        if number == len(steps) - 1:
            show_family(folder)

    with session(step, "compress") as opened:
        engine.on_main(opened.world, begin)
        compress.work(opened)
        engine.on_main(opened.world, end)


def plan(cfg: Config) -> dict[str, Config]:
    """The settings of every step, by name. Raises RequestError, naming the step, for whatever can be told before the first one is done."""
    check_folder(cfg)
    found: dict[str, Config] = {}
    archs = {ORIGINAL: known_arch(cfg.model.path)}  # None where they can't be told yet
    sizes: dict[str, int] = {}
    for name, text in cfg.family.steps.items():
        try:
            step = found[name] = settings_of(cfg, name, shlex.split(text))
            cut_from, taught_by = lineage(cfg, step)
            before = archs[cut_from]
            check(step, "compress", to_come=len(found) > 1, arch=before)
            check_sizes(step.target, sizes)
            teacher = teacher_arch(step, taught_by, archs)
            made = archs[name] = None if before is None or step.search.budgets else target_arch(before, step.target, step.parallel, exported=True)
            if len(found) > 1 and teacher is not None:
                check_teacher(step, "compress", archs[ORIGINAL] or teacher, teacher)  # the chain has one vocabulary
                if made is not None:
                    check_hidden(step, made, teacher)
        except (RequestError, ValueError) as error:  # ValueError: quotes that don't end
            raise RequestError(f"family.steps.{name}: {error}") from error
    return found


def teacher_arch(step: Config, taught_by: str, archs: dict[str, Arch | None]) -> Arch | None:
    """The sizes of a step's teacher, of those in `archs` or by its path. Raises RequestError where neither a step before makes it nor it is there."""
    if taught_by in archs:
        return archs[taught_by]
    assert step.teacher.path is not None  # or its own model taught it
    return known_arch(step.teacher.path, "teacher.path")


def check_folder(cfg: Config) -> None:
    """Names of steps that can be folders, in a folder that is a chain's or holds nothing else."""
    folder, names = Path(cfg.run.dir), cfg.family.steps
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name) or name in (ORIGINAL, FILE):
            raise refuse("family.steps", name, f"a name of letters, digits, _, - and . is needed, other than {ORIGINAL}")
    there = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".") and path.name not in BEFORE) if folder.is_dir() else []
    if RECORD in there or (FILE not in there and {*there} - {*names}):
        raise refuse("run.dir", folder, "the folder holds files that are not a family's; an empty or new folder is needed")


def settings_of(cfg: Config, name: str, words: list[str]) -> Config:
    """The settings of one step: the chain's, what the chain decides, then the step's own."""
    steps = list(cfg.family.steps)
    number, folder = steps.index(name), Path(cfg.run.dir)
    base = dataclasses.replace(cfg, family=Family(), run=dataclasses.replace(cfg.run, dir=str(folder / name), until=None))
    if number:
        before = str(folder / steps[number - 1] / "hf")
        teacher = before if cfg.family.teacher == "previous" else original_path(cfg)
        base = dataclasses.replace(base, model=Model(before), teacher=dataclasses.replace(cfg.teacher, path=teacher))
    step = compose("compress", words, base=base)
    given, decided = flat(dataclasses.asdict(step)), flat(dataclasses.asdict(base))
    for setting, value in given.items():
        if setting.startswith(("run.", "model.", "family.")) and value != decided.get(setting):
            raise refuse(setting, value, "the chain decides this; a step can't")
    return step


def original_path(cfg: Config) -> str:
    """The teacher of all steps where the original is: a .gguf file is converted once, by the first step."""
    if cfg.teacher.path is not None:
        return cfg.teacher.path
    return conversion(cfg) if locate(cfg.model.path, "model.path").endswith(".gguf") else cfg.model.path


def conversion(cfg: Config) -> str:
    """Where the first step puts the original, if it has to be converted."""
    return str(Path(cfg.run.dir) / next(iter(cfg.family.steps)) / "source")


def check_sizes(target: Target, sizes: dict[str, int]) -> None:
    """Refuse whole numbers that are larger than an earlier step's, or all the same; `sizes` are these, and are brought up to date.

    Where the first model's own sizes are not known before it is fetched or converted, no more can be told.
    """
    cuts = target.sizes
    for name, size in cuts.items():
        if isinstance(size, int) and size > sizes.get(name, size):
            raise refuse(f"target.{name}", size, f"the model before has {sizes[name]}: pruning can only make it smaller")
    if cuts and all(sizes.get(name) == size for name, size in cuts.items()):
        name, size = next(iter(cuts.items()))
        raise refuse(f"target.{name}", size, "nothing to prune: the model before has these sizes already")
    sizes.update({name: size for name, size in cuts.items() if isinstance(size, int)})


def lineage(cfg: Config, step: Config) -> tuple[str, str]:
    """What the model of a step is cut from and its teacher: by name, or the path of a teacher that is none of the chain's models."""
    names = {place(cfg.model.path): ORIGINAL, place(conversion(cfg)): ORIGINAL}
    names |= {place(str(Path(cfg.run.dir) / name / "hf")): name for name in cfg.family.steps}
    cut_from = names[place(step.model.path)]
    return cut_from, cut_from if step.teacher.path is None else names.get(place(step.teacher.path), step.teacher.path)


def place(path: str) -> str:
    """One spelling of a path; hub ids stay apart too."""
    return os.path.abspath(os.path.expanduser(path))


def relations(cfg: Config, step: Config) -> tuple[str, str]:
    """What the model of a step is cut from and taught by, as shown."""
    cut_from, teacher = lineage(cfg, step)
    return cut_from, "nobody" if step.distill.loss == "none" else teacher


def members(cfg: Config, steps: dict[str, Config]) -> list[Member]:
    """The original and every model that is finished."""
    folder = Path(cfg.run.dir)
    made = [member(name, folder / name, *relations(cfg, step)) for name, step in steps.items()]
    first, step = next(iter(steps.items()))
    known = made[0] is not None and lineage(cfg, step)[1] == ORIGINAL  # evaluate measures the teacher, whoever it is
    return [original(cfg.model.path, folder / first, known), *(one for one in made if one is not None)]
