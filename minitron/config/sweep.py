"""A sweep: one request that stands for several, in Hydra's own syntax (SETTING=A,B,C, choice(...), range(...), recipe=glob(...))."""

import fnmatch
import itertools
import re
from typing import Any

from minitron.config.compose import choices, groups, parsed
from minitron.errors import RequestError, refuse


def expand(words: list[str]) -> dict[str, tuple[list[str], dict[str, str]]]:
    """The runs of a sweep: their names, which can be folders, with the settings of each as words, and those of them that differ.

    Raises RequestError where nothing is swept, or two of the runs are the same.
    """
    swept = {parsed(word).key_or_group: values_of(parsed(word)) for word in words if parsed(word).is_sweep_override()}
    if not swept:
        raise RequestError("--sweep: no setting has several values; SETTING=A,B,C is needed")
    runs = []
    for combination in itertools.product(*swept.values()):
        chosen = dict(zip(swept, combination, strict=True))
        runs.append(([f"{key}={chosen[key]}" if (key := parsed(word).key_or_group) in chosen else word for word in words], chosen))
    names = [name_of(chosen) for _, chosen in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RequestError(f"--sweep: two of the runs would have the same name, {twice[0]}")
    return dict(zip(names, runs, strict=True))


def values_of(override: Any) -> list[str]:
    """The values that one swept setting takes, as they are written."""
    key = override.key_or_group
    if not override.is_discrete_sweep():
        raise refuse(key, override.get_value_string(), "values one by one are needed: A,B,C or choice(...), range(...)")
    value = override.value()
    if type(value).__name__ == "Glob":
        if key not in groups():
            raise refuse(key, override.get_value_string(), f"glob(...) picks among files of configs/, and its groups are {', '.join(groups())}")
        picked = [name for name in choices(key) if any(fnmatch.fnmatch(name, one) for one in value.include)]
        return [name for name in picked if not any(fnmatch.fnmatch(name, one) for one in value.exclude)]
    return [*override.sweep_string_iterator()]


def name_of(chosen: dict[str, str]) -> str:
    """What a run is called: choices among configs/ by themselves, settings after the last part of their name, or all of it where two end alike."""
    ends = [key.rpartition(".")[2] for key in chosen]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(chosen, ends, strict=True)}
    parts = [value if key in groups() else f"{short[key]}-{value}" for key, value in chosen.items()]
    return re.sub(r"[^\w.+-]+", "_", "_".join(parts).replace("'", "").replace('"', "")).strip("_")
