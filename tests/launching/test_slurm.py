"""The batch script: what it asks SLURM for, what it hands to the verb, and what it makes of each way in which an attempt may end.

Its body runs here for real, in bash, with SLURM's commands replaced by a few lines each.
"""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from minitron.config.build import build
from minitron.config.cluster import Slurm
from minitron.config.compose import compose
from minitron.config.overrides import written
from minitron.errors import RequestError
from minitron.launching.preflight import judge_alone
from minitron.launching.site import Card, answer_in, left_in
from minitron.launching.slurm import Job, Task, options, quoted, script, template
from minitron.launching.storage import own_disk, refuse_unwritable

TEXT = template().read_text(encoding="utf-8")
WORDS = ("data.train='0.7 a.jsonl 0.3 b c.jsonl#body'", 'eval.texts.x="it\'s; $HOME `date`"', "train.lr=1e-4")
SLURMS = {
    "usual": {},
    "of CPU ranks": {"nodes": 3, "gpus_per_node": 0, "ranks_per_node": 4, "exclusive": False, "requeue": False},
    "with pyxis": {"container": "/images/my image.sqsh", "mounts": ["/data", "/scratch:/tmp"], "env": {"NCCL_DEBUG": "INFO", "A": 1}},
    "with apptainer": {"container": "m.sif", "runtime": "apptainer", "mounts": "/data", "modules": ["cuda/12", "nccl"], "setup": "ulimit -c 0"},
    "with options": {"partition": "gpu", "account": "me", "qos": "long", "options": ["--constraint=h100", "--exclude=n[1-3]"], "memory": "10G"},
}  # fmt: skip


def slurm(**changes):
    return build(Slurm, changes, "slurm.")


def job(folder, changes=None, tasks=1, words=WORDS):
    runs = [Task(folder / f"run{number}" if tasks > 1 else folder, words) for number in range(tasks)]
    return Job("distill", "compress", folder, runs, slurm(**(changes or {})), Path("/here"), "/venv/bin/python")


@pytest.mark.parametrize("kind", [*SLURMS, "as it is"])
def test_bash_and_shellcheck_find_nothing_wrong(tmp_path, kind):
    for number, tasks in enumerate((1, 3)):
        text = TEXT if kind == "as it is" else script(job(tmp_path, SLURMS[kind], tasks), TEXT)
        file = tmp_path / f"{number}.sbatch"
        file.write_text(text)
        subprocess.run(["bash", "-n", file], check=True)
        if shutil.which("shellcheck"):
            done = subprocess.run(["shellcheck", "--severity=warning", file], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("changes", "tasks", "there", "absent"),
    [
        ({}, 1, {"--nodes=1", "--gpus-per-node=8", "--exclusive", "--mem=0", "--requeue", "--time=04:00:00", "--signal=B:USR1@300"}, {"--partition"}),
        (SLURMS["of CPU ranks"], 1, {"--nodes=3", "--no-requeue"}, {"--gpus-per-node", "--exclusive", "--mem", "--requeue"}),
        (SLURMS["with options"], 1, {"--partition=gpu", "--account=me", "--qos=long", "--constraint=h100", "--exclude=n[1-3]"}, {"--array"}),
        ({"options": ["--comment=two words", "--hold"]}, 1, {'--comment="two words"', "--hold"}, set()),
        ({"array_limit": 2, "job_name": "mine"}, 3, {"--array=0-2%2", "--job-name=mine"}, set()),
        ({"time": "1-12", "signal": 900, "cpus_per_node": 6}, 1, {"--time=1-12", "--signal=B:USR1@900", "--cpus-per-task=6"}, {"--array"}),
    ],
)  # fmt: skip
def test_what_slurm_is_asked_for(tmp_path, changes, tasks, there, absent):
    asked = options(job(tmp_path, changes, tasks))
    assert there <= {*asked}
    assert not absent & {option.split("=")[0] for option in asked}
    lines = [line for line in script(job(tmp_path, changes, tasks), TEXT).splitlines() if line.startswith("#SBATCH")]
    assert lines == [f"#SBATCH {option}" for option in asked]
    assert {"--ntasks-per-node=1", "--open-mode=append", "--job-name=mine" if "job_name" in changes else "--job-name=minitron-distill"} <= {*asked}


def test_logs_lie_in_the_runs_folder(tmp_path):
    folder = tmp_path / 'a "b" 7%'
    assert f'--output="{tmp_path}/a \\"b\\" 7%%/slurm/distill-%j.log"' in options(job(folder))
    assert f"--output={tmp_path}/slurm/distill-%A_%a.log" in options(job(tmp_path, tasks=2))
    assert quoted("/a-b_c.log") == "/a-b_c.log"


