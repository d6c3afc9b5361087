"""A made-up search over SmolLM2-135M for 100 M parameters, with numbers that such a search could have."""

import numpy as np

from minitron.arch import Arch
from minitron.search.candidates import SIZES, Candidate, Results, Rung

ORIGINAL = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, share_embeddings_and_output_weights=True)
GRID = [
    (30, 512, 1152, 6, 3), (30, 512, 896, 9, 3), (28, 512, 1152, 9, 3), (30, 448, 1408, 9, 3), (27, 512, 1280, 9, 3), (26, 576, 1024, 6, 3),
    (30, 448, 1536, 6, 3), (24, 576, 1152, 6, 3), (30, 576, 640, 6, 3), (26, 512, 1408, 6, 3), (28, 576, 768, 9, 3), (24, 576, 1024, 9, 3),
]  # fmt: skip
RUNGS = (0, 50, 100, 200, 400)
TOKENS_PER_STEP = 16384


def candidates(grid=GRID):
    """The candidates of a grid, with every cost that can be counted."""
    found = []
    for sizes in grid:
        named = dict(zip(SIZES, sizes, strict=True))
        params = ORIGINAL.replace(**named).num_parameters()
        costs = {
            "params": params, "non_embedding_params": params - 49152 * named["hidden_size"], "active_params": params, "memory_gb": params * 2.4e-9,
            "gflops_per_token": params * 2.2e-9, "latency_ms": 1.1 * named["num_layers"] + params * 3e-7,
        }  # fmt: skip
        found.append(Candidate("-".join(f"{letter}{size}" for letter, size in zip("LHFAG", sizes, strict=True)), named, costs))
    return found


def search(rungs=5, partial=False, seeds=1, grid=GRID, settled=True):
    """A search after its first `rungs` comparisons, ended if these are all; with `partial` the last of them is under way."""
    found, rng = candidates(grid), np.random.default_rng(5)
    names, made = [one.name for one in found], []
    quality = dict(zip(names, 3.12 + 0.2 * np.abs(rng.normal(size=len(names))), strict=True))
    start = dict(zip(names, 4.6 + 2.5 * rng.random(len(names)) + 2 * (np.array([*quality.values()]) - 3.1), strict=True))
    for at, steps in enumerate(RUNGS[:rungs]):
        unfinished = partial and at == rungs - 1
        left = 0.02 if steps else 0.0
        losses = {
            name: [float(quality[name] + (start[name] - quality[name]) * 0.5 ** (steps / 45) + left * rng.normal()) for _ in range(seeds)]
            for name in (names[: (len(names) + 1) // 2] if unfinished else names)
        }
        order = sorted(losses, key=lambda name: sum(losses[name]))
        stay = [] if unfinished or steps == RUNGS[-1] else order[: 8 if not steps else max(2, len(order) // 2)]
        tau = None if not at or unfinished else round(0.4 + 0.15 * at, 3)
        made.append(
            Rung(steps, steps * TOKENS_PER_STEP, losses, stay, tau, 0.9 if seeds > 1 and not unfinished else None, 40.0 + 2 * steps * len(names))
        )
        names = stay or order
    ended = rungs == len(RUNGS) and not partial
    settings = {"params": 100e6, "tolerance": 0.05, "rungs": list(RUNGS[1:]), "finalists": 8, "seeds": seeds}
    fell = {"parameters above 105.0 M": 2841, "dominated": 59, "heads not a multiple of the KV groups": 0}
    return Results(ORIGINAL, settings, 2912, fell, found, made, names[0] if ended else None, ended and settled)
