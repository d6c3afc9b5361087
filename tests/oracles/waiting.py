"""What makes a process wait for a GPU, found without one: tensors of torch's meta device stand in for its own, and every operator that meets them
is looked at. They have no content, so what would read one fails.

A copy from a GPU waits for everything that is queued there; so does a copy to it, unless it is asked not to (`non_blocking`, of pinned memory).
torch makes such copies unasked: of an index that lies in host memory, of a tensor there of one number in torch.where. What is not seen here is a
tensor that is made on the GPU of the host's numbers (torch.tensor, new_tensor), which waits too: torch makes it in one go.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("meta")
ATEN = torch.ops.aten
READ = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.is_nonzero, ATEN._unique2, ATEN.unique_dim}
COPIED = {ATEN.where, ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}  # operators that copy what lies in host memory


class Waits(TorchDispatchMode):
    """Notes in `found` each operator that waits."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if waits(operator.overloadpacket, args, kwargs):
            self.found.append(str(operator))
        return operator(*args, **kwargs)


def waits(operator, args, kwargs) -> bool:
    """Whether an operator with these arguments waits for a GPU."""
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
    places = {tensor.device.type for tensor in tensors}
    if operator is ATEN._to_copy:
        places.add(torch.device(kwargs["device"]).type if kwargs.get("device") is not None else tensors[0].device.type)
        return len(places) > 1 and not (kwargs.get("non_blocking") and tensors[0].device.type == "cpu")
    if operator is ATEN.copy_:
        return len(places) > 1 and not ((kwargs.get("non_blocking") or len(args) > 2) and tensors[1].device.type == "cpu")
    if operator in READ:
        return GPU.type in places
    if operator in COPIED and GPU.type in places:
        return len(places) > 1 or (operator is not ATEN.where and any(tensor.dtype == torch.bool for tensor in tensors[1:]))
    return False
