"""Moving kept units between tensor ranks: nothing lost, nothing moved that need not be."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from minitron.pruning.balance import balance, in_order


@st.composite
def layouts(draw):
    tp, held = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    units = draw(st.sets(st.integers(0, tp * held - 1), min_size=1))
    return tp, held, np.array(sorted(units))


@given(layouts())
def test_every_rank_gets_its_share_for_the_least_traffic(layout):
    tp, held, kept = layout
    plan = balance(kept, held, tp)
    even = -(-len(kept) // tp)
    assert plan.held == even

    # every kept unit ends on exactly one rank, and the ranks are filled from the first on
    shards = [[*plan.stay[rank], *(unit for sender in range(tp) for unit in plan.moves[sender][rank])] for rank in range(tp)]
    share = [min(even, max(0, len(kept) - rank * even)) for rank in range(tp)]
    assert [len(shard) for shard in shards] == share
    assert sorted(unit for shard in shards for unit in shard) == kept.tolist()
    assert plan.order().tolist() == [unit for shard in shards for unit in shard]

    # only ranks that have too many send, each to others, and units that it had
    have = [int(((kept >= rank * held) & (kept < (rank + 1) * held)).sum()) for rank in range(tp)]
    assert plan.moved() == sum(max(0, mine - due) for mine, due in zip(have, share, strict=True))
    for rank in range(tp):
        own = range(rank * held, (rank + 1) * held)
        assert all(unit in own for unit in plan.stay[rank])
        assert all(unit in own for units in plan.moves[rank] for unit in units)
        assert len(plan.moves[rank][rank]) == 0


@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_an_even_choice_moves_nothing(tp, held, data):
    count = data.draw(st.integers(1, held))
    kept = np.concatenate([
        sorted(data.draw(st.sets(st.integers(rank * held, (rank + 1) * held - 1), min_size=count, max_size=count))) for rank in range(tp)
    ])  # fmt: skip
    plan = balance(kept, held, tp)
    assert plan.moved() == 0
    assert plan.order().tolist() == kept.tolist()


@given(st.integers(1, 5), st.integers(1, 6), st.data())
def test_in_order_every_rank_gets_its_share_of_what_ascends(ranks, held, data):
    share = data.draw(st.integers(1, held))
    kept = np.array(sorted(data.draw(st.sets(st.integers(0, ranks * held - 1), min_size=ranks * share, max_size=ranks * share))))
    moves = in_order(kept, held, ranks)
    shards = [[unit for sender in range(ranks) for unit in moves[sender][rank]] for rank in range(ranks)]
    assert [len(shard) for shard in shards] == [share] * ranks
    assert [unit for shard in shards for unit in shard] == kept.tolist()
    assert all(unit // held == sender for sender, row in enumerate(moves) for units in row for unit in units)
    if ranks == 2:
        assert len(moves[0][1]) + len(moves[1][0]) == balance(kept, held, 2).moved()
