"""The grid of a search: which sizes each axis takes, every combination of them, and those that no model can have. Pure.

Shapes: P points of the grid, A their sizes, in the order of SIZES.
"""

import itertools
import math

import numpy as np
import numpy.typing as npt

from minitron.arch.arch import Arch
from minitron.arch.families import written_as
from minitron.config.schema import Parallel, Search
from minitron.errors import RequestError, refuse
from minitron.search.candidates import SIZES

Sizes = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
LAYERS, HIDDEN, FFN, HEADS, GROUPS = range(len(SIZES))


def ladder(full: int, least: int, step: int, most: int) -> list[int]:
    """A grid of its own: `full` and the multiples of `step` down to `least`; where these are more than `most`, of twice the step, and so on."""
    while True:
        sizes = sorted({full, *range(math.ceil(least / step) * step, full, step)}, reverse=True)
        if len(sizes) <= most:
            return sizes
        step *= 2


def axes(arch: Arch, search: Search, parallel: Parallel) -> dict[str, list[int]]:
    """The sizes of each axis, largest first: those that were given, or else a grid of its own, as the settings `search` say.

    The MLP's is left out where search.ffn_expansion gives it by width, query heads are left out where they follow from KV groups that were given.
    Raises RequestError for a size that is larger than the model's.
    """
    own = {
        "num_layers": lambda: ladder(arch.num_layers, math.ceil(arch.num_layers * 7 / 8), 1, search.values),
        "hidden_size": lambda: ladder(arch.hidden_size, math.ceil(arch.hidden_size / 2), search.hidden_multiple_of, search.values),
        "ffn_hidden_size": lambda: ladder(
            arch.ffn_hidden_size, math.ceil(arch.ffn_hidden_size / 2), math.lcm(search.ffn_multiple_of, parallel.tp), search.values
        ),
        "num_attention_heads": lambda: [arch.num_attention_heads],
        "num_query_groups": lambda: [arch.num_query_groups],
    }
    found = {}
    if not arch.has_dense_blocks:  # no block has an MLP that could be made smaller
        own["ffn_hidden_size"] = lambda: [arch.ffn_hidden_size]
        for name in ("ffn_hidden_size", "ffn_expansion"):
            if (asked := getattr(search, name)) is not None:
                raise refuse(f"search.{name}", asked, "must be null: every block has experts in place of an MLP")
    for name in SIZES:
        given, present = getattr(search, name), getattr(arch, name)
        if given is not None and max(given) > present:
            raise refuse(f"search.{name}", given, f"the model has {present}: pruning can only make it smaller")
        found[name] = own[name]() if given is None else sorted(set(given), reverse=True)
    if search.ffn_expansion is not None:
        del found["ffn_hidden_size"]
    if search.num_query_groups is not None and search.num_attention_heads is None:
        del found["num_attention_heads"]
    return found


def points(arch: Arch, search: Search, parallel: Parallel) -> Sizes:
    """Every combination of the sizes of `axes`, each once: [P, A]."""
    found = axes(arch, search, parallel)
    expansions = search.ffn_expansion or [0.0]
    rows = np.array(list(itertools.product(*(found.get(name, [0]) for name in SIZES), expansions)))
    points_PA = rows[:, : len(SIZES)].astype(np.int64)
    if search.ffn_expansion is not None:
        step = search.ffn_multiple_of
        points_PA[:, FFN] = np.maximum(step, np.round(rows[:, HIDDEN] * rows[:, -1] / step).astype(np.int64) * step)
    if "num_attention_heads" not in found:
        points_PA[:, HEADS] = points_PA[:, GROUPS] * arch.heads_per_group
    return np.unique(points_PA, axis=0)


def impossible(arch: Arch, points_PA: Sizes, parallel: Parallel) -> dict[str, tuple[str, Mask]]:
    """The points that are no compressed model, by the reason in words: the setting to look at, and [P] which they are. A point may be here twice.

    What pruning/target.py refuses of a single architecture, for all of them at once.
    """
    layers, hidden, ffn, heads, groups = points_PA.T
    stages = parallel.pp * parallel.vpp
    return {
        "the model itself": ("num_layers", (points_PA == [getattr(arch, name) for name in SIZES]).all(axis=1)),
        "MLP larger than the model's": ("ffn_expansion", ffn > arch.ffn_hidden_size),
        f"MLP not divisible by parallel.tp={parallel.tp}": ("ffn_hidden_size", ffn % parallel.tp != 0),
        "query heads that are no multiple of the KV groups": ("num_attention_heads", heads % groups != 0),
        f"more than the model's {arch.heads_per_group} query heads in a KV group": ("num_attention_heads", heads > groups * arch.heads_per_group),
        f"fewer layers than the {stages} pipeline stages": ("num_layers", layers < stages),
        "a shape that transformers can't load": ("hidden_size", _not_written(arch, hidden, heads, groups)),
    }


def _not_written(arch: Arch, hidden: Sizes, heads: Sizes, groups: Sizes) -> Mask:
    """Which points no class of transformers loads; it depends on width and heads alone."""
    shapes_XA, which_P = np.unique(np.stack([hidden, heads, groups], axis=1), axis=0, return_inverse=True)
    return np.array([not _is_written(arch, *map(int, shape)) for shape in shapes_XA])[which_P.ravel()]


def _is_written(arch: Arch, hidden: int, heads: int, groups: int) -> bool:
    if heads % groups:
        return True  # it has a reason of its own
    try:
        written_as(arch.replace(hidden_size=hidden, num_attention_heads=heads, num_query_groups=groups))
    except RequestError:
        return False
    return True


def dominated(points_PA: Sizes) -> Mask:
    """[P]: which points another one is at least as large as on every axis. Points are distinct.

    On the lattice of all sizes that occur: a point is dominated where one lies at or above a neighbour of it one size up.
    """
    ranks_PA = np.stack([np.unique(column, return_inverse=True)[1].ravel() for column in points_PA.T], axis=1)
    above = np.zeros(ranks_PA.max(axis=0) + 2, dtype=bool)  # one more on each axis, where nothing lies
    above[tuple(ranks_PA.T)] = True
    for axis in range(above.ndim):
        above = np.flip(np.logical_or.accumulate(np.flip(above, axis), axis=axis), axis)
    return np.logical_or.reduce([above[tuple((ranks_PA + step).T)] for step in np.eye(len(SIZES), dtype=int)])
