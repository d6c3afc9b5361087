"""Ranks that look at a run before it begins: real ones, each a process, that meet at a store. A `host` is a name that a rank gives itself."""

import contextlib
import io
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import minitron
from minitron import engine
from minitron.config.compose import compose
from minitron.errors import RequestError
from minitron.launching import site
from minitron.launching.preflight import preflight
from tests.multirank.ranks import each_rank
from tests.stages.commands import running, small_compression

pytestmark = pytest.mark.multirank


def told(settings, verb, check=lambda: None):
    """What a rank hears of the whole: a refusal's lines, or what rank 0 says of all being well; and what it said itself."""
    unread = () if verb == "compress" else ("target", "calibrate", "eval")
    settings = [value for value in settings if not value.startswith(unread)]
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        try:
            ready = preflight(compose(verb, settings), verb, check)
            end = re.sub(r"[\d.]+ s$", "T s", str(ready))
        except RequestError as error:
            assert error.said or "nothing was heard of rank 0" in str(error)
            end = str(error).splitlines()
    return end, err.getvalue().splitlines()


def as_hosts(*names):
    """This rank is the first of the host whose name is its own."""
    rank = int(os.environ["RANK"])
    os.environ["LOCAL_RANK"] = "0"
    socket.gethostname = lambda: names[rank]
    return rank


def several(settings, folder):
    """One after another, what can be wrong and what it comes to."""
    rank = as_hosts("a", "b")
    site.TO_APPEAR = 0.3
    os.chdir(folder / "shared")
    found = {"well": told(settings, "distill")}
    found["left"] = sorted(path.name for path in Path("run").iterdir())

    minitron.__version__, before = ("9.9" if rank else "0.1.0"), minitron.__version__
    found["version"] = told(settings, "distill")
    minitron.__version__ = before

    found["settings"] = told([*settings, f"train.lr={rank + 1}e-4"], "distill")

    def on_b():
        if rank:
            raise RequestError("eval.texts.x=/x: no such file")

    found["check"] = told(settings, "distill", on_b)

    (folder / f"own{rank}").mkdir()
    os.chdir(folder / f"own{rank}")
    found["apart"] = told(settings, "distill")
    found["nothing left"] = sorted(path.name for path in Path(".").rglob("*"))
    Path("run").mkdir(exist_ok=True)
    found["both there"] = told(settings, "distill")
    found["nothing left either"] = sorted(path.name for path in Path("run").iterdir())

    for name, text in (("same.txt", "a b c"), ("other.txt", f"a b {rank}"), ("long.txt", "x" * (2 << 20) + str(rank))):
        Path(name).write_text(text)
    os.symlink(folder / "shared" / "run", "shared_run")
    for name in ("same", "other", "long"):
        found[name] = told([*settings, f"data.valid={name}.txt", "run.dir=shared_run"], "distill")

    os.chdir(folder / "shared")
    found["memory"] = told([*settings, "train.micro_batch_size=1000000", "train.global_batch_size=2000000"], "compress")
    with locked_out(folder / "closed"):
        found["closed"] = told([*settings, f"run.dir={folder / 'closed'}"], "distill")
    return found


