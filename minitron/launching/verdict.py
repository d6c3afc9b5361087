"""What the cards of all ranks come to: faults, which end the run, and remarks, a line each. Pure: rank 0 holds card against card."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from minitron import engine
from minitron.config.schema import Config
from minitron.config.setting import flat
from minitron.errors import Passing, shown
from minitron.launching.memory import RankMemory
from minitron.launching.site import Card

TOO_MUCH, MUCH = 1.15, 0.9  # of what is there: an estimate, which may miss by this much, beyond which a run is refused; from which it is remarked on
GB = 10**9
UNHEARD = "a host that is not heard of"
KINDS_OF_REFUSAL: tuple[tuple[type[str], Callable[[Card], list[str]]], ...] = ((str, lambda card: card.faults), (Passing, lambda card: card.passing))


class Needs(NamedTuple):
    """What a training will take. `memory`: of a rank of each pipeline stage, in their order; `checkpoint`: bytes of one on the disk, where it is
    the first that would be written; `copies`: as many as may stay."""

    memory: Sequence[RankMemory] = ()
    checkpoint: int = 0
    copies: int = 0


@dataclasses.dataclass(frozen=True)
class Heard:
    """The cards by rank, None where there is none; who does not see rank 0's file, whose answer rank 0 does not see; what is needed."""

    cards: Sequence[Card | None]
    cfg: Config
    needs: Needs
    unanswered: Sequence[int] = ()
    nodes: Sequence[str] = ()  # the hosts that a scheduler gave, by their names, where it can be asked

    @functools.cached_property
    def there(self) -> dict[int, Card]:
        """The cards that there are."""
        return {rank: card for rank, card in enumerate(self.cards) if card is not None}

    @functools.cached_property
    def hosts(self) -> list[str]:
        """Of each rank."""
        machines: dict[str, list[str]] = {}
        for card in self.there.values():
            known = machines.setdefault(card.host, [])
            known += [card.machine] if card.machine not in known else []

        def name(card: Card) -> str:
            its = machines[card.host]
            return card.host if len(its) == 1 else f"{card.host} no. {its.index(card.machine) + 1}"

        return [UNHEARD if card is None else name(card) for card in self.cards]

    @functools.cached_property
    def by_host(self) -> dict[str, list[int]]:
        """Ranks."""
        found: dict[str, list[int]] = {}
        for rank in self.there:
            found.setdefault(self.hosts[rank], []).append(rank)
        return found

    def where(self, ranks: Iterable[int]) -> str:
        """Ranks with their hosts."""
        return engine.located(ranks, self.hosts)

    def parted(self, of: Callable[[Card], Any], among: Iterable[int] | None = None) -> dict[Any, list[int]]:
        """Ranks by what their cards say of something, rank 0's first."""
        found: dict[Any, list[int]] = {}
        for rank, card in self.there.items():
            if among is None or rank in among:
                found.setdefault(of(card), []).append(rank)
        return found

    def differing(self, of: Callable[[Card], Any], among: Iterable[int] | None = None) -> str | None:
        """`1 on a (ranks 0 to 3), 2 on b (ranks 4 to 7)` where cards don't agree."""
        parts = self.parted(lambda card: shown(of(card)), among)
        return ", ".join(f"{value} on {self.where(ranks)}" for value, ranks in parts.items()) if len(parts) > 1 else None


def faults(heard: Heard) -> list[str]:
    """Everything that the run can't begin with: Passing where a node may be at fault rather than the request."""
    return [line for check in CHECKS for line in check(heard)]


def missing(heard: Heard) -> Iterator[str]:
    """Ranks that said nothing."""
    silent = [rank for rank, card in enumerate(heard.cards) if card is None]
    if silent:
        unheard = sorted({*heard.nodes} - {card.host for card in heard.there.values()})
        on = f" ({', '.join(unheard)} among the hosts of the job)" if unheard else ""
        minutes = f"parallel.start_minutes={heard.cfg.parallel.start_minutes:g}"
        yield Passing(f"nothing was heard of {engine.spans(silent)}{on} within {minutes}: they did not start, hang or have ended; see what they said")


