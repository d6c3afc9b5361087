"""Predicted latency against the real one: the sum of measured parts, as a search with search.latency_ms has it, and the whole model of that shape.

Shapes cut from SmolLM2-135M's, with random weights, in one process. A shape's parts are measured just before the whole, so that the machine is
the same; widths and blocks that an earlier shape has are not measured again, as in a search.
"""

import tempfile
from pathlib import Path

from common import arguments, publish

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.counts import scaled
from minitron.config.build import build
from minitron.config.schema import Config
from minitron.search.candidates import SIZES, name_of
from minitron.search.latency import check, measured

SMOLLM2 = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 2048, share_embeddings_and_output_weights=True)
SHAPES = (
    SMOLLM2,
    SMOLLM2.replace(hidden_size=512, ffn_hidden_size=1152),
    SMOLLM2.replace(num_layers=22),
    SMOLLM2.replace(hidden_size=576, ffn_hidden_size=768),
    SMOLLM2.replace(num_layers=28, hidden_size=512, num_attention_heads=6, num_query_groups=2),
)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: 1)")
    parser.add_argument("--length", type=int, default=64, help="tokens of each (default: 64)")
    parser.add_argument("--dtype", default="fp32", choices=engine.DTYPES)
    options = parser.parse_args()
    search = {"latency_ms": 1e9, "batch_size": options.batch, "seq_length": options.length}
    cfg = build(Config, {"search": search, "dtype": options.dtype})
    rows = []
    with tempfile.TemporaryDirectory() as scratch, engine.world(cfg.parallel, cfg.device, cfg.seed) as world:
        for arch in SHAPES:
            spec = engine.pick_spec(cfg.spec, world, arch)
            predict = measured(SMOLLM2, cfg, world, spec, Path(scratch))
            assert predict is not None
            found = check(arch, predict([arch])[0], cfg, world, spec)
            name = name_of({size: getattr(arch, size) for size in SIZES})
            rows.append((name, scaled(arch.num_parameters()), found.predicted, found.real, found.error))
    errors = sorted(abs(row[-1]) for row in rows)
    title = f"Latency of a forward pass over {options.batch} x {options.length} tokens, {options.dtype}"
    columns = {"shape": "<", "parameters": ">", "predicted ms": ".1f", "real ms": ".1f", "error": "+.1%"}
    publish(title, columns, rows, [f"median error {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}"], options.json)


if __name__ == "__main__":
    main()
