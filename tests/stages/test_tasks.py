"""`minitron evaluate` with benchmark tasks: two processes of the command line against lm-eval's own backend for `transformers`."""

import functools
import json

import pytest
import yaml

from minitron.config.evaluation import Eval
from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation.tasks import evaluate, load
from tests.stages.commands import running

pytest.importorskip("lm_eval", reason="the Python package lm-eval is not installed")

BEGINNINGS = ["Once upon a time, there was a", "Lily and Tim", "The big dog", "One day, the sun", "Mom said"]
ENDINGS = [(" little girl", " zebra"), (" were friends", " is"), (" ran", " of"), (" was bright", " wrote a law"), (" no", " tax")]


def own_tasks_alone():
    """lm-eval knows the tasks of eval.include_path only, which spares reading thousands."""
    import lm_eval.tasks

    lm_eval.tasks.TaskManager = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of one set, and the set."""
    folder = tmp_path_factory.mktemp("tasks")
    common = {"dataset_path": "some/set", "validation_split": "validation", "fewshot_split": "validation", "doc_to_text": "{{begin}}"}
    chosen = {"task": "chosen", "output_type": "multiple_choice", "doc_to_target": "right", "doc_to_choice": "ends", "target_delimiter": "",
              "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}  # fmt: skip
    written = {"task": "written", "output_type": "generate_until", "doc_to_target": "{{ends[right]}}", "target_delimiter": "",
               "generation_kwargs": {"until": [".", " and"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    for task in (chosen, written):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump({**common, **task}))
    (folder / "group.yaml").write_text(
        yaml.safe_dump({"group": "both", "task": ["chosen"], "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    )
    data = folder / "data" / "some" / "set"
    data.mkdir(parents=True)
    rows = [{"begin": begin, "ends": [*ends], "right": at % 2} for at, (begin, ends) in enumerate(zip(BEGINNINGS, ENDINGS, strict=True))]
    (data / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings_of(folder, tasks):
    return [f"eval.include_path={folder}", f"eval.task_data={folder}/data", f"eval.tasks=[{tasks}]", "eval.limit=4", "eval.num_fewshot=1"]


def common_of(stories, tales, run):
    return [
        f"run.dir={run}", f"model.path={stories}", f"data.train={tales}", "dtype=fp32", "device=cpu", "train.seq_length=32", "eval.tokens=256",
        "eval.stride=16", "eval.max_length=96", "logging.progress=false",
    ]  # fmt: skip


@pytest.mark.multirank
def test_tasks_come_out_as_with_lm_evals_own_backend(stories, tales, folder, tmp_path, monkeypatch):
    given = [*common_of(stories, tales, tmp_path / "run"), *settings_of(folder, "both,written"), "parallel.pp=2"]
    with running(tmp_path / "log", "evaluate", *given, prepare=own_tasks_alone, size=2) as ranks:
        assert ranks.results(timeout=200) == [0, 0]
    teacher = json.loads((tmp_path / "run" / "eval.json").read_text())["teacher"]

    import lm_eval.tasks
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lm_eval.tasks.TaskManager)
    own_tasks_alone()
    settings = Eval(tasks="both, written", limit=4, num_fewshot=1, include_path=str(folder), task_data=f"{folder}/data", max_length=96)
    model = AutoModelForCausalLM.from_pretrained(stories)
    plain = HFLM(pretrained=model, tokenizer=load_tokenizer(str(stories)), batch_size=2, max_length=96, device="cpu")
    expected = evaluate(plain, load(settings, 512), settings)
    assert teacher["tasks"] == expected and [*expected] == ["chosen", "written", "both"]
    assert expected["chosen"]["group"] == "both" and expected["chosen"]["num_fewshot"] == 1 and expected["chosen"]["rows"] == 4
    assert 0 < expected["chosen"]["metrics"]["acc"]["value"] < 1 and expected["chosen"]["metrics"]["acc"]["stderr"] > 0

    assert (teacher["seq_length"], teacher["stride"], teacher["tokens"]) == (32, 16, 32 + 14 * 16)
    assert teacher["words"] > 50 and teacher["word_perplexity"] > teacher["perplexity"] > 1
    shown = (tmp_path / "log0.out").read_text()
    assert "both (1-shot)" in shown and "chosen" not in shown and "windows of 32 tokens, one every 16" in shown


def test_a_task_that_there_is_not_is_refused_before_a_model_is_loaded(stories, tales, folder, tmp_path):
    given = [*common_of(stories, tales, tmp_path / "run"), *settings_of(folder, "chosn")]
    with running(tmp_path / "log", "evaluate", *given, prepare=own_tasks_alone) as ranks:
        assert ranks.results(timeout=200) == [2]
    assert (tmp_path / "log.err").read_text().splitlines() == [
        "minitron: eval.tasks=chosn: lm-eval has no task, tag or group of this name; did you mean chosen?"
    ]
    assert not (tmp_path / "run" / "data").exists()
