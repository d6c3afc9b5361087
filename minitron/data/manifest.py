"""What `run.dir/data/` holds: manifest.json, read back by whoever needs the tokens."""

import dataclasses
from pathlib import Path
from typing import Any

from minitron.errors import RequestError
from minitron.files import atomic_path, link, read_json, write_json

MANIFEST = "manifest.json"
Blend = list[tuple[Path, float]]  # prefixes of .bin/.idx files, each with its weight


@dataclasses.dataclass(frozen=True)
class Part:
    """One pair of .bin/.idx files, with a .prompts file where data.prompt_key is set. `prefix` is relative to the data folder, or the absolute one
    of prepared data that is used where it lies."""

    prefix: str
    source: str
    documents: int
    tokens: int
    largest_id: int
    bytes: dict[str, int]  # of each of the files, by ending
    sha256: dict[str, str]
    made_from: dict[str, Any]  # everything that decides the files' content; others make it out of date


@dataclasses.dataclass
class Manifest:
    """`parts` by name, each complete; `splits`: the (part, weight) pairs of train, valid, calibration and text_NAME."""

    folder: Path
    parts: dict[str, Part] = dataclasses.field(default_factory=dict)
    splits: dict[str, list[tuple[str, float]]] = dataclasses.field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a data folder, empty where there is none yet."""
        folder = Path(folder)
        if not (folder / MANIFEST).exists():
            return cls(folder)
        content = read_json(folder / MANIFEST)
        try:
            parts = {name: Part(**part) for name, part in content["parts"].items()}
            splits = {split: [(row["part"], float(row["weight"])) for row in rows] for split, rows in content["splits"].items()}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise RequestError(f"{folder / MANIFEST} is not a manifest of prepared data; remove it to prepare the data again") from error
        return cls(folder, parts, splits)

    def save(self) -> None:
        """Write manifest.json, complete or not at all."""
        splits = {split: [{"part": name, "weight": weight} for name, weight in rows] for split, rows in self.splits.items()}
        write_json(self.folder / MANIFEST, {"splits": splits, "parts": {name: dataclasses.asdict(part) for name, part in self.parts.items()}})

    def blend(self, split: str) -> Blend:
        """Prefixes and weights of a split. Raises RequestError where the split was not prepared."""
        if split not in self.splits:
            raise RequestError(f"{self.folder}: no {split} data prepared here; there is {', '.join(self.splits) or 'none'}")
        return [(self.folder / self.parts[name].prefix, weight) for name, weight in self.splits[split]]

    def num_tokens(self, split: str) -> int:
        """Tokens of a split, end-of-document tokens included."""
        return sum(self.parts[name].tokens for name, _ in self.splits[split])

    def lend(self, folder: Path) -> None:
        """Put this prepared text into another run's data folder, which is made, unless there is one: hard links, or copies where there are none.

        What that run reads otherwise it prepares anew: files are replaced, never written into, so each run's stay what they were.
        """
        if folder.exists() or not self.parts:
            return
        with atomic_path(folder) as temporary:
            temporary.mkdir()
            for part in self.parts.values():
                for ending in part.bytes if not Path(part.prefix).is_absolute() else ():
                    link(self.folder / f"{part.prefix}.{ending}", temporary / f"{part.prefix}.{ending}")
            dataclasses.replace(self, folder=temporary).save()

    def drop(self, name: str) -> None:
        """Forget a part and the splits that use it; its files are no longer vouched for."""
        self.parts.pop(name, None)
        self.splits = {split: rows for split, rows in self.splits.items() if name not in [part for part, _ in rows]}
