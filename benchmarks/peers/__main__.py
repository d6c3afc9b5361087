"""Other ways to prune beside ours: the same model, text, tokens, sizes and evaluation, so that what ranks the units is all that differs.

Every way is a row of ARMS: a criterion, which gives scores in the product's form, and sizes. The product's own `select` and `reslice` cut, its
distillation retrains, its evaluation measures. Ways of other papers are reimplementations (criteria.py, rotation.py), each with its source.
Activations, and what criteria read beside weights, are of the same calibration samples; seeds are orders of the training text, the same for all.

Each (way, seed) that is done is a file in --folder, and not done again unless settings differ; the order is one seed of every way, then the
next, so it can be stopped and called again. From the repository: python -m benchmarks.peers
Arguments without an option before them are settings of minitron, for example `python -m benchmarks.peers train.steps=32 --seeds 1`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, arguments, origin, test_data, wikitext
from benchmarks.peers import criteria
from benchmarks.peers.figures import OURS, common, overlap_table, shape_of, table
from benchmarks.peers.rotation import components, save_rotated
from minitron import engine
from minitron.arch.arch import Arch
from minitron.calibration import importance, losses_by_depth
from minitron.config.compose import compose
from minitron.config.schema import Target
from minitron.distillation.signal import Signal, Teacher
from minitron.distillation.step import distillation_loss
from minitron.errors import RequestError
from minitron.files import read_object, write_json
from minitron.importance.scores import Scores, magnitude_scores, provenance, random_scores
from minitron.pruning.keep import select
from minitron.pruning.reslice import reslice
from minitron.pruning.target import target_arch
from minitron.session import Session, session
from minitron.stages import evaluate
from minitron.teaching import teacher_of
from minitron.training import sources, step_batches
from minitron.weights.load import load
from minitron.weights.source import Source, open_folder

RANDOM = 1  # the seed of the random ranking
FIRST = 16  # samples that Taylor takes the gradient of (LLM-Pruner takes 10), and that are read without each layer


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to prune: what ranks the units, which of the model's shapes (Setup.shapes) it is cut to, and what the product ranks layers by."""

    title: str
    criterion: str
    shape: str
    layers_by: str = "bi"


ARMS = {
    OURS: Arm("ours: activations and Block Importance, sizes by search", "activations", "searched"),
    "ours-loss": Arm("ours, layers by the loss without each", "losses", "searched", "loss"),
    "shortgpt": Arm("ShortGPT: whole layers by Block Influence", "activations", "depth"),
    "taylor": Arm("LLM-Pruner-style Taylor, the same sizes", "taylor", "searched"),
    "wanda": Arm("Wanda-style structured, the same sizes", "wanda", "searched"),
    "magnitude": Arm("weight magnitude, the same sizes", "magnitude", "searched"),
    "random": Arm("random, the same sizes", "random", "searched"),
    "ours-width": Arm("activations, in width alone", "activations", "width"),
    "taylor-width": Arm("LLM-Pruner-style Taylor, in width alone", "taylor", "width"),
    "wanda-width": Arm("Wanda-style structured, in width alone", "wanda", "width"),
    "magnitude-width": Arm("weight magnitude, in width alone", "magnitude", "width"),
    "random-width": Arm("random, in width alone", "random", "width"),
    "taylor-blocks": Arm("LLM-Pruner-style Taylor, KV groups and MLP", "taylor", "blocks"),
    "wanda-blocks": Arm("Wanda-style structured, KV groups and MLP", "wanda", "blocks"),
    "slicegpt": Arm("SliceGPT-like: principal components, one rotation", "components", "components"),
}


@dataclasses.dataclass(frozen=True)
class Setup:
    """A model with its settings, and the sizes of about the same parameters that it is cut to."""

    overrides: Callable[[], list[str]]
    shapes: dict[str, dict[str, int]]
    compared: dict[str, int]  # of which modelopt's kept sets are held against ours: every axis is cut


