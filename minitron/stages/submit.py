"""`minitron submit VERB`: looks at all that the verb would refuse, then queues it on a SLURM cluster: one job, a chain, an array."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from minitron.checks import check
from minitron.config.compose import compose, parsed
from minitron.config.layout import check_layout
from minitron.config.schema import Config
from minitron.config.sweep import expand
from minitron.errors import RequestError, refuse, say_once
from minitron.files import write_text
from minitron.launching.cluster import ask, cancel, check_cluster, queue
from minitron.launching.slurm import Job, Task, script, template
from minitron.launching.storage import own_disk, refuse_unwritable
from minitron.record import FREE, FREE_NAMES, RECORD, check_bound, flat, own, read_record
from minitron.reporting.console import say
from minitron.reporting.sweep import write_sweep
from minitron.stages import family
from minitron.stages.compress import stages_of

NEEDLESS = ("plan", "summary")  # verbs that there is no use in queueing
OURS = ("slurm", "run.dir")  # settings, and groups of them, that the script takes the place of


@dataclasses.dataclass(frozen=True)
class Part:
    """One run of a submission: its settings, these as words, and those by which it differs from the others of a sweep."""

    cfg: Config
    words: list[str]
    chosen: dict[str, str]


def run(verb: str, words: list[str], flags: Collection[str]) -> None:
    """Queue what is asked for, or print its scripts."""
    if verb == "submit":
        raise RequestError("minitron submit submit: the verb to queue is needed: minitron submit VERB [SETTING=VALUE ...]")
    if verb in NEEDLESS:
        raise RequestError(f"minitron submit {verb}: minitron {verb} itself does it at once, without a job")
    dry = "--dry-run" in flags
    folder, parts = sweep(verb, words) if "--sweep" in flags else single(verb, words)
    chains = [steps(verb, part) for part in parts]
    for part, chain in zip(parts, chains, strict=True):
        check_part(verb, part, list(chain.values()))
    jobs = [job(verb, name, folder, parts, [chain[name] for chain in chains]) for name in chains[0]]
    refuse_unwritable(folder)
    look_at_cluster(jobs, dry)
    text = template().read_text(encoding="utf-8")
    scripts = {one.file: script(one, text) for one in jobs}
    if dry:
        print("\n".join(scripts.values()), end="")
        return
    if kind := own_disk(folder, Path("/proc/self/mounts").read_text(encoding="utf-8")):
        say_once(f"run.dir={folder}: its file system is {kind}, which other machines seldom see; all nodes of a job need the folder")
    keep(verb, folder, parts, scripts)
    submit(jobs, folder)


def single(verb: str, words: list[str]) -> tuple[Path, list[Part]]:
    """The folder of a submission that is one run, and that run."""
    cfg = absolute(compose(verb, words))
    return Path(cfg.run.dir), [Part(cfg, words, {})]


def sweep(verb: str, words: list[str]) -> tuple[Path, list[Part]]:
    """The folder of a sweep, and its runs, each in a folder below."""
    runs = {name: (absolute(compose(verb, own_words)), own_words, chosen) for name, (own_words, chosen) in expand(words).items()}
    folders = [cfg.run.dir for cfg, _, _ in runs.values()]
    if len({*folders}) > 1:
        raise refuse("run.dir", list(dict.fromkeys(folders)), "one folder is needed, below which each run of the sweep has its own")
    folder = Path(folders[0])
    if (folder / RECORD).exists():
        raise refuse("run.dir", folder, "it is the folder of a run; a sweep needs another, in which each of its runs has its own")
    return folder, [Part(absolute(cfg, folder / name), own_words, chosen) for name, (cfg, own_words, chosen) in runs.items()]


def absolute(cfg: Config, folder: Path | None = None) -> Config:
    """The settings with run.dir, or another folder, as an absolute path: nodes begin where they like."""
    return dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, dir=str((folder or Path(cfg.run.dir)).absolute())))


def steps(verb: str, part: Part) -> dict[str, tuple[Config, list[str]]]:
    """The jobs of a run by name, each with its settings, and these as words: one, or a chain of those that slurm.stages has."""
    texts = part.cfg.slurm.stages
    if not texts:
        return {verb: (part.cfg, part.words)}
    order = [*stages_of(part.cfg)]
    if verb != "compress":
        raise refuse("slurm.stages", texts, f"minitron compress alone has stages; minitron {verb} is one job")
    if [*texts] != [stage for stage in order if stage in texts]:
        raise refuse("slurm.stages", [*texts], f"stages of this run in their order are needed: {', '.join(order)}")
    found = {}
    for name, text in texts.items():
        try:
            words = shlex.split(text) + ([] if name == [*texts][-1] else [f"run.until={name}"])
            found[name] = (stage_settings(part.cfg, words), [*part.words, *words])
        except (RequestError, ValueError) as error:  # ValueError: quotes that don't end
            raise RequestError(f"slurm.stages.{name}: {error}") from error
    if len(found) == 1:  # would do all stages on what was meant for one
        raise refuse("slurm.stages", texts, "two jobs at least are needed: the last one does all that is left, on nodes of its own")
    return found


def stage_settings(base: Config, words: list[str]) -> Config:
    """The settings of one job of a chain, which may differ from the others' in where and how it runs alone."""
    cfg = compose("compress", words, base=base)
    before, now = flat(dataclasses.asdict(base)), flat(dataclasses.asdict(cfg))
    for name, value in now.items():
        free = name.split(".")[0] in ("slurm", *FREE) or name in FREE_NAMES
        if value != before.get(name) and (not free or name == "run.dir" or name.startswith("slurm.stages")):
            raise refuse(name, value, "jobs of a chain have it in common; parallel, slurm and what else changes no result may differ")
    return cfg


