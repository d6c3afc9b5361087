"""Groups are tried before a run stands on them: what does not work, or hangs, ends all ranks with what rank 0 says."""

import importlib
import os
import threading
import time

import pytest
import torch.distributed as dist

from minitron.config.schema import Parallel
from minitron.engine import joining
from minitron.engine.joining import KINDS, Standing, judge
from minitron.engine.meeting import Roll
from minitron.errors import Passing, RequestError
from tests.multirank.ranks import Layout, each_rank, on_ranks
from tests.stages.commands import running

PLACES = joining.MEETING, "its tensor-parallel group"


def standing(host, *stands_in, wrong=()):
    return f'{{"host": "{host}", "stands_in": "{"".join(stands_in)}", "wrong": {[*wrong]}}}'.replace("'", '"')


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([standing("a"), standing("b")], []),
        ([standing("a", PLACES[1]), standing("a"), standing("b", PLACES[1])],
         ["its tensor-parallel group did not come about within parallel.start_minutes: a (rank 0), b (rank 2) wait there; " + joining.NETWORK]),
        ([standing("a", PLACES[0]), standing("a", PLACES[1])],
         [f"{PLACES[0]} did not come about within parallel.start_minutes: a (rank 0) wait there; {joining.NETWORK}",
          f"{PLACES[1]} did not come about within parallel.start_minutes: a (rank 1) wait there; {joining.NETWORK}"]),
        ([standing("a"), None], ["nothing was heard of a host that is not heard of (rank 1) while groups were made: see what they said"]),
        ([standing("a"), standing("b", wrong=["an all-reduce gave 3"])], ["an all-reduce gave 3"]),
    ],
)  # fmt: skip
def test_what_rank_0_makes_of_where_ranks_stand(words, said):
    assert judge(words) == said
    assert all(isinstance(line, Passing) for line in judge(words))
    assert Standing("a", "", []) == Standing(**{"host": "a", "stands_in": "", "wrong": []})


@pytest.mark.parametrize(("faults", "passing"), [([Passing("a")], True), ([Passing("a"), "b"], False), (["b"], False)])
def test_one_fault_that_lasts_makes_the_whole_last(faults, passing, capsys):
    with pytest.raises(RequestError, match="\n".join(faults)) as refused:
        Roll(1).settle("topic", "", lambda words: faults)
    assert (refused.value.passing, refused.value.said) == (passing, True)
    assert capsys.readouterr().err == "".join(f"minitron: {line}\n" for line in faults)


def test_what_rank_0_says_is_waited_for_longer_than_rank_0_waits(monkeypatch):
    waits = []
    roll = Roll(3)
    roll.store = dist.HashStore()
    monkeypatch.setattr(roll, "_there", lambda keys, seconds: waits.append(seconds))
    assert roll._words("topic") == [None]
    with pytest.raises(RequestError, match="nothing was heard of rank 0") as refused:
        roll.hear("topic")
    assert refused.value.passing
    assert waits[1] > 2 * waits[0]


@pytest.mark.parametrize(
    ("ranks", "error", "is_line"),
    [
        (2, dist.DistNetworkError("no address"), True),
        (2, RuntimeError("[gloo/transport/tcp/device.cc:83] unable to find interface"), True),
        (2, RuntimeError("NCCL error: unhandled system error"), True),
        (2, RuntimeError("shapes differ"), False),
        (1, RuntimeError("Gloo does not like it"), False),
        (2, RuntimeError("gloo: Connection reset by peer"), False),  # another rank is gone
    ],
)
def test_a_line_about_the_network_is_of_the_network(ranks, error, is_line, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr(joining, "Roll", lambda minutes: None)
    with pytest.raises(RequestError if is_line else RuntimeError) as raised, joining.in_time(1, None):
        raise error
    if is_line:
        assert raised.value.passing
        assert str(raised.value).endswith(f"stands in {joining.MEETING}: {error}; {joining.NETWORK}")
    else:
        assert raised.value is error


def kinds_tried(world):
    """The groups that a trial goes through, with their ranks."""
    found, original = {}, joining.tried
    joining.tried = lambda name, group, device: found.update({name: dist.get_process_group_ranks(group)}) or original(name, group, device)
    trial = joining.Trial()
    trial.run(world.device, world.patient, world.groups)
    joining.tried = original
    return found, trial.wrong


@pytest.mark.multirank
def test_every_kind_of_group_is_tried():
    ranks = on_ranks(kinds_tried, Layout(tp=2, pp=2))
    assert all(wrong == [] for _, wrong in ranks)
    assert ranks[3][0] == {
        "the group of all ranks": [0, 1, 2, 3], "the group that waits for rank 0": [0, 1, 2, 3],
        f"its {KINDS['tp']} group": [2, 3], f"its {KINDS['pp']} group": [1, 3], f"its {KINDS['mp']} group": [0, 1, 2, 3],
        f"its {KINDS['embd']} group": [1, 3],
    }  # fmt: skip


def joined_with_a_wrong_sum(layout):
    """Rank 1's part of every sum of two is lost."""
    from minitron.engine.parallel import world

    original = dist.all_reduce

    def all_reduce(tensor, *args, group=None, **kwargs):
        if group is not None and group.size() == 2 and dist.get_rank() == 1:
            tensor.zero_()
        return original(tensor, *args, group=group, **kwargs)

    dist.all_reduce = all_reduce
    try:
        with world(Parallel(**layout), "cpu", 1):
            return None
    except RequestError as error:
        return str(error), error.said, error.passing


@pytest.mark.multirank
def test_a_wrong_sum_is_refused_on_all_ranks():
    sums = {"tp": "ranks [0, 1], gave 1 and not 3", "pp": "ranks [1, 3], gave 4 and not 6", "embd": "ranks [1, 3], gave 4 and not 6"}
    lines = [f"an all-reduce over its {KINDS[kind]} group, {wrong}" for kind, wrong in sums.items()]
    assert each_rank(joined_with_a_wrong_sum, 4, {"tp": 2, "pp": 2}) == [("\n".join(lines), True, True)] * 4


def stuck():
    """Rank 1 does not come to make groups, and nobody waits for long."""
    timer = threading.Timer
    threading.Timer = lambda seconds, action: timer(2, action)
    if os.environ["RANK"] == "1":
        module = importlib.import_module("minitron.engine.parallel")
        module._make_groups = lambda *args: time.sleep(1000)


@pytest.mark.multirank
def test_ranks_that_wait_for_ever_are_ended_and_told_where_they_stood(stories, tales, tmp_path):
    arguments = [f"run.dir={tmp_path / 'run'}", f"model.path={stories}", f"data.calibration={tales}", "parallel.tp=2", "parallel.start_minutes=3"]
    with running(tmp_path / "log", "calibrate", *arguments, "device=cpu", prepare=stuck, size=2) as ranks:
        for process in ranks.processes:
            process.join(30)
        assert [process.exitcode for process in ranks.processes] == [2, 2]
    said = (tmp_path / "log0.err").read_text()
    assert said.startswith("minitron: the making of groups did not come about within parallel.start_minutes: ")
    assert "(ranks 0, 1) wait there; can the hosts reach each other" in said
    assert said.count("\n") == 1
    assert (tmp_path / "log1.err").read_text() == ""
