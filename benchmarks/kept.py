"""Do a GPU in bf16 and a CPU in fp32 keep the same units? The same model is measured on the same text by both, and cut to the same sizes.

Of each axis the share of the kept units that both keep, its mean over the layers and its least. `by chance` is what two random choices have in
common.
Arguments after the options are settings of minitron, for example `model.path=FOLDER data.train=FILE`.
"""

import tempfile
from pathlib import Path

import numpy as np
from common import arguments, publish

from minitron.arch.arch import Arch
from minitron.config.compose import compose
from minitron.importance.scores import FILE
from minitron.pruning.keep import Keep, select
from minitron.pruning.target import target_arch
from minitron.session import session
from minitron.stages import calibrate

SIZES = {"hidden": "hidden_size", "ffn": "ffn_hidden_size", "heads": "num_attention_heads", "groups": "num_query_groups", "layers": "num_layers"}


def kept(device: str, dtype: str, settings: list[str], folder: Path) -> tuple[Keep, Arch, Arch]:
    """What stays when this device measures, and the sizes before and after."""
    from safetensors.torch import load_file

    cfg = compose("compress", [*settings, f'run.dir="{folder}"', f"device={device}", f"dtype={dtype}", "logging.progress=false"])
    with session(cfg, "compress") as opened:
        calibrate.work(opened)
        arch = opened.source.arch
    target = target_arch(arch, cfg.target, cfg.parallel)
    return select(load_file(folder / FILE), arch, target), arch, target


def shares(one: Keep, other: Keep, axis: str) -> list[float]:
    """Of each layer, or once for the model, the share of the kept units that both keep."""
    mine, theirs = getattr(one, axis), getattr(other, axis)
    pairs = [(mine[layer], theirs[layer]) for layer in mine if layer in theirs] if isinstance(mine, dict) else [(mine, theirs)]
    return [len(np.intersect1d(*pair)) / len(pair[0]) for pair in pairs]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"), help="what is held against the CPU in fp32 (default: %(default)s)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    settings = ["recipe=smollm2_135m_to_100m", *options.overrides]
    with tempfile.TemporaryDirectory() as scratch:
        ours, arch, target = kept(options.device, options.dtype, settings, Path(scratch, "device"))
        theirs, _, _ = kept("cpu", "fp32", settings, Path(scratch, "cpu"))
    rows = []
    for axis, size in SIZES.items():
        found, chance = shares(ours, theirs, axis), getattr(target, size) / getattr(arch, size)
        if chance < 1:
            rows.append((axis, getattr(arch, size), getattr(target, size), sum(found) / len(found), min(found), chance))
    columns = {"axis": "<", "units": "d", "kept": "d", "alike": ".1%", "least": ".1%", "by chance": ".1%"}
    publish(f"Units kept by {options.device} in {options.dtype} and by the CPU in fp32", columns, rows, [], options.json)


if __name__ == "__main__":
    main()
