"""An open run: its processes, its folder, its models and data. What every stage starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import minitron
from minitron import engine
from minitron.arch.arch import Arch
from minitron.checks import (
    candidate_archs,
    check,
    check_hidden,
    check_model,
    check_teacher,
    check_texts,
    check_tokenizers,
    loads_teacher,
    measures_speed,
    remarks,
    searches,
    training_remarks,
)
from minitron.config.schema import Config
from minitron.config.setting import MISSING
from minitron.config.verbs import VERBS
from minitron.data.manifest import Manifest
from minitron.distillation.cache import Description, settled
from minitron.errors import RequestError, Stopped, refuse, say_once
from minitron.evaluation.speed import engines
from minitron.evaluation.tasks import Tasks
from minitron.evaluation.tasks import load as load_tasks
from minitron.files import read_object, sha256, write_json, write_text
from minitron.launching.preflight import preflight
from minitron.pruning.target import target_arch
from minitron.record import ADJUSTABLE, ARTIFACTS, RECORD, claim, is_there, locked, made_with, own, read_record, settings_of, trained
from minitron.reporting.console import counter, say
from minitron.search.ladder import trial
from minitron.weights.load import load
from minitron.weights.source import Source, convert_gguf, fetch, locate, open_folder

if TYPE_CHECKING:
    from minitron.data.corpus import TrainingSamples

STOPPING = (signal.SIGTERM, signal.SIGUSR1)  # by hand or from a scheduler: what runs is to end


@dataclasses.dataclass
class Session:
    """One command's view of a run. Paths of artifacts are properties here, so that no stage spells them."""

    cfg: Config
    verb: str
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

    @functools.cached_property
    def checkpoints(self) -> engine.Checkpoints:
        """The student's checkpoints."""
        train = self.cfg.train
        return engine.Checkpoints(self.folder / "checkpoints", train.keep_last, train.keep_every, train.async_save)

    def chosen(self) -> int | None:
        """The step of the checkpoint that run.checkpoint asks for, read and found whole; None where nothing was trained yet. Called by every rank
        together. Raises RequestError where there is none such."""
        return self.checkpoints.choose(self.cfg.run.checkpoint, self.world)

    @functools.cached_property
    def source(self) -> Source:
        """The model to compress, checked; a .gguf is converted once, a hub id fetched once. `session` opens it on every rank together, so
        that what rank 0 does alone may read it."""
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
        return self._on_every_host(lambda: open_folder(Path(found), setting))

    def _on_every_host(self, action: Callable[[], Source]) -> Source:
        """What each rank does by itself, given up by all where one is refused: what was fetched may not be there on every host."""
        result, failure = None, None
        try:
            result = action()
        except RequestError as error:
            failure = f"{error} [on {engine.host_name()}]" if self.world.size > 1 else str(error)
        engine.refuse_together(failure, self.world)
        assert result is not None
        return result

    def _converted(self, gguf: Path, folder: Path, setting: str) -> Source:
        """The run's conversion, made anew where it is of another file, or of another type and this verb reads weights."""
        note, stat = folder.with_name(f"{folder.name}.json"), gguf.stat()
        mine = {"file": str(gguf.resolve()), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "dtype": self.cfg.dtype}
        there = read_object(note) if note.exists() and folder.is_dir() else {}
        if any(there.get(key) != value for key, value in mine.items() if key != "dtype" or "dtype" in VERBS[self.verb].groups):
            convert_gguf(gguf, folder, self.cfg.dtype)
            write_json(note, mine)
        return open_folder(folder, setting)

    @functools.cached_property
    def data(self) -> Manifest:
        """The run's tokens, prepared on first use by rank 0; refused where they are too few for what this verb reads."""
        from minitron.data.prepare import SPLITS, prepare  # a dataset file: with Megatron, like the engine

        cfg, source = self.cfg, self.source
        splits = SPLITS if cfg.data.train != MISSING else [split for split in SPLITS if getattr(cfg.data, split) not in (None, MISSING)]

        def make() -> Manifest:
            with counter("tokenise", cfg.logging.progress) as count:
                manifest = prepare(
                    cfg.data,
                    source.folder,
                    self.folder / "data",
                    seed=cfg.seed,
                    splits=splits,
                    texts=cfg.eval.texts,
                    vocab_size=source.arch.vocab_size,
                    on_progress=count,
                )
            check_texts(cfg, self.verb, manifest)
            return manifest

        return engine.on_main(self.world, make)

    @functools.cached_property
    def training_samples(self) -> TrainingSamples:
        """What a training reads, in its order; the order is made once for all ranks."""
        from minitron.data.corpus import TrainingSamples

        train = self.cfg.train
        return TrainingSamples(
            self.data.blend("train"), train.seq_length, train.steps * train.global_batch_size, self.cfg.seed, self.folder / "data" / "order",
            once=lambda make: engine.on_main(self.world, make), packing=self.cfg.data.packing, separate=self.cfg.data.separate_documents,
            prompts=self.cfg.data.prompt_key is not None,
        )  # fmt: skip

    @functools.cached_property
    def tasks(self) -> Tasks | None:
        """The benchmark tasks of eval.tasks with their data, on rank 0 alone; None where there are none. Asked for by every rank together."""
        if self.cfg.eval.tasks is None:
            return None
        positions = min(source.arch.max_position_embeddings for source in (self.source, self.teacher_source))  # the teacher is asked as well
        return engine.main_only(self.world, lambda: load_tasks(self.cfg.eval, positions))

    @property
    def cache_folder(self) -> Path:
        """Where the teacher's cached predictions are made."""
        named = self.cfg.teacher.cache.folder
        return self.folder / "cache" if named is None else Path(named).expanduser()

    def cache_description(self) -> Description:
        """What a cache for this run's training holds."""
        cfg, rows = self.cfg, self.data.splits["train"]
        hashes = [[self.data.parts[name].sha256[ending] for ending in ("bin", "idx")] for name, _ in rows]
        texts = [hashes, [weight / sum(weight for _, weight in rows) for _, weight in rows]]
        return Description(
            teacher=self.teacher_source.fingerprint(),
            data=hashlib.sha256(repr(texts).encode()).hexdigest()[:16],
            vocab_size=self.teacher_source.arch.vocab_size,
            **settled(cfg),
        )

    def trial(self, number: int) -> Session:
        """This open run with the settings of a search's short distillations (`search.ladder.trial`); processes, models and text are the same ones."""
        other = dataclasses.replace(self, cfg=trial(self.cfg, number))
        shared = ("source", "teacher_source", "teacher_world", "teacher", "data")
        other.__dict__.update({name: self.__dict__[name] for name in shared if name in self.__dict__})
        return other

    def load_source(self) -> engine.Model:
        """A fresh copy of the model to compress, this rank's shard."""
        return load(self.source, self.world, self.dtype)

    @functools.cached_property
    def teacher_world(self) -> engine.World:
        """The teacher's layout of the processes: `world` itself unless teacher.parallel says otherwise. Asked for by every rank together."""
        layout = self.cfg.teacher_parallel
        return self.world if layout == self.cfg.parallel else engine.beside(self.world, layout)

    @functools.cached_property
    def teacher(self) -> engine.Model:
        """The teacher, this rank's shard in `teacher_world`, without gradients; kept for the rest of the command."""
        world, source = self.teacher_world, self.teacher_source
        model = load(source, world, self.dtype, self.spec(source.arch))
        model.requires_grad_(False)
        if self.cfg.teacher.offload and world.device.type == "cuda":
            model.offload(world.device)
        return model

    def load_whole(self) -> engine.Model:
        """The model of model.path as it is trained."""
        return load(self.source, self.world, self.dtype, self.spec(), self.cfg.train.recompute)

    def load_pruned(self) -> engine.Model:
        """The pruned model, before any retraining."""
        if not engine.on_main(self.world, self.pruned.is_dir):
            raise refuse("run.dir", self.folder, "there is no pruned model here; minitron prune makes it")
        engine.check_whole(self.pruned, self.world)
        return self._load(self.pruned)

    def load_student(self) -> engine.Model:
        """The student of the checkpoint that run.checkpoint asks for."""
        step = self.chosen()
        if step is None:
            raise refuse("run.dir", self.folder, "there is no checkpoint here; minitron distill makes them, or minitron train")
        return self._load(self.checkpoints.path(step))

    def _load(self, folder: Path) -> engine.Model:
        return engine.load_model(folder, self.world, self.dtype, self.spec(), self.cfg.train.recompute)

    def spec(self, arch: Arch | None = None) -> str:
        """The spec that models of this kind, that of the model to compress or of `arch`, are trained and evaluated with.

        Raises RequestError where what is asked for can't be had.
        """
        separate = self.cfg.data.separate_documents and (VERBS[self.verb].trains or self.verb == "cache")
        return engine.pick_spec(self.cfg.spec, self.world, arch or self.source.arch, separate)

    def is_whole(self) -> bool:
        """Whether the folder is that of a model trained whole (`train`), not of a compression."""
        return "train" in read_record(self.folder)

    def is_done(self, verb: str) -> bool:
        """Whether this run finished a stage with the settings and inputs it has now, and what it made is still there. The same on every rank."""

        def look() -> bool:
            entry = read_record(self.folder).get(verb, {})
            theirs, mine = made_with(entry, verb), settings_of(self.cfg, verb, free=True)
            if verb == "search" and trained(self.folder):  # what a training may change on its way, it does not search again for
                theirs, mine = ({name: value for name, value in one.items() if name not in ADJUSTABLE} for one in (theirs, mine))
            return bool(entry.get("done")) and theirs == mine and entry.get("inputs") == self.inputs(verb) and is_there(self.folder, verb)

        return engine.on_main(self.world, look)

    def inputs(self, verb: str) -> dict[str, str]:
        """Fingerprints of what a stage starts from, as they are now."""
        found = {"model": self.source.fingerprint()}
        if verb in ("evaluate", "export"):
            which = self.cfg.run.checkpoint
            found["checkpoint"] = str(self.checkpoints.latest() if which == "last" else which)
        if verb == "speed" and (self.folder / "hf").is_dir():
            found["exported"] = open_folder(self.folder / "hf", "run.dir").fingerprint()
        if verb in ("search", "distill", "evaluate", "speed") and self.cfg.teacher.path is not None:
            found["teacher"] = self.teacher_source.fingerprint()
        manifest = Manifest.load(self.folder / "data")
        for split, parts in sorted(manifest.splits.items()):
            if not split.startswith("text_") or verb == "evaluate":
                hashes = [manifest.parts[name].sha256 for name, _ in parts]
                found[split] = "-".join(one[ending][:16] for one in hashes for ending in ("bin", "prompts") if ending in one)
        return found

    def mark(self, verb: str, done: bool) -> None:
        """Note that a stage begins to write, or that it is finished, on rank 0. What was made from an earlier result of it is out of date.

        A stage says that it begins when there is nothing left to refuse it for: a command that is refused undoes nothing.
        """
        for line in training_remarks(self.cfg, verb) if self.world.is_main and not done else ():
            say_once(line)

        def note() -> None:
            record = read_record(self.folder)
            later = [*ARTIFACTS][[*ARTIFACTS].index(verb) + 1 :] if verb != "evaluate" else []
            for name in later:
                if name in record and not done:
                    record[name]["done"] = False
            entry = {"settings": settings_of(self.cfg, verb, free=True), "done": done, "version": minitron.__version__}
            record[verb] = {**entry, "inputs": self.inputs(verb) if done else {}}
            write_json(self.folder / RECORD, record)

        engine.on_main(self.world, note)

    def check_descent(self, cached: str | None = None) -> None:
        """Refuse checkpoints that were trained from another model, or by another teacher, than the one that is here now.

        `cached`: what identifies the predictions that are read in the teacher's place, if they are.
        """
        whole, fingerprint = self.verb == "train", self.source.fingerprint()
        file = self.checkpoints.folder / ("trained_from" if whole else "pruned_from")
        if self.cfg.teacher.path is not None and self.cfg.distill.loss != "none":
            fingerprint += "-" + self.teacher_source.fingerprint()
        if cached is not None:
            fingerprint += "-" + cached

        def look() -> None:
            mine = fingerprint if whole else sha256(self.folder / "keep.safetensors")[:16] + "-" + fingerprint
            if self.checkpoints.latest() is None:
                write_text(file, mine + "\n")
            elif not file.exists() or file.read_text().strip() != mine:
                other = "another model than model.path has now" if whole else "another pruned model, or by another teacher or cache"
                raise refuse("run.dir", self.folder, f"its checkpoints were trained from {other}; remove checkpoints/ or use another run.dir")

        engine.on_main(self.world, look)


