"""The whole way from activations to a pruned model at one layout, and how far it is from plain `transformers` and brute force."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.config.schema import Parallel, Target
from minitron.engine.schedule import forward_only, in_passes
from minitron.importance.depth import losses_without
from minitron.importance.hooks import Probes
from minitron.importance.scores import LAYERS_LOSS, collect
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.weights.load import load
from minitron.weights.save import export
from minitron.weights.source import open_folder
from tests.multirank.ranks import Layout, on_ranks
from tests.oracles.importance import Recorded
from tests.oracles.models import hf_model, same_tensors, save_model, saved_tensors, tokens_of
from tests.oracles.sharded import of_last_stage, whole_logits
from tests.oracles.slicing import sliced

MODEL = {"num_hidden_layers": 6, "num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 48, "intermediate_size": 60, "head_dim": 6}
VOCAB, SAMPLES, LENGTH = 61, 12, 24
TARGETS = {
    "width": Target(hidden_size=32, ffn_hidden_size=36, num_query_groups=3),
    "heads": Target(num_attention_heads=8),
    "layers by BI": Target(num_layers=4),
    "layers by loss": Target(num_layers=4, layers_by="loss"),
}
LAYOUTS = (
    Layout(), Layout(tp=2), Layout(tp=4), Layout(pp=2), Layout(pp=4), Layout(tp=2, pp=2), Layout(tp=2, pp=2, sp=True), Layout(dp=2),
    Layout(tp=2, dp=2), Layout(cp=2), Layout(tp=2, cp=2), Layout(tp=2, cp=2, sp=True), Layout(pp=2, vpp=2),
)  # fmt: skip


def make_model(folder: Path, **changes: Any) -> Path:
    """A random model whose kinds of units are all of odd number."""
    return save_model(folder, 11, **MODEL, **changes)


def at_layout(world: Any, folder: Path, out: Path, targets: dict[str, Target]) -> dict[str, Any]:
    """Scores, and of every target what is kept, the pruned model's logits and its export under `out`."""
    source = open_folder(folder, "model.path")
    windows = tokens_of(VOCAB, SAMPLES, LENGTH + 1)[world.dp_rank :: world.dp]
    model = load(source, world, torch.float32)
    probes = Probes(model, world, "mean", "l2", LENGTH)
    with probes.attached():
        for group in in_passes(windows[:, :-1].split(2), world, lambda tokens_BS: tokens_BS.shape):
            forward_only(model, group, world, watch=probes)
    scores = collect(probes, world)
    batches = [(batch, torch.ones(len(batch), dtype=torch.bool)) for batch in windows.split(2)]
    scores[f"{LAYERS_LOSS}.1"] = losses_without(model, batches, world, [1])[1]
    found: dict[str, Any] = {"scores": scores, "keeps": {}, "logits": {}}
    for name, target in targets.items():
        arch = target_arch(source.arch, target, Parallel(tp=world.tp, pp=world.pp, cp=world.cp, vpp=world.vpp, ep=world.ep))
        keep = found["keeps"][name] = select(scores, source.arch, arch, target.layers_by)
        pruned = reslice(load(source, world, torch.float32), keep, arch, world)
        found["logits"][name] = whole_logits(pruned, tokens_of(VOCAB, 2, LENGTH), world)
        export(pruned, world, source.config, folder, out / name, torch.float32)
    return found


def oracle_scores(folder: Path) -> dict[str, np.ndarray]:
    """The scores of a plain model, from whole activations in float64, and its loss without each layer."""
    windows = tokens_of(VOCAB, SAMPLES, LENGTH + 1)
    losses = []
    for layer in range(hf_model(folder).config.num_hidden_layers):
        model = hf_model(folder).double()
        del model.model.layers[layer]
        for number, block in enumerate(model.model.layers):
            block.self_attn.layer_idx = number
        model.config.num_hidden_layers -= 1
        model.config._experts_implementation = "eager"  # the kernels for experts know no float64
        with torch.no_grad():
            losses.append(model(windows, labels=windows, use_cache=False).loss.item())
    return {**Recorded(folder, windows[:, :-1]).scores("l2", "mean"), f"{LAYERS_LOSS}.1": np.array(losses)}


def compared(layout: Layout, folder: Path, out: Path, oracle: dict[str, np.ndarray], targets: dict[str, Target] = TARGETS) -> dict[str, Any]:
    """One row of the table: the largest relative error of each axis' scores, kept sets and tensors that differ, the largest error of a logit."""
    ranks = on_ranks(at_layout, layout, folder, out, targets)
    errors: dict[str, float] = {}
    for found in ranks:
        assert found["scores"].keys() == oracle.keys()
        for name, score in found["scores"].items():
            axis = ".".join(name.split(".")[:2]) if name.startswith("layers") else name.split(".")[0]
            errors[axis] = max(errors.get(axis, 0.0), float(np.abs(score.double().numpy() / oracle[name] - 1).max()))
    source = open_folder(folder, "model.path")
    scores = {name: torch.from_numpy(score) for name, score in oracle.items()}
    kept = tensors = 0
    logits = 0.0
    for name, target in targets.items():
        keep = select(scores, source.arch, target_arch(source.arch, target, Parallel()), target.layers_by)
        kept += sum(not same_tensors(found["keeps"][name].tensors(), keep.tensors()) for found in ranks)
        expected = sliced(saved_tensors(folder), source.arch.kv_channels, keep)
        tensors += not same_tensors(saved_tensors(out / name), expected)
        with torch.no_grad():
            brute_force = hf_model(out / name)(tokens_of(VOCAB, 2, LENGTH)).logits
        logits = max(logits, float((of_last_stage([found["logits"][name] for found in ranks]) - brute_force).abs().max()))
    return {"layout": str(layout), **errors, "kept ≠": kept, "tensors ≠": tensors, "logits": logits}
