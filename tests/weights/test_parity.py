"""Import and export against `transformers`: the same logits, the same bits, at every layout."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from minitron.weights.load import load
from minitron.weights.save import export, write_shards
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, same_tensors, save_zoo, saved_tensors, tokens_of
from tests.oracles.sharded import of_last_stage, whole_logits

LAYOUTS = [
    Layout(),
    Layout(tp=2),
    Layout(tp=3),
    Layout(tp=2, sp=True),
    Layout(pp=2),
    Layout(tp=2, pp=2),
    Layout(tp=3, sp=True),
    Layout(pp=3),
    Layout(pp=2, vpp=2),
    Layout(cp=2),
    Layout(tp=2, cp=2),
]
ROTATED = ("theta", "linear", "dynamic", "yarn", "longrope", "llama3", "nemotron", "nemotron_yarn")  # otherwise than is usual
LENGTHS = (12, 48)  # inside and beyond the lengths that the scaled rotary kinds were made for


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    return save_zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def expected(zoo):
    """{(model, length): logits of transformers}"""
    logits = {}
    with torch.no_grad():
        for name, folder in zoo.items():
            model = hf_model(folder)
            for length in LENGTHS:
                logits[name, length] = model(tokens_of(model.config.vocab_size, 2, length)).logits
    return logits


def battery(world, zoo, exports):
    """Logits and an export of every model, in and out again at this layout."""
    logits = {}
    for name, folder in zoo.items():
        source = open_folder(folder, "model.path")
        model = load(source, world, torch.float32)
        for length in LENGTHS:
            logits[name, length] = whole_logits(model, tokens_of(source.arch.vocab_size, 2, length), world)
        export(model, world, source.config, folder, exports / name, getattr(torch, source.config["dtype"]))
    return logits


@pytest.mark.multirank
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_logits_and_round_trip_of_every_model(layout, zoo, expected, tmp_path):
    found = on_ranks(battery, layout, zoo, tmp_path)
    wrong = {}
    for key, logits in expected.items():
        difference = (of_last_stage([rank[key] for rank in found]) - logits).abs().max().item()
        if not difference < 1e-4:
            wrong[key] = difference
    assert wrong == {}
    assert [name for name, folder in zoo.items() if not same_tensors(saved_tensors(folder), saved_tensors(tmp_path / name))] == []
    for name, folder in zoo.items():
        before, after = (AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""} for path in (folder, tmp_path / name))
        assert after == before, name


def test_the_oracle_s_logits_would_show_a_wrong_part(zoo, expected):
    """Every tensor, and every rotary kind, moves the logits by far more than the tolerance: no part of the models above is idle."""
    idle = []
    for name in ("biases_tied", "untied", "nemotron_biases"):
        model = hf_model(zoo[name])
        tokens = tokens_of(model.config.vocab_size, 2, 12)
        for part, tensor in model.named_parameters():
            original = tensor.detach().clone()
            with torch.no_grad():
                tensor.mul_(1.1)
                moved = (model(tokens).logits - expected[name, 12]).abs().max().item()
                tensor.copy_(original)
            if moved < 1e-2:
                idle.append((name, part, moved))
    for name in ROTATED:
        config = AutoConfig.from_pretrained(zoo[name])
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0}
        plain = AutoModelForCausalLM.from_pretrained(zoo[name], config=config)
        moved = (plain(tokens_of(config.vocab_size, 2, 48)).logits - expected[name, 48]).abs().max().item()
        if moved < 1e-2:
            idle.append((name, "rope", moved))
    assert idle == []


def test_weights_stored_in_bf16_pass_through_a_bf16_model_unchanged(zoo, alone, tmp_path):
    source = open_folder(zoo["bf16_files"], "model.path")
    export(load(source, alone, torch.bfloat16), alone, source.config, source.folder, tmp_path / "out", torch.bfloat16)
    assert same_tensors(saved_tensors(source.folder), saved_tensors(tmp_path / "out"))


def test_the_exported_folder_generates_the_same_text_with_the_same_tokenizer(stories, alone, tmp_path):
    source = open_folder(stories, "model.path")
    export(load(source, alone, torch.float32), alone, source.config, stories, tmp_path / "out", torch.float32)
    said = []
    for folder in (stories, tmp_path / "out"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer("Once upon a time", return_tensors="pt")
        model = hf_model(folder)
        said.append(tokenizer.decode(model.generate(**prompt, max_new_tokens=80, do_sample=False)[0]))
    assert said[0] == said[1]
    assert len(said[0].split()) > 30


def test_large_models_are_written_over_several_files(zoo, tmp_path):
    tensors = saved_tensors(zoo["untied"])
    write_shards(iter(tensors.items()), tmp_path, shard_bytes=40_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.numel() * 4 for tensor in tensors.values())
    assert set(index["weight_map"].values()) == set(files)
    (tmp_path / "config.json").write_bytes((zoo["untied"] / "config.json").read_bytes())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())


def test_export_takes_the_tokenizer_along_and_nothing_else(stories, alone, tmp_path):
    source = open_folder(stories, "model.path")
    export(load(source, alone, torch.float32), alone, source.config, stories, tmp_path / "out", torch.float32)
    taken = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json", "model.safetensors"}
    assert {"tokenizer.json", "tokenizer_config.json"} <= taken
    assert all((tmp_path / "out" / name).read_bytes() == (stories / name).read_bytes() for name in taken)
    assert not list(Path(tmp_path).glob(".*"))
