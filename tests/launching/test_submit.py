"""`minitron submit` from its words to what SLURM is told, with commands of SLURM's that only note what they are asked."""

import dataclasses
import json

import pytest

from minitron.cli import main
from minitron.config.build import build
from minitron.config.cluster import Slurm
from minitron.errors import Passing, RequestError
from minitron.launching.cluster import Cluster, Partition, check_cluster, gpus_of
from minitron.record import holds_others

FAKES = {
    "scontrol": """cat <<'X'
PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES MaxNodes=UNLIMITED MaxTime=UNLIMITED State=UP TotalNodes=2
PartitionName=short AllowGroups=ALL AllowAccounts=lab,guests AllowQos=ALL Default=NO MaxNodes=1 MaxTime=01:00:00 State=UP TotalNodes=2
X""",
    "sinfo": "printf 'main|gpu:2|4\\nmain|gpu:2(S:0-1)|4\\nshort|(null)|4+\\nshort|(null)|4\\n'",
    "sacctmgr": 'cat "$FAKES/associations" || exit 1',
    "sbatch": """echo "$@" >>"$FAKES/said"
[ "$(wc -l <"$FAKES/said")" != "$FAILS" ] || { echo "sbatch: error: Batch job submission failed: no" >&2; exit 1; }
echo "$((40 + $(wc -l <"$FAKES/said")));cluster" """,
    "scancel": 'echo "scancel $*" >>"$FAKES/said"',
}
CPU = ["slurm.gpus_per_node=0", "slurm.check=false"]
SMALL = ["model.path=/m", "data.train=/t.jsonl", "target.hidden_size=0.5"]
USUAL = ["compress", *SMALL, *CPU, "run.dir=r"]


