"""One Hugging Face family as a row: how its `config.json` maps to `Arch`, and what its tensors are called (see families.py)."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

from minitron.arch.arch import Arch
from minitron.errors import RequestError

Config = dict[str, Any]
# rotary kinds that transformers computes; anything else is refused before weights are read
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


@dataclasses.dataclass(frozen=True)
class Family:
    """One family. `sizes` maps Arch fields to config keys, `flags` those that are true or false; `requires` lists keys with the only values that are
    supported; `fixed` are fields of Arch that no key says, and `further` gives those that must be computed from the config. `defaults` is what
    transformers assumes where a config.json is silent; a size whose default is None follows from others. `partial_rotary`: a head may be
    turned in part, by `partial_rotary_factor`.

    `names` turns the table's names of tensors, which are Llama's, into the family's, every piece that is a key at once; parts of a matrix
    that get one name lie in one tensor, one after the other. Tensors whose name ends in one of `transposed` lie the other way round.

    `expresses` says which shapes transformers' own class of this family accepts, `limits` in words; where a pruned shape falls outside, it is
    written as the family `otherwise`, which must compute the same function from the same tensors. `layer_types`: config.json says
    of each layer how far it sees; `dense_layers`: it names those without experts. `following`: further keys, with the field of Arch that each
    repeats. `aliases`: other names that a config.json may have for a key.
    """

    model_type: str
    architecture: str
    sizes: dict[str, str]
    requires: dict[str, tuple[Any, ...]]
    defaults: Config
    flags: dict[str, str] = dataclasses.field(default_factory=dict)
    fixed: Config = dataclasses.field(default_factory=dict)
    further: Callable[[Config], Config] = lambda config: {}
    partial_rotary: bool = False
    rope_types: tuple[str, ...] = ROPE_TYPES
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    expresses: Callable[[Arch], bool] = lambda arch: True
    limits: str = ""
    otherwise: str | None = None
    layer_types: bool = False
    dense_layers: bool = False
    following: Mapping[str, str] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def by_own_names(family: Family, config: Config) -> Config:
    """A config.json with every key as the family's row calls it."""
    return {family.aliases.get(key, key): value for key, value in config.items()}


def rope_of(config: Config, partial: bool, kinds: tuple[str, ...]) -> str:
    """One dict of rotary settings, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before); where these are
    given for each kind of layer, those of layers that see everything."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    rope = dict(rope.get("full_attention") or rope)
    kind = rope.pop("type", None)
    rope.setdefault("rope_type", kind or "default")
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if "partial_rotary_factor" in config:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if "original_max_position_embeddings" in config and rope["rope_type"] in ("llama3", "yarn", "longrope"):
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    share = rope.get("partial_rotary_factor", 1.0)
    if not (isinstance(share, int | float) and 0 < share <= 1) or (share < 1 and not partial):
        allowed = "above 0, at most 1" if partial else "1.0"
        raise RequestError(f"partial_rotary_factor={share!r} is not supported; allowed: {allowed}")
    if rope["rope_type"] not in kinds:
        raise RequestError(f"rope_type {rope['rope_type']!r} is not supported; supported: {', '.join(kinds)}")
    return json.dumps(rope, sort_keys=True)
