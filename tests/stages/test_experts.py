"""The whole chain on a model whose experts two ranks share out: what one rank keeps is kept, what one rank learns is learnt."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron.arch.arch import Arch
from tests.oracles.experts import save_experts
from tests.oracles.models import same_tensors
from tests.stages.commands import minitron, running, small_compression

CUT = ("target.num_moe_experts=4", "target.moe_ffn_hidden_size=16", "target.moe_shared_expert_intermediate_size=16", "target.hidden_size=40")
# replicas whose shares of the samples differ
FEW = (
    "calibrate.samples=15",
    "calibrate.skip_layers=1",
    "calibrate.skip_samples=5",
    "train.steps=6",
    "train.save_interval=3",
    "train.eval_interval=3",
)


@pytest.fixture(scope="module")
def settings(stories, tales, tmp_path_factory):
    """Of a compression of a random model that has the tokenizer of `stories`."""
    folder = save_experts(tmp_path_factory.mktemp("model") / "model", "qwen2_moe", 3, vocab_size=512)
    AutoTokenizer.from_pretrained(stories).save_pretrained(folder)
    small = [setting for setting in small_compression(folder, tales) if not setting.startswith("target.")]
    return [*small, *CUT, *FEW, "device=cpu", "dtype=fp32"]


@pytest.mark.slow
@pytest.mark.multirank
def test_compress_over_expert_ranks(settings, tmp_path):
    run, alone = tmp_path / "run", tmp_path / "alone"
    with running(tmp_path / "log", "compress", f"run.dir={run}", *settings, "parallel.ep=2", size=2) as ranks:
        assert ranks.results(timeout=300) == [0, 0], (tmp_path / "log0.err").read_text()
    done = minitron(tmp_path / "one", "compress", f"run.dir={alone}", *settings)
    assert (done.code, done.err) == (0, "")
    assert "experts per layer 6 -> 4, neurons per expert 20 -> 16, neurons of the shared expert 24 -> 16" in done.out

    assert same_tensors(*(load_file(folder / "keep.safetensors") for folder in (run, alone)))
    for name, score in load_file(run / "importance.safetensors").items():
        torch.testing.assert_close(score, load_file(alone / "importance.safetensors")[name], rtol=1e-5, atol=0.0)
    losses = [[json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (run, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)

    arch = Arch.from_dict(json.loads((run / "arch.json").read_text())["pruned"])
    assert (arch.num_moe_experts, arch.moe_ffn_hidden_size, arch.moe_shared_expert_intermediate_size) == (4, 16, 16)
    assert arch.moe_layers == (True, False, True, True)
    student = json.loads((run / "eval.json").read_text())["student"]
    model = AutoModelForCausalLM.from_pretrained(run / "hf", dtype=torch.float32)
    assert model.num_parameters() == arch.num_parameters() == student["params"]
    other = AutoModelForCausalLM.from_pretrained(alone / "hf", dtype=torch.float32)
    tokens = torch.arange(64)[None] + 40
    with torch.no_grad():
        assert (model(tokens).logits - other(tokens).logits).abs().max() < 1e-3
    assert student["loss"] == pytest.approx(json.loads((alone / "eval.json").read_text())["student"]["loss"], rel=1e-4)
    assert (run / "report.html").is_file()
