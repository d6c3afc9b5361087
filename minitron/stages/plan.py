"""`minitron plan`: what the settings come to, before anything is computed. No weights are read, no other process is needed, nothing is measured."""

import os
from pathlib import Path

from minitron.arch.arch import Arch
from minitron.arch.counts import costs
from minitron.arch.families import from_hf
from minitron.config.schema import Config
from minitron.config.setting import MISSING
from minitron.files import write_json
from minitron.pruning.target import check_layout, check_smaller, target_arch
from minitron.record import RECORD, own
from minitron.reporting.plan import show_plan
from minitron.search.budget import BYTES, check_free, find
from minitron.search.candidates import SIZES, Candidate, Plan
from minitron.search.latency import known
from minitron.weights.source import config_without_weights


def run(cfg: Config) -> None:
    """Print the plan; keep it in run.dir where that is given. Of several processes only the first does."""
    plan = planned(shape_of(cfg), cfg)
    if os.environ.get("RANK", "0") != "0":
        return
    if cfg.run.dir != MISSING:
        folder = Path(cfg.run.dir)
        own(folder)
        if not (folder / RECORD).exists():
            write_json(folder / RECORD, {})
        plan.save(folder)
    show_plan(plan)


def shape_of(cfg: Config) -> Arch:
    """The model's sizes, from its config.json alone or from model.shape."""
    if cfg.model.path == MISSING:
        return from_hf(dict(cfg.model.shape), "model.shape")
    return from_hf(config_without_weights(cfg.model.path, "model.path"), f"model.path={cfg.model.path}")


def planned(arch: Arch, cfg: Config) -> Plan:
    """What `target` or `search` make of a model. Raises RequestError where they can't be met."""
    original = counted("original", arch, cfg)
    if cfg.search.budgets:
        check_free(cfg.target, cfg.search)
        check_layout(arch, cfg.parallel, "the model's")
        found = find(arch, cfg.search, cfg.parallel, cfg.dtype, known(arch, cfg))
        return Plan(arch, original, found.candidates, found.grid, found.fell)
    pruned = target_arch(arch, cfg.target, cfg.parallel)
    if cfg.target.sizes:
        check_smaller(arch, pruned, cfg.target)
    return Plan(arch, original, [counted("target", pruned, cfg)] if cfg.target.sizes else [])


def counted(name: str, arch: Arch, cfg: Config) -> Candidate:
    """An architecture with its costs."""
    search = cfg.search
    return Candidate(name, {size: getattr(arch, size) for size in SIZES}, costs(arch, search.batch_size, search.seq_length, BYTES[cfg.dtype]))
