"""What one rank finds where it runs, to be held against what the others find: software, devices, memory, files, the run's folder.

Cheap by intent: nothing large is read and Megatron is not imported. What can't be found is told as such, and judged by rank 0 (verdict.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import platform
import runpy
import shutil
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import minitron
from minitron.config.schema import Config
from minitron.config.setting import MISSING
from minitron.config.verbs import groups_of
from minitron.data import sources
from minitron.errors import RequestError
from minitron.files import fsync_path
from minitron.weights.source import locate

MODEL_FILES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".gguf")
MOST_FILES = 64  # of a source that are looked into; of the rest the names count
WHOLE, BLOCKS, BLOCK = 1 << 20, 8, 4096  # files up to WHOLE bytes are read, of larger ones so many blocks of so many bytes
TO_APPEAR = 5.0  # seconds that a file may take to be seen on another host
CGROUPS = Path("/sys/fs/cgroup")


@dataclasses.dataclass
class Card:
    """What a rank tells of itself. Bytes are whole numbers; `leads`: it speaks for its host's files."""

    host: str
    machine: str = ""  # what tells hosts of one name apart
    leads: bool = True
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)  # those that are not the defaults, by full name
    faults: list[str] = dataclasses.field(default_factory=list)  # what it refuses by itself
    passing: list[str] = dataclasses.field(default_factory=list)  # what is wrong with it, but may not be another time
    device: str = ""
    gpu: str = ""
    gpus: int = 0  # visible
    device_bytes: int = 0
    device_free: int = 0
    host_bytes: int = 0
    host_free: int = 0
    files: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)  # setting -> file -> size and quick fingerprint
    sees: bool | None = None  # rank 0's file in run.dir; None: it did not look
    not_writable: str = ""  # why it can't write into run.dir
    disk_free: int | None = None  # where run.dir is; told by rank 0

    def dump(self) -> str:
        """As text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def load(cls, text: str) -> Card:
        """The card of a text, which another version may have written."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in json.loads(text).items() if name in names})


