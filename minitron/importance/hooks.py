"""Probes on a rank's shard of the model: what the table of axes calls `probe`, read by plain forward hooks.

Legend: S sequence (a rank's part under sequence parallelism), B batch, H hidden, F ffn, N heads, G groups, D kv_channels, U units.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from minitron import engine
from minitron.importance.aggregate import batch_sums, finish_sequence, sequence_sums

Tensor = torch.Tensor
LAYERS_BI = "layers.bi"


class Probes:
    """Collects sums from the hooks of one shard. `finish_microbatch` must follow every forward pass.

    After the passes, `totals` maps a probe's name to sums [K, U] over the samples this rank saw (the units it holds), and
    `samples` counts them. Probes: "hidden.{n}" per norm, "ffn.{layer}", "heads.{layer}", and "layers.bi.{layer}" whose one
    unit is the sum of cosines over tokens.
    """

    def __init__(self, model: engine.Model, world: engine.World, seq_agg: str, batch_agg: str) -> None:
        self.model, self.world, self.seq_agg, self.batch_agg = model, world, seq_agg, batch_agg
        self.pending: dict[str, Tensor] = {}
        self.totals: dict[str, Tensor] = {}
        self.samples = 0
        self.tokens = 0

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on inside the block and gone after it."""
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._points()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _points(self) -> Iterator[tuple[torch.nn.Module, Callable[..., None]]]:
        decoder = self.model.decoder
        kv_channels = self.model.arch.kv_channels
        for layer in decoder.layers:
            number = layer.layer_number - 1
            yield layer.input_layernorm, self._output(f"hidden.{2 * number}")
            yield layer.pre_mlp_layernorm, self._output(f"hidden.{2 * number + 1}")
            yield layer.self_attention.linear_proj, self._input(f"heads.{number}", kv_channels)
            yield layer.mlp.linear_fc2, self._input(f"ffn.{number}", 1)
            yield layer, self._block(f"{LAYERS_BI}.{number}")
        if decoder.final_layernorm is not None:
            yield decoder.final_layernorm, self._output(f"hidden.{2 * self.model.arch.num_layers}")

    def _output(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            self.pending[name] = sequence_sums(output, self.seq_agg)

        return hook

    def _input(self, name: str, width: int) -> Callable[..., None]:
        """The input of a row-parallel matrix: this rank's units; a head's `width` channels become their L2 norm."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            values_SBU = args[0]
            if width > 1:
                values_SBU = values_SBU.unflatten(-1, (-1, width)).float().norm(dim=-1)
            self.pending[name] = sequence_sums(values_SBU, self.seq_agg)

        return hook

    def _block(self, name: str) -> Callable[..., None]:
        """Block Importance: the cosine between a block's input and output, token by token."""

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before_SBH = args[0] if args else kwargs["hidden_states"]
            after_SBH = output[0] if isinstance(output, tuple) else output
            cosines_SB = torch.nn.functional.cosine_similarity(before_SBH.float(), after_SBH.float(), dim=-1)
            self.pending[name] = cosines_SB.sum(dim=0)[None, :, None]

        return hook

    def finish_microbatch(self, tokens: int) -> None:
        """Complete the sequences of one microbatch over the ranks that share them, then add the samples to the totals.

        `tokens` is the length of the whole sequence. Under sequence parallelism hidden channels and cosines are spread over
        the tensor ranks: their sums travel in one packed reduction, before anything is squared over the batch.
        """
        if self.world.sequence_parallel:
            spread = sorted(name for name in self.pending if name.startswith(("hidden.", LAYERS_BI)))
            self._reduce_packed(spread)
        batch = 0
        for name, sums_KBU in self.pending.items():
            batch = sums_KBU.shape[1]
            if name.startswith(LAYERS_BI):
                added = sums_KBU.double().sum(dim=1)
            else:
                added = batch_sums(finish_sequence(sums_KBU, self.seq_agg, tokens), self.batch_agg)
            self.totals[name] = self.totals[name] + added if name in self.totals else added
        self.samples += batch
        self.tokens += batch * tokens
        self.pending.clear()

    def _reduce_packed(self, names: list[str]) -> None:
        flat = torch.cat([self.pending[name].flatten() for name in names])
        dist.all_reduce(flat, group=self.world.groups.tp)
        for name, part in zip(names, flat.split([self.pending[name].numel() for name in names]), strict=True):
            self.pending[name] = part.view_as(self.pending[name])
