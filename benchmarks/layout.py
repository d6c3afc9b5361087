"""One chain, two layouts: the same compression on one process and on two tensor-parallel ranks, in fp32.

Says whether both keep the same units, and how far the losses are apart. Arguments after the options are settings of
minitron, for example `model.path=FOLDER target.hidden_size=48` to try it on a smaller model.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, publish, wikitext

LAYOUTS = {"tp=1": (1, []), "tp=2": (2, ["parallel.tp=2"])}
SHORT = [
    "recipe=smollm2_135m_to_100m",
    "dtype=fp32",
    "calibrate.samples=32",
    "train.steps=6",
    "train.warmup_steps=2",
    "train.eval_tokens=2048",
    "eval.tokens=4096",
    "logging.progress=false",
]


def compress(folder: Path, ranks: int, overrides: list[str]) -> None:
    """One run of the chain in processes of its own."""
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    command = [sys.executable, "-m", *launcher, "minitron", "compress", *SHORT, *wikitext(), *overrides, f'run.dir="{folder}"']
    # ranks that share cores slow each other down with threads of their own
    subprocess.run(command, check=True, env=os.environ if ranks == 1 else {**os.environ, "OMP_NUM_THREADS": "1"})


def training_losses(folder: Path) -> dict[str, float]:
    """ "step N KEY" -> value, of every loss in metrics.jsonl."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {f"step {line['step']} {key}": line[key] for line in lines for key in ("loss", "kd_loss", "valid_loss") if key in line}


def evaluation_losses(folder: Path) -> dict[str, float]:
    """ "MODEL on TEXT" -> loss, of eval.json."""
    models: dict[str, Any] = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    texts = {name: {"held-out": entry, **entry["texts"]} for name, entry in models.items()}
    return {f"{name} on {text}": found["loss"] for name, entries in texts.items() for text, found in entries.items()}


def furthest(one: dict[str, float], two: dict[str, float]) -> tuple[str, float]:
    """Where two sets of figures differ most, and by how much, relative to the first."""
    assert one.keys() == two.keys(), one.keys() ^ two.keys()
    where = max(one, key=lambda name: abs(one[name] - two[name]) / abs(one[name]))
    return where, abs(one[where] - two[where]) / abs(one[where])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch, name) for name in LAYOUTS}
        for name, (ranks, layout) in LAYOUTS.items():
            compress(folders[name], ranks, [*options.overrides, *layout])
        one, two = folders.values()
        same = (one / "keep.safetensors").read_bytes() == (two / "keep.safetensors").read_bytes()
        rows = [("keep.safetensors", "identical" if same else "DIFFERENT", None, None)]
        for file, losses in (("metrics.jsonl", training_losses), ("eval.json", evaluation_losses)):
            found = losses(one), losses(two)
            where, difference = furthest(*found)
            rows.append((file, f"{len(found[0])} losses, furthest: {where}", found[0][where], difference))
    title = "tp=1 against tp=2, the same chain in fp32"
    publish(title, {"file": "<", "what": "", "tp=1": ".6f", "relative difference": ".1e"}, rows, [" ".join(SHORT + options.overrides)], options.json)


if __name__ == "__main__":
    main()
