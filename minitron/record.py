"""What `run.dir` remembers: whose folder it is, what its stages were made with. One command at a time works in it."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from minitron import engine
from minitron.config.build import from_yaml, to_yaml
from minitron.config.schema import Config
from minitron.config.setting import flat
from minitron.config.verbs import VERBS, groups_of, measures_again, reads
from minitron.errors import RequestError, refuse, say_once, shown
from minitron.files import os_errors_are_requests, read_object, write_json, write_text
from minitron.launching.slurm import FOLDER as SLURM
from minitron.search.candidates import PLAN

RECORD, LOCK = "stages.json", ".lock"
BEFORE = (PLAN, SLURM)  # what may be in a folder before a run is: its plan, the scripts that queue it
# the stages in order, each reading what those before it made, and the file without which a stage's work is to be done again
ARTIFACTS = {
    "data": "data/manifest.json", "calibrate": "importance.safetensors", "search": "candidates.json", "prune": "pruned/arch.json",
    "distill": "checkpoints/step_*/manifest.json", "train": "checkpoints/step_*/manifest.json", "evaluate": "eval.json", "export": "hf/config.json",
    "speed": "speed.json",
}  # fmt: skip
# a folder is that of a compression or, once `train` was at work in it, of one model that is trained whole: verbs of the first are refused there
COMPRESSION = ("compress", "calibrate", "search", "prune", "cache", "distill")
# settings that may differ between two commands on one run: where and how it runs, not what it makes
FREE = ("run", "parallel", "eval", "speed", "logging", "device", "spec")
FREE_NAMES = ("data.workers", "calibrate.micro_batch_size", "train.micro_batch_size", "distill.chunk_tokens", "distill.gradients",
              "train.save_interval", "train.keep_last", "train.keep_every", "train.async_save",
              "train.eval_interval", "train.eval_tokens", "teacher.parallel.tp", "teacher.parallel.pp", "teacher.parallel.ep", "teacher.offload",
              "teacher.cache.samples_per_file", "train.recompute", "train.overlap_grad_reduce", "train.overlap_param_gather",
              "search.together")  # fmt: skip
# settings of what a verb makes itself, which a stage of the run reads under the same name: a cache may be made for another run, or mended
MADE_HERE = {"cache": ("teacher.cache.folder", "teacher.cache.top_k")}
# settings of the data that training alone reads: they bind nothing that was made before it
TRAINING_ALONE = ("data.packing", "data.separate_documents")
# those that may change in the middle of a training, what a training that diverged needs: they hold from the newest checkpoint on
ADJUSTABLE = ("train.lr", "train.min_lr", "train.warmup_steps", "train.schedule", "train.decay_steps", "train.decay_form", "train.clip_grad",
              "train.spike_factor", "train.spike_window", "train.max_bad_steps")  # fmt: skip


def settings_of(cfg: Config, verb: str, free: bool) -> dict[str, Any]:
    """The settings that decide what a verb makes, by full name; with `free`, also `eval` and `speed`, which decide what these report."""
    return in_use(all_settings(cfg, verb, free), verb)


def all_settings(cfg: Config, verb: str, free: bool) -> dict[str, Any]:
    """As `settings_of`, with those that nothing reads."""
    tree = dataclasses.asdict(cfg)
    groups = [group for group in VERBS[verb].groups if group not in FREE or (free and group in ("eval", "speed"))]
    left_out = FREE_NAMES if VERBS[verb].trains or verb == "cache" else (*FREE_NAMES, *TRAINING_ALONE)
    named = flat({group: tree[group] for group in groups})
    return {name: value for name, value in named.items() if name not in left_out and reads(verb, name)}


def in_use(settings: dict[str, Any], verb: str) -> dict[str, Any]:
    """Settings without those that nothing reads: where the teacher itself is asked, it does not matter what would be read of a cache, and
    where importance is measured once, a cut reads no text."""
    unread = ["teacher.cache.top_k"] if settings.get("teacher.cache.folder") is None else []
    if verb == "prune" and not measures_again(settings["target.rounds"], settings["calibrate.criterion"]):
        unread += [name for name in settings if name.startswith("data.")]
    return {name: value for name, value in settings.items() if name not in unread}


def made_with(entry: dict[str, Any], verb: str) -> dict[str, Any]:
    """The settings of a stage's entry in the record; of a setting that is newer than the entry, the default. Nothing where it has none."""
    recorded = {name: value for name, value in entry.get("settings", {}).items() if reads(verb, name)}  # earlier versions noted more
    return in_use({**all_settings(Config(), verb, free=True), **recorded}, verb) if recorded else {}


