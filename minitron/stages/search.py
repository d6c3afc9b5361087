"""`minitron search`: compare the candidates within the budgets, as pruned and then rung by rung of distillation, and choose one."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import time
from typing import Any

from minitron import engine
from minitron.arch.arch import Arch
from minitron.config.schema import Config
from minitron.distillation.fused import Scratch
from minitron.distillation.hidden import HiddenLoss
from minitron.distillation.step import distillation_loss
from minitron.errors import RequestError, Stopped
from minitron.files import remove, sha256, write_text
from minitron.importance.scores import FILE as SCORES
from minitron.importance.scores import Scores
from minitron.pruning.keep import Keep, select
from minitron.pruning.reslice import of_kept, reslice
from minitron.pruning.target import target_arch
from minitron.record import settings_of
from minitron.reporting.console import Advance, progress, say, show_candidates, show_rung, show_search
from minitron.reporting.wording import counted
from minitron.search.budget import BYTES, find
from minitron.search.candidates import FILE, Results, Rung
from minitron.search.ladder import has_settled, kendall_tau, mean_losses, ranking, survivors, tau_between_seeds
from minitron.search.latency import check, measured
from minitron.session import Session, need, session, stop_on_signal
from minitron.teaching import SharedTeacher, given_teacher, hidden_loss
from minitron.training import SHOWN, held_out_loss, sources, step_batches

FOLDER, KEY = "search", "made_from"  # what a search needs to go on, in run.dir; gone once it has ended
SHARE = 0.7  # of the memory that is free, for weights, gradients and moments of students; the rest is for one student's activations


def run(cfg: Config) -> None:
    """Open the run and search."""
    with session(cfg, "search") as opened:
        if opened.is_done("search"):
            results = engine.on_main(opened.world, lambda: Results.load(opened.folder))
            if opened.world.is_main:
                show_search(results)
                say(f"{opened.folder / FILE} was made before: nothing is left to do")
        else:
            work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/candidates.json; goes on with the candidate, or the rung, where a search of the same was broken off."""
    world, source, target = opened.world, opened.source, opened.cfg.target
    engine.on_main(world, lambda: need(opened.folder / SCORES, "calibrate"))
    opened.data  # noqa: B018 -- before any model: a text that is too short, or that can't be used, is refused first
    opened.trial(0).training_samples  # noqa: B018
    scores = engine.on_main(world, lambda: Scores.load(opened.folder / SCORES, source.arch, source.fingerprint()))
    key = engine.on_main(world, lambda: key_of(opened))
    results = engine.on_main(world, lambda: begun(opened, key)) or found(opened)
    shapes = {one.name: target_arch(source.arch, one.target(target), opened.cfg.parallel) for one in results.candidates}
    keeps = {name: select(scores.tensors, source.arch, shape, target.layers_by, target.merge_heads) for name, shape in shapes.items()}
    shapes = {name: of_kept(shape, source.arch, keeps[name]) for name, shape in shapes.items()}
    opened.mark("search", done=False)

    def note() -> None:
        if not results.rungs:
            remove(opened.folder / FOLDER)
        results.save(opened.folder)
        write_text(opened.folder / FOLDER / KEY, key + "\n")  # last: with it, candidates.json is this search's

    engine.on_main(world, note)
    if world.is_main:
        show_candidates(results)
    ladder = Ladder(opened, results, shapes, keeps)
    for steps in (0, *opened.cfg.search.rungs):
        if ladder.results.chosen is None:
            ladder.climb(steps)
    opened.mark("search", done=True)
    engine.on_main(world, lambda: remove(opened.folder / FOLDER))
    if world.is_main:
        show_search(ladder.results)
    check_latency(opened, ladder.results)


def check_latency(opened: Session, results: Results) -> None:
    """Hold the chosen candidate's latency, a sum of parts, against its model as a whole."""
    if opened.cfg.search.latency_ms is None or results.chosen is None:
        return
    chosen = results.candidate(results.chosen)
    shape = target_arch(opened.source.arch, chosen.target(opened.cfg.target), opened.cfg.parallel)
    found = check(shape, chosen.costs["latency_ms"], opened.cfg, opened.world, opened.spec())
    if opened.world.is_main:
        limit = opened.cfg.search.latency_ms
        above = f", above search.latency_ms={limit:g}" if found.real > limit else ""
        say(f"latency of {chosen.name}: {found.predicted:.3g} ms by its parts, {found.real:.3g} ms as a whole{above}")


