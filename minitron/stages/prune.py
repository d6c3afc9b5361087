"""`minitron prune`: rank the units, cut the sharded weights in place."""

from __future__ import annotations

from minitron import engine
from minitron.config.schema import Config
from minitron.files import write_json
from minitron.importance.scores import FILE as SCORES
from minitron.importance.scores import Scores
from minitron.pruning.keep import FILE as KEEP
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
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
    wish = engine.on_main(opened.world, lambda: wanted(opened.cfg))
    target = target_arch(original, wish, opened.cfg.parallel)
    scores = engine.on_main(opened.world, lambda: Scores.load(need(opened.folder / SCORES, "calibrate"), original, opened.source.fingerprint()))
    keep = select(scores.tensors, original, target, wish.layers_by, wish.merge_heads)

    def note() -> None:
        keep.save(opened.folder / KEEP)
        write_json(opened.folder / "arch.json", {"original": original.to_dict(), "pruned": target.to_dict()})

    source = opened.load_source()
    opened.mark("prune", done=False)
    engine.on_main(opened.world, note)
    pruned = reslice(source, keep, target, opened.world)
    engine.save_model(pruned, opened.pruned, opened.world)
    opened.mark("prune", done=True)
    if opened.world.is_main:
        before, after = original.num_parameters(), target.num_parameters()
        say(f"{size(before)} -> {size(after)} parameters ({percent(after / before)} kept)")
        say(", ".join(changes(original, target)) or "no size is smaller than the original's")
