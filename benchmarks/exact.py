"""From activations to the pruned model at every layout, on gloo ranks of this machine, against plain `transformers`.

The model is small and odd; the errors are of fp32. Scores: the largest relative error, over all ranks and layers, against activations
recorded whole in float64. "≠": the number of targets whose kept set, or whose exported tensors, differ by a bit from brute force. Last
the largest error of a logit.
"""

import os
import sys
import tempfile
import warnings
from pathlib import Path

from common import ROOT, arguments, publish

sys.path.insert(0, str(ROOT))  # for the tests' oracles


def main() -> None:
    # the ranks are processes of their own, and each would repeat what Megatron and transformers say when they are imported
    os.environ |= {"PYTHONWARNINGS": "ignore", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore")
    from tests.oracles.exact import LAYOUTS, TARGETS, compared, make_model, oracle_scores

    options = arguments(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_model(Path(scratch) / "model")
        oracle = oracle_scores(folder)
        found = [compared(layout, folder, Path(scratch) / str(layout), oracle) for layout in LAYOUTS]
    forms = {name: "<" if name == "layout" else "d" if name.endswith("≠") else ".0e" for name in found[0]}
    notes = [f"targets: {', '.join(TARGETS)}"]
    publish("Every layout against transformers and brute force", forms, [tuple(row.values()) for row in found], notes, options.json)


if __name__ == "__main__":
    main()
