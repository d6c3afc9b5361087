"""A rank is killed, or fails: the others end soon and say so in one line, and the same command comes to the same end."""

import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
import re
import shutil
import signal
import socket
import time
import warnings

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load

from minitron.engine.peers import tells_of_loss, tells_of_silence
from minitron.errors import HungRank, LostRank, RequestError
from tests.oracles.metrics import without_costs
from tests.stages.commands import running, small_compression

pytestmark = pytest.mark.multirank

PROMISED = 60  # seconds until the others have ended
GROUPS = {
    "calibrate": ("model", "data", "calibrate", "logging", "device", "dtype", "parallel"),
    "prune": ("model", "target", "calibrate", "device", "dtype", "parallel"),
    "distill": ("model", "data", "train", "logging", "device", "dtype", "parallel"),
}
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:26537. This is typically caused by ..."
STORE = "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:2021, remote process exited or there was a network error, NCCL version 2.27.3\nncclRemoteError: ..."


def said_while(error, cause):
    try:
        raise error from cause
    except type(error) as raised:
        return raised


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError(GLOO), True),
        (RuntimeError("[pair.cc:589] Read error [127.0.0.1]:4242: Connection reset by peer"), True),
        (RuntimeError("[pair.cc:448] writev [127.0.0.1]:4242: Broken pipe"), True),
        (dist.DistNetworkError(STORE), True),
        (dist.DistBackendError(NCCL), True),
        (said_while(ValueError("no checkpoint"), RuntimeError(GLOO)), True),
        (RuntimeError("shape '[2, 3]' is invalid for input of size 5"), False),
        (RuntimeError("[unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete"), False),
        (dist.DistBackendError("NCCL error: unhandled cuda error"), False),
        (dist.DistNetworkError("The server socket has failed to listen on any local network address. port: 29500, EADDRINUSE"), False),
        (BrokenPipeError(32, "Broken pipe"), False),
        (RequestError("data.train=/x: Broken pipe"), False),
        (KeyError("rank"), False),
        (None, False),
    ],
)  # fmt: skip
def test_which_errors_tell_of_a_lost_rank(error, told):
    assert tells_of_loss(error) is told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("[unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"), True),
        (RuntimeError("[unbound_buffer.cc:129] Timed out waiting 3000ms for send operation to complete"), True),
        (dist.DistStoreError("wait timeout after 3000ms, keys: /default_pg/0//30//cpu//0/1"), True),
        (dist.DistNetworkError("The client socket has timed out after 300000ms while trying to connect to (127.0.0.1, 29500)."), True),
        (said_while(ValueError("no checkpoint"), RuntimeError("Timed out waiting 9ms for recv operation to complete")), True),
        (RuntimeError(GLOO), False),
        (TimeoutError("Timed out waiting for a hub"), False),
        (None, False),
    ],
)
def test_which_errors_tell_of_a_rank_that_hangs(error, told):
    assert tells_of_silence(error) is told


# What happens to a run: called in every rank before its command. The rank `victim` ends where MODULE:FUNCTION is called for the `times`-th time.


def ends(how, name, times, victim):
    """It does what `how` says, before anything of that call is done; a lost rank is waited for less long than usual."""
    from minitron.engine import peers

    peers.TO_NOTICE, peers.TO_STOP = 0.5, 1.0
    if os.environ["RANK"] == str(victim):
        _at(name, times, how)


def ends_while_others_compute(how, name, times, victim):
    """As `ends`; the other ranks have work to do by themselves, for long."""
    ends(how, name, times, victim)
    if os.environ["RANK"] != str(victim):
        _at(name, times, compute)


def ends_without_torchrun(port, how, name, times, victim):
    """As `ends`, the ranks started by hand: rank 0 keeps the store, and nobody keeps the ranks."""
    del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
    os.environ["MASTER_PORT"] = str(port)
    ends(how, name, times, victim)


def _at(name, times, do):
    module, function = name.split(":")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Megatron's, that apex is absent
        module = importlib.import_module(module)
    original, calls = getattr(module, function), []

    @functools.wraps(original)
    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == times:
            do()
        return original(*args, **kwargs)

    setattr(module, function, counted)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def killed_leaving_a_child():
    """The child has all its connections open."""
    if os.fork():
        killed()
    time.sleep(10)
    os._exit(0)


def asleep():
    time.sleep(1000)


