"""`minitron prune`: rank the units, cut the sharded weights in place; in several rounds, with importance measured anew before each, if asked to."""

from __future__ import annotations

import torch

from minitron import engine
from minitron.arch.arch import Arch
from minitron.calibration import importance
from minitron.config.schema import Config, Target
from minitron.config.verbs import groups_of
from minitron.errors import refuse
from minitron.files import write_json
from minitron.importance.scores import FILE as SCORES
from minitron.importance.scores import Scores
from minitron.pruning.keep import FILE as KEEP
from minitron.pruning.keep import Keep, by_answers, select, skipped_at_a_time
from minitron.pruning.reslice import reslice
from minitron.pruning.rounds import both, way
from minitron.pruning.target import target_arch
from minitron.record import read_record
from minitron.reporting.console import say
from minitron.reporting.wording import changes, percent, size
from minitron.search.candidates import wanted
from minitron.session import Session, need, session


def run(cfg: Config) -> None:
    """Open the run and prune."""
    with session(cfg, "prune") as opened:
        work(opened)


def work(opened: Session) -> None:
    """Writes run.dir/keep.safetensors, arch.json and the pruned model's shards."""
    original = opened.source.arch
    wish = engine.on_main(opened.world, lambda: sizes(opened))
    target = target_arch(original, wish, opened.cfg.parallel)
    scores = engine.on_main(opened.world, lambda: Scores.load(need(opened.folder / SCORES, "calibrate"), original, opened.source.fingerprint()))
    if "data" in groups_of("prune", opened.cfg):
        opened.data  # noqa: B018 -- before the model: a text that is too short is refused first
    pruned, keep = cut(opened, wish, scores.tensors, way(original, target, wish.rounds))

    def note() -> None:
        keep.save(opened.folder / KEEP)
        write_json(opened.folder / "arch.json", {"original": original.to_dict(), "pruned": pruned.arch.to_dict()})

    opened.mark("prune", done=False)
    engine.on_main(opened.world, note)
    engine.save_model(pruned, opened.pruned, opened.world)
    opened.mark("prune", done=True)
    if opened.world.is_main:
        before, after = original.num_parameters(), pruned.arch.num_parameters()
        say(f"{size(before)} -> {size(after)} parameters ({percent(after / before)} kept)")
        say(", ".join(changes(original, pruned.arch)) or "no size is smaller than the original's")


def sizes(opened: Session) -> Target:
    """What the model is cut to. Raises RequestError where a search chose it by what is not there any more."""
    found = wanted(opened.cfg)
    if not opened.cfg.target.sizes and not read_record(opened.folder).get("search", {}).get("done"):
        again = "what minitron search chose is of before something that it reads was made anew: search again, or give sizes under target"
        raise refuse("target.num_layers", None, again)
    return found


def cut(opened: Session, settings: Target, scores: dict[str, torch.Tensor], targets: list[Arch]) -> tuple[engine.Model, Keep]:
    """The model cut to each of `targets` in turn, and what is kept in the end, in the original's numbers.

    `scores` are those of the whole model; before each further cut the model that is left is measured.
    """
    world = opened.world
    keep = select(scores, opened.source.arch, targets[0], settings.layers_by, settings.merge_heads)
    model = reslice(opened.load_source(), keep, targets[0], world)
    for number, target in enumerate(targets[1:], start=2):
        if world.is_main:
            say(f"round {number} of {len(targets)}: importance of what is left, {size(model.arch.num_parameters())} parameters")
        lengths, ask = skipped(settings, model.arch, target), by_answers(settings.layers_by)
        scores = importance(opened, model.arch, lambda: model, lengths, f"round {number}", ask)  # noqa: B023 -- called at once
        left = select(scores, model.arch, target, settings.layers_by)
        keep, model = both(keep, left), reslice(model, left, target, world)
    return model, keep


def skipped(settings: Target, arch: Arch, target: Arch) -> list[int]:
    """How many layers are left out at a time to rank them as the settings say; nothing where no such ranking is needed."""
    by = settings.layers_by
    return [] if by == "bi" or arch.num_layers == target.num_layers else [skipped_at_a_time(by, arch.num_layers, target.num_layers)]
