"""From one layout of the processes to another: which replica of the second model takes which microbatch, and the way its results go back.

Microbatches are numbered over the whole global batch: replica 0's first, then replica 1's, and so on.

Legend: M microbatches of a replica, N of all replicas, B microbatch, S sequence (a context rank's part), G hidden.
"""

import dataclasses

import torch
import torch.distributed as dist

from minitron.engine.parallel import World

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout, as far as last hidden states go."""

    is_last_stage: bool
    dp_rank: int
    cp_rank: int
    tp_rank: int


def places(world: World) -> list[Place]:
    """Every rank's place, on every rank."""
    mine = Place(world.is_last_stage, world.dp_rank, world.cp_rank, world.tp_rank)
    found = [mine] * world.size
    dist.all_gather_object(found, mine)
    return found


def every_replica(mine: Tensor, world: World) -> Tensor:
    """[dp, ...]: the tensor of each data-parallel replica, all of one shape, on every rank."""
    gathered = mine.new_empty(world.dp, *mine.shape)
    dist.all_gather(list(gathered), mine.contiguous(), group=world.groups.dp)
    return gathered


def share_of(replica: int, replicas: int, count: int) -> range:
    """The consecutive microbatches, of `count`, that one of `replicas` takes: as many as the others take, or one more or less."""
    return range(replica * count // replicas, (replica + 1) * count // replicas)


class Relay:
    """Carries last hidden states from the last stages of `source` to those of `target`, two layouts of the same processes with equal cp."""

    def __init__(self, source: World, target: World) -> None:
        assert source.cp == target.cp, "the parts of a sequence are the same in both layouts"
        self.source, self.target = source, target
        self.sources, self.targets = places(source), places(target)

    def share(self, count: int) -> range:
        """The microbatches, of `count`, that this rank's replica of the source runs."""
        return share_of(self.source.dp_rank, self.source.dp, count)

    def sender(self, replica: int, receiver: int) -> int:
        """The rank of a source replica that gives to `receiver`: itself where it can, else the tensor ranks take turns."""
        part = self.targets[receiver].cp_rank
        holders = [rank for rank, place in enumerate(self.sources) if place.is_last_stage and (place.dp_rank, place.cp_rank) == (replica, part)]
        return receiver if receiver in holders else holders[self.targets[receiver].tp_rank % len(holders)]

    def carry(self, hidden_SBG: list[Tensor], count: int, empty_SBG: Tensor) -> list[Tensor]:
        """The hidden states of the target replica's own microbatches on its last stage, in their order; none elsewhere. Every rank calls.

        `hidden_SBG`: what this rank's `share(count)` gave on the source's last stage, [] elsewhere; emptied on the way, so that each microbatch
        is held twice for one round at most. `empty_SBG` (of the meta device) tells shape and type.
        """
        per_replica, me = count // self.target.dp, self.source.rank
        shares = [share_of(replica, self.source.dp, count) for replica in range(self.source.dp)]
        arrived: dict[int, Tensor] = {}
        for turn in range(max(map(len, shares))):
            # (sender, receiver, microbatch): one that each source replica ran goes to every rank that computes its loss
            routes = [
                (self.sender(replica, receiver), receiver, share[turn])
                for replica, share in enumerate(shares)
                for receiver, place in enumerate(self.targets)
                if turn < len(share) and place.is_last_stage and place.dp_rank == share[turn] // per_replica
            ]
            mine = hidden_SBG.pop(0) if hidden_SBG else torch.empty_like(empty_SBG, device=self.source.device)
            to = [sum(route[:2] == (me, rank) for route in routes) for rank in range(self.source.size)]
            back = [sum(route[:2] == (rank, me) for route in routes) for rank in range(self.source.size)]
            received = mine.new_empty(sum(back), *mine.shape)
            dist.all_to_all_single(received, mine.expand(sum(to), *mine.shape).contiguous(), back, to)
            numbers = [number for _, receiver, number in sorted(routes) if receiver == me]
            arrived |= dict(zip(numbers, received, strict=True))
        return [arrived[number] for number in sorted(arrived)]