def asleep_and_deaf():
    """As in a library that no signal reaches."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    time.sleep(1000)


def failed():
    raise KeyError("a defect")


def compute():
    while True:
        time.sleep(0.01)


COLLECTIVE = r"torch\.distributed\.distributed_c10d\.\w+, called from minitron\.[\w.]+"
FORWARD = "minitron.engine.schedule:forward_only"
STEP = "minitron.engine.trainer:forward_backward"
WRITTEN = "minitron.engine.sharded:fsync_path"  # the shards are there, the checkpoint is not
WRITING = "megatron.core.dist_checkpointing:save"
JOINING = "torch.distributed.distributed_c10d:_new_group_with_tag"


def executed(log, run, verb, usual, *layout, prepare=None, size=2):
    """The exit code of each rank, which must end in time, and what it said on stderr."""
    with running(
        log, verb, f"run.dir={run}", *[value for value in usual if value.startswith(GROUPS[verb])], *layout, prepare=prepare, size=size
    ) as ranks:
        codes = [exit_code(ranks, rank) for rank in range(size)]
    return codes, [log.with_name(f"{log.name}{rank}.err").read_text() for rank in range(size)]


def exit_code(ranks, rank):
    process = ranks.processes[rank]
    process.join(PROMISED)
    assert process.exitcode is not None, f"rank {rank} still runs"
    if process.exitcode:
        return process.exitcode
    succeeded, code, trace = pickle.loads(ranks.pipes[rank].recv_bytes())
    assert succeeded, trace
    return code


def line(rank):
    return f"minitron: {LostRank(rank)}\n"


@pytest.fixture(scope="module")
def usual(stories, tales):
    changed = ["train.steps=4", "train.save_interval=2", "train.eval_interval=100", "calibrate.samples=16", "device=cpu", "dtype=fp32"]
    names = {value.split("=")[0] for value in changed}
    return [value for value in small_compression(stories, tales) if value.split("=")[0] not in names] + changed


LAYOUTS = {"calibrate": ["parallel.tp=2"], "prune": ["parallel.pp=2"], "distill": []}  # two ranks
MAKES = {"calibrate": ["importance.safetensors"], "prune": ["keep.safetensors", "arch.json", "pruned"], "distill": ["checkpoints", "metrics.jsonl"]}


@pytest.fixture(scope="module")
def undisturbed(usual, tmp_path_factory):
    """The folder of a run whose stages went through, each at its layout of LAYOUTS."""
    root = tmp_path_factory.mktemp("undisturbed")
    for verb, layout in LAYOUTS.items():
        assert executed(root / "log", root / "run", verb, usual, *layout) == ([0, 0], ["", ""])
    return root / "run"


@pytest.fixture
def before(undisturbed, tmp_path):
    """`before(VERB)`: the folder of a run up to a stage."""

    def folder(verb):
        run = shutil.copytree(undisturbed, tmp_path / "run")
        for name in (name for later in [*MAKES][[*MAKES].index(verb) :] for name in MAKES[later]):
            shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
        return run

    return folder


def steps(text):
    """The lines of metrics without what tells time."""
    return without_costs(map(json.loads, text.splitlines()))


def plain(value):
    """A loaded state in types that compare by content."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    return [plain(one) for one in value] if isinstance(value, list | tuple) else value


