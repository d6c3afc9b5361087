"""Tasks by name, their data from a folder, and what is made of lm-eval's results."""

import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

from minitron.config.evaluation import Eval
from minitron.errors import RequestError
from minitron.evaluation import tasks
from minitron.evaluation.tasks import check_installed, check_task, leaves, like_lm_eval, load, shaped, use_local

pytest.importorskip("lm_eval", reason="the Python package lm-eval is not installed")

OWN = {
    "task": "own", "dataset_path": "json", "output_type": "multiple_choice", "validation_split": "validation", "doc_to_text": "{{question}}",
    "doc_to_target": "right", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}], "metadata": {"version": 1},
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    """lm-eval with the tasks of eval.include_path alone, which spares reading thousands."""
    import functools

    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", functools.partial(lm_eval.tasks.TaskManager, include_defaults=False))


@pytest.fixture
def folder(tmp_path):
    """A folder with two tasks of one set, as the hub would have it, and the set itself in another."""
    (tmp_path / "yaml").mkdir()
    for name in ("own", "twin"):
        text = yaml.safe_dump({**OWN, "task": name, "dataset_path": "some/set", "tag": "both"})
        (tmp_path / "yaml" / f"{name}.yaml").write_text(text)
    (tmp_path / "yaml" / "group.yaml").write_text(yaml.safe_dump({"group": "pair", "task": ["own", {"task": "twin"}]}))
    written = {"generate": {"do_sample": True}, "long": {"max_gen_toks": 64}}
    for name, wanted in written.items():
        task = {"task": name, "dataset_path": "some/set", "output_type": "generate_until", "validation_split": "validation",
                "doc_to_text": "{{question}}", "doc_to_target": "right", "generation_kwargs": {"until": ["."], **wanted}}  # fmt: skip
        (tmp_path / "yaml" / f"{name}.yaml").write_text(yaml.safe_dump(task))
    (tmp_path / "data" / "some" / "set").mkdir(parents=True)
    rows = [f'{{"question": "{at}", "choices": ["a", "b"], "right": {at % 2}}}\n' for at in range(5)]
    (tmp_path / "data" / "some" / "set" / "validation.jsonl").write_text("".join(rows))
    return tmp_path


def settings(folder, names, **more):
    return Eval(tasks=names, include_path=str(folder / "yaml"), task_data=str(folder / "data"), **more)


@pytest.mark.parametrize("names", [["own", "twin"], "own, twin", ["both"], ["pair"], ["pair", "pair"]], ids=str)
def test_tasks_are_loaded_with_the_data_of_a_folder(names, folder, small):
    found = load(settings(folder, names), 64)
    assert sorted(found.tasks) == ["own", "twin"] and sorted(found.groups) == (["pair"] if "pair" in names else [])
    assert [row["question"] for row in found.tasks["own"].eval_docs] == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["own", "zzzz"], {}, r"eval.tasks=zzzz: lm-eval has no task, tag or group of this name; lm-eval ls tasks lists those that there are"),
        (["twins"], {}, r"eval.tasks=twins: .*; did you mean twin\?"),
        (["own"], {"max_length": 65}, "eval.max_length=65: at most the model's 64 positions"),
        (["own"], {"task_data": "absent"}, "eval.task_data=absent: no such folder"),
        (["own"], {"include_path": "absent"}, "eval.include_path=absent: no such folder"),
        (["own"], {"task_data": "{folder}/yaml"}, r"eval.task_data=.*yaml: it has no folder some/set, the data set of own"),
        (["generate"], {}, "eval.tasks=generate: it draws tokens at random"),
        (["long"], {}, r"eval.tasks=long: answers of up to 64 tokens leave no room in 64 \(eval.max_length\)"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_one_line(names, more, said, folder, small):
    asked = {"include_path": str(folder / "yaml"), "task_data": str(folder / "data"), "tasks": names}
    asked |= {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in more.items()}
    with pytest.raises(RequestError, match=said) as refusal:
        load(Eval(**asked), 64)
    assert "\n" not in str(refusal.value)


def test_data_that_cannot_be_read_is_refused_with_the_reason(folder, small):
    (folder / "data" / "some" / "set" / "validation.jsonl").unlink()
    with pytest.raises(RequestError, match=r"eval.tasks=own: can't be loaded: .*") as refusal:
        load(settings(folder, ["own"]), 64)
    assert "\n" not in str(refusal.value)


def test_without_the_package_tasks_are_refused(monkeypatch):
    monkeypatch.setattr(tasks, "PACKAGE", "lm_eval_that_is_not_there")
    check_installed(Eval())
    with pytest.raises(RequestError, match=r"eval.tasks=\[piqa\]: the package lm-eval is not installed; install minitron\[eval\]"):
        check_installed(Eval(tasks=["piqa"]))


def test_models_are_not_asked_to_write_programs_or_to_look():
    for name, said in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "pictures or sound")):
        with pytest.raises(RequestError, match=f"eval.tasks=a: it .*{said}"):
            check_task("a", SimpleNamespace(**{name: True}), 64)


def entry(kind, path=None, tags=(), **cfg):
    return SimpleNamespace(kind=SimpleNamespace(name=kind), yaml_path=path, cfg=cfg or None, tags=set(tags))


