"""Shards -> a Hugging Face folder. One parameter at a time is gathered on rank 0 and written; nobody holds the whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.axes import Dim, Indices, num_units, parameters
from minitron.arch.families import hf_names, to_hf
from minitron.arch.shards import expert_rank, padded
from minitron.arch.units import from_units, to_units, unfuse
from minitron.errors import RequestError
from minitron.files import atomic_path
from minitron.weights.lineage import NOTICES
from minitron.weights.source import INDEX, SINGLE

SHARD_BYTES = 4 << 30
COMPANIONS = ("tokenizer*", "*.model", "special_tokens_map.json", "vocab.json", "merges.txt", "added_tokens.json", "generation_config.json",
              "chat_template*", *NOTICES)  # fmt: skip


def export(
    model: engine.Model,
    world: engine.World,
    source_config: dict[str, Any],
    companions: Path,
    target: Path,
    dtype: torch.dtype,
    texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write the model as a folder that `from_pretrained` loads as it is: config.json, safetensors, and the tokenizer's files.

    Called by every rank; rank 0 writes. `source_config` is the original's config.json, `companions` the folder whose
    tokenizer files and licence go along, `texts` the content of further files by name. The units of every axis are written in ascending order
    of the original.
    """
    tensors, failure = gathered(model, world), None
    try:
        if world.is_main:
            write_folder(model, tensors, source_config, companions, target, dtype, texts)
    except RequestError as error:
        failure = str(error)
    for _ in tensors:  # what is left to gather, on the other ranks all of it
        pass
    engine.refuse_together(failure, world)


def write_folder(
    model: engine.Model,
    tensors: Iterator[tuple[str, torch.Tensor]],
    source_config: dict[str, Any],
    companions: Path,
    target: Path,
    dtype: torch.dtype,
    texts: Mapping[str, str],
) -> None:
    """Rank 0's part of `export`."""
    with atomic_path(target) as folder:
        folder.mkdir()
        write_shards(((name, tensor.to(dtype)) for name, tensor in tensors), folder)
        config = to_hf(model.arch, source_config)
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
        config.pop("auto_map", None)  # names code of the original's, which does not go along
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for pattern in COMPANIONS:
            for file in companions.glob(pattern):
                if file.is_file() and file.suffix != ".py":
                    shutil.copyfile(file, folder / file.name)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")


def gathered(model: engine.Model, world: engine.World) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor on the CPU) of every parameter, on rank 0; the other ranks get nothing and must iterate too."""
    mine = {(row.name, at): name for name, row, at in engine.rows(model)}
    for row, at in parameters(model.arch):
        name = mine.get((row.name, at))
        tensor, arch = None if name is None else model.get_parameter(name).detach(), model.arch.layer(at.layer)
        # the first pipeline stage that has it speaks: a tied embedding is on two
        whole = engine.gather_to_main(tensor, world, row.tp_dim, expert_rank(at, arch, world.ep))
        if whole is None:
            continue
        if row.tp_dim is not None:
            dim = row.dims[row.tp_dim]
            whole = merge_shards(whole, row.tp_dim, dim, arch, world.tp, model.order(dim, at))
        names, transposed = hf_names(row, arch.family)
        parts = list(zip(names, unfuse(whole.cpu(), row.dims[0], arch), strict=True))
        for template in dict.fromkeys(names):
            tensor = torch.cat([part for name, part in parts if name == template])
            yield at.named(template), tensor.t() if transposed else tensor


def merge_shards(whole: torch.Tensor, index: int, dim: Dim, arch: Arch, tp: int, order: Indices | None = None) -> torch.Tensor:
    """Concatenated shards -> the unsharded tensor, without dead units, its units in ascending order of `order`.

    A shard of a dim that is laid out by part holds a piece of every part, so shards are joined unit by unit.
    """
    units = torch.cat([to_units(shard, index, dim, arch) for shard in whole.chunk(tp, dim=index)])
    assert units.shape[0] == num_units(dim, padded(arch, tp))
    live = units[: num_units(dim, arch)]
    return from_units(live if order is None else live[torch.from_numpy(order).argsort()], index, dim)


def write_shards(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors as they come into files of at most about `shard_bytes`, with an index where there is more than one."""
    files: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    total = held = 0

    def flush() -> None:
        save_file(pending, folder / f"part-{len(files)}.safetensors", metadata={"format": "pt"})
        files.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and held + size > shard_bytes:
            flush()
            held = 0
        pending[name] = tensor.contiguous()
        total, held = total + size, held + size
    flush()
    if len(files) == 1:
        (folder / "part-0.safetensors").rename(folder / SINGLE)
        return
    weight_map = {}
    for number, names in enumerate(files):
        final = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / final)
        weight_map.update(dict.fromkeys(names, final))
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")
