"""What training one or several models takes on the machines of `plan`: the part of plan.json that is not about sizes. Pure."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from minitron.arch.arch import Arch
from minitron.config.schema import Config
from minitron.errors import RequestError
from minitron.launching.cost import GIB, Cluster, estimate
from minitron.launching.layouts import check, ranked, usable_bytes
from minitron.launching.traffic import Training


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model that is trained with these settings. `teacher`: a model that is asked in every step, None where there is none."""

    name: str
    student: Arch
    teacher: Arch | None
    cfg: Config

    def training(self) -> Training:
        """Laid over the machines: without any named, as few GPUs as hold each model once. Raises RequestError where the layout can't be."""
        own = [layout.tp * layout.pp * math.lcm(layout.cp, layout.ep) for layout in (self.cfg.parallel, self.cfg.teacher_parallel)]
        training = Training(self.student, self.teacher, self.cfg, self.cfg.plan.gpus or max(own))
        check(training)
        return training


def launched(models: Sequence[Trained], cfg: Config) -> dict[str, Any]:
    """In plain JSON form: the machines and what is assumed of them; of every model what its training comes to in the layout that is set; of a single
    one on machines that are named, all layouts that fit, the fastest first.

    Raises RequestError where a layout can't be.
    """
    machine = Cluster.of(cfg.plan, cfg.dtype)
    trainings = [model.training() for model in models]
    runs = [
        {"name": model.name, "taught": model.teacher is not None, **estimate(training, machine).to_dict()}
        for model, training in zip(models, trainings, strict=True)
    ]
    found: dict[str, Any] = {
        "machine": {"gpu": cfg.plan.hardware, **dataclasses.asdict(machine.machine), "gpus_per_node": cfg.plan.gpus_per_node},
        "assumed": {
            "tflops": machine.flops / 1e12,
            "efficiency": None if cfg.plan.tflops else cfg.plan.efficiency,  # None: it is measured
            "usable_gib": usable_bytes(cfg) / GIB,
            "price": cfg.plan.price,
        },
        "nodes": cfg.plan.nodes,
        "runs": runs,
        "layouts": None,
        "shown_layouts": cfg.plan.layouts,
    }
    if len(models) == 1 and cfg.plan.nodes is not None and cfg.plan.layouts:
        found["layouts"] = layouts(trainings[0])
    return found


def layouts(training: Training) -> dict[str, Any]:
    """`ranked`, in plain JSON form; without the parts of each."""
    all_of_them = ranked(training)
    kept = ("layout", "gpus", "seconds", "bubble", "peak_bytes")
    rows = [one.to_dict() for one in all_of_them.fitting]
    fitting = [{**{name: row[name] for name in kept}, **one.figures} for row, one in zip(rows, all_of_them.fitting, strict=True)]
    return {"tried": all_of_them.tried, "fell": all_of_them.fell, "fitting": fitting}


def refuse_too_large(launch: dict[str, Any] | None, cfg: Config) -> None:
    """Refuse a plan for machines that are named, with what fits them, where a rank would hold more than a GPU has."""
    if launch is None or cfg.plan.nodes is None:
        return
    usable = usable_bytes(cfg)
    for run in launch["runs"]:
        if run["peak_bytes"] <= usable:
            continue
        has = f"{usable / GIB:.1f} GiB of a {cfg.plan.hardware} may be used (plan.reserve={cfg.plan.reserve})"
        layout, whose = run["layout"], f"family.steps.{run['name']}: " if cfg.family.steps else ""
        settings = f"parallel.tp={layout['tp']} parallel.pp={layout['pp']} train.micro_batch_size={layout['micro_batch_size']}"
        raise RequestError(
            f"{whose}{settings}: a rank needs {run['peak_bytes'] / GIB:.1f} GiB, and {has}; {way_out(launch['layouts'], cfg.parallel.ep)}"
        )


def way_out(found: dict[str, Any] | None, ep: int = 1) -> str:
    """The settings of the fastest layout that fits, in words. `ep`: the expert ranks of the settings so far."""
    if found is None:
        return "more of parallel.tp or parallel.pp, or train.recompute=full, takes less"
    if not found["fitting"]:
        return "no layout of these machines fits: more of plan.nodes, or teacher.offload=true, is needed"
    layout = found["fitting"][0]["layout"]
    names = ("tp", "pp", "vpp", "ep", "sp") if max(layout["ep"], ep) > 1 else ("tp", "pp", "vpp", "sp")
    settings = [f"parallel.{name}={str(layout[name]).lower()}" for name in names]
    settings += [f"train.{name}={layout[name]}" for name in ("micro_batch_size", "recompute")]
    return f"{' '.join(settings)} fits"
