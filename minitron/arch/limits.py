"""What a config.json may say at all: the kind and range of every value that sizes are computed from, looked at before any memory is asked for."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from minitron.arch.arch import EXPERTS, Arch
from minitron.errors import RequestError

# far above any model there is, far below what a loop or an allocation would not come back from
LARGEST = {
    "num_layers": 10_000, "hidden_size": 1 << 20, "ffn_hidden_size": 1 << 24, "num_attention_heads": 1 << 16, "num_query_groups": 1 << 16,
    "kv_channels": 1 << 16, "vocab_size": 1 << 26, "max_position_embeddings": 1 << 31,
    "num_moe_experts": 1 << 14, "moe_router_topk": 1 << 14, "moe_ffn_hidden_size": 1 << 24, "moe_shared_expert_intermediate_size": 1 << 24,
}  # fmt: skip
KINDS = {field.name: int if field.name in EXPERTS else field.type for field in dataclasses.fields(Arch)}
ROTARY, POSITIVE = ("rope_parameters", "rope_scaling"), ("rope_theta", "factor")
# what the formulas of a rotary kind read without a default
READ = {
    "linear": ("factor",), "dynamic": ("factor",), "yarn": ("factor",), "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}  # fmt: skip


def check_values(config: Mapping[str, Any], sizes: Mapping[str, str], where: str) -> None:
    """Refuse a config.json whose values are of the wrong kind or out of all proportion. `sizes`: its keys by field of `Arch`.

    What is absent or null is not looked at: the family says what that means.
    """
    for field, key in sizes.items():
        if (needed := _needed(field, config.get(key))) is not None:
            raise RequestError(f"{where}: {key}={config[key]!r}: {needed}")
    for key, value in config.items():
        if key.endswith("_bias") and value not in (None, True, False):
            raise RequestError(f"{where}: {key}={value!r}: true or false is needed")
    for key in ROTARY:
        if config.get(key) is not None and not isinstance(config[key], Mapping):
            raise RequestError(f"{where}: {key}={config[key]!r}: settings by name are needed")
        for rotary in _mappings(config.get(key)):
            kind = rotary.get("rope_type", rotary.get("type"))
            if missing := [name for name in READ.get(str(kind), ()) if rotary.get(name) is None]:
                raise RequestError(f"{where}: {key}: rope_type {kind} needs {missing[0]}")
    for key, value in _leaves({key: config.get(key) for key in (*ROTARY, "rope_theta")}):
        if key in POSITIVE and not _positive(value):
            raise RequestError(f"{where}: {key}={value!r}: a positive number is needed")
        if isinstance(value, int | float) and not math.isfinite(value):
            raise RequestError(f"{where}: {key}={value!r}: a finite number is needed")


def _needed(field: str, value: Any) -> str | None:
    """What a field's value would have to be, None where it is that."""
    kind = KINDS.get(field)
    if value is None:
        return None
    if kind is bool:
        return None if isinstance(value, bool) else "true or false is needed"
    if kind is float:
        return None if _positive(value) else "a positive number is needed"
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            return "a positive whole number is needed"
        most = LARGEST.get(field)
        return None if most is None or value <= most else f"at most {most:,} is allowed"
    return None


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _mappings(value: Any) -> Iterator[Mapping[str, Any]]:
    """Settings and those inside them."""
    if isinstance(value, Mapping):
        yield value
        for item in value.values():
            yield from _mappings(item)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What nested settings come to, each with the name that it is under; nulls are left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item, name)
    elif value is not None:
        yield name, value