def header(data):
    """That of a safetensors file, which has no order."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


READ = {  # files of equal content that are not the same bytes
    "metrics.jsonl": steps,
    "importance.safetensors": lambda data: (
        plain(load(data)),
        json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]),
    ),  # the header has no order
    ".metadata": lambda data: dataclasses.replace(pickle.loads(data), storage_meta=None),  # what lies where; the rest is a random name
    "common.pt": lambda data: plain(torch.load(io.BytesIO(data), weights_only=False)),
    "manifest.json": lambda data: sorted(json.loads(data)["files"]) if b'"files"' in data else data,  # of a checkpoint: with a checksum of .metadata
}


def made(run, verb):
    """What a stage left under final names: the content of each file."""
    files = [path for name in MAKES[verb] for path in (run / name, *(run / name).rglob("*")) if path.is_file() and ".partial" not in str(path)]
    return {str(path.relative_to(run)): READ.get(path.name, bytes)(path.read_bytes()) for path in files}


def differing(some, others):
    return sorted(name for name in some if some[name] != others.get(name))


@pytest.mark.parametrize(
    ("verb", "name", "times", "victim"),
    [("calibrate", FORWARD, 3, 1), ("prune", WRITTEN, 1, 0), ("prune", WRITING, 1, 1), ("distill", STEP, 4, 0), ("distill", WRITING, 2, 1)],
)
def test_the_same_command_comes_to_the_same_end(undisturbed, before, usual, tmp_path, verb, name, times, victim):
    run, whole = before(verb), made(undisturbed, verb)
    codes, said = executed(tmp_path / "log", run, verb, usual, *LAYOUTS[verb], prepare=functools.partial(ends, killed, name, times, victim))
    assert codes == ([75, -signal.SIGKILL] if victim else [-signal.SIGKILL, 75])
    assert said == ([line(1), ""] if victim else ["", line(0)])
    left = made(run, verb)
    assert left.keys() < whole.keys() or verb == "distill"
    assert {"metrics.jsonl", "checkpoints/latest"}.issuperset(differing(left, whole)), "half-written"

    assert executed(tmp_path / "log", run, verb, usual, *LAYOUTS[verb]) == ([0, 0], ["", ""])
    after = made(run, verb)
    assert (after.keys(), differing(after, whole)) == (whole.keys(), [])
    assert [path for path in run.rglob("*") if ".partial" in path.name] == []


@pytest.mark.parametrize(
    ("prepare", "layout"),
    [
        (functools.partial(ends_while_others_compute, killed, FORWARD, 3), []),  # data-parallel ranks meet at the end of a calibration only
        (functools.partial(ends, killed, JOINING, 3), []),  # the others wait in torch's store for a group to be complete
        (functools.partial(ends, killed_leaving_a_child, FORWARD, 3), ["parallel.tp=2"]),  # gloo's connections stay open
    ],
    ids=["others compute", "others join", "a child lives on"],
)
def test_a_rank_that_nobody_talks_to_is_missed_too(before, usual, tmp_path, prepare, layout):
    codes, said = executed(tmp_path / "log", before("calibrate"), "calibrate", usual, *layout, prepare=functools.partial(prepare, 1))
    assert (codes, said) == ([75, -signal.SIGKILL], [line(1), ""])


def test_without_torchrun_every_rank_says_who_was_lost(before, usual, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    prepare = functools.partial(ends_without_torchrun, port, killed, FORWARD, 2, 0)
    codes, said = executed(tmp_path / "log", before("calibrate"), "calibrate", usual, prepare=prepare, size=3)
    assert codes == [-signal.SIGKILL, 75, 75]
    assert said == ["", line(0), line(0)]


def test_a_rank_that_fails_tells_its_own_story_and_the_others_theirs(before, usual, tmp_path):
    prepare = functools.partial(ends, failed, FORWARD, 3, 1)
    codes, said = executed(tmp_path / "log", before("calibrate"), "calibrate", usual, "parallel.tp=2", prepare=prepare)
    assert codes == [75, 1]
    assert said[0] == line(1)
    assert said[1].startswith("Traceback")
    assert said[1].endswith("KeyError: 'a defect'\n")
    assert said[1].count("Traceback") == 1


@pytest.mark.parametrize(
    ("how", "layout", "size", "waits"),
    [
        (asleep, ["parallel.tp=2"], 2, COLLECTIVE),
        pytest.param(asleep_and_deaf, ["parallel.tp=2"], 2, COLLECTIVE, marks=pytest.mark.slow),
        pytest.param(asleep, [], 3, COLLECTIVE, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_hangs_ends_all_in_a_line_each(before, usual, tmp_path, how, layout, size, waits):
    """Of those that wait for it one speaks; the one that hangs says where."""
    prepare, short = functools.partial(ends, how, FORWARD, 3, size - 1), "parallel.timeout_minutes=0.15"
    codes, said = executed(tmp_path / "log", before("calibrate"), "calibrate", usual, *layout, short, prepare=prepare, size=size)
    assert codes == [75] * size
    first = re.escape(str(HungRank(0, 0.15))).replace("rank\\ 0", r"rank\ \d", 1).replace("another\\ rank", rf"another\ rank in {waits}", 1)
    assert re.fullmatch(f"minitron: {first}\n", "".join(said[:-1])), said
    name = f"tests.multirank.test_lost_ranks.{how.__name__}, called from minitron."
    assert said[-1].startswith(f"minitron: rank {size - 1}, while rank ") and f" waited for another, was in {name}" in said[-1], said
    assert said[-1].count("\n") == 1, said
