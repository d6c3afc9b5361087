"""What rank 0 makes of the cards of all ranks: each fault in a line that names hosts and ranks."""

import dataclasses

import pytest

from minitron import engine
from minitron.config.schema import Config, Parallel, Run
from minitron.errors import Passing, RequestError
from minitron.launching.memory import RankMemory
from minitron.launching.site import Card
from minitron.launching.verdict import Heard, Needs, faults, remarks

CFG = dataclasses.replace(Config(), run=Run(dir="/shared/run"))
SAME = {"minitron": "1.0", "minitron's own files": "aa", "torch": "2.9"}
FILES = {"model.path": {"config.json": "10 bytes, hash 1", "model.safetensors": "99 bytes, hash 2"}}


def cards(*hosts, **values):
    """Cards of two ranks on each host, the first of which leads."""
    return [Card(host, host, leads, SAME, {"verb": "train"}, device="cpu", host_bytes=64, host_free=60, files=FILES if leads else {}, **values)
            for host in hosts for leads in (True, False)]  # fmt: skip


def gpus(*hosts, **values):
    """As `cards`, with a GPU each."""
    usual = {"device": "cuda", "gpu": "H100", "gpus": 2, "device_bytes": 80 * 10**9, "device_free": 79 * 10**9, "host_bytes": 10**12}
    return [dataclasses.replace(card, **{**usual, **values}) for card in cards(*hosts)]


def changed(found, ranks, **values):
    """Cards of which those of some ranks say something else."""
    return [dataclasses.replace(card, **values) if rank in ranks else card for rank, card in enumerate(found)]


def found(its, needs=None, **values):
    return faults(Heard(its, CFG, needs or Needs(), **values))


def test_ranks_that_agree_have_no_faults():
    for its in (cards("a"), cards("a", "b"), gpus("a", "b")):
        assert found(its) == []
        assert list(remarks(Heard(its, CFG, Needs()))) == []


@pytest.mark.parametrize(
    ("its", "said"),
    [
        (changed(cards("a", "b"), {2, 3}, versions={**SAME, "torch": "2.8"}),
         ["torch differs: 2.9 on a (ranks 0, 1), 2.8 on b (ranks 2, 3); all ranks need the same"]),
        (changed(cards("a", "b"), {3}, versions={"minitron": "1.1", "minitron's own files": "bb", "torch": "2.9"}),
         ["minitron differs: 1.0 on a (ranks 0, 1), b (rank 2), 1.1 on b (rank 3); all ranks need the same"]),
        (changed(cards("a"), {1}, versions={**SAME, "minitron's own files": "bb"}),
         ["minitron's own files differs: aa on a (rank 0), bb on a (rank 1); all ranks need the same"]),
        (changed(cards("a"), {1}, versions={"minitron": "1.0", "minitron's own files": "aa"}),
         ["torch differs: 2.9 on a (rank 0), absent on a (rank 1); all ranks need the same"]),
        (changed(cards("a"), {1}, settings={"verb": "train", "seed": 7}),
         ["seed differs: 1234 on a (rank 0), 7 on a (rank 1); all ranks need the same settings"]),
        (changed(cards("a"), {0, 1}, faults=["data.train=/x: no such file or folder"]), ["data.train=/x: no such file or folder"]),
        (changed(cards("a", "b"), {2, 3}, faults=["data.train=/x: no such file or folder"]),
         ["data.train=/x: no such file or folder [on b (ranks 2, 3)]"]),
        (changed(gpus("a", "b"), {2, 3}, device="cpu"),
         ["device=auto differs: cuda on a (ranks 0, 1), cpu on b (ranks 2, 3); device=cpu takes CPUs everywhere"]),
        (changed(gpus("a", "b"), {2, 3}, gpus=1), ["b has 1 visible GPU for ranks 2, 3: one each is needed (see CUDA_VISIBLE_DEVICES)"]),
        (changed(cards("a", "b"), {2}, files={"model.path": {**FILES["model.path"], "model.safetensors": "98 bytes, hash 3"}}),
         ["model.path: model.safetensors differs between hosts: 99 bytes, hash 2 on a (rank 0), 98 bytes, hash 3 on b (rank 2)"]),
        (changed(cards("a", "b"), {2}, files={"model.path": {"config.json": "10 bytes, hash 1"}}),
         ["model.path: model.safetensors differs between hosts: 99 bytes, hash 2 on a (rank 0), not there on b (rank 2)"]),
        (changed(cards("a", "b", "c"), {2}, sees=False),
         ["run.dir=/shared/run: not one folder on all hosts: what a (rank 0) writes there is not seen, or not answered, on b (rank 2); a file system "
          "that all share is needed"]),
        (changed(cards("a", "b"), {0, 2}, not_writable="Read-only file system"),
         ["run.dir=/shared/run: can't be written: Read-only file system on a (rank 0), b (rank 2)"]),
    ],
)  # fmt: skip
def test_each_fault_is_a_line(its, said):
    assert found(its) == said


