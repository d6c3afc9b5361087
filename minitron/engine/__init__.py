"""The only folder that knows Megatron: processes and groups, the model, schedules, the training loop, checkpoints.

The rest of the project writes `from minitron import engine` and `engine.NAME`. The module behind a name is imported on
first use, so everything outside this folder can be imported, read and tested where Megatron is absent.
"""

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minitron.engine.batch import *  # noqa: F403
    from minitron.engine.checkpoint import *  # noqa: F403
    from minitron.engine.exchange import *  # noqa: F403
    from minitron.engine.experts import *  # noqa: F403
    from minitron.engine.judging import *  # noqa: F403
    from minitron.engine.meeting import *  # noqa: F403
    from minitron.engine.meter import *  # noqa: F403
    from minitron.engine.model import *  # noqa: F403
    from minitron.engine.parallel import *  # noqa: F403
    from minitron.engine.probing import *  # noqa: F403
    from minitron.engine.schedule import *  # noqa: F403
    from minitron.engine.scoring import *  # noqa: F403
    from minitron.engine.sharded import *  # noqa: F403
    from minitron.engine.specs import *  # noqa: F403
    from minitron.engine.timing import *  # noqa: F403
    from minitron.engine.trainer import *  # noqa: F403
    from minitron.engine.vocab import *  # noqa: F403

MODULES = (
    "meeting",  # which needs no Megatron
    "batch", "parallel", "specs", "model", "schedule", "vocab", "scoring", "judging", "probing", "experts", "exchange", "sharded", "checkpoint",
    "meter", "trainer", "timing",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    """The object called `name` in the first of MODULES that has it."""
    if name.startswith("_"):
        raise AttributeError(name)
    with warnings.catch_warnings():
        # without apex and Transformer Engine, importing Megatron advises to install them; both are optional here
        warnings.simplefilter("ignore")
        for module in MODULES:
            if (found := vars(importlib.import_module(f"minitron.engine.{module}")).get(name)) is not None:
                return found
    raise AttributeError(f"minitron.engine has no {name}")
