"""An open run: its processes, its folder, its models and data. What every stage starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import minitron
from minitron import engine
from minitron.config.build import from_yaml, to_yaml
from minitron.config.schema import MISSING, Config
from minitron.config.verbs import VERBS
from minitron.data.manifest import Manifest
from minitron.data.sources import check_source
from minitron.errors import RequestError, refuse
from minitron.files import os_errors_are_requests, read_json, sha256, write_json, write_text
from minitron.pruning.target import check_layers_by, target_arch
from minitron.reporting.console import counter
from minitron.weights.load import load
from minitron.weights.source import Source, convert_gguf, fetch, locate, open_folder

RECORD = "stages.json"
# settings that may differ between two commands on one run: where and how it runs, not what it makes
FREE = ("run", "parallel", "eval", "logging", "device", "spec")
FREE_NAMES = ("data.workers", "calibrate.micro_batch_size", "train.micro_batch_size", "distill.chunk_tokens", "train.save_interval",
              "train.eval_interval", "train.eval_tokens")  # fmt: skip
ORDER = ("data", "calibrate", "prune", "distill", "evaluate", "export")  # each stage reads what those before it made


@dataclasses.dataclass
class Session:
    """One command's view of a run. Paths of artifacts are properties here, so that no stage spells them."""

    cfg: Config
    world: engine.World
    folder: Path

    @property
    def dtype(self) -> Any:
        """torch's type of weights and activations."""
        return engine.DTYPES[self.cfg.dtype]

    @property
    def pruned(self) -> Path:
        """The pruned model."""
        return self.folder / "pruned"

    @property
    def checkpoints(self) -> engine.Checkpoints:
        """The student's checkpoints."""
        return engine.Checkpoints(self.folder / "checkpoints")

    @functools.cached_property
    def source(self) -> Source:
        """The model to compress, checked; a .gguf is converted once, a hub id fetched once."""
        return self._open(self.cfg.model.path, "model.path", "source")

    @functools.cached_property
    def teacher_source(self) -> Source:
        """The teacher, checked: the model that is compressed unless teacher.path says otherwise."""
        if self.cfg.teacher.path is None:
            return self.source
        return self._open(self.cfg.teacher.path, "teacher.path", "teacher_source")

    def _open(self, path: str, setting: str, name: str) -> Source:
        found = locate(path, setting)
        if found.endswith(".gguf"):
            folder = self.folder / name
            return engine.on_main(self.world, lambda: self._converted(Path(found), folder, setting))
        if not Path(found).is_dir():
            found = str(engine.on_main(self.world, lambda: fetch(found, setting)))
        return open_folder(Path(found), setting)

    def _converted(self, gguf: Path, folder: Path, setting: str) -> Source:
        if not folder.is_dir():
            convert_gguf(gguf, folder, self.cfg.dtype)
        return open_folder(folder, setting)

    @functools.cached_property
    def data(self) -> Manifest:
        """The run's tokens, prepared on first use by rank 0."""
        from minitron.data.prepare import SPLITS, prepare  # a dataset file: with Megatron, like the engine

        cfg, source = self.cfg, self.source  # opened by every rank together, before rank 0 goes to work alone
        splits = SPLITS if cfg.data.train != MISSING else [split for split in SPLITS if getattr(cfg.data, split) not in (None, MISSING)]

        def make() -> Manifest:
            return prepare(
                cfg.data,
                source.folder,
                self.folder / "data",
                seed=cfg.seed,
                splits=splits,
                texts=cfg.eval.texts,
                vocab_size=source.arch.vocab_size,
                on_progress=counter("tokenise", cfg.logging.progress),
            )

        return engine.on_main(self.world, make)

    def load_source(self) -> engine.Model:
        """A fresh copy of the model to compress, this rank's shard."""
        return load(self.source, self.world, self.dtype)

    @functools.cached_property
    def teacher(self) -> engine.Model:
        """The teacher, this rank's shard, without gradients; kept for the rest of the command."""
        model = load(self.teacher_source, self.world, self.dtype, engine.pick_spec(self.cfg.spec, self.teacher_source.arch, self.world))
        model.requires_grad_(False)
        return model

    def load_pruned(self) -> engine.Model:
        """The pruned model, before any retraining."""
        if not engine.on_main(self.world, self.pruned.is_dir):
            raise refuse("run.dir", self.folder, "there is no pruned model here; minitron prune makes it")
        return self._load(self.pruned)

    def load_student(self) -> engine.Model:
        """The student of the newest checkpoint."""
        step = engine.on_main(self.world, self.checkpoints.latest)
        if step is None:
            raise refuse("run.dir", self.folder, "there is no checkpoint here; minitron distill makes them")
        return self._load(self.checkpoints.path(step))

    def _load(self, folder: Path) -> engine.Model:
        return engine.load_model(folder, self.world, self.dtype, engine.pick_spec(self.cfg.spec, self.source.arch, self.world))

    def is_done(self, verb: str, artifact: str) -> bool:
        """Whether this run finished a stage with the settings and inputs it has now, and `artifact` is still there. The same on every rank."""

        self.source  # noqa: B018 -- opened by every rank together

        def look() -> bool:
            entry = read_json(self.folder / RECORD).get(verb, {})
            same = entry.get("settings") == settings_of(self.cfg, verb, free=True) and entry.get("inputs") == self.inputs(verb)
            return bool(entry.get("done")) and same and (self.folder / artifact).exists()

        return engine.on_main(self.world, look)

    def inputs(self, verb: str) -> dict[str, str]:
        """Fingerprints of what a stage starts from, as they are now."""
        found = {"model": self.source.fingerprint()}
        manifest = Manifest.load(self.folder / "data")
        for split, parts in sorted(manifest.splits.items()):
            if not split.startswith("text_") or verb == "evaluate":
                found[split] = "-".join(manifest.parts[name].sha256["bin"][:16] for name, _ in parts)
        return found

    def mark(self, verb: str, done: bool) -> None:
        """Note that a stage began, or that it is finished, on rank 0. What was made from an earlier result of it is out of date."""

        self.source  # noqa: B018 -- opened by every rank together

        def note() -> None:
            record = read_json(self.folder / RECORD)
            later = ORDER[ORDER.index(verb) + 1 :] if verb != "evaluate" else ()
            for name in later:
                if name in record and not done:
                    record[name]["done"] = False
            entry = {"settings": settings_of(self.cfg, verb, free=True), "done": done, "version": minitron.__version__}
            record[verb] = {**entry, "inputs": self.inputs(verb) if done else {}}
            write_json(self.folder / RECORD, record)

        engine.on_main(self.world, note)

    def check_descent(self) -> None:
        """Refuse checkpoints that were trained from another pruned model than the one that is here now."""
        file, fingerprint = self.checkpoints.folder / "pruned_from", self.source.fingerprint()

        def look() -> None:
            mine = sha256(self.folder / "keep.safetensors")[:16] + "-" + fingerprint
            if self.checkpoints.latest() is None:
                write_text(file, mine + "\n")
            elif not file.exists() or file.read_text().strip() != mine:
                raise refuse(
                    "run.dir", self.folder, "its checkpoints were trained from another pruned model; remove checkpoints/ or use another run.dir"
                )

        engine.on_main(self.world, look)


