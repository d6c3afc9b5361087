"""The batch script of a job: launch/slurm.sbatch with the options and settings of `minitron submit` in place of its own. Pure text."""

import dataclasses
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import minitron
from minitron.config.cluster import Slurm, texts
from minitron.config.overrides import written
from minitron.errors import shown

FOLDER = "slurm"  # below run.dir: scripts, logs, and what attempts tell each other
SETTINGS = re.compile(r"(?<=\n)# ---- settings\n.*?# ---- end of settings\n", re.DOTALL)
HEAD = re.compile(r"(?<=\n)(?:#.*\n)+")  # below the first line: what the file is, and options of sbatch


@dataclasses.dataclass(frozen=True)
class Task:
    """One verb in a folder of its own: `words` are its settings as on the command line, without run.dir."""

    run_dir: Path
    words: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """What one batch script does: `verb` for the only one of `tasks`, or for each in an array. `folder` is that of the submission, absolute;
    `here` where it is submitted; `python` the interpreter that has minitron on the nodes."""

    name: str
    verb: str
    folder: Path
    tasks: Sequence[Task]
    slurm: Slurm
    here: Path
    python: str

    @property
    def file(self) -> Path:
        """Where its script is kept."""
        return self.folder / FOLDER / f"{self.name}.sbatch"

    @property
    def log(self) -> Path:
        """Its log, with sbatch's marks for the number of the job."""
        return self.folder / FOLDER / (f"{self.name}-%A_%a.log" if self.is_array else f"{self.name}-%j.log")

    @property
    def is_array(self) -> bool:
        """Whether its tasks are those of an array."""
        return len(self.tasks) > 1


def template() -> Path:
    """launch/slurm.sbatch: inside an installed package, beside the package in a checkout."""
    package = Path(minitron.__file__).resolve().parent
    inside = package / "launch"
    return (inside if inside.is_dir() else package.parent / "launch") / "slurm.sbatch"


def script(job: Job, text: str) -> str:
    """The batch script, from the text of the template."""
    head = [f"# Made by `minitron submit` {minitron.__version__}; the same command makes it anew.", *map(directive, options(job))]
    settings = ["# ---- settings", *settings_of(job), "# ---- end of settings"]
    text = HEAD.sub(lambda _: "\n".join(head) + "\n", text, count=1)
    return SETTINGS.sub(lambda _: "\n".join(settings) + "\n", text, count=1)


def directive(option: str) -> str:
    """An option of sbatch as a line of the script."""
    return f"#SBATCH {option}"


def options(job: Job) -> list[str]:
    """The options of sbatch, one each."""
    slurm = job.slurm
    named: Mapping[str, object] = {
        "job-name": slurm.job_name or f"minitron-{job.name}",
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "nodes": slurm.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": slurm.gpus_per_node or None,
        "cpus-per-task": slurm.cpus_per_node,
        "mem": slurm.memory or ("0" if slurm.exclusive else None),
        "time": slurm.time,
        "signal": f"B:USR1@{slurm.signal}",
        "array": job.is_array and f"0-{len(job.tasks) - 1}" + (f"%{slurm.array_limit}" if slurm.array_limit else ""),
        "chdir": job.here,
        "output": str(job.log.parent).replace("%", "%%") + f"/{job.log.name}",
    }
    return [
        *(f"--{name}={quoted(str(value))}" for name, value in named.items() if value),
        *(["--exclusive"] if slurm.exclusive else []),
        "--requeue" if slurm.requeue else "--no-requeue",
        "--open-mode=append",
        *map(option, texts(slurm.options)),
    ]


def option(text: str) -> str:
    """A further option as it was given, its value quoted where that is needed."""
    name, sign, value = text.partition("=")
    return name + sign + (quoted(value) if value else "")


def quoted(text: str) -> str:
    """A value in a line of sbatch options, which takes double quotes alone."""
    return text if re.fullmatch(r"[\w@%+=:,./\[\]-]+", text) else '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'


def settings_of(job: Job) -> list[str]:
    """The part of the script that sets what the rest of it reads."""
    slurm = job.slurm
    lines = [
        assigned("python", job.python, "the interpreter that has minitron, on every node"),
        assigned("ranks", slurm.ranks, "processes on each node"),
        assigned("seconds", slurm.signal, "from USR1 to the time limit, as --signal says"),
        assigned("requeue", "yes" if slurm.requeue else "", "queue the job again where it was stopped or failed,"),
        assigned("retries", slurm.retries, "but not after more attempts in a row that made nothing"),
        assigned("notes", job.folder / FOLDER, "what attempts tell each other"),
        *container(job),
    ]
    if modules := texts(slurm.modules):
        lines += ["set +u # their scripts read what nobody set", "type module >/dev/null 2>&1 || . /etc/profile"]
        lines += [*(f"module load {shlex.quote(module)}" for module in modules), "set -u"]
    lines += [f"export {name}={shlex.quote('' if value is None else shown(value))}" for name, value in slurm.env.items()]
    lines += texts(slurm.setup)
    if not job.is_array:
        return [*lines, *command(job.verb, job.tasks[0])]
    lines.append('case "$SLURM_ARRAY_TASK_ID" in')
    for number, task in enumerate(job.tasks):
        lines += [f"{number})", *(f"    {line}" for line in command(job.verb, task)), "    ;;"]
    return [*lines, "esac"]


def assigned(name: str, value: object, meaning: str) -> str:
    """A variable of the script and what it is for."""
    text = shlex.quote(str(value)) if value != "" else ""
    return f"{f'{name}={text}':<40} # {meaning}"


def command(verb: str, task: Task) -> list[str]:
    """Lines that set the script's arguments to the verb and its settings, one a line, and `run_dir`."""
    words = [verb, *map(shlex.quote, (*task.words, f"run.dir={written(str(task.run_dir))}"))]
    return [f"run_dir={shlex.quote(str(task.run_dir))}", "set -- " + " \\\n        ".join(words)]


def container(job: Job) -> list[str]:
    """What enters the container, if there is one. Its folders have the same names as outside: that of the submission, and the current one."""
    slurm = job.slurm
    if slurm.container is None:
        return ["container=() # what enters a container: options of srun,", "inside=()    # or a command"]
    mounts = [str(job.folder), str(job.here), *texts(slurm.mounts)]
    pairs = [mount if ":" in mount else f"{mount}:{mount}" for mount in dict.fromkeys(mounts)]
    if slurm.runtime == "pyxis":
        words = [f"--container-image={slurm.container}", f"--container-mounts={','.join(pairs)}", f"--container-workdir={job.here}"]
        return [f"container=({joined(words)})", "inside=()"]
    gpus = ["--nv"] if slurm.gpus_per_node else []
    binds = [word for pair in pairs for word in ("--bind", pair)]
    return ["container=()", f"inside=({joined(['apptainer', 'exec', *gpus, *binds, '--pwd', str(job.here), slurm.container])})"]


def joined(words: Sequence[str]) -> str:
    """Words of a shell array; those with a comma are quoted too, which some take for a mistake otherwise."""
    return " ".join(f"'{word}'" if "," in word and shlex.quote(word) == word else shlex.quote(word) for word in words)
