"""What measuring importance costs: the same forward passes with and without the hooks, in turns.

The demo's teacher on random tokens of calibration's shape, in one process.
"""

import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from common import arguments, publish

from minitron import engine
from minitron.config.compose import compose
from minitron.importance.hooks import Probes
from minitron.session import session


def seconds(action: Callable[[], None]) -> float:
    """How long it takes, what was queued on a GPU included."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def measured(dtype: str, repeats: int, microbatches: int, settings: list[str], scratch: str) -> tuple[float, float]:
    """Median seconds of the passes without and with hooks."""
    cfg = compose("calibrate", ["recipe=smollm2_135m_to_100m", f"dtype={dtype}", f"run.dir={scratch}/{dtype}", *settings])
    with session(cfg, "calibrate") as opened:
        world, model = opened.world, opened.load_source()
        generator = torch.Generator().manual_seed(1)
        shape = (cfg.calibrate.micro_batch_size, cfg.calibrate.seq_length)
        batches = [torch.randint(0, model.arch.vocab_size, shape, generator=generator) for _ in range(microbatches)]

        def plain() -> None:
            for tokens in batches:
                engine.forward_only(model, [tokens], world)

        def hooked() -> None:
            probes = Probes(model, world, cfg.calibrate.seq_agg, cfg.calibrate.batch_agg, cfg.calibrate.seq_length)
            with probes.attached():
                for tokens in batches:
                    engine.forward_only(model, [tokens], world, watch=probes)

        for warm_up in (plain, hooked):
            warm_up()
        turns = [(seconds(plain), seconds(hooked)) for _ in range(repeats)]
    return statistics.median(turn[0] for turn in turns), statistics.median(turn[1] for turn in turns)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=7, help="turns of each side (default: 7)")
    parser.add_argument("--microbatches", type=int, default=4, help="forward passes of a turn (default: 4)")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as calibrate.seq_length=2048")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for dtype in options.dtypes:
            plain, hooked = measured(dtype, options.repeats, options.microbatches, options.set, scratch)
            rows.append((dtype, plain, hooked, hooked / plain - 1))
    notes = [f"medians of {options.repeats} turns of {options.microbatches} microbatches; cost: what the hooks add"]
    publish("Forward passes with and without hooks", {"dtype": "<", "without, s": ".2f", "with, s": ".2f", "cost": ".1%"}, rows, notes, options.json)


if __name__ == "__main__":
    main()
