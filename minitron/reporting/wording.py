"""How numbers and sizes are written, on the console, in the report and in its pictures alike. Pure."""

from minitron.arch import Arch
from minitron.arch.counts import scaled
from minitron.data.manifest import Part

ABSENT = "–"

SIZES = {  # what a reader sees -> the field of Arch
    "layers": "num_layers",
    "hidden size": "hidden_size",
    "MLP neurons per layer": "ffn_hidden_size",
    "experts per layer": "num_moe_experts",
    "neurons per expert": "moe_ffn_hidden_size",
    "neurons of the shared expert": "moe_shared_expert_intermediate_size",
    "experts of a token": "moe_router_topk",
    "attention heads": "num_attention_heads",
    "KV groups": "num_query_groups",
    "channels per head": "kv_channels",
    "vocabulary": "vocab_size",
}


def size(count: float | None) -> str:
    """A count as people say it: 134515008 -> "134.5 M"."""
    return ABSENT if count is None else scaled(count)


def decimal(value: float | None, digits: int = 2) -> str:
    """A number with a fixed number of decimals and thousands separated."""
    return ABSENT if value is None else f"{value:,.{digits}f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent: 0.827 -> "82.7 %"."""
    return ABSENT if fraction is None else f"{100 * fraction:.{digits}f} %"


def measurement(found: tuple[float, float | None] | None, error: bool = True) -> str:
    """A value and its standard error: (0.4344, 0.0222) -> "0.434 ±0.022"."""
    if found is None:
        return ABSENT
    digits = 3 if abs(found[0]) < 10 else 2
    return decimal(found[0], digits) + (f" ±{decimal(found[1], digits)}" if error and found[1] is not None else "")


def ratio(part: float | None, whole: float | None) -> float | None:
    """`part / whole`, None where either is missing or the whole is zero."""
    return None if part is None or not whole else part / whole


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def counted(number: int, what: str) -> str:
    """1, "document" -> "1 document"; 2000 -> "2,000 documents"."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def prepared(name: str, part: Part) -> str:
    """A part of a run's prepared text: "train: 12 documents, 3,456 tokens from a.jsonl"."""
    return f"{name}: {counted(part.documents, 'document')}, {counted(part.tokens, 'token')} from {part.source}"


def sizes_of(arch: Arch) -> dict[str, str]:
    """Those of SIZES that a model has: its MLPs, its experts, or both."""
    return {
        name: field for name, field in SIZES.items() if getattr(arch, field) is not None and (field != "ffn_hidden_size" or arch.has_dense_blocks)
    }


def span(arch: Arch, field: str) -> tuple[int, int]:
    """The smallest and the largest value of a size over the layers; twice the same where they are alike."""
    values = [getattr(block, field) for block in arch.layers if hasattr(block, field)] or [getattr(arch, field)]
    return min(values), max(values)


def ranged(low: int, high: int) -> str:
    """A whole number, or a range of them: (1152, 1152) -> "1,152", (12, 60) -> "12..60"."""
    return f"{low:,}" if low == high else f"{low:,}..{high:,}"


def size_of(arch: Arch, field: str) -> str:
    """A size, as the range over the layers where they have sizes of their own."""
    return ranged(*span(arch, field))


def kept_of(original: Arch, pruned: Arch, field: str) -> str:
    """The share of a size that is left, in whole percent."""
    whole = span(original, field)[1]
    low, high = (round(100 * value / whole) for value in span(pruned, field))
    return f"{ranged(low, high)} %"


def changes(original: Arch, pruned: Arch) -> list[str]:
    """What a cut made of each size that it changed: ["hidden size 64 -> 48", ...]."""
    sizes = {name: (size_of(original, field), size_of(pruned, field)) for name, field in sizes_of(original).items()}
    return [f"{name} {before} -> {after}" for name, (before, after) in sizes.items() if before != after]
