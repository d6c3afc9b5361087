"""How fast models generate: what a process is asked and answers, how turns go round, and that every family can be measured."""

import json
import os
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minitron.config.speed import Speed
from minitron.errors import RequestError
from minitron.evaluation import generating, speed
from minitron.evaluation.generating import Load, Order, Turn
from minitron.evaluation.speed import Place, alternate, check_speed, engines, loads, measure, turns
from minitron.weights.source import open_folder
from tests.oracles.models import hf_model, save_model
from tests.oracles.samples import SAMPLES, save_samples

LOAD = Load(batch_size=2, prompt_length=5, new_tokens=4)


def order(folder, **changes):
    return Order(**{"engine": "transformers", "folder": str(folder), "device": "cpu", "dtype": "fp32", "threads": None, "longest": 9, **changes})


def test_the_models_take_turns_and_the_first_of_each_is_left_out():
    asked = []

    class Fake:
        def __init__(self, name):
            self.name = name

        def ask(self, load):
            asked.append(self.name)
            return {"first": float(len(asked)), "others": 1.0, "peak": None}

    advanced = []
    found = alternate({"teacher": Fake("teacher"), "student": Fake("student")}, LOAD, 3, lambda: advanced.append(True))
    assert "".join(name[0] for name in asked) == "tsst" * 2 or "".join(name[0] for name in asked) == "stts" * 2
    assert len(advanced) == 8
    assert {name: [turn.first for turn in done] for name, done in found.items()} == {
        name: [at for at, who in enumerate(asked, start=1) if who == name][1:] for name in ("teacher", "student")
    }


def test_every_combination_is_measured_once():
    settings = Speed(batch_sizes=[8, 1, 8], prompt_lengths=[64, 16], new_tokens=3, repeats=2)
    assert loads(settings) == [Load(1, 16, 3), Load(8, 16, 3), Load(1, 64, 3), Load(8, 64, 3)]
    assert turns(settings, "cpu") == 4 * 3


def test_what_can_not_be_measured_is_refused(tmp_path, monkeypatch):
    (folder,) = save_samples(tmp_path, wanted=[f"gpt2.{next(iter(SAMPLES['gpt2']))}"]).values()
    learned = open_folder(folder, "model.path").arch
    most = learned.max_position_embeddings
    check_speed(Speed(prompt_lengths=[most - 2], new_tokens=2), learned, "cuda")
    with pytest.raises(RequestError, match=rf"speed.prompt_lengths=\[{most - 1}\]: .* at most the model's {most} learned positions"):
        check_speed(Speed(prompt_lengths=[most - 1], new_tokens=2), learned, "cuda")
    check_speed(Speed(prompt_lengths=[most], new_tokens=2), learned.replace(position_offset=None), "cuda")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(RequestError, match=r"speed.vllm=true: a GPU is needed"):
        check_speed(Speed(prompt_lengths=[8], vllm=True), learned, "cpu")
    with pytest.raises(RequestError, match=r"speed.batch_sizes=\[\]"):
        check_speed(Speed(batch_sizes=[]), learned, "cuda")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"speed.vllm=true: the package vllm is not installed"):
        check_speed(Speed(prompt_lengths=[8], vllm=True), learned, "cuda")


def test_vllm_is_measured_where_it_can_be(monkeypatch):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    assert engines(Speed(), "cuda:0") == ["transformers", "vllm"]
    assert engines(Speed(vllm=False), "cuda:0") == engines(Speed(), "cpu") == ["transformers"]
    with pytest.raises(RequestError, match=r"speed.vllm=true: a GPU is needed"):
        engines(Speed(vllm=True), "cpu")
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    assert engines(Speed(), "cuda:0") == ["transformers"]