def settings_of(cfg: Config, verb: str, free: bool) -> dict[str, Any]:
    """The settings that decide what a verb makes, by full name; with `free`, also `eval`, which decides what evaluate reports."""
    tree = dataclasses.asdict(cfg)
    groups = [group for group in VERBS[verb].groups if group not in FREE or (free and group == "eval")]
    return {name: value for name, value in flat({group: tree[group] for group in groups}).items() if name not in FREE_NAMES}


@contextlib.contextmanager
def session(cfg: Config, verb: str) -> Iterator[Session]:
    """Open a run: refuse what can't be done before any weight is read, then start the processes and claim the folder."""
    check(cfg, verb)
    with engine.world(cfg.parallel, cfg.device, cfg.seed) as here:
        opened = Session(cfg, here, Path(cfg.run.dir))
        engine.on_main(here, lambda: claim(opened.folder, cfg, verb))
        if "target" in VERBS[verb].groups:
            target_arch(opened.source.arch, cfg.target, cfg.parallel)  # what had to be fetched or converted first
        yield opened


def check(cfg: Config, verb: str) -> None:
    """Everything about a request that can be told without processes: paths and texts."""
    groups = VERBS[verb].groups
    if "model" in groups and Path(found := locate(cfg.model.path, "model.path")).is_dir():
        arch = open_folder(Path(found), "model.path").arch
        if "target" in groups:
            pruned = target_arch(arch, cfg.target, cfg.parallel, exported=verb == "compress")
            check_layers_by(arch, pruned, cfg.target, cfg.calibrate.skip_layers)
        if "calibrate" in groups and cfg.calibrate.skip_layers is not None and cfg.calibrate.skip_layers >= arch.num_layers:
            raise refuse("calibrate.skip_layers", cfg.calibrate.skip_layers, f"fewer than the model's {arch.num_layers} layers are needed")
    if "teacher" in groups and cfg.teacher.path is not None:
        locate(cfg.teacher.path, "teacher.path")
    for name, ranks in (("tp", cfg.teacher.parallel.tp), ("pp", cfg.teacher.parallel.pp)):
        if "teacher" in groups and ranks not in (None, getattr(cfg.parallel, name)):
            raise refuse(f"teacher.parallel.{name}", ranks, f"only null or parallel.{name}={getattr(cfg.parallel, name)} is supported")
    if "data" in groups:
        for name in ("train", "valid", "calibration"):
            if (spec := getattr(cfg.data, name)) not in (None, MISSING):
                check_source(spec, f"data.{name}", cfg.data.text_key, cfg.data.split)
    if "eval" in groups:
        for name, spec in cfg.eval.texts.items():
            check_source(spec, f"eval.texts.{name}", cfg.data.text_key, cfg.data.split)
    check_lengths(cfg, groups)


