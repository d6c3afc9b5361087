"""What one pass of training reads.

Legend: B sequences, S positions, T = S + 1 tokens.
"""

from typing import NamedTuple

import torch

Tensor = torch.Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on a device, without waiting for what that is doing.

    By itself `Tensor.to` copies ordinary memory to a GPU only when everything that was queued there is done, and this process waits as long.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        # whole and dense, as an expanded tensor can't be pinned and one with gaps is copied over memory that is not;
        # torch keeps this memory from being used again until the copy is made
        tensor = tensor.contiguous().pin_memory()
    return tensor.to(device, non_blocking=True)


class Batch(NamedTuple):
    """A microbatch: tokens, and where asked for which predictions count and which document each position is of."""

    tokens_BT: Tensor
    counted_BS: Tensor | None = None  # bool: the prediction made at a position counts in the loss (None: all do)
    documents_BS: Tensor | None = None  # int: a position sees those before it with its own number alone (None: all before it)

    @property
    def inputs_BS(self) -> Tensor:
        """What the models read."""
        return self.tokens_BT[:, :-1]

    @property
    def labels_BS(self) -> Tensor:
        """What comes next at each position."""
        return self.tokens_BT[:, 1:]
