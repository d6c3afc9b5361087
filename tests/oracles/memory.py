"""How much memory a function takes on the CPU, counted from the tensors that torch makes and drops inside it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that are alive, relative to those at the start: `now`, and `peak`, the most there ever were.

    `watched`: tensors that were there before, whose memory counts when it is given back.
    """

    def __init__(self, watched: list[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()
        for tensor in watched:
            self.follow(tensor, new=False)

    def follow(self, tensor: torch.Tensor, new: bool) -> None:
        """Count a tensor's storage until it is freed."""
        if tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.now += size if new else 0
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.follow(leaf, new=True)
        return result
