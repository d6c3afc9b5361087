"""From the settings under `target` to the architecture of the compressed model. Pure; every impossible size is refused here."""

import dataclasses
from collections.abc import Sequence

from minitron.arch.arch import Arch, Layer
from minitron.arch.families import written_as
from minitron.arch.shards import neurons, padded
from minitron.config.schema import Parallel, Target
from minitron.errors import RequestError, refuse
from minitron.pruning.keep import by_answers, skipped_at_a_time
from minitron.pruning.rounds import EXPERT_SIZES, most_rounds, way

_PER_LAYER = ("ffn_hidden_size", "num_attention_heads", "num_query_groups")
_ROUNDED = ("hidden_size", "ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
_EXPERTS_OVER = {"num_moe_experts": "ep", "moe_ffn_hidden_size": "tp", "moe_shared_expert_intermediate_size": "tp"}  # what must divide them


def target_arch(arch: Arch, target: Target, parallel: Parallel, exported: bool = False) -> Arch:
    """`arch` with the sizes that `target` asks for. `exported`: it must be one that transformers can express.

    Raises RequestError, naming the setting as it was given, for a size larger than the model's, not divisible, or an axis this model lacks.
    """
    check_layout(arch, parallel, "the model's")
    whole = {name: _size(name, target, getattr(target, name), getattr(arch, name)) for name in ("num_layers", "hidden_size")}
    whole |= expert_sizes(arch, target, parallel)
    check_stages(whole["num_layers"], parallel, "the target's")
    lists = {name: asked for name in _PER_LAYER if isinstance(asked := getattr(target, name), list)}
    for name, asked in lists.items():
        if len(asked) != whole["num_layers"]:
            raise refuse(f"target.{name}", asked, f"one size for each of the {whole['num_layers']} layers that are kept is needed")
    blocks = [block_sizes(arch, target, parallel, {name: asked[n] for name, asked in lists.items()}) for n in range(whole["num_layers"])]
    if blocks == blocks[:1] * len(blocks):
        pruned = arch.replace(**whole, **dataclasses.asdict(blocks[0]))
    else:
        largest = max(blocks, key=lambda block: (block.num_query_groups, block.num_attention_heads))
        sizes = {**dataclasses.asdict(largest), "ffn_hidden_size": max(block.ffn_hidden_size for block in blocks)}
        pruned = arch.replace(**whole, **sizes, layers=tuple(blocks))
        if exported:
            name, asked = next(iter(lists.items()))
            raise refuse(f"target.{name}", asked, f"no {arch.family} model of transformers has sizes that differ between layers; one size is needed")
    if not pruned.layers:
        written_as(pruned)  # a shape that no class of transformers loads is refused before any work is done
    return pruned


def expert_sizes(arch: Arch, target: Target, parallel: Parallel) -> dict[str, int]:
    """The sizes of experts, by name; nothing where there are none."""
    for name in EXPERT_SIZES:
        if getattr(arch, name) is None and getattr(target, name) is not None:
            what = "shared expert" if arch.num_moe_experts is not None else "experts"
            raise refuse(f"target.{name}", getattr(target, name), f"must be null: this model has no {what}")
    if arch.num_moe_experts is None:
        return {}
    if target.ffn_hidden_size is not None and not arch.has_dense_blocks:
        said = "must be null: tokens are routed in every block of this model; target.moe_ffn_hidden_size is of its experts"
        raise refuse("target.ffn_hidden_size", target.ffn_hidden_size, said)
    sizes = {name: _size(name, target, getattr(target, name), present) for name in EXPERT_SIZES if (present := getattr(arch, name)) is not None}
    assert arch.moe_router_topk is not None
    if (experts := sizes["num_moe_experts"]) < arch.moe_router_topk:
        few = f"a token goes to moe_router_topk={arch.moe_router_topk} of them: at least so many must stay"
        raise impossible("num_moe_experts", target, experts, few)
    for name, size in sizes.items():
        if size % (ranks := getattr(parallel, _EXPERTS_OVER[name])):
            raise impossible(name, target, size, f"must be divisible by parallel.{_EXPERTS_OVER[name]}={ranks}")
    return sizes


def block_sizes(arch: Arch, target: Target, parallel: Parallel, listed: dict[str, int]) -> Layer:
    """The sizes of one block; `listed` are those that were given for it alone."""
    asked = {name: listed.get(name, getattr(target, name)) for name in _PER_LAYER}
    sizes = {name: _size(name, target, asked[name], getattr(arch, name)) for name in _PER_LAYER}
    groups, heads = sizes["num_query_groups"], sizes["num_attention_heads"]
    if asked["num_attention_heads"] is None:
        heads = sizes["num_attention_heads"] = groups * arch.heads_per_group
    if heads % groups:
        raise impossible("num_attention_heads", target, heads, f"every KV group keeps the same number of heads: a multiple of {groups} is needed")
    if heads // groups > arch.heads_per_group:
        most = groups * arch.heads_per_group
        raise impossible("num_attention_heads", target, heads, f"a KV group has {arch.heads_per_group} heads: at most {most}")
    if arch.has_dense_blocks and sizes["ffn_hidden_size"] % parallel.tp:
        raise impossible("ffn_hidden_size", target, sizes["ffn_hidden_size"], f"must be divisible by parallel.tp={parallel.tp}")
    return Layer(**sizes)


def check_layout(arch: Arch, parallel: Parallel, whose: str, group: str = "parallel") -> None:
    """Refuse a layout that a model can't be laid over; `whose` sizes these are is said, and `group` is where its settings are."""
    for name, size in neurons(arch).items():
        if size % parallel.tp:
            raise refuse(f"{group}.tp", parallel.tp, f"must divide {whose} {name}={size}")
    check_experts(arch, parallel, whose, group)
    padded(arch, parallel.tp)
    check_stages(arch.num_layers, parallel, whose, group)


def check_experts(arch: Arch, parallel: Parallel, whose: str, group: str) -> None:
    """Refuse expert ranks without experts to share out, or that would have different numbers of them."""
    if parallel.ep > 1 and arch.num_moe_experts is None:
        raise refuse(f"{group}.ep", parallel.ep, f"must be 1: {whose} blocks have no experts")
    if (arch.num_moe_experts or 0) % parallel.ep:
        raise refuse(f"{group}.ep", parallel.ep, f"must divide {whose} num_moe_experts={arch.num_moe_experts}")


def check_stages(num_layers: int, parallel: Parallel, whose: str, group: str = "parallel") -> None:
    """Refuse more pipeline stages than layers."""
    if num_layers < parallel.pp * parallel.vpp:
        stages = f"pp x vpp = {parallel.pp * parallel.vpp} stages" if parallel.vpp > 1 else "stages"
        name = "vpp" if num_layers >= parallel.pp else "pp"
        raise refuse(f"{group}.{name}", getattr(parallel, name), f"{stages} need a layer each: at most {whose} number of layers, {num_layers}")


def check_smaller(arch: Arch, pruned: Arch, target: Target) -> None:
    """Refuse a target that leaves nothing to prune."""
    if pruned == arch:
        name = next(name for name in ("num_layers", "hidden_size", *_PER_LAYER, *EXPERT_SIZES) if getattr(target, name) is not None)
        raise impossible(name, target, getattr(arch, name), "nothing to prune: the model has these sizes already")


def check_ways(arch: Arch, pruned: Arch, target: Target, skip_lengths: Sequence[int], choices: str | None = None) -> None:
    """Refuse a ranking of layers that calibration, with these of its settings, will not measure, and ways of cutting what is not cut."""
    if target.merge_heads and all(pruned.layer(n).heads_per_group == arch.heads_per_group for n in range(pruned.num_layers)):
        raise refuse("target.merge_heads", True, "no KV group loses query heads with these targets; false is needed")
    if target.layers_by == "bi":
        return
    if pruned.num_layers == arch.num_layers:
        raise refuse("target.layers_by", target.layers_by, "no layers are cut with these targets; bi is needed")
    first = way(arch, pruned, target.rounds)[0].num_layers
    needed = skipped_at_a_time(target.layers_by, arch.num_layers, first)
    if needed not in skip_lengths and first < arch.num_layers:
        raise refuse("target.layers_by", target.layers_by, f"calibrate.skip_layers={needed} is needed with it")
    check_questions(target, choices)


def check_questions(target: Target, choices: str | None) -> None:
    """Refuse a ranking of layers by questions where there are none."""
    if by_answers(target.layers_by) and choices is None:
        raise refuse("target.layers_by", target.layers_by, "calibrate.choices is needed with it: the questions to answer")


def check_rounds(arch: Arch, pruned: Arch, target: Target, parallel: Parallel) -> None:
    """Refuse rounds of which one would cut nothing, or leave a model that the layout can't hold, and cuts that rounds don't add up to."""
    if target.rounds == 1:
        return
    if pruned.layers:
        raise refuse("target.rounds", target.rounds, "1 is needed with sizes that differ between layers")
    if target.merge_heads:
        raise refuse("target.merge_heads", True, "must be false with target.rounds above 1, where a head would be merged with merged ones")
    if target.rounds > (most := most_rounds(arch, pruned)):
        raise refuse("target.rounds", target.rounds, f"a round would cut nothing: at most {most} with these targets")
    for sizes in way(arch, pruned, target.rounds):
        over = {"ffn_hidden_size": "tp"} if arch.has_dense_blocks else {}
        for name, ranks in (over | _EXPERTS_OVER).items():
            if (size := getattr(sizes, name)) is not None and size % getattr(parallel, ranks):
                between = f"{name}={size} on the way, which parallel.{ranks}={getattr(parallel, ranks)} must divide"
                raise refuse("target.rounds", target.rounds, f"comes to {between}: another number of rounds is needed")


def impossible(name: str, target: Target, size: int, reason: str) -> RequestError:
    """The refusal of a size, which shows what was asked for and, where that is not the size itself, what it comes to."""
    asked = getattr(target, name)
    became = "" if asked == size else f"{size} in it: " if isinstance(asked, list) else f"comes to {size}: "
    return refuse(f"target.{name}", asked, f"{became}{reason}")


def _size(name: str, target: Target, asked: int | float | None, present: int) -> int:
    if asked is None:
        return present
    if isinstance(asked, float):
        if asked >= 1:
            raise refuse(f"target.{name}", asked, "a whole number, or a fraction below 1, is needed")
        step = target.multiple_of if name in _ROUNDED else 1
        return min(present, max(step, round(asked * present / step) * step))
    if asked > present:
        raise impossible(name, target, asked, f"the model has {present}: pruning can only make it smaller")
    return asked
