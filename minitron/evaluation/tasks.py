"""Benchmark tasks of lm-eval: found by name, loaded with their data, and what came of them. lm-eval is imported where it is used."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import yaml

from minitron.config.schema import Eval
from minitron.errors import RequestError, refuse

PACKAGE = "lm_eval"
FEWSHOT_SEED = 1234  # lm-eval's own: which solved examples stand before a question
MAX_WRITTEN = 256  # tokens that an answer may have where its task does not say; lm-eval's own too
# Resamples for the standard error of a metric that has no formula for it (f1, mcc, perplexity, ...): a hundredth of lm-eval's own
# number, which takes long on a large set; they tell the error to about 2 % of it.
RESAMPLES = 1000
READERS = ("json", "csv", "parquet", "arrow", "text")  # what stands in a set's place where a task reads files that it names


class Tasks(NamedTuple):
    """Loaded tasks, each once, and the groups over them, as lm-eval's evaluator wants them."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def check_installed(settings: Eval) -> None:
    """Refuse tasks where the package that knows them is absent."""
    if settings.tasks is not None and importlib.util.find_spec(PACKAGE) is None:
        raise refuse("eval.tasks", settings.tasks, "the package lm-eval is not installed; install minitron[eval], or set eval.tasks=null")


def load(settings: Eval, positions: int) -> Tasks:
    """The tasks of `settings`, with their data, for a model that knows so many positions.

    Raises RequestError for names that there are not, data that can't be loaded, and what can't be done here: sampling, code that a model wrote,
    pictures, answers that leave no room for a question.
    """
    from lm_eval.tasks import TaskManager

    for name in ("include_path", "task_data"):
        if (folder := getattr(settings, name)) is not None and not Path(folder).expanduser().is_dir():
            raise refuse(f"eval.{name}", folder, "no such folder")
    if (length := settings.max_length) is not None and length > positions:
        raise refuse("eval.max_length", length, f"at most the model's {positions} positions (max_position_embeddings)")
    manager = TaskManager(include_path=None if settings.include_path is None else str(Path(settings.include_path).expanduser()))
    if unknown := [name for name in settings.task_names if name not in manager.task_index]:
        raise no_such_task(unknown[0], manager)
    with TemporaryDirectory() as folder, like_lm_eval(), quiet():
        if settings.task_data is not None:
            use_local(manager.task_index, settings.task_names, Path(settings.task_data).expanduser().resolve(), Path(folder))
        found = Tasks({}, {})
        for name in settings.task_names:
            loaded = load_one(name, manager)
            found.tasks.update(loaded["tasks"])
            found.groups.update(loaded.get("groups", {}))
    for name, task in found.tasks.items():
        check_task(name, task, settings.max_length or positions)
    return found


def no_such_task(name: str, manager: Any) -> RequestError:
    """The refusal of a name, with those that are like it."""
    import difflib

    near = difflib.get_close_matches(name, manager.all_tasks, 3)
    advice = f"did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists those that there are"
    return refuse("eval.tasks", name, f"lm-eval has no task, tag or group of this name; {advice}")


def load_one(name: str, manager: Any) -> Any:
    """A task, or what a tag or a group stands for."""
    try:
        return manager.load([name])
    except RequestError:
        raise
    except Exception as error:  # errors of lm-eval, datasets, the hub, packages that a task needs besides, ...
        reason = " ".join(str(error).split()) or type(error).__name__
        raise refuse("eval.tasks", name, f"can't be loaded: {reason}; eval.task_data names a folder with data sets") from error


def use_local(index: dict[str, Any], names: Sequence[str], data: Path, made: Path) -> None:
    """Have the tasks that `names` stand for read their sets from `data`: each gets a YAML in the folder `made`, which includes its own and names
    another path. Tasks without a set of the hub stay as they are. Raises RequestError where a set is not there."""
    for name in dict.fromkeys(leaf for asked in names for leaf in leaves(asked, index)):
        given = (index[name].cfg or {}).get("dataset_path")
        if index[name].yaml_path is None or given is None or given in READERS or Path(given).is_dir():
            continue
        if not (data / given).is_dir():
            raise refuse("eval.task_data", data, f"it has no folder {given}, the data set of {name}")
        file = made / f"{name}.yaml"
        text = yaml.safe_dump({"task": name, "include": str(Path(index[name].yaml_path).resolve()), "dataset_path": str(data / given)})
        file.write_text(text, encoding="utf-8")
        index[name].yaml_path = file


