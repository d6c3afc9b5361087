"""The helper that the other multi-rank tests stand on."""

import os
import signal
import threading

import pytest
import torch
import torch.distributed as dist

from tests.multirank.ranks import Died, Layout, each_rank, on_ranks, started

pytestmark = pytest.mark.multirank


def place(world, word):
    total = torch.tensor([world.rank])
    dist.all_reduce(total)
    return word, world.rank, world.tp_rank, world.dp_rank, total.item(), os.getpid()


def second_fails(world):
    if world.rank == 1:
        raise KeyError("lost")
    dist.barrier()  # waits for a rank that does not come


def second_dies(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def waits():
    threading.Event().wait()


def returns_what_cannot_travel():
    return threading.Lock()


def test_every_rank_has_its_place_and_its_answer_is_in_order():
    found = on_ranks(place, Layout(tp=2, dp=2), "hello")
    assert [answer[:5] for answer in found] == [("hello", 0, 0, 0, 6), ("hello", 1, 1, 0, 6), ("hello", 2, 0, 1, 6), ("hello", 3, 1, 1, 6)]
    assert len({answer[5] for answer in found} | {os.getpid()}) == 5


def test_what_a_rank_raises_is_raised_with_its_traceback():
    with pytest.raises(KeyError, match="lost") as failure:
        on_ranks(second_fails, Layout(tp=2))
    assert "in second_fails" in str(failure.value.__cause__)
    assert "on rank 1" in str(failure.value.__cause__)


def test_a_rank_that_dies_is_named():
    with pytest.raises(Died, match="rank 1 ended with exit code -9 and no answer"):
        on_ranks(second_dies, Layout(tp=2))


def test_ranks_that_do_not_answer_are_killed():
    with started(waits, 2) as ranks, pytest.raises(TimeoutError, match=r"no answer after 0.1 s from ranks \[0, 1\]"):
        ranks.results(timeout=0.1)
    assert [process.exitcode for process in ranks.processes] == [-9, -9]


def test_an_answer_that_cannot_travel_says_so():
    with pytest.raises(RuntimeError, match="no pickle can be made of"):
        each_rank(returns_what_cannot_travel, 1)


@pytest.mark.parametrize(("layout", "name"), [(Layout(), "alone"), (Layout(tp=2, sp=True), "tp2-sp"), (Layout(tp=2, pp=3, dp=4), "tp2-pp3-dp4")])
def test_layouts_say_what_they_are(layout, name):
    assert str(layout) == name
