"""Hugging Face -> shards. Each rank reads its own slices from the files, one parameter at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.axes import PARAMETERS, VOCAB, At, Parameter, num_units, part_sizes
from minitron.arch.families import hf_names
from minitron.arch.shards import held_units, shard_shape
from minitron.arch.units import to_units
from minitron.weights.source import Source, stored_name


def load(source: Source, world: engine.World, dtype: torch.dtype, spec: str = "torch", recompute: str = "none") -> engine.Model:
    """This rank's shard of the model in `dtype`. Peak memory: the shard and one parameter."""
    model = engine.skeleton(source.arch, world, dtype, spec, recompute)
    reader = Reader(source.files)
    for name, row, at in engine.rows(model):
        engine.put(model, name, row, at, read_shard(reader, row, at, source.arch, world, dtype))
    reader.close()
    return model


def load_head(source: Source, world: engine.World, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    """This rank's part of the head alone [v, H], without vocabulary padding, and the number of its first token: of a model that itself lies in
    another layout. Stages before the last get no rows."""
    live, _ = held_units(VOCAB, source.arch, world.tp, world.tp_rank, sharded=True)
    if not world.is_last_stage:
        return torch.empty(0, source.arch.hidden_size, dtype=dtype, device=world.device), live.start
    name = "embedding.word_embeddings.weight" if source.arch.share_embeddings_and_output_weights else "output_layer.weight"
    reader = Reader(source.files)
    shard_VH = read_shard(reader, next(row for row in PARAMETERS if row.name == name), At(), source.arch, world, dtype)
    reader.close()
    return shard_VH[: len(live)], live.start


class Reader:
    """Slices of tensors, by name, from any number of safetensors files; each file is opened once."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files, self.handles = files, dict[Path, Any]()

    def read(self, name: str, index: tuple[slice, ...]) -> torch.Tensor:
        """The part `index` of a tensor; nothing else of it is read."""
        name = stored_name(name, self.files)
        file = self.files[name]
        if file not in self.handles:
            self.handles[file] = safe_open(file, framework="pt").__enter__()
        tensor: torch.Tensor = self.handles[file].get_slice(name)[index]
        return tensor

    def close(self) -> None:
        """Close every file."""
        for handle in self.handles.values():
            handle.__exit__(None, None, None)
        self.handles.clear()


def read_shard(reader: Reader, row: Parameter, at: At, arch: Arch, world: engine.World, dtype: torch.dtype) -> torch.Tensor:
    """A rank's part of one parameter, its parts fused as the table says, dead units zero: each part is read into its place."""
    shard = torch.zeros(shard_shape(row, arch, world.tp), dtype=dtype, device=world.device)
    held = [held_units(dim, arch, world.tp, world.tp_rank, sharded=index == row.tp_dim)[0] for index, dim in enumerate(row.dims)]
    sizes = part_sizes(row.dims[0], arch)
    places_UPR = to_units(shard, 0, row.dims[0], arch).split(sizes, dim=1)
    names, transposed = hf_names(row, arch.family)
    begins = dict.fromkeys(names, 0)  # where the next part begins in each tensor
    for template, size, place_UPR in zip(names, sizes, places_UPR, strict=True):
        rows_per_unit = [size, *(sum(part_sizes(dim, arch)) for dim in row.dims[1:])]
        first, *others = [slice(units.start * n, units.stop * n) for units, n in zip(held, rows_per_unit, strict=True)]
        index = (slice(begins[template] + first.start, begins[template] + first.stop), *others)
        begins[template] += num_units(row.dims[0], arch) * size
        part = reader.read(at.named(template), index[::-1] if transposed else index)
        part = part.t() if transposed else part
        place = place_UPR[: len(held[0])]
        for dim, length in enumerate(part.shape[1:], start=2):
            place = place.narrow(dim, 0, length)
        place.copy_(part.reshape(place.shape))
    return shard
