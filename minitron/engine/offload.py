"""Weights that wait in host memory while another model computes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class HostWeights:
    """Parameters kept in host memory (pinned, where the device is a GPU) and copied to the device for the length of a `with` block.

    They are frozen, so nothing is ever copied back. Blocks may be nested. What was taken of a parameter on the device (a head that a loss
    still needs) lives there for as long as it is held.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], device: torch.device) -> None:
        self.device, self.depth = device, 0
        self.homes = [(parameter, self._to_host(parameter.data)) for parameter in parameters]
        self._leave()

    def _to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        home = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
        return home.copy_(tensor)

    def _leave(self) -> None:
        for parameter, home in self.homes:
            parameter.data = home

    def __enter__(self) -> None:
        if self.depth == 0:
            for parameter, home in self.homes:
                parameter.data = home.to(self.device, copy=True, non_blocking=True)  # on the stream that the pass runs on
        self.depth += 1

    def __exit__(self, *error: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._leave()
