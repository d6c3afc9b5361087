"""The arithmetic of dims and units against loops that spell out where every row lies."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minitron.arch.arch import Arch
from minitron.arch.axes import FFN, GATE_UP, HEADS, HIDDEN, QKV, VOCAB, dim_rows, dim_size, part_sizes
from minitron.arch.shards import held_units, padded, shard_shape
from minitron.arch.units import from_units, to_units, unfuse
from minitron.errors import RequestError

DIMS = {"hidden": HIDDEN, "ffn": FFN, "vocab": VOCAB, "heads": HEADS, "qkv": QKV, "gate_up": GATE_UP}


@st.composite
def arches(draw):
    groups = draw(st.integers(1, 5))
    return Arch(
        family="llama",
        num_layers=draw(st.integers(1, 3)),
        hidden_size=draw(st.integers(1, 9)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        num_attention_heads=groups * draw(st.integers(1, 4)),
        num_query_groups=groups,
        kv_channels=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 9)),
        max_position_embeddings=8,
    )


dims = st.sampled_from(sorted(DIMS)).map(DIMS.get)


def labels(dim, arch):
    """What each row of a whole dim is, in memory order: (unit, part, row inside the part), by nested loops."""
    sizes = {"one": 1, "head": arch.kv_channels, "heads": arch.heads_per_group * arch.kv_channels}
    units = {"hidden": arch.hidden_size, "ffn": arch.ffn_hidden_size, "groups": arch.num_query_groups, "vocab": arch.vocab_size}[dim.axis]
    rows = []
    if dim.by == "unit":
        for unit in range(units):
            for part, kind in enumerate(dim.parts):
                rows += [(unit, part, row) for row in range(sizes[kind])]
    else:
        for part, kind in enumerate(dim.parts):
            for unit in range(units):
                rows += [(unit, part, row) for row in range(sizes[kind])]
    return units, rows


@given(arches(), dims, st.data())
def test_dim_rows_picks_the_rows_of_the_chosen_units_and_heads(arch, dim, data):
    units, rows = labels(dim, arch)
    chosen = data.draw(st.permutations(range(units)).flatmap(lambda order: st.integers(1, units).map(lambda n: order[:n])))
    heads = None
    if dim.axis == "groups" and data.draw(st.booleans()):
        kept = data.draw(st.integers(1, arch.heads_per_group))
        inside = st.permutations(range(arch.heads_per_group)).map(lambda order: sorted(order[:kept]))
        heads = np.array([data.draw(inside) for _ in chosen])
    got = dim_rows(dim, arch, units, np.array(chosen), heads)

    expected = []
    order = [(unit, part) for unit in range(len(chosen)) for part in range(len(dim.parts))]
    if dim.by == "part":
        order.sort(key=lambda pair: (pair[1], pair[0]))
    for position, part in order:
        for label in rows:
            if label[:2] != (chosen[position], part):
                continue
            if dim.parts[part] == "heads" and heads is not None and label[2] // arch.kv_channels not in heads[position]:
                continue
            expected.append(rows.index(label))
    assert got.tolist() == expected


@given(arches(), dims, st.integers(0, 2), st.integers(1, 3))
def test_units_gather_every_row_of_a_unit_and_go_back(arch, dim, index, others):
    units, rows = labels(dim, arch)
    assert len(rows) == dim_size(dim, arch)
    shape = [others, others + 1]
    shape.insert(index, len(rows))
    tensor = torch.randn(shape)
    grouped = to_units(tensor, index, dim, arch)
    assert grouped.shape[:2] == (units, sum(part_sizes(dim, arch)))
    for unit in range(units):
        mine = [row for row, label in enumerate(rows) if label[0] == unit]
        assert torch.equal(grouped[unit], tensor.movedim(index, 0)[mine])
    assert torch.equal(from_units(grouped, index, dim), tensor)


@given(arches(), dims, st.integers(1, 3))
def test_unfuse_takes_apart_what_the_table_joins(arch, dim, columns):
    units, rows = labels(dim, arch)
    sizes = part_sizes(dim, arch)
    parts = [torch.randn(units * size, columns) for size in sizes]
    fused = torch.stack([parts[part][unit * sizes[part] + row] for unit, part, row in rows])
    again = unfuse(fused, dim, arch)
    assert all(torch.equal(one, other) and one.is_contiguous() for one, other in zip(again, parts, strict=True))


@given(arches(), st.sampled_from([VOCAB, QKV, HEADS]), st.integers(1, 5))
def test_every_unit_is_held_by_one_rank_and_shards_are_even(arch, dim, tp):
    arch = arch.replace(ffn_hidden_size=arch.ffn_hidden_size * tp, vocab_size=arch.vocab_size + tp * tp)
    held = [held_units(dim, arch, tp, rank, sharded=True) for rank in range(tp)]
    total = {"vocab": arch.vocab_size, "groups": arch.num_query_groups}[dim.axis]
    assert [unit for live, _ in held for unit in live] == list(range(total))
    assert {size for _, size in held} == {-(-total // tp)}
    assert held_units(dim, arch, tp, tp - 1, sharded=False) == (range(total), total)


def test_shapes_of_shards_with_dead_units():
    from minitron.arch.axes import PARAMETERS

    arch = Arch("llama", 2, 12, 8, 9, 3, 4, 61, 8)
    rows = {row.name.removeprefix("decoder.layers.{layer}."): row for row in PARAMETERS if row.exists(arch)}
    assert (padded(arch, 2).num_query_groups, padded(arch, 2).num_attention_heads, padded(arch, 2).vocab_size) == (4, 12, 62)
    assert shard_shape(rows["embedding.word_embeddings.weight"], arch, 2) == (31, 12)
    assert shard_shape(rows["self_attention.linear_qkv.weight"], arch, 2) == (2 * (3 + 1 + 1) * 4, 12)
    assert shard_shape(rows["self_attention.linear_proj.weight"], arch, 2) == (12, 2 * 3 * 4)
    assert shard_shape(rows["mlp.linear_fc1.weight"], arch, 2) == (8, 12)
    assert shard_shape(rows["mlp.linear_fc2.weight"], arch, 2) == (12, 4)
    with pytest.raises(RequestError, match=r"ffn_hidden_size=8: must be divisible by parallel.tp=3"):
        padded(arch, 3)