def refusals(heard: Heard) -> Iterator[str]:
    """What ranks refuse by themselves: said without names where all of them do."""
    for kind, of in KINDS_OF_REFUSAL:
        for line in dict.fromkeys(line for card in heard.there.values() for line in of(card)):
            ranks = [rank for rank, card in heard.there.items() if line in of(card)]
            yield kind(line if len(ranks) == len(heard.cards) else f"{line} [on {heard.where(ranks)}]")


def versions(heard: Heard) -> Iterator[str]:
    """One of each everywhere. Where the version says it already, the code's own hash is not gone into."""
    names = list(dict.fromkeys(name for card in heard.there.values() for name in card.versions))
    for name in names:
        if name == "minitron's own files" and heard.differing(lambda card: card.versions.get("minitron")):
            continue
        if parts := heard.differing(lambda card, name=name: card.versions.get(name, "absent")):  # type: ignore[misc]
            yield f"{name} differs: {parts}; all ranks need the same"


def settings(heard: Heard) -> Iterator[str]:
    """Composed settings, which a file or an environment of one host may change."""
    usual = flat(dataclasses.asdict(Config()))
    names = sorted({name for card in heard.there.values() for name in card.settings})
    for name in names:
        if parts := heard.differing(lambda card, name=name: card.settings.get(name, usual.get(name))):  # type: ignore[misc]
            yield f"{name} differs: {parts}; all ranks need the same settings"


def devices(heard: Heard) -> Iterator[str]:
    """A GPU for each rank, or none for any."""
    known = [rank for rank, card in heard.there.items() if card.device]
    if parts := heard.differing(lambda card: card.device, known):
        yield Passing(f"device={heard.cfg.device} differs: {parts}; device=cpu takes CPUs everywhere")
    for name, ranks in heard.by_host.items():
        first = heard.there[ranks[0]]
        if first.device == "cuda" and first.gpus < len(ranks):
            gpus = f"{first.gpus} visible GPU{'s' * (first.gpus != 1)}"
            yield Passing(f"{name} has {gpus} for {engine.spans(ranks)}: one each is needed (see CUDA_VISIBLE_DEVICES)")


def files(heard: Heard) -> Iterator[str]:
    """Models and texts that are not the same everywhere; that they are there, each host says itself."""
    leaders = [rank for rank, card in heard.there.items() if card.leads and not card.faults + card.passing]
    for setting in dict.fromkeys(name for rank in leaders for name in heard.there[rank].files):
        its: list[dict[str, str]] = [heard.there[rank].files.get(setting, {}) for rank in leaders]
        for file in sorted({name for one in its for name in one}):

            def of(card: Card, setting: str = setting, file: str = file) -> Hashable:
                return card.files.get(setting, {}).get(file, "not there")

            if parts := heard.differing(of, leaders):
                yield f"{setting}: {file} differs between hosts: {parts}"
                break  # one of them will do


def folder(heard: Heard) -> Iterator[str]:
    """run.dir is one folder, and every host can write there."""
    name = f"run.dir={heard.cfg.run.dir}"
    blind = sorted({*(rank for rank, card in heard.there.items() if card.sees is False), *heard.unanswered})
    if blind:
        yield (
            f"{name}: not one folder on all hosts: what {heard.where([0])} writes there is not seen, or not answered, on {heard.where(blind)}; "
            "a file system that all share is needed"
        )
    for reason, ranks in heard.parted(lambda card: card.not_writable).items():
        if reason and (ranks := [rank for rank in ranks if rank not in blind]):
            yield f"{name}: can't be written: {reason} on {heard.where(ranks)}"


def memory(heard: Heard) -> Iterator[str]:
    """Trainings that will not fit for certain."""
    for line, share in loads(heard):
        if share > TOO_MUCH:
            yield f"too little memory: {line}"


