"""Which layouts fit a training onto machines, the fastest first, and why the others do not. Pure."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator

from minitron.config.layout import check_expert_ranks, nest
from minitron.config.schema import Config
from minitron.errors import RequestError, refuse
from minitron.launching.cost import GIB, Cluster, Estimate, estimate
from minitron.launching.memory import RankMemory, memory
from minitron.launching.traffic import Training
from minitron.pruning.target import check_layout

VIRTUAL = (1, 2, 4, 8)  # virtual stages that are looked at
RECOMPUTE = ("none", "selective", "full")  # each holds less than the one before, and takes longer


@dataclasses.dataclass(frozen=True)
class Ranked:
    """`fitting`: what fits, the fastest first; `tried`: layouts with their micro-batch sizes that were looked at; `fell`: how many of them do not
    fit, by the first reason in words."""

    tried: int
    fell: dict[str, int]
    fitting: list[Estimate]


def divides_the_gpus(training: Training) -> None:
    """Both layouts go round the processes."""
    for name, layout in (("parallel", training.layout), ("teacher.parallel", training.teacher_layout)):
        if training.world_size % (ranks := layout.tp * layout.pp * layout.cp):
            raise refuse(f"{name}.tp", layout.tp, f"tp x pp x cp = {ranks} must divide the number of GPUs, {training.world_size}")
        check_expert_ranks(layout, training.world_size, name)


def goes_together(training: Training) -> None:
    """Virtual stages and sequence parallelism have what they need; hidden states are compared inside one layout."""
    if training.foreign and training.cfg.distill.hidden.enabled:
        alone = "hidden states can't be compared over layouts: teacher.parallel.tp, .pp and .ep must be null"
        raise refuse("distill.hidden.enabled", True, alone)
    if training.layout.vpp > 1 and training.layout.pp == 1:
        raise refuse("parallel.vpp", training.layout.vpp, "virtual stages need parallel.pp of at least 2")
    if training.layout.sp and training.layout.tp == 1:
        raise refuse("parallel.sp", True, "sequence parallelism needs parallel.tp of at least 2")


def divides_the_models(training: Training) -> None:
    """MLPs and vocabularies go on the tensor ranks, experts on theirs, and every stage has a layer."""
    check_layout(training.student, training.layout, "the student's")
    if training.teacher is not None:
        check_layout(training.teacher, training.teacher_layout, "the teacher's", "teacher.parallel" if training.foreign else "parallel")


def divides_the_batch(training: Training) -> None:
    """Replicas have as many microbatches, in groups of the stages where they are virtual."""
    train, layout = training.cfg.train, training.layout
    per_step = train.micro_batch_size * training.replicas(layout) * (layout.pp if layout.vpp > 1 else 1)
    if train.global_batch_size % per_step:
        stages = f" x parallel.pp={layout.pp}, as parallel.vpp needs it," if layout.vpp > 1 else ""
        allowed = f"must be divisible by micro_batch_size x replicas{stages} = {per_step}"
        raise refuse("train.global_batch_size", train.global_batch_size, allowed)


def divides_the_sequence(training: Training) -> None:
    """Ranks that share a sequence have as much of it."""
    train, layout = training.cfg.train, training.layout
    ways = (2 * layout.cp if layout.cp > 1 else 1) * (layout.tp if layout.sp else 1)
    if train.seq_length % ways:
        shared = f"2 x parallel.cp={layout.cp} where that is above 1, times parallel.tp={layout.tp} with parallel.sp"
        raise refuse("train.seq_length", train.seq_length, f"must be divisible by {ways}: {shared}")


# each raises what is wrong; of many layouts, the words are counted
RULES: dict[str, Callable[[Training], None]] = {
    "tp x pp x cp does not divide the GPUs, or ep what is left": divides_the_gpus,
    "settings exclude each other": goes_together,
    "tp does not divide MLPs or vocabulary, ep the experts, or there are more stages than layers": divides_the_models,
    "the global batch does not divide by replicas and micro-batch": divides_the_batch,
    "the sequence does not divide by the ranks that share it": divides_the_sequence,
}


def check(training: Training) -> None:
    """Refuse a layout that can't be, whatever a GPU can hold."""
    for rule in RULES.values():
        rule(training)