@contextlib.contextmanager
def session(cfg: Config, verb: str) -> Iterator[Session]:
    """Open a run: refuse what can't be done before any weight is read, start the processes, and keep the folder for this command until its end."""
    with end_on_signal(verb), contextlib.ExitStack() as held:
        ready = preflight(cfg, verb, lambda: check(cfg, verb))
        here = held.enter_context(engine.world(cfg.parallel, cfg.device, cfg.seed))
        opened = Session(cfg, verb, here, Path(cfg.run.dir))
        if here.is_main and ready is not None:
            say(str(ready))

        if measures_speed(cfg, verb):
            engines(cfg.speed, here.device.type)  # device=auto may have found no GPU for vLLM

        def take() -> None:
            if verb == "speed":
                need(opened.folder / "hf" / "config.json", "export")  # before a model is converted or fetched
            own(opened.folder)
            held.enter_context(locked(opened.folder))
            claim(opened.folder, cfg, verb)

        engine.on_main(here, take)
        check_models(opened)
        if "eval" in VERBS[verb].groups:
            opened.tasks  # noqa: B018 -- what can't be asked is refused before the work that it would be asked about
        for line in remarks(cfg, verb, opened.source.arch) if here.is_main else ():
            say_once(line)
        yield opened


def check_models(opened: Session) -> None:
    """What the models rule out, also those that had to be fetched or converted first."""
    cfg, arch = opened.cfg, opened.source.arch
    check_model(cfg, opened.verb, arch)
    if "teacher" in VERBS[opened.verb].groups:
        if cfg.teacher.path is not None:
            check_teacher(cfg, opened.verb, arch, opened.teacher_source.arch)
            check_tokenizers(cfg.teacher.path, opened.source.folder, opened.teacher_source.folder)
        for student in student_archs(opened) if cfg.distill.hidden.enabled else ():
            check_hidden(cfg, student, opened.teacher_source.arch)
    if cfg.spec == "transformer_engine" and ("teacher" in VERBS[opened.verb].groups or VERBS[opened.verb].trains):
        opened.spec()
        if loads_teacher(cfg, opened.verb):
            opened.spec(opened.teacher_source.arch)


