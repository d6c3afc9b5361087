"""One GPU: logits, and the whole chain."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.config.schema import Parallel
from minitron.engine.parallel import world
from minitron.weights.load import load
from minitron.weights.source import open_folder
from tests.oracles.models import hf_model, save_model, tokens_of
from tests.oracles.sharded import whole_logits
from tests.stages.commands import small_compression

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible to torch")]


@pytest.mark.parametrize("changes", [None, {"num_key_value_heads": 1, "hidden_size": 50, "num_attention_heads": 4}], ids=["stories260k", "odd"])
def test_logits_in_fp32_are_those_of_transformers(changes, stories, tmp_path):
    folder = stories if changes is None else save_model(tmp_path / "model", **changes)
    with world(Parallel(), "cuda", 1) as here:
        source = open_folder(folder, "model.path")
        assert here.device.type == "cuda"
        tokens = tokens_of(source.arch.vocab_size, 2, 48)
        found = whole_logits(load(source, here, torch.float32), tokens, here)
    with torch.no_grad():
        expected = hf_model(folder).to("cuda")(tokens.to("cuda")).logits
    assert (found - expected).abs().max() < 1e-4


def test_the_chain_in_bf16(stories, tales, tmp_path):
    command = [sys.executable, "-m", "minitron", "compress", f"run.dir={tmp_path / 'run'}", *small_compression(stories, tales)]
    for _ in range(2):  # the second finds everything done
        done = subprocess.run([*command, "device=cuda", "dtype=bf16"], cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["teacher"]["loss"] < found["student"]["loss"] < found["pruned"]["loss"]
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf")
    assert student.dtype == torch.bfloat16
    assert student.num_parameters() == found["student"]["params"]
