"""What a setting is: a dataclass field with its meaning and its checks."""

import dataclasses
from typing import Any

from minitron.errors import refuse

MISSING: Any = "???"  # Hydra's mark for a setting without a default


def setting(default: Any, help: str, *, allowed: tuple[Any, ...] | None = None, least: float | None = None, above: float | None = None,
            most: float | None = None, below: float | None = None) -> Any:  # fmt: skip
    """A dataclass field with its meaning and its checks: one of `allowed`, >= `least`, > `above`, <= `most`, < `below`."""
    metadata = {"help": help, "allowed": allowed, "least": least, "above": above, "most": most, "below": below}
    if isinstance(default, dict | list):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check(group: Any, prefix: str) -> None:
    """Hold every value of a group against its field's checks; the first that fails is refused by its full name."""
    for field in dataclasses.fields(group):
        value, rule = getattr(group, field.name), field.metadata
        if value is None or not rule:
            continue
        name = f"{prefix}{field.name}"
        for one in value if isinstance(value, list) else [value]:
            if rule["allowed"] is not None and one not in rule["allowed"]:
                raise refuse(name, value, f"one of {', '.join(map(str, rule['allowed']))} is needed")
            if rule["least"] is not None and one < rule["least"]:
                raise refuse(name, value, f"at least {rule['least']} is needed")
            if rule["above"] is not None and one <= rule["above"]:
                raise refuse(name, value, f"more than {rule['above']} is needed")
            if rule["most"] is not None and one > rule["most"]:
                raise refuse(name, value, f"at most {rule['most']} is allowed")
            if rule["below"] is not None and one >= rule["below"]:
                raise refuse(name, value, f"less than {rule['below']} is needed")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return leaves