def student_archs(opened: Session) -> list[Arch]:
    """The sizes of what this verb distils: as asked for, every candidate's or, where they are no longer asked for, as pruned (none: not yet)."""
    cfg, arch = opened.cfg, opened.source.arch
    if searches(cfg, opened.verb):
        return candidate_archs(cfg, arch)
    if "target" in VERBS[opened.verb].groups:
        return [target_arch(arch, cfg.target, cfg.parallel)]
    file = opened.pruned / "arch.json"
    sizes = engine.on_main(opened.world, lambda: read_object(file) if file.exists() else None)
    return [Arch.from_dict(sizes)] if sizes else []


@contextlib.contextmanager
def stop_on_signal(here: engine.World) -> Iterator[Callable[[], bool]]:
    """Inside the block SIGTERM and SIGUSR1 ask for a stop; the yielded function tells, the same on every rank, whether one did."""
    with on_signal(lambda: None) as seen:
        yield lambda: engine.any_rank(bool(seen), here)


@contextlib.contextmanager
def end_on_signal(verb: str) -> Iterator[None]:
    """Inside the block SIGTERM and SIGUSR1 break the work off wherever it is. Whatever error comes of that, Stopped is raised."""

    def interrupt() -> None:
        raise KeyboardInterrupt  # which libraries know to come from anywhere, and let pass

    with on_signal(interrupt) as seen:
        cause = None
        try:
            yield
        except BaseException as error:
            if not seen:
                raise
            cause = error
        if seen:
            raise Stopped(f"stopped in {verb}: the same command continues") from cause


