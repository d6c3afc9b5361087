"""How fast a model generates beside one cut from it, as `minitron speed` measures it: plain `transformers`, a process each, turn by turn.

The shapes are SmolLM2-135M's and those that the recipes cut it to, as the class that takes them all; weights are random, as no time depends
on them. Settings are those of `minitron speed`: speed.batch_sizes=[1] speed.new_tokens=64 dtype=fp32 ...
"""

import tempfile
from pathlib import Path

import torch
from common import arguments, publish
from transformers import AutoModelForCausalLM, MistralConfig

from minitron import engine
from minitron.config.compose import compose
from minitron.evaluation.speed import Place, measure
from minitron.hardware import cpu_model
from minitron.reporting.generation import amount, memory_told, speed_rows, told

SMOLLM2 = {
    "num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "vocab_size": 49152, "max_position_embeddings": 8192, "tie_word_embeddings": True, "sliding_window": None,
}  # fmt: skip
SHAPES = {
    "SmolLM2-135M": {},
    "100 M by width": {"hidden_size": 512, "intermediate_size": 1152},
    "106 M by depth": {"num_hidden_layers": 22},
}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("settings", nargs="*", help="settings of minitron speed")
    options = parser.parse_args()
    cfg = compose("speed", ["run.dir=unused", "model.path=unused", *options.settings])
    with tempfile.TemporaryDirectory() as scratch, engine.world(cfg.parallel, cfg.device, cfg.seed) as world:
        gpu = world.device.type == "cuda"
        place = Place(str(world.device), engine.gpu_name(world.device) if gpu else cpu_model(), cfg.dtype)
        for name, changes in SHAPES.items():
            model = AutoModelForCausalLM.from_config(MistralConfig(**{**SMOLLM2, **changes}), dtype=torch.bfloat16)
            model.save_pretrained(Path(scratch, name))
        found = measure({name: Path(scratch, name) for name in SHAPES}, cfg.speed, place)
    rows = [
        (row.engine, row.load, row.model, 1e3 * row.first.median, row.prefill.median, row.prefill_ratio and row.prefill_ratio.median,
         row.decode.median, row.decode.least, row.decode.most, row.decode_ratio and row.decode_ratio.median, amount(row.weights), amount(row.peak))
        for row in speed_rows(found)
    ]  # fmt: skip
    columns = {
        "engine": "<", "load": "<", "model": "<", "first token ms": ",.1f", "prefill tokens/s": ",.0f", "prefill x": ".2f", "decode tokens/s": ",.1f",
        "least": ",.1f", "most": ",.1f", "decode x": ".2f", "weights": ">", "memory": ">",
    }  # fmt: skip
    publish("Generation with a key/value cache, greedy", columns, rows, [told(found), memory_told(found)], options.json)


if __name__ == "__main__":
    main()
