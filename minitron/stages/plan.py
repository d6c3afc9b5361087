"""`minitron plan`: what the settings come to, before anything is computed. No weights are read, no other process is needed, nothing is measured."""

import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from minitron.arch.arch import Arch
from minitron.arch.counts import costs
from minitron.arch.families import from_hf
from minitron.checks import check_teacher
from minitron.config.compose import compose
from minitron.config.schema import BUDGETS, Config, Family
from minitron.config.setting import MISSING
from minitron.errors import RequestError, refuse
from minitron.launching.launch import Trained, launched, refuse_too_large
from minitron.pruning.target import check_layout, check_smaller, target_arch
from minitron.record import holds_others, own
from minitron.reporting.console import say
from minitron.reporting.family import FILE as FAMILY
from minitron.reporting.plan import show_plan
from minitron.search.budget import BYTES, check_free, find
from minitron.search.candidates import PLAN, SIZES, Candidate, Plan
from minitron.search.latency import known
from minitron.weights.source import config_without_weights, locate


def run(cfg: Config) -> None:
    """Print the plan; keep it in run.dir where that is given. Of several processes only the first does."""
    arch = shape_of(cfg)
    plan = planned(arch, cfg)
    if os.environ.get("RANK", "0") != "0":
        return
    folder = None if cfg.run.dir == MISSING else Path(cfg.run.dir)
    if folder is not None:
        own(folder, is_other=lambda folder: holds_others(folder) and not (folder / FAMILY).exists())
        plan.save(folder)
    if cfg.model.shape and cfg.model.path != MISSING and not Path(locate(cfg.model.path, "model.path")).exists():
        say(f"sizes as model.shape gives them: the hub is not asked for {cfg.model.path}")
    show_plan(plan, cfg.search.budgets)
    if folder is not None:
        say(f"written to {folder / PLAN}")
    refuse_too_large(plan.launch, cfg)


def shape_of(cfg: Config) -> Arch:
    """The model's sizes, from model.shape or its config.json alone; a hub is not asked for what the settings say.

    Raises RequestError where a file that is there says otherwise than model.shape.
    """
    path, shape = cfg.model.path, cfg.model.shape
    if not shape:
        return from_hf(config_without_weights(path, "model.path"), f"model.path={path}")
    if shape.get("model_type") is None:
        raise refuse("model.shape", shape, "model.shape.model_type is needed, such as llama")
    given = from_hf(dict(shape), "model.shape")
    if path == MISSING or not Path(locate(path, "model.path")).exists():
        return given
    arch = from_hf(config_without_weights(path, "model.path"), f"model.path={path}")
    if given.replace(rope=arch.rope, layernorm_epsilon=arch.layernorm_epsilon, max_position_embeddings=arch.max_position_embeddings) != arch:
        raise refuse("model.path", path, "model.shape gives other sizes than this model has: one of the two is needed, not both")
    return arch


def planned(arch: Arch, cfg: Config) -> Plan:
    """What `family.steps`, `target` or `search` make of a model. Raises RequestError where they can't be met."""
    original = counted("original", arch, cfg)
    if cfg.family.steps:
        steps = list(chain(arch, cfg))
        models = [counted(step.name, step.student, step.cfg) for step in steps]
        return Plan(arch, original, models, launch=launched(steps, cfg), shapes={step.name: step.student for step in steps})
    check_budget(cfg)
    if cfg.search.budgets:
        if cfg.plan.nodes is not None:
            why = "what a search will choose can't be told before: a training is planned with sizes under target"
            raise refuse("plan.nodes", cfg.plan.nodes, f"must be null with search.{next(iter(cfg.search.budgets))}: {why}")
        check_free(cfg.target, cfg.search)
        check_layout(arch, cfg.parallel, "the model's")
        found = find(arch, cfg.search, cfg.parallel, cfg.dtype, known(arch, cfg))
        return Plan(arch, original, found.candidates, found.grid, found.fell)
    pruned = target_arch(arch, cfg.target, cfg.parallel)
    if cfg.target.sizes:
        check_smaller(arch, pruned, cfg.target)
        distilled = Trained("target", pruned, teacher_of(cfg, arch), cfg)
        return Plan(arch, original, [counted("target", pruned, cfg)], launch=launched([distilled], cfg), shapes={"target": pruned})
    # of a model by itself, what minitron train takes, where machines are named for it
    return Plan(arch, original, [], launch=launched([Trained("original", arch, None, cfg)], cfg) if cfg.plan.nodes is not None else None)


def teacher_of(cfg: Config, unless_named: Arch) -> Arch | None:
    """The model that is asked in every step of a distillation; None where a cache stands in for it, or nobody teaches."""
    if cfg.teacher.cache.folder is not None or cfg.distill.loss == "none":
        return None
    if cfg.teacher.path is None:
        return unless_named
    teacher = from_hf(config_without_weights(cfg.teacher.path, "teacher.path"), f"teacher.path={cfg.teacher.path}")
    check_teacher(cfg, "distill", unless_named, teacher)
    return teacher


def chain(arch: Arch, cfg: Config) -> Iterator[Trained]:
    """The models of a family, each cut from the one before; a step's settings come on top of those that all have."""
    original = arch
    for name, text in cfg.family.steps.items():
        try:
            step = compose("plan", shlex.split(text), base=dataclasses.replace(cfg, family=Family()))
            if step.search.budgets:
                budget, amount = next(iter(step.search.budgets.items()))
                raise refuse(f"search.{budget}", amount, "the sizes that a step's search will choose can't be told before")
            made = target_arch(arch, step.target, step.parallel, exported=True)
            check_smaller(arch, made, step.target)
        except (RequestError, ValueError) as error:  # ValueError: quotes that don't end
            raise RequestError(f"family.steps.{name}: {error}") from error
        yield Trained(name, made, teacher_of(step, original if cfg.family.teacher == "original" else arch), step)
        arch = made


def check_budget(cfg: Config) -> None:
    """Refuse sizes to look at where nothing says what to look for."""
    for name in (*SIZES, "ffn_expansion"):
        given = getattr(cfg.search, name)
        if given is not None and not cfg.search.budgets and not cfg.target.sizes:
            raise refuse(f"search.{name}", given, f"a budget is needed with it: one of {', '.join(f'search.{one}' for one in BUDGETS)}")


def counted(name: str, arch: Arch, cfg: Config) -> Candidate:
    """An architecture with its costs."""
    search = cfg.search
    return Candidate(name, {size: getattr(arch, size) for size in SIZES}, costs(arch, search.batch_size, search.seq_length, BYTES[cfg.dtype]))