@contextlib.contextmanager
def on_signal(answer: Callable[[], None]) -> Iterator[list[int]]:
    """Inside the block the first SIGTERM or SIGUSR1 calls `answer`; the list, empty at first, then holds its number.

    What asks for an end often asks twice, as `timeout` does of a process and of its group. So further signals are ignored, after a block that
    raises too, as the process is about to end. If the block ends well all the same, the signal is passed to who handled it before.
    """
    seen: list[int] = []
    process = os.getpid()

    def handle(number: int, frame: object) -> None:
        if os.getpid() != process:
            os._exit(128 + number)  # a forked child has nothing to save
        if not seen:
            seen.append(number)
            answer()

    before = {number: signal.signal(number, handle) for number in STOPPING}
    try:
        yield seen
    except BaseException:
        for number, former in before.items():
            if signal.getsignal(number) is handle:  # not one that an inner block left ignored
                signal.signal(number, signal.SIG_IGN if seen else former)
        raise
    for number, former in before.items():
        signal.signal(number, former)
    if seen:
        signal.raise_signal(seen[0])


def need(path: Path, verb: str) -> Path:
    """A file that an earlier stage makes; refused with that stage's name where it is absent."""
    if not path.exists():
        raise RequestError(f"{path} is not there; minitron {verb} makes it")
    return path