def obstacle(training: Training) -> str | None:
    """The first rule that a layout breaks, in words."""
    for words, rule in RULES.items():
        try:
            rule(training)
        except RequestError:
            return words
    return None


def usable_bytes(cfg: Config) -> float:
    """What a rank may take of a GPU."""
    machine = Cluster.of(cfg.plan, cfg.dtype).machine
    return machine.memory_gib * GIB * (1 - cfg.plan.reserve)


def ranked(training: Training) -> Ranked:
    """Every layout of the training's machines, the context ranks and the teacher's settings as they are: tensor ranks inside a machine, stages,
    virtual stages, sequence parallelism, expert ranks, micro-batch sizes; of each the lightest train.recompute with which it fits."""
    cluster, limit = Cluster.of(training.cfg.plan, training.cfg.dtype), usable_bytes(training.cfg)
    too_much = f"more than {limit / GIB:.1f} GiB on a rank, even with train.recompute=full"
    tried, fell, fitting = 0, Counter[str](), []
    for cfg in variants(training):
        tried += 1
        one = dataclasses.replace(training, cfg=cfg)
        if (reason := obstacle(one)) is None and (found := lightest(one, limit)) is None:
            reason = too_much
        if reason is not None:
            fell[reason] += 1
            continue
        assert found is not None
        fitting.append(estimate(found[0], cluster, found[1]))
    return Ranked(tried, dict(fell), sorted(fitting, key=lambda one: (one.step_seconds, one.peak_bytes)))


def variants(training: Training) -> Iterator[Config]:
    """The settings of every layout to look at."""
    cfg, world = training.cfg, training.world_size
    batch = cfg.train.global_batch_size
    sizes = sorted({*cfg.plan.micro_batch_sizes, cfg.train.micro_batch_size})
    models = [training.student, *([training.teacher] if training.teacher is not None and cfg.teacher.parallel.ep is None else [])]
    experts = math.gcd(*(model.num_moe_experts or 0 for model in models))

    def expert_ranks(same: int) -> list[int]:
        """Of so many ranks that hold the same shards of all else."""
        return [ep for ep in divisors(math.gcd(experts, same)) if nest(ep, cfg.parallel.cp)] if experts else [1]

    for tp in divisors(min(world, cfg.plan.gpus_per_node)):
        for pp in divisors(world // (tp * cfg.parallel.cp)):
            for vpp in VIRTUAL if pp > 1 else (1,):
                for sp in (False, True) if tp > 1 else (False,):
                    for ep, size in itertools.product(expert_ranks(world // (tp * pp)), sizes):
                        if batch % size == 0:
                            layout = dataclasses.replace(cfg.parallel, tp=tp, pp=pp, vpp=vpp, sp=sp, ep=ep)
                            yield dataclasses.replace(cfg, parallel=layout, train=dataclasses.replace(cfg.train, micro_batch_size=size))


def divisors(number: int) -> list[int]:
    """Ascending."""
    return [one for one in range(1, number + 1) if number % one == 0]


def lightest(training: Training, limit: float) -> tuple[Training, list[RankMemory]] | None:
    """The training with the lightest recompute that fits, no lighter than its own, and its memory; None where none does."""
    remade = ("activations", "working")  # what recompute changes
    for recompute in RECOMPUTE[RECOMPUTE.index(training.cfg.train.recompute) :]:
        one = dataclasses.replace(training, cfg=dataclasses.replace(training.cfg, train=dataclasses.replace(training.cfg.train, recompute=recompute)))
        held = memory(one.student, one.teacher, one.cfg, one.world_size, "cuda")
        if max(rank.total for rank in held) <= limit:
            return one, held
        if max(rank.total - sum(rank.parts[name] for name in remade) for rank in held) > limit:
            break
    return None