def machine() -> str:
    """What the running system is known by."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def versions() -> dict[str, str]:
    """Of everything that ranks must have alike. Packages that are absent are so called."""
    found = {
        "minitron": minitron.__version__,
        "minitron's own files": own_files(),
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": megatron(),
        "transformers": installed("transformers"),
        "Transformer Engine": installed("transformer-engine"),
        "CUDA": torch.version.cuda or "absent",
    }
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def own_files() -> str:
    """A hash of this package's code, which may be a checkout that has changed since its version was set."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)} ".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def installed(name: str) -> str:
    """A package's version."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def megatron() -> str:
    """The version of the megatron.core that an import would take, be it installed or a checkout on the path."""
    with contextlib.suppress(ImportError):
        spec = importlib.util.find_spec("megatron.core")  # imports no more than the empty package above
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (info := Path(folder, "package_info.py")).is_file():
                return str(runpy.run_path(str(info)).get("__version__", "unknown"))
    return "absent"


def devices(card: Card, device: torch.device) -> None:
    """Note what the device is and has, and the host."""
    card.device = device.type
    card.host_bytes, card.host_free = host_memory()
    if device.type == "cuda":
        card.gpus = torch.cuda.device_count()
        if device.index is not None and device.index < card.gpus:
            card.gpu = torch.cuda.get_device_name(device)
            card.device_free, card.device_bytes = torch.cuda.mem_get_info(device)


def host_memory() -> tuple[int, int]:
    """(bytes that the processes here may have together, bytes of them that are free now): the machine's, or less where a cgroup says so."""
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    told = {name: int(rest.split()[0]) << 10 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = told.get("MemTotal", 0), told.get("MemAvailable", 0)
    for limit, used in cgroup_limits():
        total, free = min(total, limit), min(free, max(0, limit - used))
    return total, free


def cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use) of each cgroup that this process is in, and that has a limit. Caches that would make room count as in use."""
    with contextlib.suppress(OSError, ValueError):
        mine = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
        # the second version has one tree, the first one for each kind; a container sees its own as the root
        for tree, path, limit, used in (
            (CGROUPS, mine.get("", "/"), "memory.max", "memory.current"),
            (CGROUPS / "memory", mine.get("memory", "/"), "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            folder = tree / path.lstrip("/")
            for place in (folder, *folder.parents):
                if place.is_relative_to(tree) and (place / limit).is_file() and (most := (place / limit).read_text().strip()) != "max":
                    yield int(most), int((place / used).read_text())


def local_files(cfg: Config, verb: str) -> Iterator[tuple[str, Path, list[Path]]]:
    """(setting, folder that names are told from, files) of what this machine must have: models, tokenizers, texts. What is nowhere to be found
    here is left to those who refuse it; what comes from a hub is not here."""
    groups = groups_of(verb, cfg)
    models = [("model.path", cfg.model.path)] if "model" in groups else []
    models += [("teacher.path", cfg.teacher.path)] if "teacher" in groups and cfg.teacher.path is not None else []
    for setting, given in models:
        with contextlib.suppress(RequestError):
            found = Path(locate(given, setting))
            if found.is_dir():
                yield setting, found, sorted(file for file in found.iterdir() if file.suffix in MODEL_FILES and file.is_file())
            elif found.is_file():
                yield setting, found.parent, [found]
    texts = [(f"data.{name}", getattr(cfg.data, name)) for name in ("train", "valid", "calibration")] if "data" in groups else []
    texts += [(f"eval.texts.{name}", spec) for name, spec in cfg.eval.texts.items()] if "eval" in groups else []
    for setting, spec in texts:
        for _, given in sources.blend(spec, setting) if spec not in (None, MISSING) else ():
            with contextlib.suppress(RequestError):
                if files := sources.locate(given, setting).files:
                    yield setting, Path(os.path.commonpath([file.absolute().parent for file in files])), [file.absolute() for file in files]


def fingerprints(cfg: Config, verb: str) -> dict[str, dict[str, str]]:
    """Of each setting that names files here: their names, sizes and quick fingerprints."""
    found: dict[str, dict[str, str]] = {}
    for setting, folder, files in local_files(cfg, verb):
        its = found.setdefault(setting, {})
        its |= {str(file.relative_to(folder)): fingerprint(file) for file in files[:MOST_FILES]}
        if rest := files[MOST_FILES:]:
            names = hashlib.sha256("\n".join(str(file.relative_to(folder)) for file in rest).encode()).hexdigest()[:8]
            its[f"{len(rest)} more"] = f"names {names}"
    return found


def fingerprint(file: Path) -> str:
    """Size, and a hash of blocks spread over a file, or of all of a small one."""
    try:
        size, digest = file.stat().st_size, hashlib.sha256()
        with open(file, "rb") as handle:
            for block in range(BLOCKS if size > WHOLE else 0):
                handle.seek((size - BLOCK) * block // (BLOCKS - 1))
                digest.update(handle.read(BLOCK))
            if size <= WHOLE:
                digest.update(handle.read())
    except OSError as error:
        return f"not readable ({error.strerror})"
    return f"{size} bytes, hash {digest.hexdigest()[:8]}"


@contextlib.contextmanager
def left_in(folder: Path, name: str, card: Card) -> Iterator[None]:
    """Rank 0's file in run.dir, for the others to find, for the length of the block; folders that were made for it go again if the block raises.

    The card says why, where it can't be written.
    """
    made: list[Path] = []
    try:
        try:
            made += [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / name)
            card.disk_free = shutil.disk_usage(folder).free
        except OSError as error:
            card.not_writable = error.strerror or str(error)
        yield
    except BaseException:
        remove(folder, name)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    remove(folder, name)


def remove(folder: Path, name: str) -> None:
    """Take rank 0's file away, and the answers to it."""
    withdraw(folder / name)
    with contextlib.suppress(OSError):
        for file in folder.glob(f"{name}.*"):
            withdraw(file)


def write(file: Path) -> None:
    """A file that holds its own name, down to the disk."""
    file.write_text(file.name)
    fsync_path(file)
    fsync_path(file.parent)


def unanswered(folder: Path, name: str, ranks: list[int]) -> list[int]:
    """The ranks that looked for rank 0's file and whose answers are not beside it."""
    until = time.monotonic() + TO_APPEAR
    return [rank for rank in ranks if not seen(answer(folder, name, rank), until)]


def answer_in(folder: Path, name: str, rank: int, card: Card) -> None:
    """Look for rank 0's file in run.dir, and leave an answer beside it. `name`: "" where rank 0 could leave none."""
    card.sees = seen(folder / name, time.monotonic() + TO_APPEAR) if name else None
    try:
        if folder.is_dir():
            write(answer(folder, name, rank))
    except OSError as error:
        card.not_writable = error.strerror or str(error)


def answer(folder: Path, name: str, rank: int) -> Path:
    """A rank's answer to rank 0's file, or the file that it tries to write where there is none."""
    return folder / f"{name or '.start'}.{rank}"


def withdraw(file: Path) -> None:
    """Take a file away, if it is there."""
    with contextlib.suppress(OSError):
        file.unlink()


def seen(file: Path, until: float) -> bool:
    """Whether a file comes to be seen here, with what is in it; file systems of networks take their time."""
    while True:
        with contextlib.suppress(OSError):
            os.listdir(file.parent)  # has the folder asked for again where its entries are remembered
            if file.read_text() == file.name:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