def key_of(opened: Session) -> str:
    """A search goes on from another than this as soon as it differs: settings, model, text, scores; of measured times also what measured them."""
    made: list[Any] = [settings_of(opened.cfg, "search", free=True), opened.inputs("search"), sha256(opened.folder / SCORES)]
    if opened.cfg.search.latency_ms is not None:
        made.append([dataclasses.asdict(opened.cfg.parallel), opened.world.device.type, opened.spec()])
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def begun(opened: Session, key: str) -> Results | None:
    """The results of a search of the same that was broken off."""
    file = opened.folder / FOLDER / KEY
    if not file.exists() or file.read_text(encoding="utf-8").strip() != key or not (opened.folder / FILE).exists():
        return None
    return Results.load(opened.folder)


def found(opened: Session) -> Results:
    """The candidates, nothing known of them yet."""
    cfg, arch = opened.cfg, opened.source.arch
    shown = cfg.logging.progress and opened.world.is_main
    measure = measured(arch, cfg, opened.world, opened.spec(), opened.folder, lambda total: progress("latency of sizes", total, shown))
    within = find(arch, cfg.search, cfg.parallel, cfg.dtype, measure)
    return Results(arch, dataclasses.asdict(cfg.search), within.grid, within.fell, within.candidates)


@dataclasses.dataclass
class Student:
    """A candidate in training on one order of the data."""

    trainer: engine.Trainer
    task: engine.Task
    checkpoints: engine.Checkpoints
    hidden: HiddenLoss | None
    saved: int  # the step of the checkpoint that was begun last

    def save(self, final: bool = False) -> None:
        """Have a checkpoint of the step that it is at. One that is not `final` may fail: what was there before stays."""
        world = self.trainer.world
        if final:  # what was begun may have failed
            self.checkpoints.wait(world)
            self.saved = engine.on_main(world, self.checkpoints.latest) or 0
        if self.saved != self.trainer.step:
            self.trainer.settle()
            self.checkpoints.save(self.trainer, final=final)
            self.saved = self.trainer.step


