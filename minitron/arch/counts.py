"""What an architecture costs, from the table: parameters, FLOPs, bytes."""

import dataclasses

from minitron.arch.arch import Arch
from minitron.arch.axes import VOCAB, count_parameters, dim_size, parameters


@dataclasses.dataclass(frozen=True)
class Counts:
    """`flops_per_token`: multiply-adds counted as two, one forward pass, attention at full length `seq_length` included."""

    parameters: int
    embedding_parameters: int
    flops_per_token: int
    kv_cache_bytes_per_token: int


def count(arch: Arch, seq_length: int, bytes_per_element: int = 2) -> Counts:
    """Costs of one forward pass of `arch` per token, at sequences of `seq_length` tokens."""
    matrix_sizes = [
        (row.dims[0] == VOCAB, dim_size(row.dims[0], arch.layer(layer)) * dim_size(row.dims[1], arch.layer(layer)))
        for row, layer in parameters(arch)
        if len(row.dims) == 2
    ]
    embedding = sum(size for is_vocab, size in matrix_sizes if is_vocab)
    # every matrix is one multiply-add per element and token; the embedding is a lookup, the head (tied or not) a product
    matrices = sum(size for is_vocab, size in matrix_sizes if not is_vocab) + arch.vocab_size * arch.hidden_size
    blocks = [arch.layer(number) for number in range(arch.num_layers)]
    attention = 2 * seq_length * arch.kv_channels * sum(block.num_attention_heads for block in blocks)
    return Counts(
        parameters=count_parameters(arch),
        embedding_parameters=embedding,
        flops_per_token=2 * (matrices + attention),
        kv_cache_bytes_per_token=2 * sum(block.num_query_groups for block in blocks) * arch.kv_channels * bytes_per_element,
    )


def training_flops(arch: Arch, seq_length: int, teacher: Arch | None) -> int:
    """FLOPs of training `arch` on one token: a forward pass, a backward pass, which is two more, and the forward pass of a teacher, if any."""
    return 3 * count(arch, seq_length).flops_per_token + (count(teacher, seq_length).flops_per_token if teacher is not None else 0)
