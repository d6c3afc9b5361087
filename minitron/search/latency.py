"""How long a forward pass of a candidate takes: from a table of measured parts, blocks of each size and the rest of a model of each width.

Only sizes that were measured are predicted, nothing is interpolated: a model's time is that of its embedding, of its blocks one after another and of
its head. Over pipeline stages this is one batch's way through all of them; passing on hidden states is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from minitron import engine
from minitron.arch.arch import Arch
from minitron.config.schema import Config
from minitron.config.setting import MISSING
from minitron.errors import refuse
from minitron.files import as_written, read_json, write_json
from minitron.search.budget import Measure
from minitron.search.candidates import SIZES, name_of

FILE = "latency.json"
Bar = Callable[[int], AbstractContextManager[Callable[[], None]]]


@dataclasses.dataclass
class Table:
    """Milliseconds on one machine in one setting (`key`). `blocks` by `block_name`; `outside` by width: before the blocks, and after them."""

    key: dict[str, Any]
    blocks: dict[str, float] = dataclasses.field(default_factory=dict)
    outside: dict[str, list[float]] = dataclasses.field(default_factory=dict)

    def lacks(self, arch: Arch) -> bool:
        """Whether a part of such a model is not measured yet."""
        return block_name(arch) not in self.blocks or str(arch.hidden_size) not in self.outside

    def predict(self, arch: Arch) -> float:
        """Milliseconds of a forward pass."""
        return sum(self.outside[str(arch.hidden_size)]) + arch.num_layers * self.blocks[block_name(arch)]


def block_name(arch: Arch) -> str:
    """What tells blocks apart: H512-F1152-A9-G3."""
    return name_of({name: getattr(arch, name) for name in SIZES[1:]})


def setting_of(arch: Arch, cfg: Config) -> dict[str, Any]:
    """What times depend on beside the sizes that a search varies and the machine: the rest of the model, the load, the layout."""
    model = {name: value for name, value in arch.to_dict().items() if name not in (*SIZES, "layers", "max_position_embeddings", "rope")}
    layout = {name: getattr(cfg.parallel, name) for name in ("tp", "pp", "vpp", "cp", "ep", "sp")}
    return {"model": model, "dtype": cfg.dtype, "batch_size": cfg.search.batch_size, "seq_length": cfg.search.seq_length, "parallel": layout}


def check_blocks(arch: Arch, cfg: Config) -> None:
    """Refuse a budget of time for a model with two kinds of blocks: one block is measured for all of a model's."""
    if cfg.search.latency_ms is not None and len(set(arch.moe_layers)) > 1:
        raise refuse(
            "search.latency_ms", cfg.search.latency_ms, "blocks with experts and dense ones in one model can't be told apart; null is needed"
        )


def machine_of(world: engine.World, spec: str) -> dict[str, Any]:
    """What they depend on of the machine and its software."""
    import torch

    gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if gpu else "cpu"
    return {"device": device, "threads": None if gpu else torch.get_num_threads(), "torch": torch.__version__, "spec": spec}


def read_tables(folder: Path) -> list[Table]:
    """The tables that earlier measurements left in a run's folder."""
    file = folder / FILE
    if not file.exists():
        return []
    with as_written(file):
        return [Table(**table) for table in read_json(file)]


def write_table(folder: Path, table: Table) -> None:
    """Put a table in the place of the one with the same key."""
    others = [other for other in read_tables(folder) if other.key != table.key]
    write_json(folder / FILE, [dataclasses.asdict(one) for one in (*others, table)])


def no_bar(total: int) -> AbstractContextManager[Callable[[], None]]:
    """Shows nothing."""
    return contextlib.nullcontext(lambda: None)


def measured(arch: Arch, cfg: Config, world: engine.World, spec: str, folder: Path, bar: Bar = no_bar) -> Measure | None:
    """Latencies for `find`, measured where latency.json has none yet; None where no budget asks. Each part is kept as soon as it is there.

    `find` is then called by every rank together. `bar(total)` shows how far that is: it yields what is called for each size that is measured.
    """
    if cfg.search.latency_ms is None:
        return None

    def measure(archs: Sequence[Arch]) -> list[float]:
        key = {**machine_of(world, spec), **setting_of(arch, cfg)}
        tables = engine.on_main(world, lambda: [table for table in read_tables(folder) if table.key == key])
        table = tables[0] if tables else Table(key)
        with bar(len({block_name(one) for one in archs if table.lacks(one)})) as advance:
            for one in archs:
                if table.lacks(one):
                    add(table, one, cfg, world, spec)
                    engine.on_main(world, lambda: write_table(folder, table))
                    advance()
        return [table.predict(one) for one in archs]

    return measure


def add(table: Table, arch: Arch, cfg: Config, world: engine.World, spec: str) -> None:
    """Measure what a table lacks of a model. Called by every rank together."""
    load = engine.Load(cfg.search.batch_size, cfg.search.seq_length)
    whole = str(arch.hidden_size) not in table.outside
    # a large vocabulary is only there where its time is asked for, or where routers need different tokens to choose different experts
    probe = arch if whole or arch.num_moe_experts is not None else arch.replace(vocab_size=world.tp)
    parts = engine.time_parts(probe, load, world, engine.DTYPES[cfg.dtype], spec)
    table.blocks[block_name(arch)] = parts.block
    if whole:
        table.outside[str(arch.hidden_size)] = [parts.embedding, parts.head]


def known(arch: Arch, cfg: Config) -> Measure | None:
    """Latencies for `find` of what an earlier search measured in run.dir, nothing else; the newest table counts where several machines were used."""
    if cfg.search.latency_ms is None:
        return None
    check_blocks(arch, cfg)
    setting = setting_of(arch, cfg)
    tables = read_tables(Path(cfg.run.dir)) if cfg.run.dir != MISSING else []
    fitting = [table for table in tables if {name: table.key.get(name) for name in setting} == setting]

    def look_up(archs: Sequence[Arch]) -> list[float]:
        if not fitting or any(fitting[-1].lacks(one) for one in archs):
            where = "which minitron plan does not do: minitron search does, and leaves them in run.dir/latency.json for it"
            raise refuse("search.latency_ms", cfg.search.latency_ms, f"times of these sizes must be measured first, {where}")
        return [fitting[-1].predict(one) for one in archs]

    return look_up


@dataclasses.dataclass(frozen=True)
class Checked:
    """Milliseconds as the table has them and as the whole model, with random weights, takes; `error`: by what share the first is off."""

    predicted: float
    real: float

    @property
    def error(self) -> float:
        """Positive where the prediction is too long."""
        return self.predicted / self.real - 1


def check(arch: Arch, predicted: float, cfg: Config, world: engine.World, spec: str) -> Checked:
    """Hold a prediction against the whole model. Called by every rank together."""
    load = engine.Load(cfg.search.batch_size, cfg.search.seq_length)
    return Checked(predicted, engine.time_forward(arch, load, world, engine.DTYPES[cfg.dtype], spec))
