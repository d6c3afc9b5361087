"""Cutting in several rounds: the sizes on the way to the target, and what all rounds keep taken together. Pure.

Iterative importance (arXiv 2407.14679, section 2.2): measure, cut a part of the way, measure what is left, cut on.
"""

import math

from minitron.arch.arch import Arch
from minitron.pruning.keep import Keep

UNIFORM = ("num_layers", "hidden_size", "ffn_hidden_size", "num_query_groups", "heads_per_group")


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


def way(original: Arch, target: Arch, rounds: int) -> list[Arch]:
    """The architecture after each round, `target` last; all axes go down together. With several rounds, blocks are alike in both."""
    if rounds == 1:
        return [target]
    columns = [sizes_after(getattr(original, name), getattr(target, name), rounds) for name in UNIFORM]
    found = []
    for layers, hidden, ffn, groups, per_group in zip(*columns, strict=True):
        sizes = {"num_layers": layers, "hidden_size": hidden, "ffn_hidden_size": ffn, "num_query_groups": groups}
        found.append(original.replace(**sizes, num_attention_heads=groups * per_group))
    assert found[-1] == target
    return found


def most_rounds(original: Arch, target: Arch) -> int:
    """The most rounds of which every one cuts something."""
    return max(getattr(original, name) - getattr(target, name) for name in UNIFORM)


def both(first: Keep, second: Keep) -> Keep:
    """What is kept of a model by `first` and then, of what that left, in the numbers it has there, by `second`. Heads were not merged."""
    keep = Keep(first.layers[second.layers], first.hidden[second.hidden], {}, {}, {})
    for number, layer in enumerate(map(int, first.layers)):
        if number in second.ffn:
            keep.ffn[layer] = first.ffn[layer][second.ffn[number]]
            keep.groups[layer] = first.groups[layer][second.groups[number]]
            keep.heads[layer] = first.heads[layer][second.heads[number]]
    return keep
