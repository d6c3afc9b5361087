"""The teacher: one that is there, or one that `minitron train` makes from random weights first."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from benchmarks.paper.claims import Teacher
from minitron.config.compose import compose
from minitron.stages import export, train


def filled(settings: Sequence[str], data: Path) -> list[str]:
    """Settings with `{data}` replaced."""
    return [one.replace("{data}", str(data)) for one in settings]


def make(teacher: Teacher, folder: Path, seed: int, data: Path) -> list[str]:
    """The settings that name the teacher, which is trained in `folder` where it is to be and is not there yet; broken off, that goes on."""
    start = None if teacher.start is None else filled([teacher.start], data)[0]
    if not teacher.training:
        return [] if start is None else [f'model.path="{start}"']
    run, made = folder / "run", folder / "run" / "hf"
    if not (made / "config.json").is_file():
        if start is None:
            start = str(random_model(teacher, folder / "random", seed, data / "stories260k"))
        given = [one for one in filled(teacher.settings, data) if one.startswith(("data.", "eval.", "dtype="))]
        cfg = [*given, *teacher.training, f'model.path="{start}"', f'run.dir="{run}"', f"seed={seed}"]
        train.run(compose("train", cfg))
        export.run(compose("export", cfg))
    return [f'model.path="{made}"']


def random_model(teacher: Teacher, folder: Path, seed: int, tokenizer: Path) -> Path:
    """A Hugging Face folder with random weights and a tokenizer; made unless it is there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        torch.manual_seed(seed)
        LlamaForCausalLM(LlamaConfig(**teacher.shape)).save_pretrained(folder)
        for file in tokenizer.glob("tokenizer*.json"):
            shutil.copyfile(file, folder / file.name)
    return folder
