"""Cutting the sharded weights, each rank its own, one parameter at a time; the old parameter is freed before the next is cut.

The new model is a skeleton without memory whose parameters are put in place as they are cut, so at no time do two models
exist, unless the old one is to stay for the next cut; of a layer's experts one matrix of each is cut at a time.

Legend: U units, P rows that one unit contributes, R other dims, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

from minitron import engine
from minitron.arch.arch import OF_LAYERS, Arch
from minitron.arch.axes import CUT, PARAMETERS, QKV, At, Dim, Indices, Parameter, dim_rows, num_units
from minitron.arch.shards import held_experts, held_units, shard_shape, stage_of
from minitron.arch.units import from_units, to_units
from minitron.pruning.balance import Plan, balance, in_order
from minitron.pruning.keep import Keep
from minitron.pruning.order import as_laid, ranks

Tensor = torch.Tensor


def reslice(
    model: engine.Model, keep: Keep, target: Arch, world: engine.World, spec: str = "torch", recompute: str = "none", empty: bool = True
) -> engine.Model:
    """The pruned model; `model` is emptied, unless `empty` is False: then it stays as it is, to be cut again. Peak extra memory: the parameter
    being cut (of a layer's experts one matrix of each, twice where some travel), or the pruned model, none of whose parameters shares memory with
    the old one's.

    After a depth cut, layers travel so that every stage has its share again; they are cut first. Experts that stay are numbered anew and travel
    over expert ranks, those of one layer and matrix together. Asserts every shape, the count of parameters and the tied head.
    """
    original, keep = model.arch, as_laid(keep, model.unit_order, model.arch)
    target = of_kept(target, original, keep)
    pruned = engine.skeleton(target, world, model.config.params_dtype, spec, recompute)
    taken = release if empty else parameter_of
    plans = Plans(keep, original, world, model.unit_order)
    old_names = {(row.name, at): name for name, row, at in engine.rows(model)}
    new_names = {(row.name, at): name for name, row, at in engine.rows(pruned)}
    for (_, at), name in old_names.items():
        if empty and not stays(at, keep):
            release(model, name)

    def cut_of(row: Parameter, at: At) -> Tensor:
        return cut(taken(model, old_names[row.name, at]), row, at, keep, original, plans, world)

    for name, row, at in engine.rows(pruned):
        if at.layer is None:  # the last stage's copy of a tied embedding has the name it had
            old_name = name if engine.is_copy(name, pruned) else old_names[row.name, at]
            engine.put(pruned, name, row, at, cut(taken(model, old_name), row, at, keep, original, plans, world))
    for layer, source, destination in journeys(keep, original, target, world):
        if world.pp_rank not in (source, destination):
            continue
        old_layer, block = int(keep.layers[layer]), target.layer(layer)
        for row in (row for row in PARAMETERS if row.per_layer and row.exists(block)):
            shape, dtype = shard_shape(row, block, world.tp), model.config.params_dtype
            numbers = [*held_experts(block, world.ep, world.ep_rank)] if row.per_expert else [None]
            tensors: list[Tensor | None] = [None] * len(numbers)
            if world.pp_rank == source:
                empty_E = torch.empty(0, *shape, dtype=dtype, device=world.device)
                own = [cut_of(row, At(old_layer))] if not row.per_expert else experts_cut(row, old_layer, keep, original, world, cut_of, empty_E)
                tensors = [*own]
            for number, tensor in zip(numbers, tensors, strict=True):
                if source != destination:
                    tensor = engine.move_between_stages(tensor, source, destination, shape, dtype, world)
                if tensor is not None:
                    at = At(layer, number)
                    engine.put(pruned, new_names[row.name, at], row, at, tensor)
            if world.pp_rank == destination and row.tp_dim is not None and (order := plans.order(row.dims[row.tp_dim], old_layer)) is not None:
                pruned.unit_order[f"{row.dims[row.tp_dim].axis}.{layer}"] = order
    # rank 0 writes the layers of every stage, so it knows the order of all
    pruned.unit_order = engine.merge_over_stages(pruned.unit_order, world)
    check(pruned, world)
    return pruned


def of_kept(target: Arch, original: Arch, keep: Keep) -> Arch:
    """`target` with what is known of it only when it is known which layers stay: how far each of them sees, and which of them have experts."""
    kept = original.of_layers(keep.layers.tolist())
    return target.replace(**{name: getattr(kept, name) for name in OF_LAYERS})


def stays(at: At, keep: Keep) -> bool:
    """Whether a parameter is of a layer, and of an expert, of which something stays."""
    if at.layer is None:
        return True
    return at.layer in keep.layers and (at.expert is None or at.expert in keep.experts[at.layer])


def experts_cut(
    row: Parameter, layer: int, keep: Keep, original: Arch, world: engine.World, cut_of: Callable[[Parameter, At], Tensor], empty_E: Tensor
) -> list[Tensor]:
    """One matrix of each expert that this rank holds in the pruned model, in their order. Those of its own that stay are cut, and go to where their
    place is among all that stay. `empty_E` [0, ...] tells shape and type."""
    mine = held_experts(original, world.ep, world.ep_rank)
    moves = in_order(keep.experts[layer], len(mine), world.ep)
    cut_ones = [cut_of(row, At(layer, expert)) for expert in keep.experts[layer].tolist() if expert in mine]
    if not travels(moves):
        return cut_ones
    arrived_E = exchanged(torch.stack(cut_ones) if cut_ones else empty_E, moves, world.ep_rank, world.groups.ep)
    return [tensor.clone() for tensor in arrived_E]  # each in memory of its own


def travels(moves: list[list[Indices]]) -> bool:
    """Whether anything goes to another rank."""
    return any(len(units) for source, row in enumerate(moves) for target, units in enumerate(row) if source != target)


def exchanged(mine: Tensor, moves: list[list[Indices]], rank: int, group: dist.ProcessGroup) -> Tensor:
    """What a rank holds after `moves` (see `in_order`), of entries along the first dim: all to all, if any goes to another rank."""
    if not travels(moves):
        return mine
    sending, receiving = [len(units) for units in moves[rank]], [len(row[rank]) for row in moves]
    incoming = mine.new_empty(sum(receiving), *mine.shape[1:])
    dist.all_to_all_single(incoming, mine.contiguous(), receiving, sending, group=group)
    return incoming


def journeys(keep: Keep, original: Arch, target: Arch, world: engine.World) -> list[tuple[int, int, int]]:
    """(layer of the pruned model, pipeline rank that has it, pipeline rank that gets it), in the order in which every rank works.

    Layers that travel towards the end go first, the last of them first, then the others in ascending order: so a stage gives
    its layers away before it receives, and never holds more than it did.
    """
    pp, vpp = world.pp, world.vpp
    found = []
    for layer, old_layer in enumerate(map(int, keep.layers)):
        found.append((layer, stage_of(old_layer, original.num_layers, pp, vpp), stage_of(layer, target.num_layers, pp, vpp)))
    forward = [journey for journey in found if journey[2] > journey[1]]
    return forward[::-1] + [journey for journey in found if journey[2] <= journey[1]]


def parameter_of(model: engine.Model, name: str) -> Tensor:
    """A parameter's tensor, which stays the model's."""
    return model.get_parameter(name).detach()


def release(model: engine.Model, name: str) -> Tensor:
    """Take a parameter's tensor out of the model; the model keeps a tensor without memory in its place."""
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    parameter = getattr(owner, attribute)
    setattr(owner, attribute, torch.nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
    return parameter.detach()


class Plans:
    """The balancing plan of every (axis, layer) whose units lie over tensor ranks, made once and used by each matrix of the axis.

    `keep` tells places; `numbers` are those of the units that lie there (Model.unit_order), where the two differ.
    """

    def __init__(self, keep: Keep, original: Arch, world: engine.World, numbers: dict[str, Indices]) -> None:
        self.keep, self.original, self.world, self.numbers = keep, original, world, numbers
        self.made: dict[tuple[str, int | None], Plan] = {}

    def get(self, dim: Dim, layer: int | None) -> Plan:
        """The plan for a sharded dim."""
        key = (dim.axis, layer)
        if key not in self.made:
            _, held = held_units(dim, self.original, self.world.tp, 0, sharded=True)
            self.made[key] = balance(kept_units(self.keep, dim, At(layer), self.original), held, self.world.tp)
        return self.made[key]

    def order(self, dim: Dim, layer: int | None) -> Indices | None:
        """How the kept units lie over the ranks, where that is not in ascending order, in which an expert's neurons always lie."""
        if dim.axis == "expert_ffn":
            return None
        order = self.get(dim, layer).order()
        if (numbers := self.numbers.get(f"{dim.axis}.{layer}")) is not None:
            order = ranks(numbers)[order]
        return None if np.all(np.diff(order) > 0) else order


def kept_units(keep: Keep, dim: Dim, at: At, original: Arch) -> Indices:
    """The kept units of a dim; the vocabulary, positions and the channels of a head are never cut."""
    if dim.axis not in CUT:
        return np.arange(num_units(dim, original))
    if dim.axis == "hidden":
        return keep.hidden
    assert at.layer is not None
    units: Indices = getattr(keep, dim.axis)[at.layer]
    return units if at.expert is None else units[np.searchsorted(keep.experts[at.layer], at.expert)]


def cut(tensor: Tensor, row: Parameter, at: At, keep: Keep, original: Arch, plans: Plans, world: engine.World) -> Tensor:
    """This rank's part of the pruned parameter, from its part of the original one."""
    for index, dim in enumerate(row.dims):
        sharded = row.tp_dim == index
        if sharded and dim.axis == "vocab":
            continue
        kept_all, held = kept_units(keep, dim, at, original), num_units(dim, original)
        units, first, spread = kept_all, 0, sharded and world.tp > 1
        if spread:
            mine, held = held_units(dim, original, world.tp, world.tp_rank, sharded=True)
            units, first = kept_all[(kept_all >= mine.start) & (kept_all < mine.stop)], mine.start
        heads = partners = None
        if dim.axis == "groups":
            assert at.layer is not None
            chosen = np.isin(keep.groups[at.layer], units)
            heads = keep.heads_in_groups(at.layer, original)[chosen]
            if dim == QKV and at.layer in keep.partners:
                partners = keep.partners_in_groups(at.layer, original)[chosen]
        kept = pick(tensor, index, dim_rows(dim, original, held, units - first, heads))
        if partners is not None:  # a row that is its own partner is left as it is
            kept += kept - pick(tensor, index, dim_rows(dim, original, held, units - first, partners))
        tensor = kept
        if spread and dim.axis == "expert_ffn":
            moved = exchanged(to_units(tensor, index, dim, original), in_order(kept_all, held, world.tp), world.tp_rank, world.groups.tp)
            tensor = from_units(moved, index, dim)
        elif spread:
            tensor = rebalance(tensor, index, dim, units, plans.get(dim, at.layer), pruned_units(original, keep, at.layer), world)
    return tensor.contiguous()


def pick(tensor: Tensor, index: int, rows: Indices) -> Tensor:
    """The rows of a dim, copied."""
    return tensor.index_select(index, torch.from_numpy(rows).to(tensor.device))


def pruned_units(original: Arch, keep: Keep, layer: int | None) -> Arch:
    """The architecture whose units the cut tensor is made of (a KV group may have lost heads)."""
    if layer is None:
        return original
    groups = len(keep.groups[layer])
    return original.replace(num_query_groups=groups, num_attention_heads=len(keep.heads[layer]))


def rebalance(tensor: Tensor, index: int, dim: Dim, units: Indices, plan: Plan, arch: Arch, world: engine.World) -> Tensor:
    """Even a dim over the tensor ranks: surplus units travel, all to all, and dead ones fill what is left.

    `units`: the original numbers of the units that this rank's `tensor` holds now.
    """
    me = world.tp_rank
    stay, sending, receiving = len(plan.stay[me]), [len(u) for u in plan.moves[me]], [len(row[me]) for row in plan.moves]
    if not plan.moved() and len(units) == plan.held:
        return tensor
    mine_UPR = to_units(tensor, index, dim, arch)
    shape = list(tensor.shape)
    shape[index] = plan.held * mine_UPR.shape[1]
    new = tensor.new_zeros(shape)
    new_UPR = to_units(new, index, dim, arch)  # a view: units are put where they lie in the end
    new_UPR[:stay] = mine_UPR[:stay]
    if plan.moved():
        # surplus units are the last ones, and `moves` lists them by receiving rank in that order
        outgoing = mine_UPR[stay:].contiguous()
        assert len(outgoing) == sum(sending) == len(units) - stay
        incoming = outgoing.new_empty(sum(receiving), *outgoing.shape[1:])
        dist.all_to_all_single(incoming, outgoing, receiving, sending, group=world.groups.tp)
        new_UPR[stay : stay + len(incoming)] = incoming
    return new


def check(model: engine.Model, world: engine.World) -> None:
    """The pruned model holds what its architecture says: every parameter was cut, and the ranks' live parts add up to the exact count."""
    live = 0
    for name, row, at in engine.rows(model):
        parameter = model.get_parameter(name)
        assert not parameter.is_meta, f"{name} was not cut"
        held_once = (row.tp_dim is not None or world.tp_rank == 0) and (row.per_expert or world.ep_rank == 0)
        if not engine.is_copy(name, model) and held_once:
            live += live_elements(parameter.numel(), row, model.arch.layer(at.layer), world)
    counted = engine.sum_over_model_ranks(live, world)
    assert counted == model.arch.num_parameters(), f"{counted} parameters, {model.arch.num_parameters()} expected"


def live_elements(elements: int, row: Parameter, arch: Arch, world: engine.World) -> int:
    """Elements of a rank's shard that are not padding."""
    if row.tp_dim is None:
        return elements
    live, held = held_units(row.dims[row.tp_dim], arch, world.tp, world.tp_rank, sharded=True)
    return elements // held * len(live)