def test_a_model_of_every_family_writes_as_many_tokens_as_it_is_asked_for(tmp_path):
    wanted = [f"{family}.{next(iter(samples))}" for family, samples in SAMPLES.items()]
    for family, folder in save_samples(tmp_path, wanted=wanted).items():
        if open_folder(folder, "model.path").arch.num_moe_experts is not None:
            continue  # of an odd shape, as all samples: transformers' grouped products take even ones alone
        ready, write = generating.plain(order(folder))
        assert ready.weights == 4 * open_folder(folder, "model.path").arch.num_parameters(), family
        turn = write(LOAD)  # which holds against the number of tokens
        assert turn.first > 0 and turn.others > 0 and turn.peak > ready.weights


def test_an_end_of_text_token_does_not_end_a_measurement(tmp_path):
    folder = save_model(tmp_path / "ends")
    tokens = hf_model(folder).generate(torch.full((1, 5), 3), max_new_tokens=8, do_sample=False)[0, 5:]
    wishes = {"eos_token_id": sorted({*tokens.tolist()}), "do_sample": True, "temperature": 9.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    _, write = generating.plain(order(folder))
    assert write(Load(3, 5, 8)).others > 0


def test_vllm_is_asked_for_the_same_tokens(tmp_path, monkeypatch):
    folder, asked, clock, slow = save_model(tmp_path / "model"), [], [0.0], []
    monkeypatch.setattr(generating, "time", types.SimpleNamespace(perf_counter=lambda: clock[0]))

    class LLM:
        def __init__(self, **settings):
            self.settings = settings
            assert set(settings) <= {"model", "dtype", "max_model_len", "gpu_memory_utilization", "enable_prefix_caching", "skip_tokenizer_init"}

        def generate(self, prompts, settings, use_tqdm):
            asked.append((prompts, settings.__dict__))
            clock[0] += slow.pop() if slow else settings.max_tokens
            return [types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=[0] * settings.max_tokens)]) for _ in prompts]

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=types.SimpleNamespace, __version__="0.1", __spec__=None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    ready, write = generating.vllm(order(folder, engine="vllm", device="cuda:0"))
    turn = write(LOAD)
    assert (ready.weights, turn.peak, ready.software["vllm"]) == (None, None, "0.1")
    assert [settings["max_tokens"] for _, settings in asked] == [1, 4]
    assert all(settings["ignore_eos"] and settings["temperature"] == 0 for _, settings in asked)
    (prompts, _), (again, _) = asked
    assert prompts == again and [len(prompt["prompt_token_ids"]) for prompt in prompts] == [5, 5]
    assert all(0 <= token < 61 for prompt in prompts for token in prompt["prompt_token_ids"])
    assert (turn.first, turn.others) == (1, 3)
    slow[:] = [4, 9]  # taken from the end: the one token took longer than all
    assert write(LOAD) == turn and len(asked) == 6
    slow[:] = [4, 9] * generating.TRIES
    with pytest.raises(RuntimeError, match="4 tokens took no longer than one, 3 times"):
        write(LOAD)


