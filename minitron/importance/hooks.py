"""Probes on a rank's shard of the model: what the table of axes calls `probe`, read by plain forward hooks.

Legend: S sequence (a rank's part under sequence and context parallelism), B batch, H hidden, N heads, D kv_channels, U units, K sums.
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
    """Collects sums from the hooks on one rank's blocks: the `watch` of forward passes.

    After the passes, `totals` maps a probe's name to sums [K, U] over the samples this rank saw (the units it holds), and
    `samples` counts them. Probes: "hidden.{n}" per norm, "ffn.{layer}", "heads.{layer}", and "layers.bi.{layer}" whose one
    unit is the sum of cosines over tokens. `seq_length` is that of whole sequences.
    """

    def __init__(self, model: engine.Model, world: engine.World, seq_agg: str, batch_agg: str, seq_length: int) -> None:
        self.model, self.world, self.seq_agg, self.batch_agg, self.seq_length = model, world, seq_agg, batch_agg, seq_length
        self.pending: dict[int, dict[str, Tensor]] = {}
        self.current: int | None = None
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

    def begin(self, microbatch: int | None) -> None:
        """What the hooks see from now on belongs to this microbatch (None: to none)."""
        self.current = microbatch

    def end(self, microbatch: int) -> None:
        """Complete the sequences of one microbatch over the ranks that share them, then add the samples to the totals."""
        sums = self.pending.pop(microbatch)
        complete(sums, self.world)
        # all probes at once, side by side along U: a call for each of hundreds would cost more than what it computes
        cosines = {name: sums_KBU for name, sums_KBU in sums.items() if name.startswith(LAYERS_BI)}
        units = {name: sums_KBU for name, sums_KBU in sums.items() if name not in cosines}
        self._add(cosines, torch.cat(list(cosines.values()), dim=2).double().sum(dim=1))
        packed_KBU = torch.cat(list(units.values()), dim=2)
        self._add(units, batch_sums(finish_sequence(packed_KBU, self.seq_agg, self.seq_length), self.batch_agg))
        self.samples += packed_KBU.shape[1]
        self.tokens += packed_KBU.shape[1] * self.seq_length

    def _add(self, sums: dict[str, Tensor], packed_KU: Tensor) -> None:
        """Add what a microbatch gives to the totals; `packed_KU` holds the units of all of `sums`."""
        for name, part_KU in zip(sums, packed_KU.split([sums_KBU.shape[2] for sums_KBU in sums.values()], dim=1), strict=True):
            self.totals[name] = self.totals[name] + part_KU if name in self.totals else part_KU.clone()

    def _points(self) -> Iterator[tuple[torch.nn.Module, Callable[..., None]]]:
        arch = self.model.arch
        for number, block in self.model.blocks():
            yield block.input_layernorm, self._hook(f"hidden.{2 * number}", self._output)
            yield block.pre_mlp_layernorm, self._hook(f"hidden.{2 * number + 1}", self._output)
            yield block.self_attention.linear_proj, self._hook(f"heads.{number}", self._heads)
            yield block.mlp.linear_fc2, self._hook(f"ffn.{number}", self._input)
            yield block, self._hook(f"{LAYERS_BI}.{number}", block_cosines)
        final_norm = self.model.chunks[-1].decoder.final_layernorm
        if final_norm is not None:
            yield final_norm, self._hook(f"hidden.{2 * arch.num_layers}", self._output)

    def _hook(self, name: str, sums: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.current is not None:
                self.pending.setdefault(self.current, {})[name] = sums(args, kwargs, output)

        return hook

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        return sequence_sums(output, self.seq_agg)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """Of a row-parallel matrix: this rank's units."""
        return sequence_sums(args[0], self.seq_agg)

    def _heads(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        """As `_input`, where a unit is a head: the L2 norm of its channels."""
        values_SBND = args[0].unflatten(-1, (-1, self.model.arch.kv_channels))
        return sequence_sums(values_SBND.float().norm(dim=-1), self.seq_agg)


def block_cosines(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
    """Block Importance: the cosine between a block's input and output, summed over the tokens at hand, [1, B, 1]."""
    before_SBH = args[0] if args else kwargs["hidden_states"]
    after_SBH = output[0] if isinstance(output, tuple) else output
    return cosines(before_SBH, after_SBH).sum(dim=0)[None, :, None]


def cosines(before_SBH: Tensor, after_SBH: Tensor) -> Tensor:
    """Token by token, [S, B], in fp32."""
    before_SBH, after_SBH = before_SBH.float(), after_SBH.float()
    lengths_SB = torch.linalg.vector_norm(before_SBH, dim=-1) * torch.linalg.vector_norm(after_SBH, dim=-1)
    return torch.linalg.vecdot(before_SBH, after_SBH) / lengths_SB.clamp_min(1e-12)


def complete(sums: dict[str, Tensor], world: engine.World) -> None:
    """Complete a microbatch's sums over the ranks that share its sequences, in place: one packed reduction, or none.

    Context ranks share all of them. Under sequence parallelism tensor ranks share those of norms and blocks, while the units of
    a row-parallel matrix are each rank's own: they travel in a slot of their own, so that one reduction serves both.
    """
    if world.cp == 1 and not world.sequence_parallel:
        return
    spread = sorted(name for name in sums if name.startswith(("hidden.", LAYERS_BI)))
    owned = sorted(set(sums) - set(spread)) if world.cp > 1 else []
    slots = world.tp if world.sequence_parallel else 1
    mine = world.tp_rank if world.sequence_parallel else 0
    names = spread + owned
    flat = torch.cat([sums[name].flatten() for name in spread])
    if owned:
        own = torch.cat([sums[name].flatten() for name in owned])
        in_slots = own.new_zeros(slots, own.numel())
        in_slots[mine] = own
        flat = torch.cat([flat, in_slots.flatten()])
    dist.all_reduce(flat, group=world.groups.tp_cp if world.sequence_parallel else world.groups.cp)
    count = sum(sums[name].numel() for name in spread)
    parts = flat[:count] if not owned else torch.cat([flat[:count], flat[count:].view(slots, -1)[mine]])
    for name, part in zip(names, parts.split([sums[name].numel() for name in names]), strict=True):
        sums[name] = part.view_as(sums[name])