@pytest.mark.parametrize("value", ["/plain/a.b", "a b", "it's", 'a "b"', "a\\'b", "end\\", "7", "null", "a,b", "{x: 1}", "a#b=c"])
def test_any_text_survives_hydra(value):
    assert compose("report", [f"run.dir={written(value)}"]).run.dir == value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("100:00:01", 360001), ("2-12", 216000), ("2-12:30", 217800), ("1-00:00:01", 86401)],
)
def test_time_limits_are_read_as_slurm_does(text, seconds):
    assert slurm(time=text, signal=10).seconds == seconds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"time": "4h"}, "slurm.time=4h: hours:minutes:seconds"),
        ({"time": "5"}, "slurm.signal=300: fewer seconds than slurm.time=5 are needed"),
        ({"mounts": "/data"}, "slurm.mounts=/data: slurm.container is needed with it"),
        ({"modules": []}, "slurm.modules=[]: text or a list with at least one name or null is needed"),
        ({"nodes": 0}, "slurm.nodes=0: at least 1 is needed"),
        ({"runtime": "docker"}, "slurm.runtime=docker: one of pyxis, apptainer is needed"),
    ],
)
def test_settings_that_contradict_each_other(changes, said):
    with pytest.raises(RequestError) as refused:
        slurm(**changes)
    assert str(refused.value).startswith(said)


# ---- the script at work

FAKES = {
    "scontrol": 'if [ "$1" = show ]; then echo n1; else echo "$@" >>"$FAKES/said"; fi',
    "squeue": """echo "$*" >>"$FAKES/asked"
case "$*" in *%T) cat "$FAKES/state";; *) date +%Y-%m-%dT%H:%M:%S -d "+$(cat "$FAKES/left") seconds";; esac""",
    # to the tasks, as SLURM would: those of this test
    "scancel": 'echo "scancel $*" >>"$FAKES/said"; for pid in $(cat "$FAKES/tasks"); do kill -USR1 "$pid"; done',
    "srun": 'while [ "$1" != bash ]; do echo "srun $1" >>"$FAKES/said"; shift; done; exec "$@"',
}
PYTHON = """#!/bin/bash
# in the place of torchrun: does what the test says, and tells what it was called with
printf '%s\\n' "$@" >"$FAKES/called"
printf '%s\\n' "$OMP_NUM_THREADS $NCCL_DEBUG $SLURM_JOB_NUM_NODES" >"$FAKES/environment"
. "$FAKES/deed"
"""


@pytest.fixture
def attempt(tmp_path, monkeypatch):
    """Runs a script with `deed` (bash) in the place of the ranks: its exit code, its log, what it told SLURM."""
    fakes = tmp_path / "fakes"
    fakes.mkdir()
    for name, body in {**FAKES, "python": None}.items():
        (fakes / name).write_text(PYTHON if body is None else f"#!/bin/bash\n{body}\n")
        (fakes / name).chmod(0o755)
    (fakes / "state").write_text("RUNNING\n")
    (fakes / "left").write_text("10000")
    monkeypatch.setenv("PATH", str(fakes), prepend=":")
    for name, value in {"FAKES": fakes, "SLURM_JOB_ID": 7, "SLURM_JOB_NODELIST": "n1", "SLURM_JOB_NUM_NODES": 1}.items():
        monkeypatch.setenv(name, str(value))
    for name in ("OMP_NUM_THREADS", "NCCL_DEBUG", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)

    def run(deed, changes=None, tasks=1, made=None):
        one = made or job(tmp_path / "run", changes, tasks)
        one.folder.mkdir(exist_ok=True)
        (fakes / "deed").write_text(deed)
        (fakes / "said").write_text("")
        file = tmp_path / "job.sbatch"
        file.write_text(script(one, TEXT).replace("python=/venv/bin/python", f"python={fakes}/python"))
        done = subprocess.run(["bash", file], capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr, (fakes / "said").read_text().splitlines()

    run.fakes, run.run_dir = fakes, tmp_path / "run"
    return run


def requeued(said):
    return "requeue 7" in said


def test_the_ranks_get_every_setting_as_it_is(attempt):
    code, log, said = attempt("exit 0", {"ranks_per_node": 3, "env": {"NCCL_DEBUG": "INFO"}})
    called = (attempt.fakes / "called").read_text().splitlines()
    assert code == 0, log
    assert called[:2] == ["-m", "torch.distributed.run"]
    assert {"--nnodes=1", "--nproc-per-node=3", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:20007", "--rdzv-id=7-0"} <= {*called}
    assert called[called.index("minitron") + 1 :] == ["compress", *WORDS, f"run.dir={attempt.run_dir}"]
    assert (attempt.fakes / "environment").read_text() == "1 INFO 1\n"
    assert not requeued(said)
    assert [*(attempt.run_dir / "slurm").iterdir()] == []


def test_an_array_gives_each_of_its_tasks_a_run(attempt, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    for number in range(3):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(number))
        code, log, _ = attempt("exit 0", tasks=3)
        assert (code, (attempt.fakes / "called").read_text().splitlines()[-1]) == (0, f"run.dir={attempt.run_dir}/run{number}"), log


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("with pyxis", ["srun --container-image=/images/my image.sqsh", "srun --container-workdir=/here"]),
        ("with apptainer", ["srun apptainer", "srun --nv", "srun /data:/data", "srun m.sif"]),
    ],
)
def test_containers_are_entered_with_the_folders_that_ranks_need(attempt, kind, expected):
    changes = {name: value for name, value in SLURMS[kind].items() if name != "modules"}
    code, log, said = attempt("exit 0", changes)
    assert code == 0, log
    assert {*expected} <= {*said}
    mounts = next((line for line in said if "--container-mounts" in line), " ".join(said))
    assert f"{attempt.run_dir}:{attempt.run_dir}" in mounts
    assert "/data:/data" in mounts


