"""`candidates.json`: the architectures that a search looked at, what each costs, their losses rung by rung, and which was chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minitron.arch.arch import Arch
from minitron.config.schema import Config, Target
from minitron.errors import RequestError, refuse
from minitron.files import read_json, write_json

FILE = "candidates.json"
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """An architecture within the budgets. `costs` by the names of the budgets (arch/counts.py), those that were counted."""

    name: str
    sizes: dict[str, int]  # by SIZES
    costs: dict[str, float]

    def target(self, base: Target) -> Target:
        """The settings that ask for it; how units are ranked is `base`'s."""
        sizes: dict[str, Any] = dict(self.sizes)
        return dataclasses.replace(base, **sizes)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One comparison. `losses` in nats per token on held-out text, one per seed, by candidate; rung 0, of no steps, is before any training.

    `stayed`: those that go on, best first. `tau`: Kendall's rank correlation with the rung before, of those in both (None: there is none).
    `seed_tau`: the same between the seeds, its mean over pairs (None with one seed). `seconds`: what it took.
    """

    steps: int
    tokens: int  # of distillation, per candidate and seed
    losses: dict[str, list[float]]
    stayed: list[str] = dataclasses.field(default_factory=list)
    tau: float | None = None
    seed_tau: float | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Results:
    """The content of candidates.json. `fell`: how many of the grid are no candidates, by reason in words. `chosen`: a name, None until the search has
    ended; `settled`: it ended because the order did not change any more. `settings`: those of `search`, as they were."""

    original: Arch
    settings: dict[str, Any]
    grid: int  # points of the grid
    fell: dict[str, int]
    candidates: list[Candidate]
    rungs: list[Rung] = dataclasses.field(default_factory=list)
    chosen: str | None = None
    settled: bool = False

    def candidate(self, name: str) -> Candidate:
        """The candidate of this name."""
        return next(candidate for candidate in self.candidates if candidate.name == name)

    def save(self, folder: Path) -> None:
        """Write run.dir/candidates.json."""
        write_json(folder / FILE, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Results:
        """Read run.dir/candidates.json. Raises RequestError where it is not one."""
        try:
            tree = read_json(folder / FILE)
            rungs = [Rung(**rung) for rung in tree.pop("rungs")]
            candidates = [Candidate(**candidate) for candidate in tree.pop("candidates")]
            return cls(**{**tree, "original": Arch.from_dict(tree["original"]), "candidates": candidates, "rungs": rungs})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"cannot read {folder / FILE}: {error} (minitron search makes it)") from error


def sizes_asked(target: Target) -> dict[str, Any]:
    """The sizes that the settings under `target` name."""
    axes = [field.name for field in dataclasses.fields(Target) if field.default is None]
    return {name: size for name in axes if (size := getattr(target, name)) is not None}


def wanted(cfg: Config) -> Target:
    """The target that a model is pruned to: the sizes that are asked for, or where none are, those that a search chose in run.dir.

    Raises RequestError where there are neither.
    """
    folder = Path(cfg.run.dir)
    if sizes_asked(cfg.target):
        return cfg.target
    results = Results.load(folder) if (folder / FILE).exists() else None
    if results is None or results.chosen is None:
        search = "is not at its end" if results else "was not run"
        ways = f"sizes are needed under target, or those that minitron search chooses: in run.dir={folder} it {search}"
        raise refuse("target.num_layers", None, ways)
    return results.candidate(results.chosen).target(cfg.target)