SETUPS = {
    "smollm2_135m": Setup(
        lambda: [
            "recipe=smollm2_135m_to_100m", "calibrate.samples=64", "train.steps=12", "train.global_batch_size=2", "train.micro_batch_size=2",
            "train.warmup_steps=3", "eval.tokens=8192", *wikitext(),
        ],
        {
            "searched": {"num_layers": 24, "ffn_hidden_size": 1280},
            "width": {"hidden_size": 512, "ffn_hidden_size": 1152},
            "depth": {"num_layers": 21},
            "blocks": {"num_query_groups": 2, "ffn_hidden_size": 1088},
            "components": {"hidden_size": 360},
        },
        {"num_layers": 24, "hidden_size": 512, "ffn_hidden_size": 1152, "num_attention_heads": 6},
    ),
    "stories260k": Setup(
        lambda: [
            f"model.path={test_data() / 'stories260k'}", f"data.train={test_data() / 'text' / 'wikitext2_test.docs.jsonl'}", "data.text_key=page",
            "target.hidden_size=48", "dtype=fp32", "calibrate.samples=32", "calibrate.seq_length=64", "train.steps=8", "train.global_batch_size=8",
            "train.micro_batch_size=4", "train.seq_length=64", "train.warmup_steps=2", "train.lr=2e-3", "eval.tokens=4096",
        ],
        {
            "searched": {"num_layers": 4, "ffn_hidden_size": 160},
            "width": {"hidden_size": 56, "ffn_hidden_size": 136},
            "depth": {"num_layers": 4},
            "blocks": {"num_query_groups": 3, "ffn_hidden_size": 136},
            "components": {"hidden_size": 40},
        },
        {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 128, "num_attention_heads": 4},
    ),
}  # fmt: skip


