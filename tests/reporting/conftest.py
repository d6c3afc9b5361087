"""A made-up run folder with the sizes of SmolLM2-135M and numbers that such a run could have."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from minitron.arch import Arch

ORIGINAL = Arch("llama", 30, 576, 1536, 9, 3, 64, 49152, 8192, share_embeddings_and_output_weights=True)
LOSSES = {"teacher": (2.65, 3.48), "pruned": (4.38, 5.60), "student": (2.95, 4.02)}  # held-out, wikitext2
CONFIG = """run:
  dir: runs/smollm2
model:
  path: HuggingFaceTB/SmolLM2-135M
target:
  hidden_size: 512
  ffn_hidden_size: 1152
train:
  steps: 1200
  seq_length: 1024
  lr: 0.0004
"""
KD = "distill:\n  loss: forward_kl\n  temperature: 1.0\n  top_k: null\n  cross_entropy: 0.0\n"


def largest(scores, count):
    """Indices of the `count` largest scores, ascending."""
    return np.sort(np.argsort(-scores, kind="stable")[:count]).astype(np.int64)


def write_scores(folder: Path, original: Arch, pruned: Arch) -> None:
    """importance.safetensors and keep.safetensors of a prune from `original` to `pruned`."""
    rng = np.random.default_rng(7)
    scores = {"hidden": rng.lognormal(0, 0.7, original.hidden_size)}
    scores["hidden"][[3, 37]] *= 60  # real models have a few channels of massive activations
    depth = np.linspace(0, 1, original.num_layers)
    scores["layers.bi"] = 0.05 + 0.3 * np.exp(-depth * 12) + 0.12 * np.exp((depth - 1) * 9) + rng.uniform(0, 0.03, original.num_layers)
    for layer in range(original.num_layers):
        scores[f"ffn.{layer}"] = rng.lognormal(layer / 10, 0.5 + 0.4 * depth[layer], original.ffn_hidden_size)
        scores[f"heads.{layer}"] = rng.lognormal(layer / 10, 0.6, original.num_attention_heads)
        scores[f"groups.{layer}"] = scores[f"heads.{layer}"].reshape(original.num_query_groups, -1).sum(1)
    scores = {name: value.astype(np.float32) for name, value in scores.items()}
    header = {"criterion": "activation", "batch_agg": "l2", "seq_agg": "mean", "samples": "1024", "seq_length": "512", "version": "1"}
    save_file(scores, folder / "importance.safetensors", metadata=header)

    keep = {"hidden": largest(scores["hidden"], pruned.hidden_size), "layers": largest(scores["layers.bi"], pruned.num_layers)}
    per_group = pruned.num_attention_heads // pruned.num_query_groups
    for layer in keep["layers"]:
        groups = largest(scores[f"groups.{layer}"], pruned.num_query_groups)
        heads = scores[f"heads.{layer}"].reshape(original.num_query_groups, -1)
        keep[f"ffn.{layer}"] = largest(scores[f"ffn.{layer}"], pruned.ffn_hidden_size)
        keep[f"groups.{layer}"] = groups
        keep[f"heads.{layer}"] = np.concatenate([group * original.heads_per_group + largest(heads[group], per_group) for group in groups])
    save_file(keep, folder / "keep.safetensors")


def write_metrics(folder: Path, steps: int = 1200) -> None:
    """metrics.jsonl of a distillation, one step of which was skipped."""
    rng = np.random.default_rng(8)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            kd = 0.28 + 1.35 * np.exp(-step / 130) + 0.25 * np.exp(-step / 700) + rng.normal(0, 0.035)
            rate = 4e-4 * step / 40 if step < 40 else 4e-5 + 1.8e-4 * (1 + np.cos(np.pi * (step - 40) / (steps - 40)))
            line = {"step": step, "loss": kd, "kd_loss": kd, "lr": rate, "grad_norm": 1.2, "tokens": step * 32768, "tokens_per_second": 1510.0}
            if step == 600:
                line |= {"loss": None, "kd_loss": None, "skipped": True}
            if step % 100 == 0:
                line["valid_loss"] = 2.95 + 0.9 * np.exp(-step / 220)
            file.write(json.dumps(line) + "\n")


def write_parts(folder: Path, steps: int) -> None:
    """metrics.jsonl and config.yaml of a distillation with every part of the loss, whose total falls while its kd_loss rises."""
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for step in range(1, steps + 1):
            parts = {"kd_loss": 0.5 + 0.3 * step / steps, "ce_loss": 3 + 2 * np.exp(-4 * step / steps), "hidden_loss": 0.2 * np.exp(-step / steps)}
            total = parts["kd_loss"] + 0.5 * parts["ce_loss"] + 2 * parts["hidden_loss"]
            line = {"step": step, "loss": total, **parts, "alpha": 2.0, "lr": 4e-4 * (1 - step / (steps + 1)), "tokens": step * 8192}
            file.write(json.dumps(line | ({"valid_loss": parts["ce_loss"]} if step % (steps // 4) == 0 else {})) + "\n")
    distill = "distill:\n  loss: jsd\n  beta: 0.3\n  temperature: 2.0\n  top_k: 64\n  cross_entropy: 0.5\n  hidden:\n    alpha: 2.0\n"
    (folder / "config.yaml").write_text(CONFIG + distill, encoding="utf-8")


def write_evals(folder: Path, original: Arch, pruned: Arch) -> None:
    """eval.json of teacher, pruned and distilled model."""
    evals = {}
    for key, (held_out, wikitext) in LOSSES.items():
        arch = original if key == "teacher" else pruned
        evals[key] = {
            "params": arch.num_parameters(),
            "loss": held_out,
            "perplexity": float(np.exp(held_out)),
            "tokens": 65536,
            "tokens_per_second": 1210.0 if key == "teacher" else 1530.0,
            "texts": {"wikitext2": {"loss": wikitext, "perplexity": float(np.exp(wikitext)), "tokens": 65536}},
            "tasks": {},
        }
    (folder / "eval.json").write_text(json.dumps(evals), encoding="utf-8")


def write_run(folder: Path, pruned: Arch, original: Arch = ORIGINAL) -> Path:
    """Every file of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG + KD, encoding="utf-8")
    (folder / "arch.json").write_text(json.dumps({"original": original.to_dict(), "pruned": pruned.to_dict()}), encoding="utf-8")
    write_scores(folder, original, pruned)
    write_metrics(folder)
    write_evals(folder, original, pruned)
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text("{}", encoding="utf-8")
    return folder


WIDTH = ORIGINAL.replace(hidden_size=512, ffn_hidden_size=1152)
EVERY_AXIS = ORIGINAL.replace(num_layers=26, hidden_size=512, ffn_hidden_size=1152, num_attention_heads=4, num_query_groups=2)


@pytest.fixture
def run_dir(tmp_path):
    """A finished run that pruned widths: 576 -> 512 hidden, 1536 -> 1152 MLP neurons."""
    return write_run(tmp_path / "smollm2", WIDTH)


@pytest.fixture
def every_axis_run_dir(tmp_path):
    """A finished run that pruned every axis, layers too."""
    return write_run(tmp_path / "every_axis", EVERY_AXIS)