class Ladder:
    """A search at work: what it knows, the model that candidates are cut from, the students that are in memory.

    A rung that no `stayed` has ended is the one that it stands on. Every rank takes the same way: losses are the same on all.
    """

    def __init__(self, opened: Session, results: Results, shapes: dict[str, Arch], keeps: dict[str, Keep]) -> None:
        self.opened, self.results, self.shapes, self.keeps = opened, results, shapes, keeps
        self.search, self.world = opened.cfg.search, opened.world
        self.students: dict[tuple[str, int], Student] = {}
        self.trials: dict[int, tuple[Session, Any]] = {}
        self.source: engine.Model | None = None
        self.scratch = Scratch()
        self.advance: Advance = lambda *_, **__: None
        self.since = time.monotonic()

    def climb(self, steps: int) -> None:
        """One rung: losses of all that came so far, then who goes on."""
        rungs, train = self.results.rungs, self.opened.cfg.train
        if any(rung.steps == steps and rung.stayed for rung in rungs):
            return
        if not rungs or rungs[-1].stayed:
            rungs.append(Rung(steps, steps * train.global_batch_size * train.seq_length, {}))
        names = rungs[-2].stayed if steps else [one.name for one in self.results.candidates]
        if steps:
            self._train(names, steps)
        else:
            self._as_pruned(names)
        self._decide(names)

    def _as_pruned(self, names: list[str]) -> None:
        """Cut every candidate in turn from the one model and measure it."""
        todo = [name for name in names if name not in self.results.rungs[-1].losses]
        with self._bar("candidates as pruned", len(names), len(names) - len(todo)) as advance:
            for name in todo:
                loss = self._measure(name, self._cut(name))
                advance(1, **{SHOWN["valid_loss"]: loss})

    def _train(self, names: list[str], steps: int) -> None:
        """Train them to the rung, as many at a time as there is room for, and measure them; they stay in memory where all have room."""
        losses, lost, seeds = self.results.rungs[-1].losses, self.results.rungs[-1].lost, self.search.seeds
        if steps == self.search.rungs[0] and self.source is None:
            self.source = self.opened.load_source()  # of a search that was broken off: it takes its room before students do
        stay = len(names) * seeds <= self._room
        for number in range(seeds):
            todo = [name for name in names if name not in lost and len(losses.get(name, [])) <= number]
            for first in range(0, len(todo), self._room):
                self._train_together(todo[first : first + self._room], number, steps)
                if not stay:
                    self._put_away(final=steps < self.search.rungs[-1])

    def _train_together(self, names: list[str], number: int, steps: int) -> None:
        """Step by step: one run of the teacher, then each student's step. A student that was broken off before the others catches up first."""
        students = {name: self._student(name, number) for name in names}
        done = [student.trainer.step for student in students.values()]
        rungs = self.search.rungs
        what = f"rung {rungs.index(steps) + 1} of {len(rungs)}: {counted(len(names), 'candidate')} to step {steps:,}" + (
            f", seed {number + 1}" if self.search.seeds > 1 else ""
        )
        with self._bar(what, steps * len(names), sum(done)) as self.advance, stop_on_signal(self.world) as stop_requested:
            for step in range(min(done), steps):
                for name, student in [*students.items()]:
                    if student.trainer.step == step and (fault := self._step(name, student)):
                        self._lose(name, number, fault)
                        del students[name]
                self._teacher.forget()
                if stop_requested():
                    self._stop(step + 1)
        for name, student in students.items():
            student.trainer.settle()
            self._measure(name, student.trainer.model)

    def _step(self, name: str, student: Student) -> str | None:
        """One step of a student; in words why it is to be its last, if it is."""
        trainer, task = student.trainer, student.task
        try:
            engine.report(task, engine.take_step(trainer, task, student.checkpoints), self.world)
        except RequestError as error:
            raise RequestError(f"{name}: {error}") from error
        return trainer.guard.verdict(trainer.step, task.source(trainer.step - 1))

    def _lose(self, name: str, number: int, fault: str) -> None:
        """A candidate whose training came to nothing is out, and the others go on."""
        rung = self.results.rungs[-1]
        rung.losses.pop(name, None)
        rung.lost[name] = fault
        self._write()
        self._close([(name, number)])
        if self.world.is_main:
            say(f"{name} is out: {fault}")

    def _stop(self, step: int) -> None:
        for student in self.students.values():
            student.save(final=True)
        raise Stopped(f"stopped in search at step {step} of a rung, saved in {self.opened.folder / FOLDER}: the same command continues")

    def _measure(self, name: str, model: engine.Model) -> float:
        """The model's loss, noted under the rung that the search stands on."""
        loss = held_out_loss(self.opened, model, self.search.tokens, "search.tokens")
        self.results.rungs[-1].losses.setdefault(name, []).append(loss)
        self._write()
        return loss

    def _decide(self, names: list[str]) -> None:
        """End the rung: who goes on, how much of the order held, whether it has settled."""
        rungs, search = self.results.rungs, self.search
        rung = rungs[-1]
        losses = mean_losses(rung)
        if not losses:
            raise RequestError(f"search.rungs={search.rungs}: no candidate came to step {rung.steps:,}; {next(iter(rung.lost.values()))}")
        count = survivors(len(names), search.survive) if rung.steps else search.finalists
        tau = kendall_tau(losses, mean_losses(rungs[-2])) if rung.steps else None
        rungs[-1] = rung = dataclasses.replace(rung, stayed=ranking(rung)[:count], tau=tau, seed_tau=tau_between_seeds(rung.losses))
        last = rung.steps == search.rungs[-1]
        settled = not last and has_settled(rungs, search.settled)
        if last or settled or len(rung.stayed) == 1:
            self.results = dataclasses.replace(self.results, chosen=rung.stayed[0], settled=settled)
        out = [name for name in names if self.results.chosen is not None or name not in rung.stayed]
        for (name, _), student in self.students.items():
            if name not in out:
                student.save()
        self._write()
        self._close([(name, number) for name, number in self.students if name in out])
        if rung.steps:
            self.source = None  # every finalist was cut

        def forget() -> None:
            for name in out:
                for number in range(search.seeds):
                    remove(self._folder(name, number))

        engine.on_main(self.world, forget)
        if self.world.is_main:
            show_rung(self.results)

    def _write(self) -> None:
        now = time.monotonic()
        rungs = self.results.rungs
        rungs[-1] = dataclasses.replace(rungs[-1], seconds=rungs[-1].seconds + now - self.since)
        self.since = now
        engine.on_main(self.world, lambda: self.results.save(self.opened.folder))

    def _bar(self, what: str, total: int, start: int) -> Any:
        return progress(what, total, self.opened.cfg.logging.progress and self.world.is_main, start=start)

    def _folder(self, name: str, number: int) -> Any:
        return self.opened.folder / FOLDER / f"{name}-{number}"

    @functools.cached_property
    def _teacher(self) -> SharedTeacher:
        """Loaded, or read from a cache, when the first rung of distillation begins."""
        return SharedTeacher(self.opened, given_teacher(self.opened.trial(0)))

    def _trial(self, number: int) -> tuple[Session, Any]:
        """The session of one order of the data, and its microbatches of a step, which all students of it read."""
        if number not in self.trials:
            self._teacher  # noqa: B018 -- a session made after it shares it
            trial = self.opened.trial(number)
            batches = functools.lru_cache(maxsize=1)(lambda step: step_batches(trial.training_samples, trial.cfg, trial.world, step))
            self.trials[number] = trial, batches
        return self.trials[number]

    @functools.cached_property
    def _room(self) -> int:
        """How many students are trained at a time."""
        if self.search.together is not None:
            return self.search.together
        self._teacher  # noqa: B018 -- it takes its memory first
        world, bits16 = self.world, self.opened.cfg.dtype == "bf16"
        parameters = max(shape.num_parameters() for shape in self.shapes.values()) / (world.tp * world.pp)
        # weights, gradients in fp32; moments, and of 16-bit weights a copy in fp32, spread over the replicas
        student = parameters * (BYTES[self.opened.cfg.dtype] + 4 + (12 if bits16 else 8) / world.dp)
        return max(1, engine.least(int(SHARE * engine.free_memory(world.device) / student), world))

    def _cut(self, name: str) -> engine.Model:
        opened = self.opened
        if self.source is None:
            self.source = opened.load_source()
        spec = opened.spec()
        return reslice(self.source, self.keeps[name], self.shapes[name], opened.world, spec, opened.cfg.train.recompute, empty=False)

    def _student(self, name: str, number: int) -> Student:
        """A student where it is in its training: in memory, in its checkpoint, or at the beginning."""
        if (name, number) in self.students:
            return self.students[name, number]
        trial, microbatches = self._trial(number)
        world, cfg = trial.world, trial.cfg
        checkpoints = engine.Checkpoints(self._folder(name, number), keep_last=1)
        if self._is_begun(checkpoints):
            model = engine.empty_model(self.shapes[name], world, trial.dtype, trial.spec(), cfg.train.recompute)
        else:
            model = self._cut(name)
        hidden = hidden_loss(trial, model)
        trainer = engine.Trainer(model, cfg.train, world, {"hidden": hidden} if hidden else {})
        checkpoints.resume(trainer)
        if hidden:
            self._teacher.watches.all.append(hidden.teacher_states)
        task = engine.Task(
            microbatches=microbatches,
            loss=distillation_loss(model, self._teacher, cfg.distill, world, hidden, self.scratch),
            validate=dict,
            report=lambda line: self.advance(1, **{SHOWN[key]: line[key] for key in ("kd_loss", "ce_loss") if key in line}),
            source=lambda step: sources(trial, step),
        )
        self.students[name, number] = Student(trainer, task, checkpoints, hidden, trainer.step)
        return self.students[name, number]

    def _is_begun(self, checkpoints: engine.Checkpoints) -> bool:
        """Whether a student has a checkpoint to go on from; one that is damaged is removed, and the student begins anew."""
        try:
            return checkpoints.choose("last", self.world) is not None
        except RequestError as error:
            if self.world.is_main:
                say(f"{error}; this candidate begins anew")
            engine.on_main(self.world, lambda: remove(checkpoints.folder))
            checkpoints.damaged.clear()
            return False

    def _put_away(self, final: bool) -> None:
        """Make room for others; students that have steps to come are saved."""
        for student in self.students.values() if final else ():
            student.save(final=True)
        self._close([*self.students])

    def _close(self, which: list[tuple[str, int]]) -> None:
        for one in which:
            student = self.students.pop(one)
            student.checkpoints.drop()  # nothing writes or removes there any more
            student.trainer.close()
            if student.hidden:
                self._teacher.watches.all.remove(student.hidden.teacher_states)
                student.hidden.teacher_states.close()
        gc.collect()  # a trainer and its model hold each other
