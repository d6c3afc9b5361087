"""Plain trees of settings <-> the frozen dataclasses of schema.py, with every name, type and value checked."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import yaml

from minitron.config.schema import TARGETS, Config
from minitron.config.setting import MISSING, check
from minitron.errors import RequestError, refuse

Group = TypeVar("Group")

KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list with at least one number",
    type(None): "null",
}
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")  # YAML 1.1 takes 1e-4 for text, as it lacks the point
COUNT, SCALES = re.compile(r"(\d+(?:\.\d*)?) ?([KMBT])", re.IGNORECASE), {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
COUNTS = {f"search.{name}" for name in TARGETS}  # settings in which 8B stands for 8e9


class Setting(NamedTuple):
    """One leaf of the tree: its full dotted name, the types it may have, its default, its dataclass metadata, and what a list of it holds."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    rule: typing.Mapping[str, Any]
    items: Any


def settings(group: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting below a group, in the schema's order."""
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        hint, name = hints[field.name], f"{prefix}{field.name}"
        if dataclasses.is_dataclass(hint):
            yield from settings(typing.cast(type, hint), f"{name}.")
        else:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            kinds = kinds_of(hint)
            yield Setting(name, kinds, default, field.metadata, item_type(hint) if list in kinds else None)


def build(group: type[Group], tree: Any, prefix: str = "") -> Group:
    """The dataclass `group` from a plain tree; settings the tree lacks keep their defaults.

    Raises RequestError at the first unknown name, wrong type or value that is not allowed.
    """
    hints = typing.get_type_hints(group)
    if not isinstance(tree, dict):
        name = prefix.rstrip(".") or "settings"
        raise refuse(name, tree, f"this is a group: {', '.join(prefix + key for key in hints)}")
    for key, value in tree.items():
        if key not in hints:
            raise unknown(f"{prefix}{key}", value)
    values = {key: convert(hints[key], value, f"{prefix}{key}") for key, value in tree.items()}
    # the plain checks come first: a group's own __post_init__ may divide by what they refuse
    unchecked = object.__new__(group)
    for field in dataclasses.fields(group):  # type: ignore[arg-type]
        missing = field.default if field.default_factory is dataclasses.MISSING else None
        object.__setattr__(unchecked, field.name, values.get(field.name, missing))
    check(unchecked, prefix)
    return group(**values)


def convert(hint: Any, value: Any, name: str) -> Any:
    """`value` as the type `hint` asks for. A whole number serves as a number; true and false are not numbers."""
    if dataclasses.is_dataclass(hint):
        return build(typing.cast(type, hint), value, f"{name}.")
    kinds = kinds_of(hint)
    if kinds == (dict,):
        if not isinstance(value, dict):
            raise refuse(name, value, f"names are needed below it: {name}.NAME=TEXT")
        return {str(key): convert(typing.get_args(hint)[1], item, f"{name}.{key}") for key, item in value.items()}
    if float in kinds and type(value) is int and int not in kinds:
        value = float(value)
    if float in kinds and type(value) is str and NUMBER.fullmatch(value):
        value = float(value)
    if name in COUNTS and type(value) is str and (count := COUNT.fullmatch(value)):
        value = float(count[1]) * SCALES[count[2].upper()]
    if type(value) is list and list in kinds and value:
        return [convert(item_type(hint), item, name) for item in value]
    if type(value) not in kinds or type(value) is list or (type(value) is float and not math.isfinite(value)):
        quote = f" (a number as text is written '{name}=\"{value}\"')" if str in kinds and type(value) in (int, float) else ""
        quote = " (8e9 or 8B, say)" if name in COUNTS else quote
        named = {**KINDS, list: "a list with at least one name"} if list in kinds and item_type(hint) is str else KINDS
        wanted = [named[kind] for kind in kinds if not (kind is int and float in kinds)]
        raise refuse(name, value, f"{' or '.join(wanted)} is needed{quote}")
    return value


def kinds_of(hint: Any) -> tuple[Any, ...]:
    """The plain types a type hint admits: `int | None` -> (int, NoneType), `dict[str, str]` -> (dict,), `list[int] | None` -> (list, NoneType)."""
    if (whole := typing.get_origin(hint)) in (dict, list):
        return (whole,)
    return tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint) or (hint,))


def item_type(hint: Any) -> Any:
    """What the lists hold that a type hint admits: `list[int] | None` -> int."""
    lists = [kind for kind in (hint, *typing.get_args(hint)) if typing.get_origin(kind) is list]
    return typing.get_args(lists[0])[0]


def unknown(name: str, value: Any) -> RequestError:
    """The refusal of a setting that does not exist, with the nearest one that does, or else its group's settings."""
    names = [setting.name for setting in settings()]
    group, _, leaf = name.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in names if known.rpartition(".")[0] == group]
    near = [f"{group}.{close}".lstrip(".") for close in difflib.get_close_matches(leaf, siblings, 1)]
    near += [known for known in names if known.rpartition(".")[2] == leaf]  # the right name in the wrong group
    near += [] if siblings else difflib.get_close_matches(name, names, 1)
    if near:
        advice = f"did you mean {near[0]}?"
    elif group and siblings:
        advice = f"the settings of {group} are {', '.join(siblings)}"
    else:
        advice = "--help lists all"
    return refuse(name, value, f"there is no such setting; {advice}")


def require(config: Config, verb: str, needs: tuple[str, ...]) -> None:
    """Refuse a config that lacks a setting which the verb needs; `a | b` among `needs` stands for at least one of them."""
    rules = {setting.name: setting.rule for setting in settings()}
    for need in needs:
        names = need.split(" | ")
        values = [value_at(config, name) for name in names]
        if all(value in (None, MISSING, "", {}) for value in values):
            wanted = rules[names[0]]["help"] if len(names) == 1 else f"at least one of {', '.join(names)}"
            raise refuse(names[0], values[0], f"{verb} needs {'this setting: ' if len(names) == 1 else ''}{wanted}")


def value_at(config: Any, name: str) -> Any:
    """The value of a setting by its dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def to_yaml(config: Config) -> str:
    """Every setting with its value, as YAML that `from_yaml` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=math.inf)


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote. Raises RequestError for anything else."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RequestError(f"settings are not valid YAML: {' '.join(str(error).split())}") from error
    return build(Config, tree)