def disk(heard: Heard) -> Iterator[str]:
    """A first checkpoint that will not fit."""
    free = heard.there[0].disk_free if 0 in heard.there else None
    if free is not None and free < heard.needs.checkpoint:
        yield f"run.dir={heard.cfg.run.dir}: {free / GB:.1f} GB are free there, and a checkpoint takes about {heard.needs.checkpoint / GB:.1f}"


CHECKS: tuple[Callable[[Heard], Iterator[str]], ...] = (missing, versions, settings, refusals, devices, folder, files, memory, disk)


def loads(heard: Heard) -> Iterator[tuple[str, float]]:
    """How much of the memory that is there a training takes, with a line that says so: of the fullest kind of GPU rank, and of the fullest host."""
    stages = heard.needs.memory
    if not stages or not all(card.device for card in heard.there.values()):
        return
    of_stage = len(heard.cards) // len(
        stages
    )  # a pipeline stage is a run of ranks, of which the first tensor group writes, and those of other experts
    needed = [
        stages[rank // of_stage] if rank % of_stage < heard.cfg.parallel.tp * heard.cfg.parallel.ep else stages[rank // of_stage].without_copies
        for rank in range(len(heard.cards))
    ]
    on_gpus = {rank for rank, card in heard.there.items() if card.device == "cuda" and card.device_bytes}
    if on_gpus:
        fullest = max(sorted(on_gpus), key=lambda rank: needed[rank].total / heard.there[rank].device_bytes)
        yield told(needed[fullest], f"rank {fullest}", heard.there[fullest].device_bytes, heard.where([fullest]))
    hosts = heard.by_host
    sums = {name: sum(needed[rank].host if rank in on_gpus else needed[rank].total for rank in ranks) for name, ranks in hosts.items()}
    room = {name: heard.there[ranks[0]].host_bytes for name, ranks in hosts.items() if heard.there[ranks[0]].host_bytes}
    if room:
        name = max(room, key=lambda one: sums[one] / room[one])
        most = max(hosts[name], key=lambda rank: needed[rank].total)
        parts = f" ({engine.spans([most])}: {biggest(needed[most])})" if most not in on_gpus else ""
        yield (
            f"the ranks of {name} take about {sums[name] / GB:.1f} GB of host memory together{parts}, and there are {room[name] / GB:.1f}",
            sums[name] / room[name],
        )


def told(need: RankMemory, who: str, there: int, where: str) -> tuple[str, float]:
    """A GPU's load, as a line and as a share."""
    return f"{who} takes about {need.total / GB:.1f} GB ({biggest(need)}), and its GPU on {where} has {there / GB:.1f}", need.total / there


def biggest(need: RankMemory) -> str:
    """The three largest parts of a rank's memory."""
    parts = sorted(need.parts.items(), key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {size / GB:.1f}" for name, size in parts)


def remarks(heard: Heard) -> Iterator[str]:
    """What a run can begin with, though it may not end well."""
    if parts := heard.differing(lambda card: card.gpu, [rank for rank, card in heard.there.items() if card.gpu]):
        yield f"GPUs of several kinds: {parts}: the fastest wait for the slowest"
    for line, share in loads(heard):
        if share > MUCH:
            yield f"memory may not be enough: {line}"
    taken = [rank for rank, card in heard.there.items() if card.device_bytes and card.device_free < MUCH * card.device_bytes]
    if taken:
        least = min(taken, key=lambda rank: heard.there[rank].device_free / heard.there[rank].device_bytes)
        card = heard.there[least]
        free = f"rank {least}'s has {card.device_free / GB:.1f} of {card.device_bytes / GB:.1f} GB left"
        yield f"GPUs that other processes use too: on {heard.where(taken)}; {free}"
    left, copies = heard.there[0].disk_free, heard.needs.copies
    if left is not None and left < (room := heard.needs.checkpoint * copies):
        yield (
            f"run.dir={heard.cfg.run.dir}: {left / GB:.1f} GB are free there, and {copies} checkpoints, as many as may be there at a time, take "
            f"about {room / GB:.1f}"
        )