def test_a_refused_request_is_not_tried_again(attempt):
    code, log, said = attempt('echo "train.lr=0: more than 0 is needed" >"$MINITRON_REFUSAL"; exit 1')
    assert code == 2
    assert log.splitlines()[-1] == "minitron: not tried again, as this was refused: train.lr=0: more than 0 is needed"
    assert not requeued(said)


def test_failures_without_anything_made_are_tried_so_many_times(attempt):
    seen = [attempt("exit 1", {"retries": 2}) for _ in range(3)]
    assert [(code, requeued(said)) for code, _, said in seen] == [(1, True), (1, True), (1, False)]
    assert "3 in a row finished and saved nothing: not queued again (slurm.retries=2)" in seen[-1][1]
    assert not requeued(attempt("exit 1", {"retries": 0})[2])


def test_what_makes_progress_is_tried_again_for_as_long_as_it_does(attempt):
    step = 'd=$(printf "%s/checkpoints/step_$RANDOM$RANDOM" "$(dirname "$FAKES")/run"); mkdir -p "$d"; echo >"$d/manifest.json"; exit 1'
    assert all(requeued(attempt(step, {"retries": 0})[2]) for _ in range(3))
    code, log, said = attempt("exit 1", {"retries": 0})
    assert (code, requeued(said)) == (1, False), log


@pytest.mark.parametrize(("state", "why"), [("COMPLETING", "SLURM itself ends it"), ("RUNNING", "queued again")])
def test_a_cancelled_job_does_not_come_back(attempt, state, why):
    (attempt.fakes / "state").write_text(f"{state}\n")
    code, log, said = attempt("exit 75")
    assert (code, requeued(said)) == (75, state == "RUNNING")
    assert why in log


def test_without_requeue_it_says_how_to_go_on(attempt):
    code, log, said = attempt("exit 1", {"requeue": False})
    assert (code, requeued(said)) == (1, False)
    assert "the same submission continues" in log


# USR1 is ignored where ranks begin, which bash itself could not change
STOPPED = f"""
echo $$ >"$FAKES/tasks"
exec {sys.executable} -S -c '
import os, signal, sys, time
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
os.kill(os.getppid(), signal.SIGUSR1)  # the script
time.sleep(30)'
"""


@pytest.mark.parametrize(("left", "again"), [(10000, [True, True]), (60, [True, False])])
def test_a_stop_reaches_the_ranks_and_only_the_time_limit_counts_as_an_attempt(attempt, left, again):
    (attempt.fakes / "left").write_text(str(left))
    for expected in again:
        code, log, said = attempt(STOPPED, {"retries": 1})
        assert "scancel --signal=USR1 7" in said
        assert (code, requeued(said)) == (75, expected), log
        assert "was told to stop" in log


def test_a_task_of_an_array_stops_and_queues_itself_alone(attempt, monkeypatch):
    """The number of its last task is that of the whole array."""
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    code, log, said = attempt(STOPPED, tasks=3)
    assert code == 75, log
    assert [line for line in said if "srun" not in line] == ["scancel --signal=USR1 7_2", "requeue 7_2"]
    asked = (attempt.fakes / "asked").read_text().splitlines()
    assert asked == ["-h -j 7_2 -o %e", "-h -j 7_2 -o %T"]


def test_a_node_that_does_not_share_the_folder_is_named(attempt):
    (attempt.fakes / "srun").write_text('#!/bin/bash\nwhile [ "$1" != bash ]; do shift; done; exec "${@:1:4}" /elsewhere "$6"\n')
    code, log, said = attempt("exit 0")
    assert (code, requeued(said)) == (2, False)
    assert log.splitlines()[-1].startswith("minitron: run.dir=/elsewhere: ")
    assert "cannot write there" in log


