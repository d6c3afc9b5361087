"""Which kept units move between tensor ranks, so that every rank holds its share: the least traffic that evens the shards. Pure."""

import dataclasses
import math

import numpy as np

from minitron.arch.axes import Indices


@dataclasses.dataclass(frozen=True)
class Plan:
    """`stay[r]`: kept units of rank r that stay; `moves[s][d]`: units that rank s sends to rank d. All in the original numbering.

    A rank's new shard is what stays, then what it receives in the order of the senders, then dead units up to `held`.
    """

    stay: list[Indices]
    moves: list[list[Indices]]
    held: int

    def order(self) -> Indices:
        """The live units as they lie over the ranks, in the original numbering."""
        ranks = range(len(self.stay))
        return np.concatenate([np.concatenate([self.stay[d], *(self.moves[s][d] for s in ranks)]) for d in ranks])

    def moved(self) -> int:
        """Units that travel."""
        return sum(len(units) for row in self.moves for units in row)


def in_order(kept: Indices, held_before: int, ranks: int) -> list[list[Indices]]:
    """[s][d]: the kept units that rank s holds and rank d gets, so that every rank ends with its share and all lie in ascending order over the ranks.

    `ranks` must divide what is kept. On two ranks this moves as little as `balance` does, on more a unit may have to make room for another.
    """
    share = len(kept) // ranks
    assert share * ranks == len(kept)
    owners = kept // held_before
    return [[kept[d * share : (d + 1) * share][owners[d * share : (d + 1) * share] == s] for d in range(ranks)] for s in range(ranks)]


def balance(kept: Indices, held_before: int, tp: int) -> Plan:
    """Plan the shards of an axis whose rank r held units [r * held_before, (r + 1) * held_before).

    Every rank ends with ceil(len(kept) / tp) units; where they do not divide, the last ranks are filled with dead ones. A
    unit moves only if its rank has more than its share, so exactly the surplus travels: no plan moves fewer.
    """
    held = math.ceil(len(kept) / tp)
    mine = [kept[(kept >= rank * held_before) & (kept < (rank + 1) * held_before)] for rank in range(tp)]
    share = [max(0, min(held, len(kept) - rank * held)) for rank in range(tp)]
    stay = [units[:count] for units, count in zip(mine, share, strict=True)]
    surplus = [units[count:] for units, count in zip(mine, share, strict=True)]
    wanted = [count - len(units) for units, count in zip(stay, share, strict=True)]
    empty = kept[:0]
    moves = [[empty] * tp for _ in range(tp)]
    for source, units in enumerate(surplus):
        for target in range(tp):
            count = min(wanted[target], len(units))
            moves[source][target], units = units[:count], units[count:]
            wanted[target] -= count
    return Plan(stay, moves, held)
