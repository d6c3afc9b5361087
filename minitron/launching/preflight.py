"""Everything that can be told of a run before it begins, looked at by every rank at once and held together by rank 0.

One report: on all ranks the same refusal, which rank 0 says, a line for each fault with the hosts and ranks that it is about. Ranks tell one
another through the store where they meet: groups are only made (engine/joining.py, where they are tried) once versions and settings agree.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.axes import count_parameters
from minitron.arch.families import from_hf
from minitron.config.layout import check_layout
from minitron.config.schema import Config
from minitron.config.setting import flat
from minitron.config.verbs import VERBS
from minitron.errors import RequestError, first_line, say_once
from minitron.files import os_errors_are_requests, read_json
from minitron.launching.memory import BYTES, memory
from minitron.launching.site import Card, answer, answer_in, devices, fingerprints, left_in, machine, unanswered, versions, withdraw
from minitron.launching.storage import existing
from minitron.launching.verdict import Heard, Needs, disk, faults, remarks
from minitron.launching.verdict import memory as too_large
from minitron.pruning.target import target_arch
from minitron.weights.source import config_without_weights

TOPIC, WORD = "preflight", "word"


class Ready(NamedTuple):
    """What rank 0 says when all is well."""

    hosts: int
    ranks: int
    began: float

    def __str__(self) -> str:
        hosts = f"{self.hosts} host{'s' * (self.hosts > 1)}"
        return f"{hosts}, {self.ranks} ranks: looked at and in reach of one another after {time.monotonic() - self.began:.1f} s"


def preflight(cfg: Config, verb: str, check: Callable[[], None]) -> Ready | None:
    """Look at everything that can be told before processes join; `check` is what each of them refuses by itself. Called by every rank.

    None of a process that is alone, which has nobody to agree with: of it memory and disk are looked at, and its own refusals are raised as they
    are. Raises RequestError, the same one on every rank of several.
    """
    began, size, rank = time.monotonic(), int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    check_layout(cfg.parallel, size)
    if size == 1:
        check()
        judge_alone(cfg, verb)
        return None
    roll, mine, hosts = engine.Roll(cfg.parallel.start_minutes), new_card(cfg, verb), list[str]()
    folder, name = Path(cfg.run.dir), f".start-{secrets.token_hex(4)}"

    def judge(words: list[str | None]) -> list[str]:
        cards = [None if word is None else Card.load(word) for word in words]
        lost = unanswered(folder, name, [number for number, card in enumerate(cards) if card is not None and card.sees])
        heard = Heard(cards, cfg, needs(cfg, verb, size, mine.device or None), lost, given_nodes() if None in cards else [])
        hosts.extend(heard.by_host)
        found = faults(heard)
        for line in remarks(heard) if not found else ():
            say_once(line)
        return found

    with contextlib.ExitStack() as left:
        if rank == 0:
            left.enter_context(left_in(folder, name, mine))
            roll.tell(WORD, "" if mine.not_writable else name)
        try:
            fill(mine, cfg, verb, check)
            if rank and mine.leads:
                word = roll.hear(WORD)
                left.callback(withdraw, answer(folder, word, rank))
                answer_in(folder, word, rank, mine)
        except BaseException as error:
            mine.passing.append(f"{type(error).__name__}: see what is said there")
            roll.fail(TOPIC, mine.dump(), f"rank 0 on {mine.host} failed before the run began: see what it said")
            raise
        roll.settle(TOPIC, mine.dump(), judge)
    return Ready(len(hosts), size, began)


def new_card(cfg: Config, verb: str) -> Card:
    """What a rank can say of itself at once."""
    given = flat(dataclasses.asdict(cfg))
    usual = flat(dataclasses.asdict(Config()))
    differing = {name: value for name, value in given.items() if name not in usual or usual[name] != value}
    return Card(engine.host_name(), machine(), os.environ.get("LOCAL_RANK", "0") == "0", versions(), {"verb": verb, **differing})


def fill(card: Card, cfg: Config, verb: str, check: Callable[[], None]) -> None:
    """What takes a rank a moment: its own refusals, the engine, the device, its host's files. A defect is told too, before it is raised."""
    try:
        check()
        import_engine()
        devices(card, engine.pick_device(cfg.device))
    except RequestError as error:
        (card.passing if error.passing else card.faults).append(str(error))
    except ImportError as error:
        card.faults.append(unusable(error))
    several = os.environ.get("LOCAL_WORLD_SIZE") != os.environ["WORLD_SIZE"]
    if card.leads and several:
        card.files = fingerprints(cfg, verb)