def test_a_node_that_fails_before_the_ranks_start_costs_an_attempt(attempt):
    (attempt.fakes / "srun").write_text("#!/bin/bash\nexit 143\n")
    seen = [attempt("exit 0", {"retries": 1}) for _ in range(2)]
    assert [(code, requeued(said)) for code, _, said in seen] == [(143, True), (143, False)]
    assert "failed with 143" in seen[0][1]
    assert not [*(attempt.run_dir / "slurm").glob("seen-*")]


@pytest.mark.parametrize(("silent", "again"), [(3, True), (10**6, False)])
def test_a_controller_that_does_not_answer_is_asked_again(attempt, silent, again):
    """What squeue and scontrol are asked at the end is answered from some time on only."""
    answered = f'[ "$(echo >>"$FAKES/turns"; wc -l <"$FAKES/turns")" -gt {silent} ] || exit 1\n'
    for name in ("squeue", "scontrol"):
        usual = FAKES[name]
        (attempt.fakes / name).write_text(f'#!/bin/bash\ncase "$*" in *%T|*requeue*) {answered};; esac\n{usual}\n')
    (attempt.fakes / "sleep").write_text("#!/bin/bash\n")
    (attempt.fakes / "sleep").chmod(0o755)
    code, log, said = attempt("exit 1")
    assert (code, requeued(said)) == (1, again), log
    assert ("SLURM does not answer: not queued again" in log) != again
    assert "SLURM itself ends it" not in log
    assert int((attempt.fakes / "turns").read_text().count("\n")) == (5 if again else 30)


def test_the_script_by_hand_asks_for_a_verb_and_is_told_where_settings_are_wrong(attempt, tmp_path):
    usual = {**os.environ}
    assert "usage: sbatch" in subprocess.run(["bash", template()], capture_output=True, text=True, env=usual).stderr
    (attempt.fakes / "deed").write_text('case "$*" in *--cfg) echo "minitron: a=b: no" >&2; exit 2;; esac')
    done = subprocess.run(["bash", template(), "compress", "a=b"], capture_output=True, text=True, env=usual)
    assert (done.returncode, done.stderr) == (2, "minitron: a=b: no\n")
    (attempt.fakes / "deed").write_text("case $* in *--cfg) printf \"run:\\n  dir: '???'\";; esac")
    assert (
        subprocess.run(["bash", template(), "compress"], capture_output=True, text=True, env=usual).stderr == "minitron: run.dir=FOLDER is needed\n"
    )
    (attempt.fakes / "deed").write_text(f'case "$*" in *--cfg) printf "run:\\n  dir: {tmp_path}/mine\\n";; esac')
    done = subprocess.run(["bash", template(), "compress", "a=b"], capture_output=True, text=True, env=usual)
    assert (done.returncode, (tmp_path / "mine" / "slurm").is_dir()) == (0, True), done.stderr
    assert (attempt.fakes / "called").read_text().splitlines()[-2:] == ["compress", "a=b"]


# ---- where folders lie


def test_kinds_of_file_systems():
    mounts = "overlay / overlay rw 0 0\nserver:/x /tmp nfs4 rw 0 0\ntmpfs /tmp/my\\040ram tmpfs rw 0 0\n"
    assert own_disk(Path("/"), mounts) == "overlay"
    assert own_disk(Path("/tmp/nobody/made/this"), mounts) is None
    assert own_disk(Path("/tmporary"), mounts) == "overlay"


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=r"run.dir=.*/file/run: .*/file is a file; a folder is needed"):
        refuse_unwritable(tmp_path / "file" / "run")
    refuse_unwritable(tmp_path / "not" / "yet")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder below one that may not be searched, as the system says it even to root."""
    folder = tmp_path / "closed" / "run"
    for name in ("exists", "is_dir", "stat"):
        usual = getattr(Path, name)

        def look(path, *given, usual=usual, **more):
            if path == folder:
                raise PermissionError(errno.EACCES, "Permission denied")
            return usual(path, *given, **more)

        monkeypatch.setattr(Path, name, look)
    return folder


def test_folders_that_may_not_be_looked_for(closed, monkeypatch):
    cfg = compose("train", [f"run.dir={closed}", "model.path=/m", "data.train=/t", "device=cpu"])
    for look in (lambda: refuse_unwritable(closed), lambda: own_disk(closed, ""), lambda: judge_alone(cfg, "train")):
        with pytest.raises(RequestError, match=rf"^cannot look for {closed}: Permission denied$"):
            look()


def test_ranks_note_a_folder_that_may_not_be_searched(closed):
    first, other = Card("a"), Card("b")
    with left_in(closed, ".start", first):
        answer_in(closed, "", 1, other)
    assert (first.not_writable, other.not_writable) == ("Permission denied", "Permission denied")
