"""Lines of metrics as two runs of the same training share them."""

from collections.abc import Iterable, Mapping
from typing import Any


def without_costs(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what a step took in time and memory."""
    return [{name: value for name, value in line.items() if "second" not in name and name != "peak_memory_gib"} for line in lines]
