"""From a rank's sums to the scores of the whole model, and the layout-free file that holds them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.axes import CUT, At, Indices
from minitron.arch.units import to_units
from minitron.errors import RequestError
from minitron.files import atomic_path
from minitron.importance.aggregate import finish_batch
from minitron.importance.hooks import LAYERS_BI, Probes

Tensor = torch.Tensor
FILE = "importance.safetensors"
# without every run of N layers, the loss and the share of questions answered rightly: "layers.loss.N", "layers.choices.N" [layers - N + 1]
MLP = ("ffn.", "experts.", "expert_ffn.", "shared_ffn.")  # what the scores of a block's second half are called
LAYERS_LOSS, LAYERS_CHOICES = "layers.loss", "layers.choices"


@dataclasses.dataclass(frozen=True)
class Scores:
    """Scores of every unit, fp32, in the unsharded order: "hidden", "ffn.{layer}", "heads.{layer}", "groups.{layer}", "layers.bi", and
    where they were measured "layers.loss.{N}" and "layers.choices.{N}": the loss, and the share of right answers, without every run of N layers.
    A layer with experts has "experts.{layer}", "expert_ffn.{layer}" [experts, neurons] and, with a shared one, "shared_ffn.{layer}" for "ffn".

    Of the others, higher matters more. `provenance` says what they were measured on.
    """

    tensors: dict[str, Tensor]
    provenance: dict[str, str]

    def save(self, path: Path) -> None:
        """Write the layout-free file."""
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, temporary, metadata=self.provenance)

    @classmethod
    def load(cls, path: Path, arch: Arch, model_hash: str) -> Scores:
        """Read scores; those of another model are refused."""
        try:
            with safe_open(path, framework="pt") as handle:
                provenance = dict(handle.metadata() or {})
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"cannot read {path}: {error} (minitron calibrate makes it)") from error
        if provenance.get("model_hash") != model_hash:
            raise RequestError(f"{path} was measured on another model (hash {provenance.get('model_hash')}, this one is {model_hash})")
        if LAYERS_LOSS in tensors:  # files of before several lengths were measured: the one length is told by the number of runs
            losses = tensors.pop(LAYERS_LOSS)
            tensors[f"{LAYERS_LOSS}.{arch.num_layers - len(losses) + 1}"] = losses
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        lengths = range(1, arch.num_layers)
        runs = {f"{kind}.{length}": (arch.num_layers - length + 1,) for kind in (LAYERS_LOSS, LAYERS_CHOICES) for length in lengths}
        if shapes != expected_shapes(arch) | {name: shape for name, shape in runs.items() if name in shapes}:
            raise RequestError(f"{path}: its tensors do not fit the model's sizes")
        return cls(tensors, provenance)


def expected_shapes(arch: Arch) -> dict[str, tuple[int, ...]]:
    """Name and shape of every score tensor."""
    shapes: dict[str, tuple[int, ...]] = {"hidden": (arch.hidden_size,), LAYERS_BI: (arch.num_layers,)}
    for layer in range(arch.num_layers):
        if arch.routes(layer):
            shapes |= expert_shapes(arch, layer)
        else:
            shapes[f"ffn.{layer}"] = (arch.ffn_hidden_size,)
        shapes[f"heads.{layer}"] = (arch.num_attention_heads,)
        shapes[f"groups.{layer}"] = (arch.num_query_groups,)
    return shapes


def expert_shapes(arch: Arch, layer: int) -> dict[str, tuple[int, ...]]:
    """As `expected_shapes`, of the MLP of a layer that has experts."""
    assert arch.num_moe_experts is not None and arch.moe_ffn_hidden_size is not None
    shapes: dict[str, tuple[int, ...]] = {
        f"experts.{layer}": (arch.num_moe_experts,),
        f"expert_ffn.{layer}": (arch.num_moe_experts, arch.moe_ffn_hidden_size),
    }
    if arch.moe_shared_expert_intermediate_size is not None:
        shapes[f"shared_ffn.{layer}"] = (arch.moe_shared_expert_intermediate_size,)
    return shapes


def collect(probes: Probes, world: engine.World) -> dict[str, Tensor]:
    """Scores of the whole model on every rank, from what each rank's probes summed."""
    arch = probes.model.arch
    sizes = {"ffn": arch.ffn_hidden_size, "heads": arch.num_attention_heads, "shared_ffn": arch.moe_shared_expert_intermediate_size}
    counts = torch.tensor([probes.samples, probes.tokens], dtype=torch.float64, device=world.device)
    names = sorted(probes.totals)
    samples, tokens = engine.sum_over_replicas([counts], world)[0].tolist()
    totals = dict(zip(names, engine.sum_over_replicas([probes.totals[name] for name in names], world), strict=True))
    mine = probes.experts.scores()
    for name, sums_KU in totals.items():
        axis = name.split(".")[0]
        if name.startswith(LAYERS_BI):
            mine[name] = 1.0 - sums_KU[0] / tokens
            continue
        score_U = finish_batch(sums_KU, probes.batch_agg, samples)
        if axis in sizes:  # these units lie over the tensor ranks, dead ones last
            score_U = engine.gather_shards(score_U, world)[: sizes[axis]]
        mine[name] = score_U
    whole = combine(engine.merge_over_stages({name: score.cpu() for name, score in mine.items()}, world), arch)
    return in_order(whole, probes.model.unit_order)


