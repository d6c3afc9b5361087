"""Imported by every Python that finds this folder in its PYTHONPATH: training steps last at least as many seconds as a file says.

A step of the tiny model is over before anybody could interrupt it. Rank 0 waits before its part of a step, and so the others in the middle of theirs.
"""

import importlib.abc
import importlib.util
import os
import sys
import time
from pathlib import Path

FILE, SLOWED = os.environ.get("MINITRON_TEST_PACE"), "minitron.engine.trainer"


class Slow(importlib.abc.MetaPathFinder):
    """Slows the trainer down as soon as it is imported."""

    def find_spec(self, name, path=None, target=None):
        """The trainer's own spec, with what comes after its loading."""
        if name != SLOWED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            slow_down(module.Trainer)

        spec.loader.exec_module = exec_module
        return spec


def slow_down(trainer):
    """Before each update, wait."""
    update = trainer.update

    def slow(self, *args, **kwargs):
        time.sleep(float(Path(FILE).read_text()))
        return update(self, *args, **kwargs)

    trainer.update = slow


if FILE and os.environ.get("RANK") == "0":
    sys.meta_path.insert(0, Slow())