INDEX = {
    "a": entry("TASK", Path("/lm/a.yaml"), task="a", dataset_path="x/a"),
    "b": entry("TASK", Path("/lm/b.yaml"), task="b", dataset_path="x/b"),
    "c": entry("TASK", Path("/lm/c.yaml"), task="c", dataset_path="json"),
    "code": entry("PY_TASK", Path("/lm/code.yaml"), task="code", **{"class": "Some"}),
    "tag": entry("TAG", tags=["b", "a"]),
    "group": entry("GROUP", Path("/lm/g.yaml"), group="group", task=["tag", {"group": "inner", "task": ["c", {"task": "a"}]}, {"group": "nested"}]),
    "nested": entry("GROUP", Path("/lm/n.yaml"), group="nested", task=["code", {"task": "not_registered"}]),
}


@pytest.mark.parametrize(("name", "expected"), [("a", "a"), ("tag", "a b"), ("group", "a b c a code"), ("nested", "code"), ("none", "")])
def test_what_a_name_stands_for(name, expected):
    assert " ".join(leaves(name, INDEX)) == expected


def test_local_data_takes_the_hubs_place(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "data" / "x" / name).mkdir(parents=True)
    index = {name: SimpleNamespace(**vars(one)) for name, one in INDEX.items()}
    use_local(index, ["group"], tmp_path / "data", tmp_path)
    assert {name: one.yaml_path.parent for name, one in index.items() if one.yaml_path} == {
        "a": tmp_path, "b": tmp_path, "c": Path("/lm"), "code": Path("/lm"), "group": Path("/lm"), "nested": Path("/lm")
    }  # fmt: skip
    made = yaml.safe_load((tmp_path / "a.yaml").read_text())
    assert made == {"task": "a", "include": "/lm/a.yaml", "dataset_path": str(tmp_path / "data" / "x" / "a")}


RESULTS = {
    "results": {
        "all": {"acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 30, "name": "all", "alias": "all"},
        "one": {"acc,none": np.float64(0.25), "acc_stderr,none": 0.05, "acc_norm,none": 0.75, "acc_norm_stderr,none": "N/A", "sample_len": 10},
        "math": {"exact_match,strict-match": 0.1, "exact_match_stderr,strict-match": 0.01, "exact_match,flexible": 0.2, "sample_len": 20},
        "text": {"word_perplexity,none": 20.5, "word_perplexity_stderr,none": "N/A", "sample_len": 5},
        "empty": {"name": "empty", " ": " "},
    },
    "group_subtasks": {"all": ["one"], "empty": ["math", "text"]},
    "n-shot": {"all": 5, "one": 5, "math": 8, "text": 0},
    "higher_is_better": {"one": {"acc": True, "acc_norm": True}, "math": {"exact_match": True}, "text": {"word_perplexity": False}},
}


def test_results_are_told_metric_by_metric():
    found = shaped(RESULTS)
    assert [*found] == ["all", "one", "math", "text"]
    assert found["one"] == {
        "metrics": {
            "acc": {"value": 0.25, "stderr": 0.05, "higher_is_better": True},
            "acc_norm": {"value": 0.75, "stderr": None, "higher_is_better": True},
        },
        "rows": 10, "num_fewshot": 5, "group": "all",
    }  # fmt: skip
    assert [*found["math"]["metrics"]] == ["exact_match (strict-match)", "exact_match (flexible)"]
    assert found["math"]["group"] is found["text"]["group"] is None  # its group has no figures of its own
    assert not found["text"]["metrics"]["word_perplexity"]["higher_is_better"]
    assert shaped(RESULTS, ["all", "one"])["one"]["group"] is None  # it was asked for by itself


def test_other_peoples_random_numbers_go_on_as_before():
    random.seed(5), np.random.seed(5)
    expected = random.random(), np.random.rand()
    random.seed(5), np.random.seed(5)
    with like_lm_eval():
        drawn = random.random(), np.random.rand()
    assert (random.random(), np.random.rand()) == expected
    with like_lm_eval():
        assert (random.random(), np.random.rand()) == drawn != expected


def test_standard_errors_are_resampled_in_this_process_and_in_silence(folder, small, monkeypatch, capfd):
    """Of a task whose metric has no formula for its error, answered by chance."""
    import multiprocessing
    import sys

    from lm_eval.api.model import LM

    class Chance(LM):
        def loglikelihood(self, requests, disable_tqdm=False):
            return [(random.random(), False) for _ in requests]

        loglikelihood_rolling = generate_until = None

    monkeypatch.setattr(multiprocessing, "Pool", None)  # whoever forks fails
    monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
    written = {**OWN, "dataset_path": "some/set", "metric_list": [{"metric": "acc", "aggregation": "perplexity", "higher_is_better": True}]}
    (folder / "yaml" / "own.yaml").write_text(yaml.safe_dump(written))
    asked = settings(folder, ["own"])
    found = tasks.evaluate(Chance(), load(asked, 64), asked)["own"]["metrics"]["acc"]
    assert found["value"] < 1 and 0.05 < found["stderr"] < 0.5  # exp(-share) of five questions
    assert capfd.readouterr() == ("", "")
    assert "DISABLE_MULTIPROC" not in os.environ and "silent" not in sys.modules["lm_eval.api.metrics"].bootstrap_stderr.__name__