def test_a_process_answers_line_by_line_and_says_why_it_can_not(tmp_path, monkeypatch):
    """With a stand-in for the process: what is read, what is written, and what is made of an end that comes too early."""
    helper = tmp_path / "helper.py"
    helper.write_text(
        "import sys, json, os, signal\n"
        "order = json.loads(sys.stdin.readline())\n"
        "print(json.dumps({'weights': 1, 'before': 2, 'threads': 1, 'software': {}}), flush=True)\n"
        "print('noise', file=sys.stderr, flush=True)\n"
        "for line in sys.stdin:\n"
        "    if order['folder'] == 'killed': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    if order['folder'] == 'no ' + order['engine']: raise RuntimeError('no vllm')\n"
        "    if order['folder'] == 'broken': raise MemoryError('too large')\n"
        "    print(json.dumps({'first': 0.5, 'others': 1.5, 'peak': json.loads(line)['batch_size']}), flush=True)\n"
    )
    start = subprocess.Popen
    monkeypatch.setattr(speed.subprocess, "Popen", lambda command, **options: start([sys.executable, str(helper)], **options))
    settings, place = Speed(batch_sizes=[1, 3], prompt_lengths=[4], new_tokens=2, repeats=2, vllm=False), Place("cpu", "a processor", "fp32")
    found = measure({"teacher": Path("a"), "student": Path("b")}, settings, place)
    assert [load["peak_bytes"] for load in found["engines"]["transformers"]["student"]["loads"]] == [1, 3]
    assert found["engines"]["transformers"]["teacher"]["loads"][0] == {
        "batch_size": 1, "prompt_length": 4, "new_tokens": 2, "first_seconds": [0.5, 0.5], "other_seconds": [1.5, 1.5], "peak_bytes": 1,
    }  # fmt: skip
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: name)
    on_gpu, kept, said = place._replace(device="cuda:0"), [], []
    monkeypatch.setattr(speed, "say_once", said.append)
    both = measure({"teacher": Path("a"), "student": Path("b")}, replace(settings, vllm=None), on_gpu)
    assert [[*sides] for sides in both["engines"].values()] == [["teacher", "student"]] * 2 and not said
    folders = {"teacher": Path("a"), "student": Path("no vllm")}
    assert [*measure(folders, replace(settings, vllm=None), on_gpu)["engines"]] == ["transformers"]
    (line,) = said
    assert line.startswith("vllm is left out: the speed of the student could not be measured: RuntimeError: no vllm")
    with pytest.raises(RequestError, match="no vllm"):
        measure(folders, replace(settings, vllm=True), on_gpu, keep=lambda found: kept.append([*found["engines"]]))
    assert kept == [["transformers"]]
    for folder, why in (("killed", "killed by signal 9, as where memory is short"), ("broken", "MemoryError: too large")):
        with pytest.raises(RequestError, match=rf"^the speed of the student could not be measured: {why}$"):
            measure({"teacher": Path("a"), "student": Path(folder)}, settings, place)


def test_a_process_that_stays_is_ended_with_what_it_started():
    """One that neither ends when nothing is asked any more nor lets go of its output, with a child that has it too."""
    program = "import subprocess, sys, time\nother = subprocess.Popen(['sleep', '600'])\nprint(other.pid, flush=True)\ntime.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    child = int(process.stdout.readline())
    speed.end(process, patience=0.2)
    assert process.returncode == -9 and process.stdin.closed and process.stdout.closed
    while Path(f"/proc/{child}").exists() and ") Z " not in Path(f"/proc/{child}/stat").read_text():
        time.sleep(0.01)


@pytest.mark.slow
def test_a_real_process_holds_the_model_alone(tmp_path):
    """Its resident memory, before and after; libraries' words don't get among the answers; a folder that is none is told in a line."""
    folder = save_model(tmp_path / "model", hidden_size=480, intermediate_size=1280, num_hidden_layers=8)
    weights = 4 * open_folder(folder, "model.path").arch.num_parameters()
    settings, place = Speed(batch_sizes=[1], prompt_lengths=[4], new_tokens=2, repeats=1, threads=1), Place("cpu", "a processor", "fp32")
    entry = measure({"student": folder}, settings, place)["engines"]["transformers"]["student"]
    assert entry["weights_bytes"] == weights
    assert entry["before_bytes"] + weights < entry["loads"][0]["peak_bytes"] < entry["before_bytes"] + 4 * weights + 200e6
    (folder / "config.json").write_text("{}")
    with pytest.raises(RequestError, match=r"^the speed of the student could not be measured: \S.*"):
        measure({"student": folder}, settings, place)


def test_the_most_memory_is_counted_from_anew():
    if generating.resident("VmHWM") is None or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this kernel does not count the most memory from anew")
    held = torch.zeros(2**26, dtype=torch.uint8) + 1
    most = generating.resident("VmHWM")
    del held
    generating.forget_peak(gpu=False)
    assert generating.resident("VmHWM") < most - 2**25
    assert Turn(1.0, 2.0, None).peak is None
