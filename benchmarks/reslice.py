"""What cutting costs: seconds and memory of reslicing the demo's model in place, beside copying what stays.

The floor is one copy of every kept weight (`clone` of the pruned parameters). Memory is the peak above what the model itself took
before the cut, in units of its largest parameter.
"""

import statistics
import sys
import tempfile
import time

import torch
from common import ROOT, arguments, publish

from minitron.config.compose import compose
from minitron.config.schema import Target
from minitron.importance.scores import random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.session import Session, session

sys.path.insert(0, str(ROOT))  # for the tests' oracles

TARGETS = {
    "hidden 512, MLP 1152": Target(hidden_size=512, ffn_hidden_size=1152),
    "2 of 3 KV groups": Target(num_query_groups=2),
    "22 of 30 layers": Target(num_layers=22),
    "all of these": Target(num_layers=22, hidden_size=512, ffn_hidden_size=1152, num_query_groups=2),
}


def cut(opened: Session, target: Target) -> tuple[float, float, float]:
    """Seconds of the cut, seconds of the floor, and the peak of memory over the largest parameter."""
    from tests.oracles.memory import LiveBytes

    arch = opened.source.arch
    pruned_arch = target_arch(arch, target, opened.cfg.parallel)
    keep = select(random_scores(arch, 1), arch, pruned_arch)
    model = opened.load_source()
    parameters = list(model.parameters())
    largest = max(parameter.numel() * parameter.element_size() for parameter in parameters)
    with LiveBytes(parameters) as live:
        del parameters
        reslice(model, keep, pruned_arch, opened.world)
    model = opened.load_source()
    started = time.perf_counter()
    pruned = reslice(model, keep, pruned_arch, opened.world)
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    _ = [parameter.detach().clone() for parameter in pruned.parameters()]
    return seconds, time.perf_counter() - started, live.peak / largest


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="cuts per target (default: 5)")
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of minitron, such as model.path=FOLDER")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        cfg = compose("calibrate", ["recipe=smollm2_135m_to_100m", f"run.dir={scratch}/run", *options.set])
        with session(cfg, "calibrate") as opened, torch.no_grad():
            elements = sum(parameter.numel() for parameter in opened.load_source().parameters())
            for name, target in TARGETS.items():
                turns = [cut(opened, target) for _ in range(options.repeats)]
                seconds, floor, peak = (statistics.median(turn[part] for turn in turns) for part in range(3))
                rows.append((name, seconds, floor, seconds / floor, peak))
    notes = [f"{elements / 1e6:.1f} M parameters in {cfg.dtype}, one process; medians of {options.repeats}"]
    columns = {"cut to": "<", "cut, s": ".3f", "one copy, s": ".3f", "ratio": ".1f", "peak / largest parameter": ".2f"}
    publish("Reslicing in place", columns, rows, notes, options.json)


if __name__ == "__main__":
    main()