def check_lengths(cfg: Config, groups: tuple[str, ...]) -> None:
    """Sequences that divide by the ranks that share them, and steps that divide by the replicas."""
    layout = cfg.parallel
    ways = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)
    for name, length in (("calibrate", cfg.calibrate.seq_length), ("train", cfg.train.seq_length), ("eval", cfg.eval.seq_length)):
        if name in groups and length is not None and length % ways:
            allowed = (
                f"must be divisible by {ways}: 2 x parallel.cp={layout.cp} where that is above 1, times parallel.tp={layout.tp} with parallel.sp"
            )
            raise refuse(f"{name}.seq_length", length, allowed)
    if "train" in groups:
        replicas = int(os.environ.get("WORLD_SIZE", "1")) // (layout.tp * layout.pp * layout.cp)
        per_step = cfg.train.micro_batch_size * replicas * (layout.pp if layout.vpp > 1 else 1)
        if per_step and cfg.train.global_batch_size % per_step:
            stages = f" x parallel.pp={layout.pp}, as parallel.vpp needs it," if layout.vpp > 1 else ""
            raise refuse(
                "train.global_batch_size", cfg.train.global_batch_size, f"must be divisible by micro_batch_size x replicas{stages} = {per_step}"
            )


def claim(folder: Path, cfg: Config, verb: str) -> None:
    """Make the run's folder, or see that it belongs to this run; write config.yaml. Raises RequestError naming the first setting that differs."""
    with os_errors_are_requests("cannot use run.dir", folder):
        folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / RECORD
    if not record_file.exists():
        if any(path.name != RECORD for path in folder.iterdir() if not path.name.startswith(".")):
            raise refuse("run.dir", folder, "the folder holds files that are not a run's; an empty or new folder is needed")
        write_json(record_file, {})
    mine = settings_of(cfg, verb, free=False)
    for stage, entry in read_json(record_file).items():
        theirs = entry["settings"]
        for name in sorted(set(mine) & set(theirs)):
            if mine[name] != theirs[name]:
                raise refuse(name, mine[name], f"run.dir={folder} belongs to a run whose {stage} has {theirs[name]!r}; use that, or another run.dir")
    write_config(folder / "config.yaml", cfg, verb)


def write_config(file: Path, cfg: Config, verb: str) -> None:
    """config.yaml: the settings of this verb's groups as they are now, the others as an earlier verb of the run left them."""
    if file.exists():
        earlier = from_yaml(file.read_text(encoding="utf-8"))
        cfg = dataclasses.replace(earlier, **{group: getattr(cfg, group) for group in VERBS[verb].groups})
    write_text(file, to_yaml(cfg))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves


@contextlib.contextmanager
def stop_on_signal(here: engine.World) -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM and SIGUSR1 ask for a stop; the yielded function tells, the same on every rank, whether one did."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda number, frame: seen.append(number)) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: engine.any_rank(bool(seen), here)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def need(path: Path, verb: str) -> Path:
    """A file that an earlier stage makes; refused with that stage's name where it is absent."""
    if not path.exists():
        raise RequestError(f"{path} is not there; minitron {verb} makes it")
    return path
