"""Settings as one gives them on the command line: the inverse of composing them."""

import json
import re
from typing import Any

from minitron.config.build import settings, value_at
from minitron.config.schema import Config
from minitron.config.verbs import reads

BARE = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z_/][\w./-]*", re.IGNORECASE)
# where a run lies, what it tells, how its processes share the work: not what it makes
OWN = ("run.", "logging.", "parallel.", "teacher.parallel.", "slurm.")


def overrides(cfg: Config, verb: str) -> list[str]:
    """SETTING=VALUE of all that differs from the defaults and that a verb reads, but for where and how the run is done, in the schema's order."""
    found = []
    for one in settings():
        value = value_at(cfg, one.name)
        if value != one.default and not one.name.startswith(OWN) and reads(verb, one.name):
            found += [f"{name}={written(item)}" for name, item in _named(one.name, value)]
    return found


def _named(name: str, value: Any) -> list[tuple[str, Any]]:
    """A setting that holds values by name as one of each; others as they are."""
    return [(f"{name}.{key}", item) for key, item in value.items()] if isinstance(value, dict) else [(name, value)]


def written(value: Any) -> str:
    """A value in Hydra's syntax, from which it is read back as it is."""
    if isinstance(value, str) and not BARE.fullmatch(value):
        return '"' + re.sub(r'(\\*)("|$)', lambda found: found[1] * 2 + ('\\"' if found[2] else ""), value) + '"'
    if isinstance(value, list | tuple):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}:{written(item)}' for key, item in value.items())}}}"
    return value if isinstance(value, str) else json.dumps(value)
