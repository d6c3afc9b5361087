"""Whether a layout fits a number of processes: from the settings alone."""

from minitron.config.schema import Parallel
from minitron.errors import refuse


def check_layout(parallel: Parallel, world_size: int) -> None:
    """Refuse a layout that does not fit the number of processes, or that this version can't run."""
    if parallel.vpp > 1 and parallel.pp == 1:
        raise refuse("parallel.vpp", parallel.vpp, "virtual stages need parallel.pp of at least 2")
    ranks = parallel.tp * parallel.pp * parallel.cp
    if world_size % ranks:
        raise refuse("parallel.tp", parallel.tp, f"tp x pp x cp = {ranks} must divide the number of processes, {world_size}")
    check_expert_ranks(parallel, world_size)
    if parallel.sp and parallel.tp == 1:
        raise refuse("parallel.sp", parallel.sp, "sequence parallelism needs parallel.tp of at least 2")


def check_expert_ranks(parallel: Parallel, world_size: int, group: str = "parallel") -> None:
    """Refuse expert ranks that the ranks which hold the same shards of all else can't be divided into; `group` is where the layout's settings are."""
    same = world_size // (parallel.tp * parallel.pp)
    if same % parallel.ep:
        raise refuse(f"{group}.ep", parallel.ep, f"must divide dp x cp = {same}, the processes over tp x pp")
    if not nest(parallel.ep, parallel.cp):
        raise refuse(f"{group}.ep", parallel.ep, f"must divide parallel.cp={parallel.cp} or be a multiple of it")


def nest(ep: int, cp: int) -> bool:
    """Whether expert ranks lie inside of the context ranks or go round them whole: groups that overlap otherwise would wait for each other."""
    return ep % cp == 0 or cp % ep == 0