@pytest.mark.parametrize(
    ("its", "passes"),
    [
        ([*cards("a"), None], [True]),
        (changed(gpus("a", "b"), {2, 3}, device="cpu"), [True]),
        (changed(gpus("a", "b"), {2, 3}, gpus=1), [True]),
        (changed(cards("a", "b"), {2}, passing=["no GPU"]), [True]),
        (changed(cards("a"), {0, 1}, passing=["no GPU"]), [True]),
        (changed(cards("a"), {1}, faults=["train.lr=0"], passing=["no GPU"]), [False, True]),
        (changed(cards("a", "b"), {2}, sees=False), [False]),
        (changed(cards("a"), {1}, versions={**SAME, "torch": "2.8"}), [False]),
    ],
)  # fmt: skip
def test_what_a_node_may_be_at_fault_for_may_pass(its, passes):
    lines = found(its)
    assert [isinstance(line, Passing) for line in lines] == passes
    assert RequestError.of(*lines).passing == all(passes)


def test_ranks_that_said_nothing_are_named_and_their_hosts_where_the_scheduler_knows_them():
    its = [*cards("a"), None, None]
    line = "nothing was heard of ranks 2, 3{} within parallel.start_minutes=5: they did not start, hang or have ended; see what they said"
    assert found(its) == [line.format("")]
    assert found(its, nodes=["a", "b"]) == [line.format(" (b among the hosts of the job)")]


def test_all_faults_are_told_at_once():
    its = changed(cards("a", "b"), {3}, versions={**SAME, "torch": "2.8"}, settings={"verb": "train", "dtype": "fp32"})
    lines = found(changed(its, {2}, not_writable="No space left on device"), unanswered=[2])
    assert [line.split()[0] for line in lines] == ["torch", "dtype", "run.dir=/shared/run:"]
    assert "not one folder" in lines[2]


