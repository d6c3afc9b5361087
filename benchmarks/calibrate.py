"""What measuring importance costs: the same forward passes with and without the hooks, in turns.

Two models on random tokens of calibration's shape, in one process.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from common import arguments, publish

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.shards import shard_shape
from minitron.config.compose import compose
from minitron.importance.hooks import Probes
from minitron.session import Session, session


def seconds(action: Callable[[], None]) -> float:
    """How long it takes, what was queued on a GPU included."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def smollm2(opened: Session) -> engine.Model:
    """The demo's teacher."""
    return opened.load_source()


def llama_8b(opened: Session) -> engine.Model:
    """Two blocks of the shape of Llama 3.1 8B's, of random weights: what hooks add goes with the width, what a pass takes with its square."""
    arch = Arch("llama", num_layers=2, hidden_size=4096, ffn_hidden_size=14336, num_attention_heads=32, num_query_groups=8, kv_channels=128,
                vocab_size=1024, max_position_embeddings=8192, share_embeddings_and_output_weights=True)  # fmt: skip
    model, generator = engine.skeleton(arch, opened.world, opened.dtype), torch.Generator().manual_seed(2)
    for name, row, at in engine.rows(model):
        engine.put(model, name, row, at, 0.02 * torch.randn(shard_shape(row, arch, 1), dtype=opened.dtype, generator=generator))
    return model


MODELS = {"SmolLM2-135M": smollm2, "2 blocks as of Llama 3.1 8B": llama_8b}


def measured(name: str, dtype: str, repeats: int, microbatches: int, settings: list[str], scratch: str) -> tuple[float, float, float]:
    """Median seconds of the passes without and with hooks, and the median of what the hooks added in a turn."""
    cfg = compose("calibrate", ["recipe=smollm2_135m_to_100m", f"dtype={dtype}", f"run.dir={scratch}/{dtype}", *settings])
    with session(cfg, "calibrate") as opened:
        world, model = opened.world, MODELS[name](opened)
        generator = torch.Generator().manual_seed(1)
        shape = (cfg.calibrate.micro_batch_size, cfg.calibrate.seq_length)
        batches = [torch.randint(0, model.arch.vocab_size, shape, generator=generator) for _ in range(microbatches)]

        def plain() -> None:
            for tokens in batches:
                engine.forward_only(model, [tokens], world)

        def hooked() -> None:
            probes = Probes(model, world, cfg.calibrate.seq_agg, cfg.calibrate.batch_agg, cfg.calibrate.seq_length, cfg.calibrate.compile)
            with probes.attached():
                for tokens in batches:
                    engine.forward_only(model, [tokens], world, watch=probes)

        for warm_up in (plain, hooked):
            warm_up()
        turns = [(seconds(plain), seconds(hooked)) for _ in range(repeats)]
    median = statistics.median
    return median(turn[0] for turn in turns), median(turn[1] for turn in turns), median(turn[1] / turn[0] - 1 for turn in turns)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=11, help="turns of each side (default: 11)")
    parser.add_argument("--microbatches", type=int, default=4, help="forward passes of a turn (default: 4)")
    parser.add_argument("--dtypes", nargs="+", choices=("bf16", "fp32"), default=("bf16", "fp32"))
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as calibrate.seq_length=2048")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for name, dtype in itertools.product(MODELS, options.dtypes):
            rows.append((name, dtype, *measured(name, dtype, options.repeats, options.microbatches, options.set, scratch)))
    notes = [f"medians of {options.repeats} turns of {options.microbatches} microbatches; cost: what the hooks add in a turn"]
    publish(
        "Forward passes with and without hooks",
        {"model": "<", "dtype": "<", "without, s": ".2f", "with, s": ".2f", "cost": ".1%"},
        rows,
        notes,
        options.json,
    )


if __name__ == "__main__":
    main()
