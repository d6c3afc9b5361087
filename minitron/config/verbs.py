"""What each verb is for, the groups of settings it reads and those it cannot do without."""

import dataclasses
from typing import NamedTuple

from minitron.config import schema
from minitron.config.schema import Target

BUDGETS = " | ".join(f"search.{name}" for name in schema.BUDGETS)
AXES = " | ".join(f"target.{field.name}" for field in dataclasses.fields(Target) if field.default is None)
COMMON = ("device", "spec", "dtype", "seed")
PIPELINE = ("target", "search", "data", "calibrate", "teacher", "distill", "train", "eval", "speed", "parallel", "logging", *COMMON)


class Verb(NamedTuple):
    """`needs` names settings without which the verb is refused; `a | b` means at least one of them. `trains`: takes optimizer steps.

    `flags`: options that it alone has, with their meaning. `carries`: its name is followed by another verb's, whose settings it passes on.
    """

    summary: str
    groups: tuple[str, ...]
    needs: tuple[str, ...]
    trains: bool = False
    flags: tuple[tuple[str, str], ...] = ()
    carries: bool = False


VERBS: dict[str, Verb] = {
    "compress": Verb(
        "the whole pipeline: data, calibrate, search where a budget is set, prune, distill, evaluate, export, speed with speed.enabled, and report; "
        "continues where it stopped",
        ("run", "model", *PIPELINE),
        ("run.dir", "model.path", "data.train", f"{AXES} | {BUDGETS}"),
        trains=True,
    ),
    "family": Verb(
        "several models in a chain, each compressed from the one before, every one in a folder of its own below run.dir",
        ("run", "model", "family", *PIPELINE),
        ("run.dir", "model.path", "data.train", "family.steps"),
        trains=True,
    ),
    "plan": Verb(
        "what the settings come to, before anything is computed: sizes, parameters; a training's memory, traffic, time, cost and fitting layouts; a "
        "search's candidates",
        ("run", "model", "family", "target", "search", "plan", "data", "teacher", "distill", "train", "parallel", *COMMON),
        ("model.path | model.shape",),
    ),
    "data": Verb(
        "tokenise text into Megatron's indexed files",
        ("run", "model", "data", "seed"),
        ("run.dir", "model.path", "data.train"),
    ),
    "calibrate": Verb(
        "measure how much every unit of every axis matters, with forward passes alone",
        ("run", "model", "data", "calibrate", "parallel", "logging", *COMMON),
        ("run.dir", "model.path", "data.train | data.calibration"),
    ),
    "search": Verb(
        "find the best sizes within a budget: enumerate, compare by loss as pruned, then by short distillations of those that are left",
        ("run", "model", "target", "search", "data", "calibrate", "teacher", "distill", "train", "parallel", "logging", *COMMON),
        ("run.dir", "model.path", "data.train", BUDGETS),
        trains=True,
    ),
    "prune": Verb(
        "cut the model down to the target's sizes, or those that search chose, keeping the units that matter most",
        ("run", "model", "target", "data", "calibrate", "parallel", "logging", *COMMON),
        ("run.dir", "model.path"),
    ),
    "cache": Verb(
        "run the teacher once over the training samples and keep its most probable tokens, for a distill without it",
        ("run", "model", "data", "teacher", "distill", "train", "parallel", "logging", *COMMON),
        ("run.dir", "model.path", "data.train"),
    ),
    "distill": Verb(
        "retrain the pruned model to match the teacher's predictions",
        ("run", "model", "data", "teacher", "distill", "train", "parallel", "logging", *COMMON),
        ("run.dir", "model.path", "data.train"),
        trains=True,
    ),
    "train": Verb(
        "train the model itself, whole, on the next token of the text, in a run.dir of its own: a teacher is corrected to the data before it teaches",
        ("run", "model", "data", "train", "parallel", "logging", *COMMON),
        ("run.dir", "model.path", "data.train"),
        trains=True,
    ),
    "evaluate": Verb(
        "perplexities and benchmark tasks of the teacher, the pruned model and the student, or of a model before and after minitron train",
        ("run", "model", "data", "teacher", "train", "eval", "parallel", *COMMON),
        ("run.dir", "model.path", "data.train | data.valid"),
    ),
    "export": Verb(
        "write the student, or what minitron train made, as a Hugging Face folder that transformers and vLLM load as it is",
        ("run", "model", "parallel", *COMMON),
        ("run.dir", "model.path"),
    ),
    "speed": Verb(
        "how fast the exported student and its teacher generate with plain transformers (vLLM too where a GPU has it), and their memory",
        ("run", "model", "teacher", "speed", "logging", *COMMON),
        ("run.dir", "model.path"),
    ),
    "submit": Verb(
        "queue another verb on a SLURM cluster: a job, a chain of jobs, or an array of them for a sweep over settings",
        ("run", "slurm"),
        ("run.dir",),
        flags=(("--dry-run", "print the batch scripts, queue nothing"), ("--sweep", "a run for each combination of SETTING=A,B,C, in run.dir/NAME")),
        carries=True,
    ),
    "summary": Verb(
        "what a run, or a sweep of runs, came to so far, on the console, also while it runs: stages, steps, losses, speed, checkpoints, evaluation",
        ("run",),
        ("run.dir",),
    ),
    "report": Verb(
        "one self-contained page about the run: sizes, importance, loss curves, evaluation",
        ("run",),
        ("run.dir",),
    ),
}


# settings that not every verb with their group reads: those that do
READERS = {
    "model.shape": ("plan",),
    "run.until": ("compress",),
    "speed.enabled": ("compress", "family"),
    "run.checkpoint": ("compress", "family", "evaluate", "export"),
    "train.steps": ("compress", "family", "plan", "cache", "distill", "train"),  # a search ends with its last rung
}
# groups of which a verb reads these settings alone
READ_ALONE = {
    ("evaluate", "train"): ("train.seq_length",),
    ("plan", "data"): ("data.separate_documents",),
    ("speed", "teacher"): ("teacher.path",),
    ("speed", "logging"): ("logging.progress",),
}


def reads(verb: str, setting: str) -> bool:
    """Whether a verb has any use for a setting, by its full name."""
    group = setting.split(".")[0]
    alone = READ_ALONE.get((verb, group), (setting,))
    readers = next((verbs for name, verbs in READERS.items() if f"{setting}.".startswith(f"{name}.")), VERBS)  # model.shape has names below it
    return group in VERBS[verb].groups and verb in readers and setting in alone


def measures_again(rounds: int, criterion: str) -> bool:
    """Whether prune reads text, to measure what earlier rounds left."""
    return rounds > 1 and criterion == "activation"


def groups_of(verb: str, cfg: schema.Config) -> tuple[str, ...]:
    """The groups of settings that a verb reads with the settings it has: prune has no use for text but to measure again."""
    unread = ("data",) if verb == "prune" and not measures_again(cfg.target.rounds, cfg.calibrate.criterion) else ()
    return tuple(group for group in VERBS[verb].groups if group not in unread)