@contextlib.contextmanager
def locked_out(folder):
    """A folder that this process can't write into, be it root's."""
    if os.environ["RANK"] == "0":
        folder.mkdir(exist_ok=True)
        folder.chmod(0o555)
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.fixture
def open_folder():
    """A temporary folder that every user can enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def test_what_two_hosts_refuse_together(stories, tales, open_folder):
    (open_folder / "shared").mkdir()
    settings = [*small_compression(stories, tales), "device=cpu", "dtype=fp32", "run.dir=run", "parallel.start_minutes=3"]
    first, second = each_rank(several, 2, settings, open_folder)

    assert first.pop("well") == ("2 hosts, 2 ranks: looked at and in reach of one another after T s", [])
    assert second.pop("well")[1] == []
    del second["left"]  # rank 0 may still be about to clear away
    assert first.pop("left") == []
    for found in (first, second):
        assert [found.pop(name) for name in ("nothing left", "nothing left either")] == [[], []]
    shared = (
        "not one folder on all hosts: what a (rank 0) writes there is not seen, or not answered, on b (rank 1); "
        "a file system that all share is needed"
    )
    expected = {
        "version": "minitron differs: 0.1.0 on a (rank 0), 9.9 on b (rank 1); all ranks need the same",
        "settings": "train.lr differs: 0.0001 on a (rank 0), 0.0002 on b (rank 1); all ranks need the same settings",
        "check": "eval.texts.x=/x: no such file [on b (rank 1)]",
        "apart": f"run.dir=run: {shared}",
        "both there": f"run.dir=run: {shared}",
        "closed": f"run.dir={open_folder / 'closed'}: can't be written: Permission denied on a (rank 0), b (rank 1)",
    }
    for name, line in expected.items():
        assert first.pop(name) == ([line], [f"minitron: {line}"] if name != "both there" else []), name  # that was said before
        assert second.pop(name) == ([line], []), name
    for name in ("other", "long"):
        assert re.fullmatch(
            rf"data\.valid: {name}\.txt differs between hosts: \d+ bytes, hash \w+ on a \(rank 0\), .* on b \(rank 1\)", first.pop(name)[0][0]
        )
    assert first.pop("same")[1] == []
    assert re.match(
        r"too little memory: the ranks of a take about [\d.]+ GB of host memory together \(rank 0: activations ", first.pop("memory")[0][0]
    )
    assert first == {}


def late(settings, lost):
    """All but some ranks call."""
    from minitron.engine import meeting

    meeting.SLACK = 0.5
    rank = as_hosts("a", "b", "b")
    engine.Roll(3).call("together", "", lambda words: "")
    began = time.monotonic()
    found = told(settings, "distill") if rank != lost else None
    if rank == 0:
        time.sleep(1)
    return found, time.monotonic() - began < 20


@pytest.mark.parametrize("lost", [0, 2])
def test_ranks_that_do_not_come_are_named_in_time(stories, tales, tmp_path, lost):
    found = each_rank(late, 3, [*small_compression(stories, tales), "device=cpu", f"run.dir={tmp_path / 'run'}", "parallel.start_minutes=0.04"], lost)
    who = "rank 0 within parallel.start_minutes=0.04: it did not start, hangs or has ended; see what it said" if lost == 0 else (
        "rank 2 within parallel.start_minutes=0.04: they did not start, hang or have ended; see what they said"
    )  # fmt: skip
    for rank, (heard, soon) in enumerate(found):
        assert soon
        assert rank == lost or heard[0] == [f"nothing was heard of {who}"]
    assert not (tmp_path / "run").exists() or lost == 0


def of_another_version():
    if os.environ["RANK"] == "1":
        minitron.__version__ = "9.9"


def without_megatron():
    """As where it is not installed."""
    if os.environ["RANK"] == "1":
        for name in [name for name in sys.modules if name.startswith(("megatron", "minitron.engine"))]:
            del sys.modules[name]
        sys.modules["megatron"] = None


def fails():
    """A defect that only one rank has."""
    if os.environ["RANK"] == "1":
        minitron.session.check = lambda cfg, verb: {}["a defect"]


@pytest.mark.parametrize(
    ("prepare", "codes", "said"),
    [
        (of_another_version, [2, 2], r"minitron: minitron differs: 0\.1\.0 on \S+ \(rank 0\), 9\.9 on \S+ \(rank 1\); all ranks need the same\n"),
        (without_megatron, [2, 2],
         r"minitron: megatron-core differs: \S+ on \S+ \(rank 0\), absent on \S+ \(rank 1\); all ranks need the same\n"
         r"minitron: the installation is not usable: ModuleNotFoundError: .*megatron.* \[on \S+ \(rank 1\)\]\n"),
        (fails, [2, 1], r"minitron: KeyError: see what is said there \[on \S+ \(rank 1\)\]\n"),
    ],
)  # fmt: skip
def test_a_command_ends_on_all_ranks_with_what_rank_0_says(stories, tales, tmp_path, prepare, codes, said):
    usual = [value for value in small_compression(stories, tales) if value.startswith(("model", "data", "logging"))]
    with running(tmp_path / "log", "data", f"run.dir={tmp_path / 'run'}", *usual[:2], prepare=prepare, size=2) as ranks:
        assert ranks.results(60) == codes
    err = [(tmp_path / f"log{rank}.err").read_text() for rank in range(2)]
    assert re.fullmatch(said, err[0]), err[0]
    assert err[1] == "" if codes[1] == 2 else err[1].endswith("KeyError: 'a defect'\n")
    assert not (tmp_path / "run").exists()


SITECUSTOMIZE = """
import os
if os.environ.get("RANK") == "1":
    import minitron
    minitron.__version__ = "9.9"
"""


@pytest.mark.slow
def test_torchrun_ends_with_one_line(stories, tales, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    root = Path(minitron.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "minitron", "data", f"run.dir={tmp_path / 'run'}",
         f"model.path={stories}", f"data.train={tales}"],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("minitron:")]
    assert len(lines) == 1 and "minitron differs: 0.1.0 on" in lines[0] and "9.9 on" in lines[0], done.stderr
    assert done.returncode == 1
    assert done.stderr.count("Traceback") <= 1, done.stderr  # torchrun's own
    assert not (tmp_path / "run").exists()