def in_order(scores: dict[str, Tensor], orders: Mapping[str, Indices]) -> dict[str, Tensor]:
    """Scores of units as they lie -> in ascending order of the units; `orders` is `Model.unit_order`."""
    sorted_scores = dict(scores)
    for name, order in orders.items():
        axis, layer = name.split(".")
        for scored in (name, f"heads.{layer}") if axis == "groups" else (name,):  # heads lie with their group
            sorted_scores[scored] = scores[scored].view(len(order), -1)[torch.from_numpy(order.argsort())].flatten()
    return sorted_scores


def combine(probed: dict[str, Tensor], arch: Arch) -> dict[str, Tensor]:
    """Scores per probe -> scores per axis: hidden summed over every norm of the model, groups summed over their heads."""
    scores = {"hidden": torch.stack([probed[f"hidden.{n}"] for n in range(2 * arch.num_layers + 1)]).sum(dim=0)}
    scores[LAYERS_BI] = torch.cat([probed[f"{LAYERS_BI}.{layer}"] for layer in range(arch.num_layers)])
    scores |= {name: score for name, score in probed.items() if name.startswith(MLP)}
    for layer in range(arch.num_layers):
        scores[f"heads.{layer}"] = probed[f"heads.{layer}"]
        scores[f"groups.{layer}"] = probed[f"heads.{layer}"].view(arch.num_query_groups, -1).sum(dim=1)
    return {name: score.float() for name, score in scores.items()}


def random_scores(arch: Arch, seed: int) -> dict[str, Tensor]:
    """Scores that rank the units at random: the baseline that says whether measuring is worth it."""
    generator = np.random.default_rng(seed)
    return {name: torch.from_numpy(generator.random(shape, dtype=np.float32)) for name, shape in expected_shapes(arch).items()}


def magnitude_scores(model: engine.Model, world: engine.World) -> dict[str, Tensor]:
    """L2 norm of all weights that belong to a unit: the classic baseline. Same names and sizes as `collect` returns."""
    arch = model.arch
    shapes = expected_shapes(arch)
    squares: dict[str, Tensor] = {}
    of_experts: dict[str, Tensor] = {}  # of those that this rank holds

    def add(into: dict[str, Tensor], key: str, value: Tensor, at: At) -> None:
        if at.expert is not None and key.startswith(("experts.", "expert_ffn.")):
            whole = into.setdefault(key, value.new_zeros(shapes[key]))
            whole[at.expert] += value
        else:
            into[key] = into[key] + value if key in into else value

    for name, row, at in engine.rows(model):
        if engine.is_copy(name, model):
            continue  # a copy of what the first stage counts
        weight, into = model.get_parameter(name).detach().double(), of_experts if row.per_expert else squares
        for index, dim in enumerate(row.dims):
            units_UPR = to_units(weight, index, dim, arch)
            square_UP = units_UPR.square().flatten(2).sum(dim=2) if units_UPR.dim() > 2 else units_UPR.square()
            sharded_elsewhere = row.tp_dim is not None and row.tp_dim != index
            for key, value in _per_axis(square_UP, dim.axis, dim.parts, at, arch).items():
                if sharded_elsewhere:
                    value = engine.sum_over_tensor_ranks(value, world)
                elif row.tp_dim == index:
                    value = engine.gather_shards(value, world)[: shapes[key][-1]]
                add(into, key, value, at)
        total = weight.square().sum()
        if at.layer is not None:
            total = engine.sum_over_tensor_ranks(total, world) if row.tp_dim is not None else total
            add(into, f"{LAYERS_BI}.{at.layer}", total[None], at)
            if row.per_expert:
                add(into, f"experts.{at.layer}", total, at)
    for key, value in zip(of_experts, engine.sum_over_expert_ranks(list(of_experts.values()), world), strict=True):
        squares[key] = squares[key] + value if key in squares else value
    merged = engine.merge_over_stages({key: value.cpu() for key, value in squares.items()}, world, add=("hidden",))
    whole = {key: value.sqrt().float() for key, value in merged.items()}
    layers = torch.cat([whole.pop(f"{LAYERS_BI}.{layer}") for layer in range(arch.num_layers)])
    return in_order({**whole, LAYERS_BI: layers}, model.unit_order)


def _per_axis(square_UP: Tensor, axis: str, parts: tuple[str, ...], at: At, arch: Arch) -> dict[str, Tensor]:
    """Squares per unit of each score name that a dim contributes to."""
    if axis == "hidden":
        return {"hidden": square_UP.sum(dim=1)}
    if axis == "groups":
        heads_UN = square_UP[:, : arch.heads_per_group * arch.kv_channels].unflatten(1, (arch.heads_per_group, -1)).sum(dim=2)
        return {f"groups.{at.layer}": square_UP.sum(dim=1), f"heads.{at.layer}": heads_UN.flatten()}
    return {f"{axis}.{at.layer}": square_UP.sum(dim=1)} if axis in CUT else {}


def provenance(model_hash: str, data_hash: str, settings: dict[str, object], version: str) -> dict[str, str]:
    """What a score file says of its origin: strings, as safetensors headers hold."""
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in settings.items()}
    return {"model_hash": model_hash, "data_hash": data_hash, "version": version, **plain}
