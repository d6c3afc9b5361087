"""A run's metrics: always one JSON line per logged step; Weights & Biases and TensorBoard besides, if asked for."""

import importlib
import json
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from minitron.config.schema import Logging
from minitron.errors import RequestError, refuse
from minitron.files import os_errors_are_requests, write_text
from minitron.reporting.runfiles import METRICS, read_metrics

WANDB_ID, TENSORBOARD = "wandb_id", "tensorboard"


def json_line(metrics: dict[str, Any]) -> str:
    """One strict JSON object and a newline. JSON knows no NaN and no infinity: both are written as null."""
    plain = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in metrics.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


class Sink(Protocol):
    """Where metrics go besides the file."""

    def log(self, metrics: dict[str, Any]) -> None:
        """The metrics of one step, which is among them."""

    def close(self, failed: bool) -> None:
        """No more will come; whether because the run failed."""


class Tracker:
    """Writes the metrics of a run; only one process of a run (rank 0) makes one.

    `start_step` is the step that training continues from: what an interrupted run had written of later steps, before it was
    set back to its checkpoint, is removed, so every step has one line. `config` (the resolved settings) is what Weights & Biases
    shows beside the run. Raises RequestError if the folder can't be written or `logging` can't be met.
    """

    def __init__(self, run_dir: Path, *, start_step: int, logging: Logging, config: dict[str, Any]) -> None:
        run_dir = Path(run_dir)
        self.path = run_dir / METRICS
        kept = [metrics for metrics in read_metrics(self.path) if metrics["step"] <= start_step]
        write_text(self.path, "".join(map(json_line, kept)))
        self._sinks = [start(run_dir, start_step, logging, config) for name, start in SINKS.items() if getattr(logging, name)]
        with os_errors_are_requests("cannot write", self.path):
            self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 -- closed by close()

    def log(self, metrics: dict[str, Any]) -> None:
        """Append one line: `step` and plain numbers, strings or booleans. It is in the file when this returns."""
        line = json_line({**metrics, "step": int(metrics["step"])})
        with os_errors_are_requests("cannot write", self.path):
            self._file.write(line)
        for sink in self._sinks:
            sink.log(metrics)

    def close(self, failed: bool = False) -> None:
        """Close the file and end what else is written, marked as failed or not. Closing twice does nothing."""
        self._file.close()
        while self._sinks:
            self._sinks.pop().close(failed)

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close(failed=error is not None)


def absent(name: str) -> RequestError:
    """The refusal of a setting `logging.NAME` whose package of that name is not installed."""
    return refuse(f"logging.{name}", True, f"the package {name} is not installed; install minitron[logging] or set logging.{name}=false")


class WandbRun:
    """A run of Weights & Biases: the one whose id lies in the run's folder, or a new one."""

    def __init__(self, run_dir: Path, start_step: int, logging: Logging, config: dict[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise absent("wandb") from error
        identity = run_dir / WANDB_ID
        if not identity.exists():
            write_text(identity, uuid.uuid4().hex + "\n")
        try:
            self._run = wandb.init(
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
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any]) -> None:
        """As `Sink` says."""
        self._run.log(metrics)

    def close(self, failed: bool) -> None:
        """As `Sink` says."""
        self._run.finish(exit_code=int(failed))


class TensorBoard:
    """Event files of TensorBoard under run.dir/tensorboard: a scalar for each number; what earlier files hold of later steps is void."""

    def __init__(self, run_dir: Path, start_step: int, logging: Logging, config: dict[str, Any]) -> None:
        try:
            module = importlib.import_module("torch.utils.tensorboard")
        except ImportError as error:
            raise absent("tensorboard") from error
        self._folder = run_dir / TENSORBOARD
        with os_errors_are_requests("cannot write", self._folder):
            self._writer = module.SummaryWriter(str(self._folder), purge_step=start_step + 1)

    def log(self, metrics: dict[str, Any]) -> None:
        """As `Sink` says. It is in the file when this returns."""
        with os_errors_are_requests("cannot write", self._folder):
            for name, value in metrics.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, metrics["step"])
            self._writer.flush()

    def close(self, failed: bool) -> None:
        """As `Sink` says."""
        self._writer.close()


SINKS: dict[str, Callable[[Path, int, Logging, dict[str, Any]], Sink]] = {"wandb": WandbRun, "tensorboard": TensorBoard}  # by setting and package
