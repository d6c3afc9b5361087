"""What an architecture costs, from the table: parameters, FLOPs, bytes."""

import dataclasses

from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, POSITIONS, VOCAB, count_active, count_parameters

SCALES = {"memory_gb": 10**9, "gflops_per_token": 10**9}  # of the budgets: in which unit of what is counted, bytes and FLOPs
_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))


@dataclasses.dataclass(frozen=True)
class Counts:
    """`flops_per_token`: multiply-adds counted as two, one forward pass, attention at full length `seq_length` included. `active_parameters`: all
    but the experts that one token is not sent to."""

    parameters: int
    active_parameters: int
    embedding_parameters: int
    flops_per_token: int
    kv_cache_bytes_per_token: int


def count(arch: Arch, seq_length: int, bytes_per_element: int = 2) -> Counts:
    """Costs of one forward pass of `arch` per token, at sequences of `seq_length` tokens."""
    sizes = [
        (row.dims[0] in (VOCAB, POSITIONS), row.active(block) * row.size(block))
        for row in PARAMETERS
        if len(row.dims) == 2
        for _, block in row.blocks(arch)
    ]
    embedding = sum(size for is_lookup, size in sizes if is_lookup)
    # every matrix is one multiply-add per element and token; the embedding is a lookup, the head (tied or not) a product
    matrices = sum(size for is_lookup, size in sizes if not is_lookup) + arch.vocab_size * arch.hidden_size
    blocks = [arch.layer(number) for number in range(arch.num_layers)]
    attention = 2 * seq_length * arch.kv_channels * sum(block.num_attention_heads for block in blocks)
    return Counts(
        parameters=count_parameters(arch),
        active_parameters=count_active(arch),
        embedding_parameters=embedding,
        flops_per_token=2 * (matrices + attention),
        kv_cache_bytes_per_token=2 * sum(block.num_query_groups for block in blocks) * arch.kv_channels * bytes_per_element,
    )


def training_flops(arch: Arch, seq_length: int, teacher: Arch | None) -> int:
    """FLOPs of training `arch` on one token: a forward pass, a backward pass, which is two more, and the forward pass of a teacher, if any."""
    return 3 * count(arch, seq_length).flops_per_token + (count(teacher, seq_length).flops_per_token if teacher is not None else 0)


def totals(arch: Arch, batch_size: int, seq_length: int, bytes_per_element: int) -> dict[str, int]:
    """What `arch` costs, by the names of the budgets (config/schema.py) that need no measurement, as whole numbers: parameters, bytes, FLOPs.

    Memory is that of the weights and of the key/value cache of `batch_size` sequences of `seq_length` tokens, FLOPs those of one forward pass per
    token at that length. Every one of them is a line in the number of layers where these are alike.
    """
    found = count(arch, seq_length, bytes_per_element)
    return {
        "params": found.parameters,
        "non_embedding_params": found.parameters - found.embedding_parameters,
        "active_params": found.active_parameters,
        "memory_gb": found.parameters * bytes_per_element + batch_size * seq_length * found.kv_cache_bytes_per_token,
        "gflops_per_token": found.flops_per_token,
    }


def costs(arch: Arch, batch_size: int, seq_length: int, bytes_per_element: int) -> dict[str, float]:
    """`totals` in the units of the budgets: parameters, GB (10^9 bytes), GFLOP."""
    return {name: total / SCALES.get(name, 1) for name, total in totals(arch, batch_size, seq_length, bytes_per_element).items()}


def scaled(count: float, digits: int = 1) -> str:
    """A count as people say it: 134515008 -> "134.5 M"."""
    scale, unit = next(((scale, unit) for scale, unit in _UNITS if abs(count) >= scale), (1.0, ""))
    return f"{count / scale:.{digits}f} {unit}" if unit else f"{count:,.0f}"
