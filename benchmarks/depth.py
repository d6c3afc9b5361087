"""What it costs to leave out each layer of SmolLM2-135M in turn: one walk through the layers, against as many full passes.

The sides take turns, microbatch by microbatch. The time is that of the processor in this process, and of the wall where several threads or a GPU
compute; the losses of both ways are compared.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from common import ROOT, arguments, publish

sys.path.insert(0, str(ROOT))  # for the tests' oracles

from minitron import engine
from minitron.config.compose import compose
from minitron.importance.depth import losses_without, runs_of
from minitron.session import session


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """How many seconds it takes, what was queued on a GPU included, and what comes of it."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    clock = time.process_time if alone else time.perf_counter
    started = clock()
    found = action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - started, found


def evaluations(model: engine.Model, sequences: int, action: Callable[[], object]) -> int:
    """How often a microbatch of `sequences` goes through a block."""
    seen: list[int] = []

    def see(block: object, args: object, kwargs: dict[str, torch.Tensor], output: tuple[object, ...]) -> None:
        if output[0] is not kwargs["hidden_states"]:  # where a block is left out
            seen.append(kwargs["hidden_states"].shape[1] // sequences)

    handles = [block.register_forward_hook(see, with_kwargs=True) for _, block in model.blocks()]
    action()
    for handle in handles:
        handle.remove()
    return sum(seen)


def measured(dtype: str, length: int, microbatches: int, settings: list[str], scratch: str) -> list[tuple[object, ...]]:
    """A row for each way."""
    from tests.oracles.depth import skipped

    cfg = compose("calibrate", ["recipe=smollm2_135m_to_100m", f"dtype={dtype}", f"run.dir={scratch}/{dtype}-{length}", *settings])
    with session(cfg, "calibrate") as opened:
        world, model = opened.world, opened.load_source()
        layers, sequences = model.arch.num_layers, cfg.calibrate.micro_batch_size
        generator, valid = torch.Generator().manual_seed(1), torch.ones(sequences, dtype=torch.bool)
        shape = (sequences, cfg.calibrate.seq_length + 1)
        batches = [(torch.randint(0, model.arch.vocab_size, shape, generator=generator), valid) for _ in range(microbatches)]
        runs = runs_of(layers, length)

        def full_pass(batch: tuple[torch.Tensor, torch.Tensor]) -> float:
            return engine.language_model_score(model, [batch], world).loss

        def naive(batch: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
            losses = []
            for run in runs:
                with skipped(model, run):
                    losses.append(full_pass(batch))
            return losses

        def walk(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return losses_without(model, [batch], world, [length])[length]

        ways: dict[str, Callable[[tuple[torch.Tensor, torch.Tensor]], Any]] = {
            f"{len(runs)} full passes": lambda batch: [full_pass(batch) for _ in runs],
            "full passes, each without its layers": naive,
            "one walk": walk,
        }
        full_pass(batches[0])
        turns, worst = [], 0.0
        for batch in batches:
            done = [timed(lambda way=way, batch=batch: way(batch)) for way in ways.values()]
            turns.append([took for took, _ in done])
            worst = max(worst, float((done[2][1] / torch.tensor(done[1][1]) - 1).abs().max()))
        short = (batches[0][0][:, :17], valid)
        counts = [evaluations(model, sequences, lambda way=way: way(short)) for way in ways.values()]
    rows = []
    for number, (name, count) in enumerate(zip(ways, counts, strict=True)):
        share = statistics.median(turn[number] / turn[0] for turn in turns)
        rows.append((dtype, length, name, statistics.median(turn[number] for turn in turns), share, count, worst if number == 2 else None))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--microbatches", type=int, default=5, help="turns, each of one microbatch (default: 5)")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--lengths", nargs="+", type=int, default=(1,), metavar="N", help="layers to leave out at a time (default: 1)")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as calibrate.seq_length=2048")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.dtypes:
            for length in options.lengths:
                rows += measured(dtype, length, options.microbatches, options.set, scratch)
    notes = [f"medians of {options.microbatches} turns; losses ≠: the largest relative difference to those of full passes without the layers"]
    publish(
        "The loss without each run of layers",
        {"dtype": "<", "layers": "d", "way": "<", "s": ".2f", "of full passes": ".3f", "blocks": "d", "losses ≠": ".1e"},
        rows,
        notes,
        options.json,
    )


if __name__ == "__main__":
    main()
