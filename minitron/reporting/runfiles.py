"""Reading what a run's folder holds. Every file may be absent; a broken one is refused by its name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from minitron.arch import Arch
from minitron.errors import RequestError, refuse
from minitron.files import read_object
from minitron.search.candidates import FILE as CANDIDATES
from minitron.search.candidates import Results

METRICS, RECORD, SPEED = "metrics.jsonl", "stages.json", "speed.json"
Arrays = dict[str, npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """The content of `run.dir`; None (or, for metrics, an empty list) where a file is not there yet.

    `importance`: scores [units] by name ("hidden", "ffn.0", ..., "layers.bi", and "layers.loss.1" and the like [runs] where it was measured);
    `keep`: kept units, ascending, in the original's numbering, under the same names ("layers" for the layers); `config`: the
    text of config.yaml.
    """

    path: Path
    original: Arch | None
    pruned: Arch | None
    importance: Arrays | None
    calibration: dict[str, str]
    keep: Arrays | None
    metrics: list[dict[str, Any]]
    evals: dict[str, Any] | None
    config: str | None
    search: Results | None
    exported: bool
    whole: bool  # one model trained as it is (`minitron train`), nothing compressed
    speed: dict[str, Any] | None = None  # how fast the exported model generates, where that was measured

    def setting(self, name: str) -> Any:
        """A setting by its dotted name; None if it, or config.yaml, is absent."""
        return OmegaConf.select(OmegaConf.create(self.config or "{}"), name, throw_on_resolution_failure=False)


def read_run(run_dir: Path) -> RunFiles:
    """Read every file of a run that the report shows. Raises RequestError for a missing folder or a broken file."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise refuse("run.dir", run_dir, "an existing folder is needed")
    arch = read_object(run_dir / "arch.json") if (run_dir / "arch.json").exists() else {}
    importance, calibration = read_arrays(run_dir / "importance.safetensors")
    return RunFiles(
        path=run_dir,
        original=Arch.from_dict(arch["original"]) if "original" in arch else None,
        pruned=Arch.from_dict(arch["pruned"]) if "pruned" in arch else None,
        importance=importance,
        calibration=calibration,
        keep=read_arrays(run_dir / "keep.safetensors")[0],
        metrics=read_metrics(run_dir / METRICS),
        evals=read_object(run_dir / "eval.json") if (run_dir / "eval.json").exists() else None,
        config=read_config(run_dir / "config.yaml"),
        search=Results.load(run_dir) if (run_dir / CANDIDATES).exists() else None,
        exported=(run_dir / "hf" / "config.json").exists(),
        whole=(run_dir / RECORD).exists() and "train" in read_object(run_dir / RECORD),
        speed=read_object(run_dir / SPEED) if (run_dir / SPEED).exists() else None,
    )


def read_arrays(path: Path) -> tuple[Arrays | None, dict[str, str]]:
    """The tensors of a safetensors file and its header's strings; (None, {}) if there is no file."""
    if not path.exists():
        return None, {}
    try:
        with safe_open(path, framework="numpy") as handle:
            return {name: np.asarray(handle.get_tensor(name)) for name in handle.keys()}, dict(handle.metadata() or {})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error


def read_config(path: Path) -> str | None:
    """The text of config.yaml, None if there is no file; text that is not a YAML mapping is refused."""
    if not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if not isinstance(OmegaConf.create(text), DictConfig):
            raise ValueError("settings by name are needed")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise RequestError(f"cannot read {path}: {' '.join(str(error).split())}") from error
    return text


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, an empty list if there is no file.

    A last line cut short (a killed writer's, or one being written now) is left out; any other broken line is refused.
    """
    if not path.exists():
        return []
    try:
        *lines, _cut_short = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            value["step"] = int(value["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise RequestError(f"cannot read {path}: line {number} is not a JSON object with a step") from error
        found.append(value)
    return found
