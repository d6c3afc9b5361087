"""`candidates.json` and `plan.json`: the architectures that a search looked at, what each costs, their losses rung by rung, and which was chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from minitron.arch.arch import Arch
from minitron.config.schema import Config, Target
from minitron.errors import RequestError, refuse
from minitron.files import read_json, write_json

FILE, PLAN = "candidates.json", "plan.json"
SIZES = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups")


def name_of(sizes: dict[str, int]) -> str:
    """A short name for some of SIZES: L30-H512-F1152-A9-G3."""
    return "-".join(f"{letter}{sizes[name]}" for letter, name in zip("LHFAG", SIZES, strict=True) if name in sizes)


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
    lost: dict[str, str] = dataclasses.field(default_factory=dict)  # candidates whose training came to no loss, and why


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


def wanted(cfg: Config) -> Target:
    """The target that a model is pruned to: the sizes that are asked for, or where none are, those that a search chose in run.dir.

    Raises RequestError where there are neither.
    """
    folder = Path(cfg.run.dir)
    if cfg.target.sizes:
        return cfg.target
    results = Results.load(folder) if (folder / FILE).exists() else None
    if results is None or results.chosen is None:
        search = "is not at its end" if results else "was not run"
        ways = f"sizes are needed under target, or those that minitron search chooses: in run.dir={folder} it {search}"
        raise refuse("target.num_layers", None, ways)
    return results.candidate(results.chosen).target(cfg.target)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The content of plan.json: the model, and what the settings make of it: the target or, largest first, the candidates of a search. `grid`: points
    that the search looked at (None where there is no budget), `fell`: how many of them are no candidates, by reason in words. `launch`: what
    training them takes, as launching/ tells it in plain JSON form (None where nothing is trained). `shapes`: all sizes of the models that settings
    give, by their names."""

    arch: Arch
    original: Candidate
    models: list[Candidate]
    grid: int | None = None
    fell: dict[str, int] = dataclasses.field(default_factory=dict)
    launch: dict[str, Any] | None = None
    shapes: dict[str, Arch] = dataclasses.field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write run.dir/plan.json."""
        write_json(folder / PLAN, dataclasses.asdict(self))