def read_record(folder: Path) -> dict[str, dict[str, Any]]:
    """What stages.json notes of every stage that was at work. Raises RequestError where it is not as it was written."""
    record = read_object(folder / RECORD, of_objects=True)
    for stage, entry in record.items():
        if not isinstance(entry.get("done"), bool) or not all(isinstance(entry.get(part, {}), dict) for part in ("settings", "inputs")):
            raise RequestError(f"cannot read {folder / RECORD}: what it says of {stage} is not as it was written")
    return record


def is_there(folder: Path, stage: str) -> bool:
    """Whether what a stage makes is in the run's folder."""
    return any(folder.glob(ARTIFACTS[stage]))


def bound(folder: Path, record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The stages whose results the run stands on, each with the settings that they were made with.

    What a stage left unfinished, or what nothing follows from (an evaluation, an export), is made again with any settings. Checkpoints are what
    a training continues from, so they bind it even unfinished, but for ADJUSTABLE, and with it the stages that they descend from. Of a search its
    own settings bind: it is the others' that a distillation may change.
    """
    step = trained(folder)
    if record.get("search", {}).get("done") and is_there(folder, "search"):
        yield "search", {name: value for name, value in made_with(record["search"], "search").items() if name.startswith("search.")}
    for stage in ("data", "calibrate", "prune", "distill", "train"):
        entry = record.get(stage, {"done": False, "settings": {}})
        settings = made_with(entry, stage)
        if VERBS[stage].trains and 0 < step < settings.get("train.steps", 0):
            yield stage, {name: value for name, value in settings.items() if name not in ADJUSTABLE}
        elif (entry["done"] and is_there(folder, stage)) or (step and stage != "data"):
            yield stage, settings


def trained(folder: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    return engine.Checkpoints(folder / "checkpoints").latest() or 0


def holds_others(folder: Path) -> bool:
    """Whether a folder holds files and is not a run's."""
    return not (folder / RECORD).exists() and any(not path.name.startswith(".") and path.name not in BEFORE for path in folder.iterdir())


def own(folder: Path, setting: str = "run.dir", whose: str = "a run's", is_other: Callable[[Path], bool] = holds_others) -> None:
    """Make the folder that a setting names, or see that it is one of its kind. Raises RequestError where it holds other files."""
    with os_errors_are_requests(f"cannot use {setting}", folder):
        if folder.exists() and not folder.is_dir():
            raise refuse(setting, folder, "a file is there; a folder is needed")
        folder.mkdir(parents=True, exist_ok=True)
        if is_other(folder):
            raise refuse(setting, folder, f"the folder holds files that are not {whose}; an empty or new folder is needed")


@contextlib.contextmanager
def locked(folder: Path, setting: str = "run.dir") -> Iterator[None]:
    """Keep other commands out of a folder, which is made, for the length of the block. The system ends the lock with the process, whatever ends that.

    Raises RequestError, which names the `setting` that the folder comes from, where another command is at work.
    """
    with os_errors_are_requests(f"cannot use {setting}", folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder, setting)
    os.register_at_fork(after_in_child=handle.close)  # a child that outlives this process must not keep the lock
    with handle:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()


def _lock(folder: Path, setting: str) -> TextIO:
    """The lock file, open and locked, and saying who has it."""
    handle = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 -- the caller closes it
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with handle:
            handle.seek(0)
            who = handle.read() or "another process"
        raise refuse(setting, folder, f"{who} is at work in it; wait for it, or use another {setting}") from error
    except OSError as error:
        say_once(f"{setting}={folder}: its file system has no locks ({error.strerror}): see to it that one command at a time works in it")
    try:
        removed = not os.path.samestat(os.fstat(handle.fileno()), os.stat(folder / LOCK))
    except FileNotFoundError:
        removed = True
    if removed:  # by whoever had it, when it was open here already
        handle.close()
        return _lock(folder, setting)
    handle.truncate(0)
    handle.write(f"process {os.getpid()} on {socket.gethostname()}")
    handle.flush()
    return handle


def at_work(folder: Path) -> str | None:
    """Which process has the run's folder now, None where none has; where locks don't work, nobody can tell."""
    try:
        with open(folder / LOCK, encoding="utf-8") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back at once, with the file
            except BlockingIOError:
                return handle.read() or "another process"
    except OSError:
        pass
    return None


def claim(folder: Path, cfg: Config, verb: str) -> None:
    """See that the folder belongs to a run with these settings; write config.yaml. Raises RequestError naming the first setting that differs.

    Says which settings a training goes on with that it did not begin with.
    """
    if not (folder / RECORD).exists():
        write_json(folder / RECORD, {})
    mine, record = settings_of(cfg, verb, free=False), read_record(folder)
    check_bound(folder, record, cfg, verb)
    write_config(folder / "config.yaml", cfg, verb)
    if VERBS[verb].trains and verb != "search" and (step := trained(folder)):
        before = record.get("train" if verb == "train" else "distill", {"settings": {}})["settings"]
        changed = [f"{name}={shown(mine[name])} (before: {shown(before[name])})" for name in ADJUSTABLE if before.get(name, mine[name]) != mine[name]]
        if changed:
            say_once(f"{', '.join(changed)} from step {step + 1} on")


def check_bound(folder: Path, record: dict[str, Any], cfg: Config, verb: str) -> None:
    """Refuse settings that differ from those of what is done in the folder already; the first of them is named."""
    check_kind(folder, record, verb)
    mine, made_here = settings_of(cfg, verb, free=False), MADE_HERE.get(verb, ())
    for stage, theirs in bound(folder, record):
        for name in sorted(set(mine) & set(theirs)):
            if name not in made_here and mine[name] != theirs[name]:
                made = f"run.dir={folder} belongs to a run whose {stage} was made with {name}={shown(theirs[name])}"
                raise refuse(name, mine[name], f"{made}; use that, or another run.dir")


def check_kind(folder: Path, record: dict[str, Any], verb: str) -> None:
    """Refuse to train a model whole in the folder of a compression, and to compress in the folder of such a training."""
    if verb == "train" and (begun := [stage for stage in COMPRESSION if stage in record]):
        holds = "a pruned model" if is_there(folder, "prune") else f"what minitron {begun[0]} made"
        retrain = "minitron distill retrains the pruned one, with distill.loss=none distill.cross_entropy=1 as this verb would"
        raise refuse("run.dir", folder, f"it holds {holds}, and train is for the whole model of model.path: use another run.dir ({retrain})")
    if verb in COMPRESSION and "train" in record:
        further = "use another run.dir, with what minitron export makes of this one as model.path or teacher.path"
        raise refuse("run.dir", folder, f"it holds a training of the whole model (minitron train): {further}")


def write_config(file: Path, cfg: Config, verb: str) -> None:
    """config.yaml: the settings that this verb reads as they are now, the others as an earlier verb of the run left them."""
    if file.exists():
        earlier = read_settings(file)
        groups = groups_of(verb, cfg)
        cfg = dataclasses.replace(earlier, **{group: newer(getattr(earlier, group), getattr(cfg, group), group, verb) for group in groups})
    write_text(file, to_yaml(cfg))


def read_settings(file: Path) -> Config:
    """The settings of a config.yaml. Raises RequestError, which names the file, where they are none."""
    try:
        return from_yaml(file.read_text(encoding="utf-8"))
    except (RequestError, OSError, ValueError) as error:
        raise RequestError(f"cannot read {file}: {error}") from error


def newer(earlier: Any, now: Any, group: str, verb: str) -> Any:
    """A group, or a setting without one, as it is now as far as the verb reads it."""
    if not dataclasses.is_dataclass(earlier):
        return now
    names = [field.name for field in dataclasses.fields(earlier) if reads(verb, f"{group}.{field.name}")]
    return dataclasses.replace(earlier, **{name: getattr(now, name) for name in names})  # type: ignore[type-var]
