"""Does measuring importance pay? One model, cut to the same sizes by different rankings of its units, without any retraining.

The loss is read on held-out documents of the calibration corpus and, where MINITRON_TEST_DATA has it, on WikiText-2.
Arguments after the options are settings of minitron, for example `eval.tokens=65536`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

from common import arguments, publish, wikitext

from minitron import engine
from minitron.calibration import importance
from minitron.config.compose import compose
from minitron.importance.scores import magnitude_scores, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.session import Session, session
from minitron.stages import evaluate

DEMO = ["recipe=smollm2_135m_to_100m", "eval.tokens=16384", "logging.progress=false"]
SEEDS = (1, 2, 3)


def models(opened: Session) -> Iterator[tuple[str, engine.Model]]:
    """The original, and one pruned model per ranking; each lives until the next is made."""
    cfg, world, arch = opened.cfg, opened.world, opened.source.arch
    yield "none (the original)", opened.load_source()
    rankings = {
        f"activations ({cfg.calibrate.batch_agg}, {cfg.calibrate.seq_agg})": lambda: importance(opened, arch, opened.load_source, []),
        "weight magnitude": lambda: magnitude_scores(opened.load_source(), world),
        **{f"random, seed {seed}": lambda seed=seed: random_scores(arch, seed) for seed in SEEDS},
    }
    target = target_arch(arch, cfg.target, cfg.parallel)
    for name, scores in rankings.items():
        yield name, reslice(opened.load_source(), select(scores(), arch, target), target, world)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cfg = compose("compress", [*DEMO, *wikitext(), *options.overrides, f'run.dir="{scratch}/run"'])
        texts = {"valid": "held-out loss", **{f"text_{name}": f"{name} loss" for name in cfg.eval.texts}}
        with session(cfg, "compress") as opened:
            for name, model in models(opened):
                rows.append(
                    (
                        name,
                        model.arch.num_parameters() / 1e6,
                        *(evaluate.score(model, split, name, opened, opened.world)[0]["loss"] for split in texts),
                    )
                )
                print("  ".join(f"{cell:.3f}" if isinstance(cell, float) else cell for cell in rows[-1]), flush=True)
    columns = {"ranked by": "<", "M parameters": ".1f", **dict.fromkeys(texts.values(), ".3f")}
    notes = [
        f"no retraining; {cfg.calibrate.samples} calibration samples of {cfg.calibrate.seq_length} tokens; "
        f"loss in nats per token over {cfg.eval.tokens:,} tokens of each text; {cfg.dtype}"
    ]
    publish("Zero-shot loss after pruning, by what ranks the units", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
