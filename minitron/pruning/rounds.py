"""Cutting in several rounds: the sizes on the way to the target, and what all rounds keep taken together. Pure.

Iterative importance (arXiv 2407.14679, section 2.2): measure, cut a part of the way, measure what is left, cut on.
"""

import math

import numpy as np

from minitron.arch.arch import Arch
from minitron.pruning.keep import Keep

UNIFORM = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "heads_per_group")
EXPERT_SIZES = ("num_moe_experts", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")  # of models that have them


def sizes_after(before: int, after: int, rounds: int) -> list[int]:
    """The size of an axis after each round, `after` last: steps as equal as they go, in whole multiples of a divisor of both sizes.

    That divisor is the largest that makes them equal, else the largest of which a round takes at least two. So what divides both sizes usually
    divides those in between, and they do not depend on a layout.
    """
    cut, common = before - after, math.gcd(before, after)
    divisors = [number for number in range(1, common + 1) if common % number == 0]
    equal = [divisor for divisor in divisors if cut // divisor % rounds == 0]
    step = max(equal or [divisor for divisor in divisors if divisor == 1 or 2 * rounds * divisor <= cut])
    steps = cut // step
    return [before - step * ((2 * steps * number + rounds) // (2 * rounds)) for number in range(1, rounds + 1)]


def uniform(arch: Arch) -> list[str]:
    """The sizes that rounds step through together."""
    return [*UNIFORM, *(name for name in EXPERT_SIZES if getattr(arch, name) is not None)]


def way(original: Arch, target: Arch, rounds: int) -> list[Arch]:
    """The architecture after each round, `target` last; all axes go down together. With several rounds, blocks are alike in both."""
    if rounds == 1:
        return [target]
    columns = {name: sizes_after(getattr(original, name), getattr(target, name), rounds) for name in uniform(original)}
    found = []
    for number in range(rounds):
        sizes = {name: column[number] for name, column in columns.items()}
        heads = sizes["num_query_groups"] * sizes.pop("heads_per_group")
        found.append(original.replace(**sizes, num_attention_heads=heads))
    assert found[-1] == target
    return found


def most_rounds(original: Arch, target: Arch) -> int:
    """The most rounds of which every one cuts something."""
    return max(getattr(original, name) - getattr(target, name) for name in uniform(original))


def both(first: Keep, second: Keep) -> Keep:
    """What is kept of a model by `first` and then, of what that left, in the numbers it has there, by `second`. Heads were not merged."""
    keep = Keep(first.layers[second.layers], first.hidden[second.hidden], {}, {}, {})
    for number, layer in enumerate(map(int, first.layers)):
        for axis in ("ffn", "groups", "heads", "experts", "shared_ffn"):
            if number in (left := getattr(second, axis)):
                getattr(keep, axis)[layer] = getattr(first, axis)[layer][left[number]]
        if number in second.experts:  # neurons are numbered within their expert
            neurons_EF = first.expert_ffn[layer][second.experts[number]]
            keep.expert_ffn[layer] = np.take_along_axis(neurons_EF, second.expert_ffn[number], axis=1)
    return keep
