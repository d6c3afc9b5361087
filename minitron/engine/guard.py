"""Which steps a training leaves out: those whose loss or gradient is not finite, and those whose loss is far above what it was."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from minitron.config.schema import Train


def fault(parts: Mapping[str, float], grad_norm: float, good: Sequence[float], settings: Train) -> str | None:
    """What is wrong with a step whose parts of the loss and gradient norm these are, in words; None where nothing is.

    A spike is a "loss" above `train.spike_factor` times the median of the last `train.spike_window` `good` ones; fewer say nothing yet. The
    gradient's norm, which jumps in sound steps too and which clipping bounds, is no reason.
    """
    if not all(map(math.isfinite, parts.values())):
        return "its loss was not finite"
    if not math.isfinite(grad_norm):
        return "its gradient was not finite"
    if settings.spike_factor is not None and len(good) >= settings.spike_window:
        usual = median([*good][-settings.spike_window :])
        if parts["loss"] > settings.spike_factor * usual:
            return f"its loss of {parts['loss']:.4g} was more than train.spike_factor={settings.spike_factor} times {usual:.4g}, the median before it"
    return None


class Guard:
    """Judges a training's steps and counts those that are left out. An `Extra`: a resumed run judges as one without a break.

    All that it is told is the same on every rank, so every rank judges alike.
    """

    def __init__(self, settings: Train) -> None:
        self.settings = settings
        self.good: deque[float] = deque(maxlen=settings.spike_window)  # losses of the steps that were not left out, the newest last
        self.skipped = 0
        self.in_a_row = 0
        self.reason = ""  # of the last step that was left out

    def passes(self, parts: Mapping[str, float], grad_norm: float) -> bool:
        """Whether a step may change the model; it is remembered either way."""
        found = fault(parts, grad_norm, self.good, self.settings)
        if found is None:
            self.in_a_row = 0
            self.good.append(parts["loss"])
        else:
            self.skipped, self.in_a_row, self.reason = self.skipped + 1, self.in_a_row + 1, found
        return found is None

    def verdict(self, step: int, source: str) -> str | None:
        """Why the training ends with its `step`-th step, which read samples of `source`; None where it goes on."""
        if self.in_a_row < self.settings.max_bad_steps:
            return None
        remedy = f"lower train.lr={self.settings.lr}" + (", raise train.spike_factor" if "spike" in self.reason else "")
        row = f"the last of {self.in_a_row} in a row that were left out" if self.in_a_row > 1 else "left out"
        size = self.settings.global_batch_size
        samples = f"samples {(step - 1) * size:,} to {step * size - 1:,} of {source}"
        return f"step {step} ({samples}) was {row}: {self.reason}; {remedy}, or look at the data there"

    def state_dict(self) -> dict[str, Any]:
        """As `Extra` says."""
        return {"good": [*self.good], "skipped": self.skipped, "in_a_row": self.in_a_row, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `Extra` says; a window of another length keeps what it can."""
        self.good = deque(state["good"], maxlen=self.settings.spike_window)
        self.skipped, self.in_a_row, self.reason = state["skipped"], state["in_a_row"], state["reason"]
