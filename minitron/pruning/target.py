"""From the settings under `target` to the architecture of the compressed model. Pure; every impossible size is refused here."""

from minitron.arch.arch import Arch
from minitron.arch.families import written_as
from minitron.config.schema import Parallel, Target
from minitron.errors import refuse

_PRUNABLE = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")
_ROUNDED = ("hidden_size", "ffn_hidden_size")


def target_arch(arch: Arch, target: Target, parallel: Parallel) -> Arch:
    """`arch` with the sizes that `target` asks for.

    Raises RequestError, naming the setting, for a size larger than the model's, not divisible, or an axis this model lacks.
    """
    if target.num_moe_experts is not None:
        raise refuse("target.num_moe_experts", target.num_moe_experts, "this model has no experts; null is needed")
    sizes = {name: _size(name, getattr(target, name), getattr(arch, name), target.multiple_of) for name in _PRUNABLE}
    groups, heads = sizes["num_query_groups"], sizes["num_attention_heads"]
    if target.num_attention_heads is None:
        heads = sizes["num_attention_heads"] = groups * arch.heads_per_group
    if heads % groups:
        raise refuse("target.num_attention_heads", heads, f"every KV group keeps the same number of heads: a multiple of {groups} is needed")
    if heads // groups > arch.heads_per_group:
        raise refuse("target.num_attention_heads", heads, f"a KV group has {arch.heads_per_group} heads: at most {groups * arch.heads_per_group}")
    for name, divisor in (("ffn_hidden_size", "tp"), ("num_layers", "pp")):
        ranks = getattr(parallel, divisor)
        if sizes[name] % ranks:
            raise refuse(f"target.{name}", sizes[name], f"must be divisible by parallel.{divisor}={ranks}")
    if sizes["num_layers"] != arch.num_layers and parallel.pp > 1:
        raise refuse("parallel.pp", parallel.pp, "layers can be dropped on one pipeline stage only; use parallel.pp=1 to prune in depth")
    pruned = arch.replace(**sizes)
    written_as(pruned)  # a shape that no class of transformers loads is refused before any work is done
    return pruned


def _size(name: str, asked: int | float | None, present: int, multiple_of: int) -> int:
    if asked is None:
        return present
    if isinstance(asked, float):
        if asked >= 1:
            raise refuse(f"target.{name}", asked, "a whole number, or a fraction below 1, is needed")
        step = multiple_of if name in _ROUNDED else 1
        return min(present, max(step, round(asked * present / step) * step))
    if asked > present:
        raise refuse(f"target.{name}", asked, f"the model has {present}: pruning can only make it smaller")
    return asked
