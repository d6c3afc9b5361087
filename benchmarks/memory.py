"""The memory of a rank, part by part: what `minitron plan` tells beforehand (minitron/launching/memory.py), beside what processes take.

Each row is one pipeline stage of a layout on gloo ranks of this machine: two steps of training random models, as the verbs make them.
Measured is what the kernel counts: the most that was resident of the process (VmHWM, from the moment before the models are made), less what was
resident at that moment, when everything was imported and a model of no size had been trained (its baseline, told below). So what is
said is without the part "runtime"; "rest" are communication and copies of checkpoints. glibc is told to give freed memory back (mallopt:
blocks of 64 KiB and more by mmap, one arena): by itself it keeps blocks of up to 32 MiB, and what is resident would be more than what is
in use. In MiB.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from common import ROOT, arguments, publish

sys.path.insert(0, str(ROOT))  # for the tests' oracles
COLUMNS = {"teacher": "teach", "student": "stud", "gradients": "grad", "optimizer": "adam", "signals": "sign", "activations": "acts", "loss": "loss",
           "working": "work"}  # fmt: skip
REST = ("communication", "copies")


def main() -> None:
    # the ranks are processes of their own, and each would repeat what Megatron and transformers say when they are imported
    os.environ |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    warnings.simplefilter("ignore")
    from tests.oracles.resident import CASES, compared

    parser = arguments(__doc__)
    parser.add_argument("--only", nargs="*", metavar="CASE", default=list(CASES), help=", ".join(CASES))
    options = parser.parse_args()
    rows: list[list[Any]] = []
    baselines: list[float] = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as scratch:
            found = compared(CASES[name], Path(scratch))
        for stage, (expected, real) in enumerate(found):
            baselines.append(real.baseline / 2**20)
            parts = [expected.parts[part] / 2**20 for part in COLUMNS]
            rest = sum(expected.parts[part] for part in REST) / 2**20
            said, took = sum(parts) + rest, real.peak / 2**20
            rows.append([name if stage == 0 else "", stage, *parts, rest, said, took, said / took])
    forms = {"case": "<", "": "d", **dict.fromkeys([*COLUMNS.values(), "rest", "said", "took"], ",.0f"), "ratio": ".2f"}
    worst = max(abs(row[-1] - 1) for row in rows)
    notes = [f"furthest from what was measured: {100 * worst:.0f} %; baselines {min(baselines):,.0f} to {max(baselines):,.0f} MiB"]
    publish("Memory of a rank by part, MiB", forms, rows, notes, options.json)


if __name__ == "__main__":
    main()
