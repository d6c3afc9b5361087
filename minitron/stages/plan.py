"""`minitron plan`: what the settings come to, before anything is computed. No weights are read, no other process is needed, nothing is measured."""

import dataclasses
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

from minitron.arch.arch import Arch
from minitron.arch.counts import costs
from minitron.arch.families import from_hf
from minitron.config.compose import compose
from minitron.config.schema import BUDGETS, Config, Family
from minitron.config.setting import MISSING
from minitron.errors import RequestError, refuse
from minitron.pruning.target import check_layout, check_smaller, target_arch
from minitron.record import holds_others, own
from minitron.reporting.console import say
from minitron.reporting.family import FILE as FAMILY
from minitron.reporting.plan import show_plan
from minitron.search.budget import BYTES, check_free, find
from minitron.search.candidates import PLAN, SIZES, Candidate, Plan
from minitron.search.latency import known
from minitron.weights.source import config_without_weights


def run(cfg: Config) -> None:
    """Print the plan; keep it in run.dir where that is given. Of several processes only the first does."""
    plan = planned(shape_of(cfg), cfg)
    if os.environ.get("RANK", "0") != "0":
        return
    folder = None if cfg.run.dir == MISSING else Path(cfg.run.dir)
    if folder is not None:
        own(folder, is_other=lambda folder: holds_others(folder) and not (folder / FAMILY).exists())
        plan.save(folder)
    show_plan(plan, cfg.search.budgets)
    if folder is not None:
        say(f"written to {folder / PLAN}")


def shape_of(cfg: Config) -> Arch:
    """The model's sizes, from its config.json alone or from model.shape. Raises RequestError where both are given and differ."""
    shape = cfg.model.shape
    if shape and shape.get("model_type") is None:
        raise refuse("model.shape", shape, "model.shape.model_type is needed, such as llama")
    if cfg.model.path == MISSING:
        return from_hf(dict(shape), "model.shape")
    arch = from_hf(config_without_weights(cfg.model.path, "model.path"), f"model.path={cfg.model.path}")
    if shape and from_hf(dict(shape), "model.shape") != arch:
        raise refuse("model.path", cfg.model.path, "model.shape gives other sizes than this model has: one of the two is needed, not both")
    return arch


def planned(arch: Arch, cfg: Config) -> Plan:
    """What `family.steps`, `target` or `search` make of a model. Raises RequestError where they can't be met."""
    original = counted("original", arch, cfg)
    if cfg.family.steps:
        return Plan(arch, original, list(chain(arch, cfg)))
    check_budget(cfg)
    if cfg.search.budgets:
        check_free(cfg.target, cfg.search)
        check_layout(arch, cfg.parallel, "the model's")
        found = find(arch, cfg.search, cfg.parallel, cfg.dtype, known(arch, cfg))
        return Plan(arch, original, found.candidates, found.grid, found.fell)
    pruned = target_arch(arch, cfg.target, cfg.parallel)
    if cfg.target.sizes:
        check_smaller(arch, pruned, cfg.target)
    return Plan(arch, original, [counted("target", pruned, cfg)] if cfg.target.sizes else [])


def chain(arch: Arch, cfg: Config) -> Iterator[Candidate]:
    """The models of a family, each cut from the one before; a step's settings come on top of those that all have."""
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
        arch = made
        yield counted(name, arch, step)


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
