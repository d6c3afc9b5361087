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
from minitron.importance.aggregate import batch_sums, exact, finish_sequence, in_blocks, sequence_sums
from minitron.importance.experts import ExpertProbes

Tensor = torch.Tensor
LAYERS_BI = "layers.bi"


class Probes:
    """Collects sums from the hooks on one rank's blocks: the `watch` of forward passes.

    After the passes, `totals` maps a probe's name to sums [K, U] over the samples this rank saw (the units it holds), and
    `samples` counts them. Probes: "hidden.{n}" per norm, "ffn.{layer}" or "shared_ffn.{layer}", "heads.{layer}", and "layers.bi.{layer}" whose
    one unit is the sum of cosines over tokens; those on experts are `experts`. `seq_length` is that of whole sequences. `compiled`: what
    these hooks compute, but for those on experts, runs as kernels of torch.compile, which read an activation once.
    """

    def __init__(self, model: engine.Model, world: engine.World, seq_agg: str, batch_agg: str, seq_length: int, compiled: bool = False) -> None:
        self.model, self.world, self.seq_agg, self.batch_agg, self.seq_length = model, world, seq_agg, batch_agg, seq_length
        parts: list[Callable[..., Any]] = [sums_of_units, sums_of_heads, cosines_and_lengths]
        self.sums_of_units, self.sums_of_heads, cosines = (torch.compile(part, dynamic=False) if compiled else part for part in parts)
        self.cosines = Cosines(cosines)
        self.pending: dict[int, dict[str, Tensor]] = {}
        self.current: int | None = None
        self.totals: dict[str, Tensor] = {}
        self.samples = 0
        self.tokens = 0
        self.experts = ExpertProbes(model, world, lambda: self.current is not None)

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are on inside the block and gone after it."""
        handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in self._points()]
        try:
            with self.experts.attached():
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
            if not arch.routes(number):
                yield block.mlp.linear_fc2, self._hook(f"ffn.{number}", self._input)
            elif block.mlp.shared_experts is not None:
                yield block.mlp.shared_experts.linear_fc2, self._hook(f"shared_ffn.{number}", self._input)
            yield block, self._hook(f"{LAYERS_BI}.{number}", self.cosines)
        final_norm = self.model.chunks[-1].decoder.final_layernorm
        if final_norm is not None:
            yield final_norm, self._hook(f"hidden.{2 * arch.num_layers}", self._output)

    def _hook(self, name: str, sums: Callable[..., Tensor]) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self.current is not None:
                self.pending.setdefault(self.current, {})[name] = sums(args, kwargs, output)

        return hook

    def _output(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Any:
        return self.sums_of_units(output, self.seq_agg)

    def _input(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Of a row-parallel matrix: this rank's units."""
        return self.sums_of_units(args[0], self.seq_agg)

    def _heads(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """As `_input`, where a unit is a head: the L2 norm of its channels."""
        return self.sums_of_heads(args[0], self.model.arch.kv_channels, self.seq_agg)


def sums_of_units(values_SBU: Tensor, seq_agg: str) -> Tensor:
    """[K, B, U]."""
    return sequence_sums(values_SBU, seq_agg)


def sums_of_heads(values_SBC: Tensor, kv_channels: int, seq_agg: str) -> Tensor:
    """[K, B, N] of the heads' L2 norms."""
    values_SBND = values_SBC.unflatten(-1, (-1, kv_channels))
    return sequence_sums(torch.linalg.vector_norm(values_SBND, dim=-1, dtype=exact(values_SBND)), seq_agg)


def cosines_and_lengths(before_SBH: Tensor, after_SBH: Tensor, lengths_SB: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token by token, in fp32: the cosines of `before` and `after`, and the lengths of `after`; those of `before` may be known."""
    found = []
    for before, after in zip(in_blocks(before_SBH), in_blocks(after_SBH), strict=True):
        before, after = before.float(), after.float()
        ours = [before, after] if lengths_SB is None else [after]
        found.append((torch.linalg.vecdot(before, after), *(torch.linalg.vector_norm(x, dim=-1) for x in ours)))
    dots_SB, *lengths = (torch.cat(part) for part in zip(*found, strict=True))
    before_SB = lengths[0] if lengths_SB is None else lengths_SB
    return dots_SB / (before_SB * lengths[-1]).clamp_min(1e-12), lengths[-1]


class Cosines:
    """Block Importance: the cosine between a block's input and output, summed over the tokens at hand, [1, B, 1], in fp32."""

    def __init__(self, measure: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.measure = measure
        # the last block's output, which is the next one's input, and its lengths: found once
        self.output_SBH, self.lengths_SB = torch.empty(0), torch.empty(0)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        before_SBH = args[0] if args else kwargs["hidden_states"]
        after_SBH = output[0] if isinstance(output, tuple) else output
        known = self.lengths_SB if before_SBH is self.output_SBH else None
        cosines_SB, self.lengths_SB = self.measure(before_SBH, after_SBH, known)
        self.output_SBH = after_SBH
        return cosines_SB.sum(dim=0)[None, :, None]


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