class Remembered:
    """A teacher whose answers stay: every way asks it about the same batches, and they are a model's last hidden states, which are small."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher, self.answers = teacher, dict[int, Sequence[Signal | None]]()

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> Sequence[Signal | None]:
        """As `Teacher` says."""
        if step not in self.answers:
            self.answers[step] = self.teacher.signals(step, batches)
        return self.answers[step]


class Bench:
    """An open run, and the folder in which scores and figures are kept."""

    def __init__(self, opened: Session, setup: Setup, folder: Path) -> None:
        self.opened, self.setup, self.folder = opened, setup, folder
        self.cfg, self.world, self.arch = opened.cfg, opened.world, opened.source.arch
        self.texts = {"valid": "held-out"} | {f"text_{name}": name for name in self.cfg.eval.texts}

    @functools.cached_property
    def samples_NT(self) -> torch.Tensor:
        """The calibration samples that the product reads, in its order, each with the token after it."""
        from minitron.data.corpus import Windows

        calibrate = self.cfg.calibrate
        windows = Windows(self.opened.data.blend("calibration"), calibrate.seq_length, count=calibrate.samples, shuffle_seed=self.cfg.seed)
        return torch.stack([windows[i] for i in range(len(windows))])

    @property
    def samples_NS(self) -> torch.Tensor:
        """The same without it."""
        return self.samples_NT[:, :-1]

    @functools.cached_property
    def plain(self) -> Any:
        """The original as `transformers` loads it, in fp32."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.opened.source.folder, dtype=torch.float32).eval()

    @functools.cached_property
    def recorder(self) -> criteria.Recorder:
        """What one pass over the samples gives."""
        with self.narrow():
            return criteria.Recorder(self.plain).record(self.samples_NS)

    def taylor(self) -> dict[str, torch.Tensor]:
        """What each weight counts."""
        with self.narrow():
            return criteria.taylor(self.plain, self.samples_NS[:FIRST])

    def narrow(self) -> torch.autocast:
        """Products in the run's type, as the product's own calibration computes them; sums, gradients and the residual stream stay in fp32."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.opened.dtype == torch.bfloat16)

    def scores(self, criterion: str) -> criteria.Scores:
        """Scores, from their file where they were made before."""
        made = {
            "activations": lambda: importance(self.opened, self.arch, self.opened.load_source, []),
            "losses": lambda: self.scores("activations") | losses_by_depth(self.opened.load_source(), self.samples_NT[:FIRST], self.opened, [1]),
            "magnitude": lambda: magnitude_scores(self.opened.load_source(), self.world),
            "random": lambda: random_scores(self.arch, RANDOM),
            "taylor": lambda: criteria.coupled(self.plain, self.taylor(), self.world),
            "wanda": lambda: criteria.wanda(self.recorder),
            "modelopt": lambda: criteria.modelopt(self.recorder),
        }
        file = self.folder / "scores" / f"{criterion}.safetensors"
        calibrate = dataclasses.asdict(self.cfg.calibrate)
        read = {**calibrate, "seed": self.cfg.seed, "dtype": self.cfg.dtype, "gradient_samples": FIRST}
        mine = provenance(self.opened.source.fingerprint(), self.opened.inputs("calibrate")["calibration"], read, criterion)
        if file.exists() and (found := Scores.load(file, self.arch, mine["model_hash"])).provenance == mine:
            return found.tensors
        print(f"measure: {criterion}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        found = Scores(made[criterion](), mine)
        found.save(file)
        return found.tensors

    def target(self, source: Arch, sizes: dict[str, int]) -> Arch:
        """The architecture of these sizes."""
        return target_arch(source, Target(**sizes), self.cfg.parallel)

    def cut(self, arm: Arm) -> engine.Model:
        """The pruned model of an arm, cut by the product."""
        sizes = self.setup.shapes[arm.shape]
        source, scores = self.rotated(sizes["hidden_size"]) if arm.criterion == "components" else (self.opened.source, self.scores(arm.criterion))
        target = self.target(source.arch, sizes)
        return reslice(load(source, self.world, self.opened.dtype), select(scores, source.arch, target, arm.layers_by), target, self.world)

    def rotated(self, width: int) -> tuple[Source, criteria.Scores]:
        """The original in its principal components' coordinates, and scores by which the first of them stay."""
        folder = self.folder / f"components-{width}"

        def make() -> dict[str, Any]:
            print("measure: principal components", flush=True)
            variances_H, components_HH = components(self.recorder.spread)
            save_rotated(self.plain, components_HH, width, folder)
            return {"kept": float(variances_H[:width].sum() / variances_H.sum())}

        self.kept(folder.name, self.settings(), make)
        source = open_folder(folder, "components")
        hidden = torch.arange(source.arch.hidden_size, 0, -1, dtype=torch.float32)  # the largest variance comes first
        return source, random_scores(source.arch, RANDOM) | {"hidden": hidden}  # nothing else is cut

    def losses(self, model: engine.Model) -> dict[str, float]:
        """Nats per token of each text."""
        return {text: evaluate.score(model, text, text, self.opened, self.world)[0]["loss"] for text in self.texts}

    def distilled(self, arm: Arm, seed: int) -> dict[str, float]:
        """Losses after the distillation of the recipe, on the order of the text that a seed gives."""
        trial = dataclasses.replace(self.opened, cfg=dataclasses.replace(self.cfg, seed=self.cfg.seed + seed))
        trial.__dict__.update({name: getattr(self.opened, name) for name in ("source", "teacher_source", "teacher_world", "teacher", "data")})
        cfg, world = trial.cfg, trial.world
        samples, model = trial.training_samples, self.cut(arm)
        trainer = engine.Trainer(model, cfg.train, world)
        task = engine.Task(
            microbatches=lambda step: step_batches(samples, cfg, world, step),
            loss=distillation_loss(model, self.teacher(seed), cfg.distill, world),
            validate=dict,
            report=lambda line: None,
            source=lambda step: sources(trial, step),
        )
        with tempfile.TemporaryDirectory() as scratch:
            checkpoints = engine.Checkpoints(Path(scratch), keep_last=1)
            for _ in range(cfg.train.steps):
                engine.tell(trainer, task, engine.take_step(trainer, task, checkpoints), checkpoints)
        trainer.settle()
        found = self.losses(model)
        trainer.close()
        if trainer.guard.skipped or not all(map(math.isfinite, found.values())):
            raise RequestError(f"{arm.title}, seed {seed}: {trainer.guard.skipped} steps were left out, losses {found}")
        return found

    @functools.lru_cache(maxsize=1)  # noqa: B019 -- one bench lives as long as the process
    def teacher(self, seed: int) -> Remembered:
        """The teacher of all ways on one order of the text."""
        return Remembered(teacher_of(self.opened, None))

    def file(self, name: str) -> Path:
        """Where figures are kept."""
        return self.folder / "found" / f"{name}.json"

    def kept(self, name: str, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `make` gives, from its file where it was made before with the same settings."""
        file = self.file(name)
        if file.exists() and (found := read_object(file))["settings"] == settings:
            return found["figures"]
        figures = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, {"settings": settings, "figures": figures})
        print(f"{name}: " + "  ".join(f"{value:.4f}" for value in figures.values() if isinstance(value, float)), flush=True)
        return figures

    def settings(self, arm: Arm | None = None, seed: int | None = None) -> dict[str, Any]:
        """All that figures depend on."""
        groups = ("calibrate", "eval", "train", "distill")
        chosen = {name: dataclasses.asdict(getattr(self.cfg, name)) for name in (groups if seed is not None else groups[:2])}
        sizes = {} if arm is None else {"criterion": arm.criterion, "sizes": self.setup.shapes[arm.shape]}
        return {"model": self.opened.source.fingerprint(), "seed": self.cfg.seed, "order": seed, "dtype": self.cfg.dtype, **chosen, **sizes}

    def as_cut(self, name: str) -> dict[str, Any]:
        """An arm's sizes, parameters and losses before any training."""
        arm = ARMS[name]

        def make() -> dict[str, Any]:
            model = self.cut(arm)
            return {"shape": shape_of(model.arch), "params": model.arch.num_parameters(), **self.losses(model)}

        return self.kept(name, self.settings(arm), make)

    def original(self) -> dict[str, Any]:
        """The same of the model itself."""
        described = {"shape": shape_of(self.arch), "params": self.arch.num_parameters()}
        return self.kept("source", self.settings(), lambda: {**described, **self.losses(self.opened.teacher)})

    def after(self, name: str, seed: int) -> dict[str, Any]:
        """An arm's losses after distillation on one order of the text."""
        return self.kept(f"{name}-{seed}", self.settings(ARMS[name], seed), lambda: self.distilled(ARMS[name], seed))

    def overlap(self) -> dict[str, Any]:
        """Which units modelopt's formula keeps that ours keeps too."""
        target = self.target(self.arch, self.setup.compared)
        keeps = [select(self.scores(criterion), self.arch, target) for criterion in ("activations", "modelopt")]
        return {"sizes": self.setup.compared, "axes": common(*keeps)}

    def there(self, name: str, seeds: list[int]) -> dict[str, Any]:
        """An arm's entry of the collected figures, of what is done."""
        figures = self.as_cut(name)
        done = {str(seed): self.after(name, seed) for seed in seeds if self.file(f"{name}-{seed}").exists()}
        whole = {key: figures[key] for key in ("shape", "params")}
        return {"title": ARMS[name].title, **whole, "as_cut": {text: figures[text] for text in self.texts}, "distilled": done}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", choices=SETUPS, default="smollm2_135m")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[*ARMS], metavar="WAY", help=f"which ways to go: {', '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="orders of the text to distil on (none: only cut)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmarks" / "peers", help="where scores and figures are kept")
    parser.add_argument("--collect", action="store_true", help="run nothing: --json gets what is there of these ways and seeds")
    parser.add_argument("overrides", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_args()
    setup, folder = SETUPS[options.model], options.folder / options.model
    given = [*setup.overrides(), "logging.progress=false", *options.overrides, f'run.dir="{folder / "run"}"']
    cfg = compose("compress", given)
    with session(cfg, "compress") as opened:
        bench = Bench(opened, setup, folder)
        source = bench.original()
        if not options.collect:
            for name in options.arms:
                bench.as_cut(name)
            for seed in options.seeds:
                for name in options.arms:
                    bench.after(name, seed)
        if options.json is None:
            return
        found = {
            **origin("Other ways to prune"),
            "model": options.model,
            "texts": bench.texts,
            "tokens": {"calibration": bench.samples_NS.numel(), "distillation": cfg.train.steps * cfg.train.global_batch_size * cfg.train.seq_length,
                       "evaluation": cfg.eval.tokens},
            "dtype": cfg.dtype,
            "source": source,
            "arms": {name: bench.there(name, options.seeds) for name in options.arms if bench.file(name).exists()},
            "overlap": bench.overlap(),
        }  # fmt: skip
    write_json(options.json, found)
    print(table(found), overlap_table(found), sep="\n")


if __name__ == "__main__":
    main()