def leaves(name: str, index: Mapping[str, Any]) -> Iterator[str]:
    """The names of the tasks that a task, a tag or a group stands for."""
    if name not in index:  # a group may define tasks of its own
        return
    entry = index[name]
    below = (entry.cfg or {}).get("task")
    if entry.kind.name == "TAG":
        below = sorted(entry.tags)
    if isinstance(below, list):
        for child in below:
            yield from members(child, index)
    else:
        yield name


def members(child: Any, index: Mapping[str, Any]) -> Iterator[str]:
    """The same of a member of a group: a name, or a mapping that changes a task or defines another group."""
    if isinstance(child, str):
        yield from leaves(child, index)
    elif isinstance(child.get("task"), list) and child.get("group") not in index:
        for grandchild in child["task"]:
            yield from members(grandchild, index)
    else:
        yield from leaves(child.get("group") or child.get("task"), index)


def check_task(name: str, task: Any, max_length: int) -> None:
    """Refuse what can't be asked of a sharded model."""
    from lm_eval.models.utils import normalize_gen_kwargs

    if getattr(task, "UNSAFE_CODE", False):
        raise refuse("eval.tasks", name, "it runs code that the model writes, which is not done here")
    if getattr(task, "MULTIMODAL", False):
        raise refuse("eval.tasks", name, "it asks about pictures or sound; these models read text alone")
    if task.OUTPUT_TYPE == "generate_until":
        asked = normalize_gen_kwargs(task.config.generation_kwargs or {}, MAX_WRITTEN)
        if asked["do_sample"]:
            raise refuse("eval.tasks", name, "it draws tokens at random; the most probable one is always taken here")
        if asked["max_gen_toks"] >= max_length:
            raise refuse("eval.tasks", name, f"answers of up to {asked['max_gen_toks']} tokens leave no room in {max_length} (eval.max_length)")


def evaluate(model: Any, found: Tasks, settings: Eval) -> dict[str, Any]:
    """Each task and group as eval.json has it, of an `lm_eval.api.model.LM`."""
    from lm_eval.evaluator import evaluate

    for task in found.tasks.values():
        own = task.get_config("num_fewshot")
        if own is None or (settings.num_fewshot is not None and own != 0):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=FEWSHOT_SEED)  # for each model anew: all get the same questions
    with like_lm_eval(), quiet(), resampled_here():
        results = evaluate(lm=model, task_dict=found._asdict(), limit=settings.limit, bootstrap_iters=RESAMPLES, log_samples=False)
        return shaped(results, settings.task_names)


def shaped(results: Mapping[str, Any], asked: Sequence[str] = ()) -> dict[str, Any]:
    """lm-eval's results: of every task its metrics with their standard errors (None where there is none), rows and solved examples; of one that was
    not `asked` for by its name and whose group has metrics too, that group's name."""
    parents = {child: group for group, children in results["group_subtasks"].items() for child in children if child not in asked}
    tasks = {}
    for name, values in results["results"].items():
        metrics = {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{kind}")
                metrics[metric if kind == "none" else f"{metric} ({kind})"] = {
                    "value": float(value),
                    "stderr": float(error) if isinstance(error, int | float) else None,
                    "higher_is_better": bool((results["higher_is_better"].get(name) or {}).get(metric, True)),
                }
        if metrics:
            tasks[name] = {"metrics": metrics, "rows": values.get("sample_len"), "num_fewshot": results["n-shot"].get(name)}
    return {name: {**entry, "group": parents.get(name) if parents.get(name) in tasks else None} for name, entry in tasks.items()}


@contextlib.contextmanager
def like_lm_eval() -> Iterator[None]:
    """Inside the block random numbers, which some tasks mix their choices with, are as in lm-eval's own command; then they go on as before."""
    import numpy as np

    before = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside the block neither lm-eval nor datasets draws bars, as this project shows by itself how far a work has come, and lm-eval says nothing of
    settings that its own tasks leave out."""
    import datasets
    import lm_eval.api.task

    shown, bar = datasets.is_progress_bar_enabled(), lm_eval.api.task.tqdm
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda items, **_: items  # it asks nobody whether to draw one
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def resampled_here() -> Iterator[None]:
    """Inside the block lm-eval resamples for standard errors in this process, as one that talks to a GPU and to other ranks is not to be forked, and
    prints nothing of it."""
    from lm_eval.api import metrics

    switch, own = "DISABLE_MULTIPROC", metrics.bootstrap_stderr
    before = os.environ.get(switch)

    def silent(*args: Any, **kwargs: Any) -> Any:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            return own(*args, **kwargs)

    os.environ[switch], metrics.bootstrap_stderr = "1", silent
    try:
        yield
    finally:
        metrics.bootstrap_stderr = own
        del os.environ[switch]
        if before is not None:
            os.environ[switch] = before