def check_part(verb: str, part: Part, chain: list[tuple[Config, list[str]]]) -> None:
    """Refuse what the verb itself would, with the processes that each of the jobs will have."""
    for cfg, _ in chain:
        with processes(cfg.slurm.world_size):
            check_layout(cfg.parallel, cfg.slurm.world_size)
            if not cfg.slurm.check:
                continue
            if verb == "family":
                family.plan(cfg)
            else:
                check(cfg, verb)
    folder = Path(part.cfg.run.dir)
    if part.cfg.slurm.check and (folder / RECORD).exists():
        if importlib.util.find_spec("megatron") is None:
            raise refuse("slurm.check", True, "Megatron-Core is not installed here; false leaves it to the job to look at what run.dir holds")
        check_bound(folder, read_record(folder), part.cfg, verb)


@contextlib.contextmanager
def processes(size: int) -> Iterator[None]:
    """Inside the block, checks see as many processes as torchrun will start."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(size)
    try:
        yield
    finally:
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def job(verb: str, name: str, folder: Path, parts: Sequence[Part], found: Sequence[tuple[Config, list[str]]]) -> Job:
    """The job that does the same step of every run."""
    slurm = found[0][0].slurm
    for cfg, _ in found:
        if cfg.slurm != slurm:
            raise refuse("slurm", "...", "the runs of a sweep are one array of jobs, all with the same settings of slurm")
    tasks = [Task(Path(part.cfg.run.dir), passed_on(words)) for part, (_, words) in zip(parts, found, strict=True)]
    python = slurm.python or ("python" if slurm.container else sys.executable)
    return Job(name, verb, folder, tasks, slurm, Path.cwd(), python)


def passed_on(words: list[str]) -> tuple[str, ...]:
    """The settings that a rank is given: all but those that are the script's."""
    keys = [(word, parsed(word).key_or_group) for word in words]
    return tuple(word for word, key in keys if key not in OURS and key.split(".")[0] != "slurm")


def look_at_cluster(jobs: Sequence[Job], dry: bool) -> None:
    """Refuse what the cluster has no place for; where scripts are only printed, SLURM need not be there."""
    try:
        cluster = ask()
    except RequestError as error:
        if not dry:
            raise
        say_once(f"the cluster was not looked at: {error}")
        return
    for one in jobs:
        check_cluster(one.slurm, cluster)


def keep(verb: str, folder: Path, parts: Sequence[Part], scripts: dict[Path, str]) -> None:
    """Write the scripts, and of a sweep what its runs are, into run.dir."""
    for part in parts if verb != "family" else ():
        own(Path(part.cfg.run.dir))
    for file, content in scripts.items():
        write_text(file, content)
    if parts[0].chosen:
        write_sweep(folder, {Path(part.cfg.run.dir).name: part.chosen for part in parts})


def submit(jobs: Sequence[Job], folder: Path) -> None:
    """Queue jobs, each to begin when the one before it has ended well; all or none. Tells their ids."""
    ids: list[str] = []
    for one in jobs:
        conditions = [f"{'aftercorr' if one.is_array else 'afterok'}:{ids[-1]}"] if ids else []
        conditions += [f"afterok:{one.slurm.after}"] if one.slurm.after else []
        try:
            ids.append(queue(one.file, ",".join(conditions)))
        except RequestError:
            if ids:
                cancel(ids)
            raise
        runs = f" for each of {len(one.tasks)} runs" if one.is_array else ""
        after = f", after {ids[-2]}" if len(ids) > 1 else ""
        say(f"job {ids[-1]}: {one.name}{runs}, {one.slurm.nodes} x {one.slurm.ranks} ranks{after}; its log: {one.log}")
    say(f"minitron summary run.dir={folder} tells how far it is")
