"""The card of an export: what the hub reads of it, what a reader finds in it, and the command that makes the model again."""

import dataclasses
import functools
import json
import shlex

import pytest
from huggingface_hub import ModelCard

from minitron.arch.families import from_hf
from minitron.config.compose import compose, to_yaml
from minitron.config.overrides import overrides
from minitron.reporting.card import Made, model_card, settings_file
from minitron.reporting.runfiles import RunFiles

LLAMA = {"model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 5, "num_attention_heads": 8}
ORIGINAL, PRUNED = (from_hf({**LLAMA, "head_dim": 8, **changes}, "config.json") for changes in ({}, {"hidden_size": 48}))
EVALS = {
    "teacher": {"params": 300_000, "loss": 1.0, "perplexity": 2.72, "texts": {"a|b": {"loss": 1.5, "perplexity": 4.48}}},
    "pruned": {"params": 200_000, "loss": 3.0, "perplexity": 20.1, "texts": {}},
    "student": {"params": 200_000, "loss": 1.5, "perplexity": 4.48, "texts": {}},
}
METRICS = [
    {"step": 4, "loss": 2.5, "kd_loss": 2.5, "tokens": 8192, "valid_loss": 2.25},
    {"step": 8, "loss": 2.0, "kd_loss": 2.0, "tokens": 16384, "valid_loss": 1.75},
    {"step": 12, "loss": 1.0, "kd_loss": 1.0, "tokens": 24576, "valid_loss": 1.25},
]
ASKED = [
    "model.path=some/model",
    "data.train='0.7 my text.jsonl 0.3 other|text.jsonl'",
    "run.dir=runs/first",
    "target.hidden_size=48",
    "train.steps=12",
]


@functools.cache  # it takes a while
def composed():
    return compose("compress", ASKED)


@pytest.fixture
def run(tmp_path):
    return RunFiles(
        path=tmp_path, original=ORIGINAL, pruned=PRUNED, importance=None, calibration={}, keep=None, metrics=METRICS, evals=EVALS,
        config=to_yaml(composed()), search=None, exported=False, whole=False,
    )  # fmt: skip


@functools.cache
def made():
    return Made(
        step=8, parameters=PRUNED.num_parameters(), front={"base_model": "some/model", "license": "llama3.1", "language": ["en"]},
        notices=["LICENSE", "NOTICE"], texts=["train: 12 documents, 3,456 tokens from other|text.jsonl"], evals=EVALS,
        overrides=overrides(composed(), "compress"), version="1.2.3", fingerprints={"model": "abc", "checkpoint": "8"},
    )  # fmt: skip


def table(text, heading):
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    return [[cell.strip() for cell in line.replace("\\|", "¦").strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]


def test_the_hub_reads_where_it_comes_from(run):
    data = ModelCard(model_card(run, made())).data.to_dict()
    assert data == {
        "base_model": "some/model", "license": "llama3.1", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["minitron", "pruning", "distillation"],
    }  # fmt: skip


def test_a_reader_finds_what_was_done(run):
    text = model_card(run, made())
    rows = dict(row for row in table(text, "Lineage")[2:])
    assert rows["Original"] == "`some/model`" == rows["Teacher"]
    assert rows["Sizes"] == "hidden size 64 -> 48"
    assert rows["Loss"] == "KL(teacher ‖ student)"
    # of the checkpoint that is exported, not of later steps
    assert rows["Training"].startswith("8 steps of ") and "16.4 K tokens" in rows["Training"]
    assert rows["Losses"] == "2.000 in the last step; held out 1.750"
    assert rows["Text"] == "train: 12 documents, 3,456 tokens from other¦text.jsonl"
    assert table(text, "Evaluation")[2:] == [
        ["held-out", "teacher", "300.0 K", "1.000", "2.72", ""], ["held-out", "pruned", "200.0 K", "3.000", "20.10", ""],
        ["held-out", "student", "200.0 K", "1.500", "4.48", "75.0 %"], ["a¦b", "teacher", "300.0 K", "1.500", "4.48", ""],
    ]  # fmt: skip
    assert "That of the original: llama3.1. Its terms: `LICENSE`, `NOTICE`." in text


def test_a_reader_finds_perplexities_per_word_and_tasks(run):
    def metric(value, stderr, more_is_better):
        return {"value": value, "stderr": stderr, "higher_is_better": more_is_better}

    def entry(shots, **metrics):
        return {"metrics": metrics, "rows": 1838, "num_fewshot": shots, "group": None}

    measured = {
        "teacher": {"word_perplexity": 9.5, "tasks": {"a|b": entry(5, acc=metric(0.8, 0.01, True)), "wiki": entry(0, ppl=metric(20.0, None, False))}},
        "student": {"tasks": {"a|b": entry(5, acc=metric(0.6, 0.02, True))}},
    }
    evals = {name: {**EVALS[name], **measured.get(name, {})} for name in EVALS}
    found = table(model_card(run, dataclasses.replace(made(), evals=evals)), "Evaluation")
    assert found[0] == ["text", "model", "parameters", "loss", "perplexity", "word perplexity", "gap closed"]
    assert [row[5] for row in found[2:6]] == ["9.50", "–", "–", "–"]
    assert found[6:] == [
        ["task", "metric", "questions", "teacher", "pruned", "student", "retained"], ["---"] * 7,
        ["a¦b (5-shot)", "acc", "1,838", "0.800 ±0.010", "–", "0.600 ±0.020", "75.0 %"], ["wiki", "ppl", "1,838", "20.00", "–", "–", "–"],
    ]  # fmt: skip


def test_the_command_makes_the_same_settings(run):
    text = model_card(run, made())
    shown = text.split("```sh\n")[1].split("\n```")[0].replace("\\\n", " ")
    words = shlex.split(shown)
    told = json.loads(settings_file(run, made()))
    assert words == told["command"] and words[:3] == ["minitron", "compress", "run.dir=runs/again"]
    again = compose("compress", words[2:])
    assert again == dataclasses.replace(composed(), run=again.run)
    assert told["settings"]["target"]["hidden_size"] == 48
    assert (told["minitron"], told["checkpoint"], told["inputs"]["model"]) == ("1.2.3", 8, "abc")


def test_a_model_that_was_not_retrained_or_not_evaluated_says_so(run):
    text = model_card(run, dataclasses.replace(made(), step=None, evals=None, front={}, notices=[]))
    assert "runs/again" in text and "run.until=prune" in text and "run.until" not in model_card(run, made())
    assert "It was not retrained" in text and "was not evaluated" in text and "names none" in text
    assert "Training" not in dict(row for row in table(text, "Lineage")[2:])
    assert ModelCard(text).data.to_dict()["tags"] == ["minitron", "pruning"]


def test_a_model_that_was_trained_whole(run):
    config = to_yaml(compose("train", ["model.path=some/model", "data.train=my.jsonl", "run.dir=a", "train.steps=12"]))
    whole = dataclasses.replace(run, whole=True, original=None, pruned=None, config=config)
    text = model_card(whole, dataclasses.replace(made(), evals=None))
    assert "`some/model`, trained on for 8 steps." in text and "minitron \\\n    train" in text
    assert {"Sizes", "Teacher"}.isdisjoint(dict(row for row in table(text, "Lineage")[2:]))


def test_names_that_are_markup_stay_names(run):
    odd = run.config.replace("path: some/model", "path: '`a`|<b>\n'")
    text = model_card(dataclasses.replace(run, config=odd), dataclasses.replace(made(), overrides=["data.train=```"]))
    assert dict(row for row in table(text, "Lineage")[2:])["Original"] == "`a¦&lt;b>`"
    assert "````sh\n" in text
