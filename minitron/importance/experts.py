"""Probes on experts: what the tokens that the router sends to an expert make of it.

An expert's score is the mean, over the tokens sent to it, of the length of what it gives each of them: the L2 norm of its output times the
router's probability (REAP, arXiv 2510.13999). A neuron's is the mean, over the same tokens, of the absolute value of what it puts into the
expert's second matrix, where Megatron has multiplied it by that probability. An expert to which no token was sent scores 0, and so do its neurons.
Both are sums over tokens divided by a count of tokens, so `calibrate.seq_agg` and `batch_agg`, which are about samples, say nothing of them; they
need no reduction before the end.

Legend: T tokens of this rank, E experts of the layer, P pairs of a token and one of its experts, in the order of the experts, H hidden,
F neurons of one expert (a tensor rank's part, as far as an activation goes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from minitron import engine
from minitron.importance.aggregate import exact

Tensor = torch.Tensor


class ExpertProbes:
    """Sums of one rank over the tokens it sees, in float64: of layer n "experts.{n}" [E] and "expert_tokens.{n}" [E] over its own tokens, and
    "expert_ffn.{n}" [E, F] over what is sent to the experts it holds, zero elsewhere; F is that of whole experts.

    `counting()`: whether the pass that is under way counts. Of one that does not, as it only keeps this rank in step with others, tokens reach
    other ranks' experts all the same: they go there with probability 0, which adds nothing. Of tokens that every tensor rank has, the first counts.
    """

    def __init__(self, model: engine.Model, world: engine.World, counting: Callable[[], bool]) -> None:
        self.arch, self.world, self.counting = model.arch, world, counting
        self.speaks = world.sequence_parallel or world.tp_rank == 0
        self.layers = [(number, block.mlp) for number, block in model.blocks() if model.arch.routes(number)]
        self.sums: dict[str, Tensor] = {}
        if self.layers:
            experts, neurons = self.arch.num_moe_experts, self.arch.moe_ffn_hidden_size
            assert experts is not None and neurons is not None
            shapes = {"experts": (experts,), "expert_tokens": (experts,), "expert_ffn": (experts, neurons)}
            numbers = [number for number, _ in self.layers]
            self.sums = {
                f"{name}.{number}": torch.zeros(shape, dtype=torch.float64, device=world.device)
                for name, shape in shapes.items()
                for number in numbers
            }

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on inside the block and gone after it."""
        with contextlib.ExitStack() as undo:
            for number, layer in self.layers:
                undo.callback(layer.router.register_forward_hook(self._routed(number)).remove)
                undo.enter_context(engine.expert_outputs(layer, self._given(number)))
                for expert, module in zip(layer.local_expert_indices, layer.experts.local_experts, strict=True):
                    undo.callback(module.linear_fc2.register_forward_hook(self._activated(number, expert)).remove)
            yield

    def _routed(self, number: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor] | None:
            probabilities_TE, chosen_TE = output
            if not self.counting():
                return torch.zeros_like(probabilities_TE), chosen_TE
            if self.speaks:
                self.sums[f"expert_tokens.{number}"] += chosen_TE.sum(dim=0)
            return None

        return hook

    def _given(self, number: int) -> Callable[[Tensor, Tensor], None]:
        def see(outputs_PH: Tensor, chosen_TE: Tensor) -> None:
            if self.counting() and self.speaks:
                lengths_P = torch.linalg.vector_norm(outputs_PH, dim=-1, dtype=exact(outputs_PH)).double()
                experts_P = chosen_TE.t().nonzero()[:, 0]
                self.sums[f"experts.{number}"].index_add_(0, experts_P, lengths_P)

        return see

    def _activated(self, number: int, expert: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            activations_PF = args[0]
            mine_F = self.sums[f"expert_ffn.{number}"][expert].chunk(self.world.tp)[self.world.tp_rank]
            mine_F += activations_PF.abs().sum(dim=0, dtype=exact(activations_PF))

        return hook

    def scores(self) -> dict[str, Tensor]:
        """Of this stage's layers "experts.{n}" [E] and "expert_ffn.{n}" [E, F]. Called by every rank."""
        sums = dict(zip(self.sums, engine.sum_over_stage(list(self.sums.values()), self.world), strict=True))
        found = {}
        for number, _ in self.layers:
            tokens_E = sums[f"expert_tokens.{number}"].clamp(min=1)
            found[f"experts.{number}"] = sums[f"experts.{number}"] / tokens_E
            found[f"expert_ffn.{number}"] = sums[f"expert_ffn.{number}"] / tokens_E[:, None]
        return found