def test_machines_of_one_name_are_told_apart():
    its = [dataclasses.replace(card, host="node", machine=str(rank // 2)) for rank, card in enumerate(gpus("a", "b"))]
    assert found(its) == []  # two GPUs for two ranks, twice
    assert found(changed(its, {3}, gpu="A100", device="cpu"))[0].endswith("cpu on node no. 2 (rank 3); device=cpu takes CPUs everywhere")


def needs(*totals, host=0.0):
    """Of each pipeline stage, in GB."""
    return Needs([RankMemory(stage, {"student": 0.25e9 * total, "activations": 0.75e9 * total}, host * 1e9) for stage, total in enumerate(totals)])


@pytest.mark.parametrize(
    ("totals", "fault", "remark"),
    [
        ((40, 60), None, None),
        ((40, 75), None, "memory may not be enough: rank 2 takes about 75.0 GB (activations 56.2, student 18.8), and its GPU on b (rank 2) has 80.0"),
        ((40, 90), None, "memory may not be enough: rank 2 takes"),
        ((93, 40), "too little memory: rank 0 takes about 93.0 GB (activations 69.8, student 23.2), and its GPU on a (rank 0) has 80.0", None),
    ],
)
def test_a_training_that_does_not_fit_a_gpu(totals, fault, remark):
    heard = Heard(gpus("a", "b"), CFG, needs(*totals))
    lines, notes = faults(heard), list(remarks(heard))
    assert (lines == []) if fault is None else (lines == [fault])
    assert fault or ((notes == []) if remark is None else notes[0].startswith(remark))


def test_the_ranks_of_a_host_share_its_memory():
    roomy = [dataclasses.replace(card, host_bytes=100 * 10**9) for card in cards("a", "b")]
    assert faults(Heard(roomy, CFG, needs(40, 44))) == []
    assert faults(Heard(roomy, CFG, needs(40, 60))) == [
        "too little memory: the ranks of b take about 120.0 GB of host memory together (rank 2: activations 45.0, student 15.0), and there are 100.0"
    ]
    waiting = [dataclasses.replace(card, host_bytes=100 * 10**9) for card in gpus("a", "b")]
    assert faults(Heard(waiting, CFG, needs(40, 40, host=60))) == [
        "too little memory: the ranks of a take about 120.0 GB of host memory together, and there are 100.0"
    ]


def test_the_first_replica_alone_copies_checkpoints():
    """One host of 8 replicas: their weights are 10 GB each, and the copy that one of them makes is 30."""
    host = [dataclasses.replace(card, host_bytes=100 * 10**9) for card in cards("a") * 4]
    on_cpus = Needs([RankMemory(0, {"student": 10e9, "copies": 30e9})])
    assert faults(Heard(host, CFG, on_cpus)) == []  # 110
    assert [*remarks(Heard(host, CFG, on_cpus))] == [
        "memory may not be enough: the ranks of a take about 110.0 GB of host memory together (rank 0: copies 30.0, student 10.0), "
        "and there are 100.0"
    ]
    on_gpus = Needs([RankMemory(0, {"student": 10e9}, host=40e9, copied=30e9)])
    with_gpus = [dataclasses.replace(card, host_bytes=100 * 10**9) for card in gpus("a", gpus=8) * 4]
    assert faults(Heard(with_gpus, CFG, on_gpus)) == []
    tensor_ranks = dataclasses.replace(CFG, parallel=Parallel(tp=2))
    assert faults(Heard(with_gpus, tensor_ranks, on_gpus)) == [
        "too little memory: the ranks of a take about 140.0 GB of host memory together, and there are 100.0"
    ]


def test_memory_that_is_not_known_refuses_nothing():
    assert faults(Heard([dataclasses.replace(card, host_bytes=0) for card in cards("a")], CFG, needs(10**6))) == []


def test_checkpoints_that_find_no_room():
    its = changed(cards("a"), {0}, disk_free=50 * 10**9)
    assert found(its, Needs((), 60 * 10**9, 4)) == ["run.dir=/shared/run: 50.0 GB are free there, and a checkpoint takes about 60.0"]
    assert found(its, Needs((), 40 * 10**9, 4)) == []
    assert [*remarks(Heard(its, CFG, Needs((), 40 * 10**9, 4)))] == [
        "run.dir=/shared/run: 50.0 GB are free there, and 4 checkpoints, as many as may be there at a time, take about 160.0"
    ]
    assert [*remarks(Heard(its, CFG, Needs((), 10 * 10**9, 4)))] == []


def test_what_may_be_a_slip_is_remarked_on():
    mixed = changed(gpus("a", "b"), {2, 3}, gpu="A100")
    assert [*remarks(Heard(mixed, CFG, Needs()))] == [
        "GPUs of several kinds: H100 on a (ranks 0, 1), A100 on b (ranks 2, 3): the fastest wait for the slowest"
    ]
    shared = changed(gpus("a"), {1}, device_free=50 * 10**9)
    assert [*remarks(Heard(shared, CFG, Needs()))] == ["GPUs that other processes use too: on a (rank 1); rank 1's has 50.0 of 80.0 GB left"]


def test_many_hosts_are_cut_short():
    hosts = [f"n{rank}" for rank in range(20)]
    assert engine.located([1, 2], hosts) == "n1 (rank 1), n2 (rank 2)"
    assert engine.located(range(20), hosts).endswith("n7 (rank 7), and 12 more")
    assert engine.spans([0, 1, 2, 5, 7, 8]) == "ranks 0 to 2, 5, 7, 8"
    assert engine.spans([4]) == "rank 4"


def test_a_card_of_another_version_is_read():
    card = Card("a", versions=SAME)
    assert Card.load(card.dump()) == card
    assert Card.load('{"host": "b", "of_another_version": 1}') == Card("b")
