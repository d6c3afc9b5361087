"""Arithmetic on all gradients at once, where neither apex nor Transformer Engine brings a kernel for it.

Megatron then goes from one gradient to the next. For their norm it reads each one's off the GPU by itself, and waits for it: as often in a step as
there are parameters. torch has kernels that take a list of tensors, which Megatron does not use.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.optimizer import clip_grads

Tensor = torch.Tensor


def l2_norm(chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], per_tensor: bool, *unused: Any) -> tuple[Tensor, None]:
    """([1], None): the L2 norm of all tensors of all lists, on their device."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm([tensor for tensors in lists for tensor in tensors])))[None], None


def scale(chunk_size: int, overflow: Tensor, lists: Sequence[list[Tensor]], factor: float) -> None:
    """The second list's tensors become the first's times a factor; Megatron gives the same list twice."""
    if lists[1]:
        if lists[0] is not lists[1]:
            torch._foreach_copy_(lists[1], lists[0])
        torch._foreach_mul_(lists[1], factor)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside the block Megatron takes gradients' norm, and clips them, by these; by apex's or Transformer Engine's kernels where it has some."""
    usual = clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl
    if usual[0].__module__ == "megatron.core.utils":
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = l2_norm, scale
    try:
        yield
    finally:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = usual
