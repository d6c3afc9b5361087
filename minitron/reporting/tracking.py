"""A run's metrics: always one JSON line per logged step, Weights & Biases besides if asked for."""

import importlib
import json
import math
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any

from minitron.config.schema import Logging
from minitron.errors import refuse
from minitron.files import os_errors_are_requests, write_text
from minitron.reporting.runfiles import METRICS, read_metrics

WANDB_ID = "wandb_id"


def json_line(metrics: dict[str, Any]) -> str:
    """One strict JSON object and a newline. JSON knows no NaN and no infinity: both are written as null."""
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


class Tracker:
    """Writes the metrics of a run; only one process of a run (rank 0) makes one.

    `start_step` is the step that training continues from: lines of later steps, which an interrupted run had written
    before it was set back to its checkpoint, are removed, so every step has one line. `config` (the resolved settings)
    is what Weights & Biases shows beside the run. Raises RequestError if the folder can't be written or
    `logging.wandb` can't be met.
    """

    def __init__(self, run_dir: Path, *, start_step: int, logging: Logging, config: dict[str, Any]) -> None:
        run_dir = Path(run_dir)
        self.path = run_dir / METRICS
        kept = [metrics for metrics in read_metrics(self.path) if metrics["step"] <= start_step]
        write_text(self.path, "".join(map(json_line, kept)))
        self._wandb = _start_wandb(run_dir, logging, config) if logging.wandb else None
        with os_errors_are_requests("cannot write", self.path):
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 -- closed by close()

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line: `step` and plain numbers, strings or booleans. It is in the file when this returns."""
        line = json_line({**metrics, "step": int(metrics["step"])})
        with os_errors_are_requests("cannot write", self.path):
            self._file.write(line)
        if self._wandb is not None:
            self._wandb.log(metrics)

    def close(self, failed: bool = False) -> None:
        """Close the file and end the wandb run, marked as failed or not. Closing twice does nothing."""
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(failed))
            self._wandb = None

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)


def _start_wandb(run_dir: Path, logging: Logging, config: dict[str, Any]) -> Any:
    """Start, or continue, the wandb run whose id lies in the run's folder."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise refuse("logging.wandb", True, "the package wandb is not installed; install minitron[logging] or set logging.wandb=false") from error
    identity = run_dir / WANDB_ID
    if not identity.exists():
        write_text(identity, uuid.uuid4().hex + "\n")
    try:
        run = wandb.init(
            project=logging.wandb_project,
            name=run_dir.resolve().name,
            id=identity.read_text(encoding="utf-8").strip(),
            resume="allow",
            dir=str(run_dir),
            config=config,
        )
    except wandb.Error as error:
        reason = " ".join(str(error).split())
        raise refuse("logging.wandb", True, f"wandb did not start ({reason}); log in, set WANDB_MODE=offline or logging.wandb=false") from error
    # a resumed run goes back to its checkpoint's step, which wandb's own step counter, that only grows, would refuse
    run.define_metric("*", step_metric="step")
    return run
