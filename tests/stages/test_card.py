"""What lies beside an exported model, and that it is loaded all the same."""

import dataclasses
import json
import shlex

import yaml
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.config.build import from_yaml
from minitron.config.compose import compose


def test_a_finished_run_exports_its_card_with_its_evaluation(finished):
    card = ModelCard.load(finished / "hf" / "README.md")
    assert card.data.to_dict()["tags"] == ["minitron", "pruning", "distillation"]
    evals = json.loads((finished / "eval.json").read_text())
    student = evals["student"]
    assert f"| held-out | student | {student['params'] / 1000:.1f} K | {student['loss']:.3f} | {student['perplexity']:.2f} |" in card.text
    assert "16 steps of 8 sequences of 64 tokens" in card.text


def test_its_settings_make_the_run_again(finished):
    told = json.loads((finished / "hf" / "minitron_config.json").read_text())
    text = (finished / "config.yaml").read_text()
    assert told["settings"] == yaml.safe_load(text)
    config, again = from_yaml(text), compose("compress", told["command"][2:])
    assert dataclasses.replace(again, run=config.run, logging=config.logging) == config
    assert " ".join(map(shlex.quote, told["command"])) in (finished / "hf" / "README.md").read_text().replace(" \\\n    ", " ")


def test_transformers_loads_the_folder(finished):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished / "hf"), AutoTokenizer.from_pretrained(finished / "hf")
    assert model.config.hidden_size == 48
    assert model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=2, do_sample=False).shape[1] > 2
