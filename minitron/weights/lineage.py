"""What a model's folder tells of where it comes from: its name on the hub, its licence, its notices. They go along with what is made of it."""

import re
from pathlib import Path
from typing import Any

import yaml

NOTICES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
CARRIED = ("license", "license_name", "license_link", "language")  # of a README's front matter
FRONT = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")  # a folder of the hub's cache
MOST = 1 << 16  # characters of a README that are looked at


def notices(folder: Path) -> list[Path]:
    """The files of a folder that say under what terms the model is given."""
    return sorted({file for pattern in NOTICES for file in folder.glob(pattern) if file.is_file()})


def carried(folder: Path) -> dict[str, Any]:
    """The front matter that what is made of a model takes over from it: CARRIED, and as `base_model` its name on the hub or, of
    one that was made here, what it was made of; without either there is none.

    A licence that lies there without being named is `other`, with a link to the file; where there is none, nothing is said.
    """
    front = front_matter(folder / "README.md")
    found = {key: front[key] for key in CARRIED if _is_text(front.get(key))}
    if "license" not in found and (texts := [file.name for file in notices(folder) if not file.name.startswith("NOTICE")]):
        found |= {"license": "other", "license_link": texts[0]}
    tags = front.get("tags")
    made_here = isinstance(tags, list) and "minitron" in tags  # it says what it was cut from; others', what they were fine-tuned from
    base = hub_id(folder) or (front.get("base_model") if made_here else None)
    return found if not _is_text(base) else {"base_model": base, **found}


def hub_id(folder: Path) -> str | None:
    """The hub's name of a model whose folder lies in the hub's cache."""
    match = next((match for part in folder.parts if (match := CACHED.fullmatch(part))), None)
    return f"{match['owner']}/{match['name']}" if match else None


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML at the head of a model's README; empty where there is none that can be read: it decides nothing but what the card says."""
    try:
        with open(readme, encoding="utf-8", errors="replace") as handle:
            match = FRONT.match(handle.read(MOST))
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value))