@pytest.fixture
def submit(tmp_path, monkeypatch, capsys):
    """Runs `minitron submit` in a folder of its own: the exit code, what it printed, what sbatch and scancel were told."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, body in FAKES.items():
        (fakes / name).write_text(f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(fakes), prepend=":")
    monkeypatch.setenv("FAKES", str(fakes))
    monkeypatch.setenv("FAILS", "never")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        (fakes / "said").write_text("")
        code = main(["submit", *words])
        printed = capsys.readouterr()
        errors = [line for line in printed.err.splitlines() if "its file system is" not in line]
        return code, printed.out, errors, (fakes / "said").read_text().splitlines()

    return run


def test_a_job_is_queued_with_a_script_that_stays(submit, tmp_path):
    words = ["run.dir=runs/mine", "slurm.nodes=2", "slurm.ranks_per_node=2", "parallel.tp=4"]
    code, out, err, said = submit("compress", *SMALL, *CPU, *words)
    script = tmp_path / "runs" / "mine" / "slurm" / "compress.sbatch"
    assert (code, err, said) == (0, [], [f"--parsable {script}"])
    assert "job 41: compress, 2 x 2 ranks; its log: " in out
    text, settings = script.read_text(), [*SMALL, "parallel.tp=4", f"run.dir={script.parents[1]}"]
    assert " \\\n        ".join(["set -- compress", *settings]) + "\n" in text
    assert "slurm.nodes" not in text
    assert not holds_others(script.parents[1])  # the verb will take the folder for its own


def test_scripts_are_printed_and_nothing_else_done(submit, tmp_path):
    code, out, err, said = submit("compress", *SMALL, *CPU, "run.dir=mine", "--dry-run")
    assert (code, err, said, (tmp_path / "mine").exists()) == (0, [], [], False)
    assert out.startswith("#!/usr/bin/env bash\n")


def test_where_there_is_no_slurm_scripts_can_be_printed(submit, tmp_path, monkeypatch):
    (tmp_path / "fakes" / "scontrol").write_text("#!/bin/bash\necho 'slurm_load_partitions:\n no contact' >&2; exit 1\n")
    code, out, err, _ = submit("compress", *SMALL, *CPU, "run.dir=mine", "--dry-run")
    assert (code, err) == (0, ["minitron: the cluster was not looked at: scontrol: slurm_load_partitions: no contact"])
    assert "#SBATCH --nodes=1" in out
    assert submit("compress", *SMALL, *CPU, "run.dir=mine")[:3] == (2, "", ["minitron: scontrol: slurm_load_partitions: no contact"])


STAGES = "slurm.stages={calibrate: 'slurm.nodes=1 parallel.tp=2', distill: 'slurm.nodes=2'}"


def test_a_chain_waits_for_each_job_to_end_well(submit, tmp_path):
    words = [*SMALL, *CPU, "run.dir=mine", "slurm.ranks_per_node=2", STAGES, "slurm.after=7:8"]
    code, out, err, said = submit("compress", *words)
    folder = tmp_path / "mine" / "slurm"
    assert (code, err) == (0, [])
    assert said == [
        f"--parsable --dependency=afterok:7:8 --kill-on-invalid-dep=yes {folder}/calibrate.sbatch",
        f"--parsable --dependency=afterok:41,afterok:7:8 --kill-on-invalid-dep=yes {folder}/distill.sbatch",
    ]
    assert "job 42: distill, 2 x 2 ranks, after 41" in out
    first, last = ((folder / f"{name}.sbatch").read_text() for name in ("calibrate", "distill"))
    assert "--nodes=1\n" in first and "parallel.tp=2 \\\n        run.until=calibrate \\\n" in first
    assert "--nodes=2\n" in last and "run.until" not in last.split("# ---- end of settings")[0]


def test_a_chain_is_queued_whole_or_not_at_all(submit, monkeypatch):
    monkeypatch.setenv("FAILS", "2")
    code, _, err, said = submit("compress", *SMALL, *CPU, "run.dir=mine", "slurm.ranks_per_node=2", STAGES)
    assert (code, err) == (2, ["minitron: sbatch: sbatch: error: Batch job submission failed: no"])
    assert said[-1] == "scancel 41"


def test_a_sweep_is_an_array_of_runs(submit, tmp_path, capsys):
    code, out, err, said = submit("compress", *SMALL, *CPU, "run.dir=many", "train.lr=1e-3,1e-4", "slurm.ranks_per_node=2", STAGES, "--sweep")
    folder = tmp_path / "many"
    assert (code, err) == (0, [])
    assert "--dependency=aftercorr:41" in said[1]
    assert "job 41: calibrate for each of 2 runs" in out
    assert "#SBATCH --array=0-1\n" in (folder / "slurm" / "distill.sbatch").read_text()
    assert json.loads((folder / "sweep.json").read_text()) == {"runs": {"lr-0.001": {"train.lr": "0.001"}, "lr-0.0001": {"train.lr": "0.0001"}}}
    assert {path.name for path in folder.iterdir()} == {"slurm", "sweep.json", "lr-0.001", "lr-0.0001"}
    assert main(["summary", f"run.dir={folder}"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("not begun") == 2 and "train.lr" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*USUAL, "slurm.partition=fast"], "slurm.partition=fast: the cluster's partitions are main, short"),
        ([*USUAL, "slurm.nodes=3"], "slurm.nodes=3: partition main gives a job at most 2 nodes"),
        ([*USUAL, "slurm.nodes=2", "parallel.tp=4"], "parallel.tp=4: tp x pp x cp = 4 must divide the number of processes, 2"),
        (["compress", *SMALL, *CPU, "run.dir=fakes/said/r"], "run.dir="),
        (["compress", *SMALL, *CPU, "run.dir=fakes"], "run.dir="),
        (["compress", *SMALL, "run.dir=r", "slurm.gpus_per_node=1"], "model.path=/m: no such file or folder"),
        (["compress", *SMALL, "run.dir=r", "train.global_batch_size=9", "slurm.gpus_per_node=2"], "train.global_batch_size=9: must be divisible by"),
        (["compress", *SMALL[1:], *CPU, "run.dir=r"], "model.path=???: compress needs this setting"),
        ([*USUAL, "seed=1,2"], "seed=1,2: one value is needed"),
        ([*USUAL, "run.dir=a,b", "--sweep"], "run.dir=["),
        ([*USUAL, "slurm.nodes=1,2", "--sweep"], "slurm=...: the runs of a sweep are one array of jobs"),
        (["distill", *SMALL, *CPU, "run.dir=r", "slurm.stages.distill=a"], "slurm.stages={distill: a}: minitron compress alone has stages"),
        ([*USUAL, "slurm.stages={distill: '', calibrate: ''}"], "slurm.stages=[distill, calibrate]: stages of this run in"),
        ([*USUAL, "slurm.stages={search: ''}"], "slurm.stages=[search]: stages of this run in their order"),
        ([*USUAL, "slurm.stages.distill='train.lr=1'"], "slurm.stages.distill: train.lr=1.0: jobs of a chain have"),
        ([*USUAL, "slurm.stages.distill='run.dir=b'"], "slurm.stages.distill: run.dir=b: jobs of a chain have"),
        ([*USUAL, "slurm.stages={calibrate: ''}"], "slurm.stages={calibrate: }: two jobs at least are needed"),
        ([*USUAL, "slurm.env={B-C: 1}"], "slurm.env=B-C: a variable's name is needed"),
        ([*USUAL, "slurm.options=constraint"], "slurm.options=constraint: an option of sbatch is needed"),
        (["plan", "model.path=/m"], "minitron submit plan: minitron plan itself does it at once"),
        (["train", "--swep"], "--swep: no such option"),
        (["comprss"], "comprss: no such verb; did you mean compress?"),
        ([], "minitron submit: the verb to submit is needed"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_queued(submit, words, said):
    code, out, err, asked = submit(*words)
    assert (code, out, asked) == (2, "", [])
    assert len(err) == 1 and err[0].startswith(f"minitron: {said}")


def test_options_of_submit_are_its_own(capsys):
    assert main(["distill", "--dry-run"]) == 2
    assert capsys.readouterr().err == "minitron: --dry-run: minitron submit alone has this option\n"


def test_a_refusal_is_left_for_the_batch_script(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINITRON_REFUSAL", str(tmp_path / "refused"))
    assert main(["compress", "train.lr=0"]) == 2
    assert (tmp_path / "refused").read_text() == "train.lr=0.0: more than 0 is needed\n"


def test_what_may_pass_leaves_no_word(tmp_path, monkeypatch, capsys):
    def fails(words, flags):
        raise RequestError.of(Passing("a node is silent"))

    monkeypatch.setenv("MINITRON_REFUSAL", str(tmp_path / "refused"))
    monkeypatch.setattr("minitron.cli.run", fails)
    assert main(["compress"]) == 2
    assert capsys.readouterr().err == "minitron: a node is silent\n"
    assert not (tmp_path / "refused").exists()


def test_settings_can_be_looked_at(capsys):
    assert main(["submit", "compress", "slurm.nodes=3", "--cfg"]) == 0
    assert "\n  nodes: 3\n" in capsys.readouterr().out


# ---- what a cluster has

MAIN = Partition("main", True, True, None, None, None, None, gpus=(8, 8, 4), cpus=(64, 64, 32))
SHORT = dataclasses.replace(MAIN, name="short", default=False, max_nodes=2, max_time="1-00:00:00", accounts=("lab",), qos=("high",))
CLOSED = dataclasses.replace(MAIN, name="closed", default=False, up=False)
HERE = Cluster((MAIN, SHORT, CLOSED), accounts=("lab", "mine"), qos=("high", "low"))


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": 2},
        {"nodes": 3, "gpus_per_node": 4},
        {"account": "mine", "qos": "low", "time": "30-00"},
        {"partition": "short", "account": "lab", "qos": "high", "nodes": 2, "time": "24:00:00"},
        {"partition": "short,main", "nodes": 3, "gpus_per_node": 0},
        {"cpus_per_node": 64, "nodes": 2},
    ],
)
def test_what_there_is_a_place_for(changes):
    check_cluster(build(Slurm, changes, "slurm."), HERE)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nodes": 3}, "slurm.gpus_per_node=8: partition main has 2 nodes with as many GPUs (0: CPU ranks)"),
        ({"nodes": 4, "gpus_per_node": 0}, "slurm.nodes=4: partition main gives a job at most 3 nodes"),
        ({"nodes": 3, "gpus_per_node": 0, "cpus_per_node": 64}, "slurm.cpus_per_node=64: partition main has 2 nodes with as many cores"),
        ({"account": "theirs"}, "slurm.account=theirs: accounts of yours are lab, mine"),
        ({"qos": "top"}, "slurm.qos=top: qualities of service of yours are high, low"),
        ({"partition": "nope,main"}, "slurm.partition=nope,main: the cluster's partitions are main, short, closed"),
        ({"partition": "closed"}, "slurm.partition=closed: this partition is closed at the moment"),
        ({"partition": "short", "nodes": 3, "gpus_per_node": 0}, "slurm.nodes=3: partition short gives a job at most 2 nodes"),
        ({"partition": "short", "account": "mine"}, "slurm.account=mine: partition short is for accounts that are lab"),
        ({"partition": "short", "qos": "low"}, "slurm.qos=low: partition short is for qualities of service that are high"),
        ({"partition": "short", "time": "1-00:00:01"}, "slurm.time=1-00:00:01: partition short gives a job at most 1-00:00:00"),
    ],
)
def test_what_there_is_no_place_for(changes, said):
    with pytest.raises(RequestError) as refused:
        check_cluster(build(Slurm, changes, "slurm."), HERE)
    assert str(refused.value) == said


def test_a_cluster_without_a_default_partition_needs_one_named():
    with pytest.raises(RequestError, match=r"slurm.partition=null: the cluster has no default; its partitions are short$"):
        check_cluster(Slurm(), Cluster((SHORT,)))


def test_accounts_are_looked_at_where_slurm_keeps_them(submit, tmp_path):
    words = [*USUAL, "slurm.account=theirs"]
    assert submit(*words)[0] == 0
    (tmp_path / "fakes" / "associations").write_text("lab|normal,long\nmine|normal\n")
    assert submit(*words)[2] == ["minitron: slurm.account=theirs: accounts of yours are lab, mine"]
    assert submit(*words[:-1], "slurm.qos=top")[2] == ["minitron: slurm.qos=top: qualities of service of yours are normal, long"]


@pytest.mark.parametrize(
    ("resources", "count"), [("gpu:8", 8), ("gpu:a100:8(S:0-1)", 8), ("gpu:a100:4,gpu:h100:2", 6), ("(null)", 0), ("nvme:2,gpu:1", 1), ("mps:200", 0)]
)
def test_gpus_of_a_node(resources, count):
    assert gpus_of(resources) == count
