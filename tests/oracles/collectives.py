"""What a process really hands to torch's collectives, seen where torch dispatches them."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operation of torch -> (our word, which argument is the whole tensor)
OPERATIONS = {
    "allreduce_": ("all-reduce", 0),
    "allgather_": ("all-gather", 0),
    "_allgather_base_": ("all-gather", 0),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
    "reduce_scatter_": ("reduce-scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce-scatter", 1),
    "allgather_into_tensor_coalesced_": ("all-gather", 0),
    "send": ("send", 0),
    "alltoall_base_": ("send", 0),  # what arrives
}
SINGLE_NUMBERS = 64  # bytes: counts of tokens, norms, means to log


class Collectives(TorchDispatchMode):
    """`calls` and `bytes` of each (operation, ranks of the group), without single numbers, while this mode is on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[str, int]] = Counter()
        self.bytes: Counter[tuple[str, int]] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "c10d" and name in OPERATIONS:
            word, place = OPERATIONS[name]
            group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()))
            size = sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(args[place]))
            if size > SINGLE_NUMBERS and group.size() > 1:
                self.calls[word, group.size()] += 1
                self.bytes[word, group.size()] += size
        return function(*args, **(kwargs or {}))
