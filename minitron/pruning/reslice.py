"""Cutting the sharded weights, each rank its own, one parameter at a time; the old parameter is freed before the next is cut.

The new model is a skeleton without memory whose parameters are put in place as they are cut, so at no time do two models
exist, unless the old one is to stay for the next cut. Legend: U units, P rows that one unit contributes, R other dims.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from minitron import engine
from minitron.arch.arch import OF_LAYERS, Arch
from minitron.arch.axes import CUT, PARAMETERS, QKV, At, Dim, Indices, Parameter, dim_rows, num_units
from minitron.arch.shards import held_units, shard_shape, stage_of
from minitron.arch.units import to_units
from minitron.pruning.balance import Plan, balance
from minitron.pruning.keep import Keep
from minitron.pruning.order import as_laid, ranks

Tensor = torch.Tensor


def reslice(
    model: engine.Model, keep: Keep, target: Arch, world: engine.World, spec: str = "torch", recompute: str = "none", empty: bool = True
) -> engine.Model:
    """The pruned model; `model` is emptied, unless `empty` is False: then it stays as it is, to be cut again. Peak extra memory: the parameter
    being cut, or the pruned model, none of whose parameters shares memory with the old one's.

    After a depth cut, layers travel so that every stage has its share again; they are cut first. Asserts every shape, the count
    of parameters and the tied head.
    """
    original, keep = model.arch, as_laid(keep, model.unit_order, model.arch)
    target = of_kept(target, original, keep)
    pruned = engine.skeleton(target, world, model.config.params_dtype, spec, recompute)
    taken = release if empty else parameter_of
    plans = Plans(keep, original, world, model.unit_order)
    old_names = {(row.name, at.layer): name for name, row, at in engine.rows(model)}
    new_names = {(row.name, at.layer): name for name, row, at in engine.rows(pruned)}
    for (_, layer), name in old_names.items():
        if empty and layer is not None and layer not in keep.layers:
            release(model, name)
    for name, row, at in engine.rows(pruned):
        if at.layer is None:  # the last stage's copy of a tied embedding has the name it had
            old_name = name if engine.is_copy(name, pruned) else old_names[row.name, None]
            engine.put(pruned, name, row, at, cut(taken(model, old_name), row, None, keep, original, plans, world))
    block_rows = [row for row in PARAMETERS if row.per_layer and row.exists(original)]
    for layer, source, destination in journeys(keep, original, target, world):
        if world.pp_rank not in (source, destination):
            continue
        old_layer = int(keep.layers[layer])
        for row in block_rows:
            tensor = None
            if world.pp_rank == source:
                tensor = cut(taken(model, old_names[row.name, old_layer]), row, old_layer, keep, original, plans, world)
            if source != destination:
                shape = shard_shape(row, target.layer(layer), world.tp)
                tensor = engine.move_between_stages(tensor, source, destination, shape, model.config.params_dtype, world)
            if tensor is not None:
                engine.put(pruned, new_names[row.name, layer], row, At(layer), tensor)
                if row.tp_dim is not None and (order := plans.order(row.dims[row.tp_dim], old_layer)) is not None:
                    pruned.unit_order[f"{row.dims[row.tp_dim].axis}.{layer}"] = order
    # rank 0 writes the layers of every stage, so it knows the order of all
    pruned.unit_order = engine.merge_over_stages(pruned.unit_order, world)
    check(pruned, world)
    return pruned


def of_kept(target: Arch, original: Arch, keep: Keep) -> Arch:
    """`target` with what is known of it only when it is known which layers stay: how far each of them sees, and whether it has experts."""
    kept = original.of_layers(keep.layers.tolist())
    return target.replace(**{name: getattr(kept, name) for name in OF_LAYERS})


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
            self.made[key] = balance(kept_units(self.keep, dim, layer, self.original), held, self.world.tp)
        return self.made[key]

    def order(self, dim: Dim, layer: int | None) -> Indices | None:
        """How the kept units lie over the ranks, where that is not in ascending order."""
        order = self.get(dim, layer).order()
        if (numbers := self.numbers.get(f"{dim.axis}.{layer}")) is not None:
            order = ranks(numbers)[order]
        return None if np.all(np.diff(order) > 0) else order


def kept_units(keep: Keep, dim: Dim, layer: int | None, original: Arch) -> Indices:
    """The kept units of a dim; the vocabulary, positions and the channels of a head are never cut."""
    if dim.axis not in CUT:
        return np.arange(num_units(dim, original))
    return keep.hidden if dim.axis == "hidden" else getattr(keep, dim.axis)[layer]


def cut(tensor: Tensor, row: Parameter, layer: int | None, keep: Keep, original: Arch, plans: Plans, world: engine.World) -> Tensor:
    """This rank's part of the pruned parameter, from its part of the original one."""
    for index, dim in enumerate(row.dims):
        sharded = row.tp_dim == index
        if sharded and dim.axis == "vocab":
            continue
        units, held = kept_units(keep, dim, layer, original), num_units(dim, original)
        plan = None
        if sharded and world.tp > 1:
            plan, (mine, held) = plans.get(dim, layer), held_units(dim, original, world.tp, world.tp_rank, sharded=True)
            units = units[(units >= mine.start) & (units < mine.stop)]
        heads = partners = None
        if dim.axis == "groups":
            assert layer is not None
            chosen = np.isin(keep.groups[layer], units)
            heads = keep.heads_in_groups(layer, original)[chosen]
            if dim == QKV and layer in keep.partners:
                partners = keep.partners_in_groups(layer, original)[chosen]
        first = 0 if plan is None else mine.start
        kept = pick(tensor, index, dim_rows(dim, original, held, units - first, heads))
        if partners is not None:  # a row that is its own partner is left as it is
            kept += kept - pick(tensor, index, dim_rows(dim, original, held, units - first, partners))
        tensor = kept
        if plan is not None:
            tensor = rebalance(tensor, index, dim, units, plan, pruned_units(original, keep, layer), world)
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
        if not engine.is_copy(name, model) and (row.tp_dim is not None or world.tp_rank == 0):
            live += live_elements(parameter.numel(), row, model.arch.layer(at.layer), world)
    counted = engine.sum_over_model_ranks(live, world)
    assert counted == model.arch.num_parameters(), f"{counted} parameters, {model.arch.num_parameters()} expected"


def live_elements(elements: int, row: Parameter, arch: Arch, world: engine.World) -> int:
    """Elements of a rank's shard that are not padding."""
    if row.tp_dim is None:
        return elements
    live, held = held_units(row.dims[row.tp_dim], arch, world.tp, world.tp_rank, sharded=True)
    return elements // held * len(live)