def import_engine() -> None:
    """Import what the run will stand on. Raises RequestError where that can't be."""
    try:
        engine.World  # noqa: B018 -- its module brings Megatron
    except Exception as error:  # of another library's import: whatever a broken installation raises
        raise RequestError(unusable(error)) from error


def unusable(error: BaseException) -> str:
    """One line on software that is not there, or not whole."""
    return f"the installation is not usable: {type(error).__name__}: {first_line(error)}"


def judge_alone(cfg: Config, verb: str) -> None:
    """Of a process without others that trains: memory and disk. Raises RequestError."""
    if VERBS[verb].trains:
        mine = Card(engine.host_name())
        devices(mine, engine.pick_device(cfg.device))
        folder = existing(Path(cfg.run.dir).absolute())
        with os_errors_are_requests("cannot look at", folder):
            mine.disk_free = shutil.disk_usage(folder).free
        heard = Heard([mine], cfg, needs(cfg, verb, 1, mine.device))
        for line in (*too_large(heard), *disk(heard)):
            raise RequestError(line)
        for line in remarks(heard):
            say_once(line)


def needs(cfg: Config, verb: str, ranks: int, device: str | None) -> Needs:
    """What a verb's training takes, as far as its models' sizes are known by now: those of a search are not, nor is a .gguf file opened for it."""
    try:
        student, teacher = models(cfg, verb)
        held = memory(student, teacher, cfg, ranks, device) if student is not None else []
        first = not any((Path(cfg.run.dir) / "checkpoints").glob("step_*"))
    except (RequestError, OSError):  # each rank says it itself
        return Needs()
    if student is None:
        return Needs()
    train = cfg.train
    copies = train.keep_last + 2 + (train.steps // train.keep_every if train.keep_every else 0)  # the best one, and the one that is written
    checkpoint = (BYTES[cfg.dtype] + 12) * count_parameters(student)  # fp32 weights and moments too, whatever dtype is
    return Needs(held, checkpoint if first else 0, copies)


def models(cfg: Config, verb: str) -> tuple[Arch | None, Arch | None]:
    """(what a verb trains, who teaches it in every step): None where there is none, or its sizes are not known yet."""
    if not VERBS[verb].trains or verb == "search" or cfg.search.budgets or cfg.model.path.endswith(".gguf"):
        return None, None
    whole = sizes(cfg.model.path, "model.path")
    if verb == "train":
        return whole, None
    pruned = Path(cfg.run.dir) / "pruned" / "arch.json"
    if verb == "compress":
        student = target_arch(whole, cfg.target, cfg.parallel)
    elif pruned.is_file():
        student = Arch.from_dict(read_json(pruned))
    else:
        return None, None
    if cfg.distill.loss == "none" or cfg.teacher.cache.folder is not None:
        return student, None
    other = cfg.teacher.path
    if other is not None and other.endswith(".gguf"):
        return None, None
    return student, whole if other is None else sizes(other, "teacher.path")


def sizes(path: str, setting: str) -> Arch:
    """Of a model, from its config.json."""
    return from_hf(config_without_weights(path, setting), f"{setting}={path}: config.json")


def given_nodes() -> list[str]:
    """The names of the hosts that SLURM gave, where it can be asked."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if listed is None or shutil.which("scontrol") is None:
        return []
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, timeout=10)
        return asked.stdout.split()
    return []
