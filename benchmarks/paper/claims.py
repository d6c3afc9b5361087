"""What is tried: the teachers, the arms (one way to make a student each), and the claims, each a comparison of arms. Tables, and nothing else.

An arm is settings of minitron, as a command would be given them. Claims name the published evidence by paper, table and figure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minitron.search.ladder import kendall_tau

Figures = Mapping[str, Any]  # of one arm with one seed: "before" and "after", each loss and KL by text, and "curve", the loss by share of the tokens
MARGIN = 0.02  # nats: what counts as a tie


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A model to compress, and what depends on its sizes. `parts`: settings by the name that arms use; the cuts have equally many parameters, but
    for `small`. `training`: settings by which the teacher is trained on the text first (none: it is `start` as it is), from the weights of
    `start` or, where there are none, from random ones of this `shape`.
    `{data}` stands for the folder that MINITRON_TEST_DATA names."""

    settings: tuple[str, ...]
    parts: Mapping[str, tuple[str, ...]]
    start: str | None = None
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    training: tuple[str, ...] = ()


def sizes(hidden: int, ffn: int, layers: int | None = None, heads: int | None = None) -> tuple[str, ...]:
    """The settings of a cut."""
    given = {"hidden_size": hidden, "ffn_hidden_size": ffn, "num_layers": layers, "num_attention_heads": heads}
    return tuple(f"target.{name}={value}" for name, value in given.items() if value is not None)


TEACHERS = {
    "openstax": Teacher(
        settings=(
            'data.train="{data}/text/openstax.jsonl.gz"', 'eval.texts.wikitext2="{data}/text/wikitext2_test.joined.txt"', "dtype=fp32",
            "calibrate.samples=64", "calibrate.seq_length=128", "calibrate.micro_batch_size=8", "calibrate.skip_samples=32",
            "train.steps=64", "train.global_batch_size=8", "train.micro_batch_size=8", "train.seq_length=128", "train.lr=2e-3", "train.min_lr=1e-4",
            "train.warmup_steps=6", "train.eval_tokens=8192", "eval.tokens=16384", "eval.micro_batch_size=8",
        ),
        parts={
            "width": sizes(96, 304),
            "depth": sizes(128, 384, layers=5),
            "both": sizes(104, 328, layers=7),
            "fewer_layers": sizes(112, 360, layers=6),
            "fewer_heads": sizes(96, 344, heads=4),
            "mlp": sizes(128, 192),
            "wide": sizes(112, 240),
            "small": sizes(56, 152),
            "few_tokens": ("distill.top_k=2",),
            "many_tokens": ("distill.top_k=64",),
        },
        shape={
            "num_hidden_layers": 8, "hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16,
            "vocab_size": 512, "max_position_embeddings": 512, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "bos_token_id": 1,
            "eos_token_id": 2,
        },
        training=(
            "train.steps=1250", "train.global_batch_size=8", "train.micro_batch_size=8", "train.seq_length=128", "train.lr=3e-3", "train.min_lr=1e-4",
            "train.warmup_steps=100", "train.eval_interval=250", "train.save_interval=250", "train.eval_tokens=16384",
        ),
    ),
    "stories260k": Teacher(  # karpathy's, of stories that are not here, corrected to the text that is
        settings=(
            'data.train="{data}/text/openstax.jsonl.gz"', 'eval.texts.wikitext2="{data}/text/wikitext2_test.joined.txt"', "dtype=fp32",
            "calibrate.samples=64", "calibrate.seq_length=128", "calibrate.micro_batch_size=8", "calibrate.skip_samples=32",
            "train.steps=64", "train.global_batch_size=8", "train.micro_batch_size=8", "train.seq_length=128", "train.lr=2e-3", "train.min_lr=1e-4",
            "train.warmup_steps=6", "train.eval_tokens=8192", "eval.tokens=16384", "eval.micro_batch_size=8",
        ),
        start="{data}/stories260k",
        training=(
            "train.steps=800", "train.global_batch_size=8", "train.micro_batch_size=8", "train.seq_length=128", "train.lr=2e-3", "train.min_lr=1e-4",
            "train.warmup_steps=40", "train.eval_interval=200", "train.save_interval=200", "train.eval_tokens=16384",
        ),
        parts={
            "width": sizes(48, 136),
            "depth": sizes(64, 172, layers=3),
            "both": sizes(56, 144, layers=4),
            "fewer_layers": sizes(64, 112, layers=4),
            "fewer_heads": sizes(48, 156, heads=4),
            "mlp": sizes(64, 78),
            "wide": sizes(56, 102),
            "small": sizes(24, 82),
            "few_tokens": ("distill.top_k=2",),
            "many_tokens": ("distill.top_k=64",),
        },
    ),
    "smollm2_135m": Teacher(  # for a GPU
        settings=(
            "recipe=smollm2_135m_to_100m", 'data.train="{data}/text/openstax.jsonl.gz"',
            'eval.texts.wikitext2="{data}/text/wikitext2_test.joined.txt"', "train.steps=400", "train.global_batch_size=16",
            "train.micro_batch_size=16", "train.seq_length=512",
        ),
        parts={
            "width": sizes(512, 1152),
            "depth": sizes(576, 1536, layers=21),
            "both": sizes(544, 1256, layers=26),
            "fewer_layers": sizes(576, 1336, layers=23),
            "fewer_heads": sizes(512, 1280, heads=6),
            "mlp": sizes(576, 904),
            "wide": sizes(544, 1024),
            "small": sizes(256, 400),
            "few_tokens": ("distill.top_k=10",),
            "many_tokens": ("distill.top_k=1000",),
        },
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to make a student. What differs from seed to seed is the order of the text, what is calibrated on, and what is random."""

    settings: tuple[str, ...] = ()
    parts: tuple[str, ...] = ("width",)  # of the teacher's
    init: str = "pruned"  # or "random": the same sizes, weights as of a model that is trained from nothing
    logits: str | None = None  # "mse" or "cosine": a loss on the logits in the place of the divergence
    via: str | None = None  # a cut to make, and to retrain for as many tokens, before
    budget: float = 1.0  # of the tokens; 0: as pruned, without any retraining


BY_LOSS = ("target.layers_by=loss", "calibrate.skip_layers=1")
ARMS = {
    "width": Arm(),
    "random init": Arm(init="random"),
    "random units": Arm(("calibrate.criterion=random",)),
    "CE": Arm(("distill.loss=none", "distill.cross_entropy=1")),
    "KL + CE": Arm(("distill.cross_entropy=1",)),
    "reverse KL": Arm(("distill.loss=reverse_kl",)),
    "reverse KL + CE": Arm(("distill.loss=reverse_kl", "distill.cross_entropy=1")),
    "MSE + CE": Arm(("distill.cross_entropy=1",), logits="mse"),
    "cosine + CE": Arm(("distill.cross_entropy=1",), logits="cosine"),
    "T=0.5": Arm(("distill.temperature=0.5",)),
    "T=3": Arm(("distill.temperature=3",)),
    "few tokens": Arm(parts=("width", "few_tokens")),
    "many tokens": Arm(parts=("width", "many_tokens")),
    "seq mean": Arm(budget=0),
    "seq L2": Arm(("calibrate.seq_agg=l2",), budget=0),
    "seq var": Arm(("calibrate.seq_agg=var",), budget=0),
    "depth, by loss": Arm(BY_LOSS, ("depth",)),
    "depth, by BI": Arm(parts=("depth",)),
    "depth and width": Arm(BY_LOSS, ("both",)),
    "fewer layers": Arm(BY_LOSS, ("fewer_layers",)),
    "in 4 rounds": Arm(("target.rounds=4",)),
    "fewer heads": Arm(parts=("fewer_heads",)),
    "MLP alone": Arm(parts=("mlp",)),
    "wider, MLP narrower": Arm(parts=("wide",)),
    "small, two steps": Arm(parts=("small",), via="width"),
    "small, one step": Arm(parts=("small",)),
    "small, one step, twice the tokens": Arm(parts=("small",), budget=2),
}


@dataclasses.dataclass(frozen=True)
class Lower:
    """`better` has the lower loss on held-out text than `worse`, after the retraining or before; with a margin: the same."""

    better: str
    worse: str
    when: str = "after"
    margin: float | None = None

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""
        return self.better, self.worse

    @property
    def words(self) -> str:
        """What is compared."""
        sign = "<" if self.margin is None else "="
        return f"{self.better} {sign} {self.worse}" + (", as pruned" if self.when == "before" else "")

    def difference(self, figures: Callable[[str], Figures]) -> float:
        """Of one seed, in nats: above 0 where `better` is."""
        return float(figures(self.worse)[self.when]["loss"] - figures(self.better)[self.when]["loss"])


@dataclasses.dataclass(frozen=True)
class Settles:
    """The order of these arms by loss after `share` of the tokens is closer to the final one than the order before any retraining is."""

    arms: tuple[str, ...]
    share: float
    margin: None = None

    @property
    def words(self) -> str:
        """What is compared."""
        return f"Kendall's tau with the last order of {len(self.arms)} cuts: after {self.share:.0%} of the tokens > as pruned"

    def difference(self, figures: Callable[[str], Figures]) -> float:
        """Of one seed: Kendall's tau to the last order, of the one minus of the other."""
        last = {arm: figures(arm)["after"]["loss"] for arm in self.arms}
        one, other = ({arm: figures(arm)["curve"][str(share)] for arm in self.arms} for share in (self.share, 0.0))
        return (kendall_tau(one, last) or 0.0) - (kendall_tau(other, last) or 0.0)


@dataclasses.dataclass(frozen=True)
class Claim:
    """`words`: what is claimed; `published`: the evidence that the papers give for it."""

    words: str
    published: str
    comparisons: tuple[Lower | Settles, ...]


CANDIDATES = ("width", "fewer heads", "depth and width", "fewer layers", "depth, by loss", "MLP alone", "wider, MLP narrower")
CURVE = (0.0, 0.25, 0.5, 1.0)
CLAIMS = {
    "pruned_init": Claim(
        "a pruned model is a far better start than random weights", "P1 Table 1: loss 2.049 against 3.953", (Lower("width", "random init"),)
    ),
    "importance": Claim(
        "units ranked by importance beat units chosen at random",
        "P1 section 2.2, without a figure of its own",
        (Lower("width", "random units", "before"), Lower("width", "random units")),
    ),
    "kd_over_ce": Claim(
        "distillation beats cross-entropy at equal tokens", "P1 Table 11: HellaSwag 51.04 against 50.85, MMLU 37.81 against 24.57",
        (Lower("width", "CE"),),
    ),
    "kd_alone": Claim("distillation alone beats distillation with cross-entropy", "P1 Table 15: 2.107 against 2.117", (Lower("width", "KL + CE"),)),
    "forward_kl": Claim(
        "forward KL beats reverse KL, and MSE and cosine on the logits",
        "P1 Tables 15 to 17: with CE 2.117 against 2.140, 2.144, 2.134; without, after a depth cut, 2.155 against 2.665",
        (Lower("width", "reverse KL"), *(Lower("KL + CE", f"{loss} + CE") for loss in ("reverse KL", "MSE", "cosine"))),
    ),
    "temperature": Claim(
        "temperature 1 is best", "P1: the best of 0.1, 0.5, 1 and 3", (Lower("width", "T=0.5"), Lower("width", "T=3"))
    ),
    "top_k": Claim(
        "few of the teacher's tokens hurt, many are as good as all", "P1: of 256,000 tokens, 100 and fewer hurt, more equal all but don't beat them",
        (Lower("width", "few tokens"), Lower("width", "many tokens", margin=MARGIN)),
    ),
    "seq_mean": Claim(
        "before retraining, the mean over tokens ranks better than L2 and variance", "P1 Table 13: 7.18 against 8.73 and 8.18",
        (Lower("seq mean", "seq L2", "before"), Lower("seq mean", "seq var", "before")),
    ),
    "width_over_depth": Claim(
        "after retraining, width is better cut than depth", "P1 Table 1: 2.049 against 2.155", (Lower("width", "depth, by loss"),)
    ),
    "flip": Claim(
        "depth and width together begin below width alone, and end above it",
        "P1 Table 1: KL 5.35 against 6.33 before, loss 2.062 against 2.049 after",
        (Lower("depth and width", "width", "before"), Lower("width", "depth and width")),
    ),
    "iterative": Claim(
        "after retraining, importance in rounds is as good as at once", "P1: 1.92 with 1, 2 and 4 rounds",
        (Lower("width", "in 4 rounds", margin=MARGIN),),
    ),
    "settling": Claim(
        "the order of candidates shuffles at first, then settles", "P1, search: it changes until about step 300 of 400",
        (Settles(CANDIDATES, 0.25), Settles(CANDIDATES, 0.5)),
    ),
    "two_steps": Claim(
        "four times smaller in two steps beats one step", "P1 Table 11: HellaSwag 52.04 against 51.04, MMLU 42.45 against 37.81",
        (Lower("small, two steps", "small, one step"),),
    ),
    "two_steps_at_equal_tokens": Claim(
        "the same where the one step has the tokens of both", "not tried", (Lower("small, two steps", "small, one step, twice the tokens"),)
    ),
    "loss_over_bi": Claim(
        "layers by the loss without them beat layers by Block Importance", "P1 Table 1: 2.155 against 2.177",
        (Lower("depth, by loss", "depth, by BI"),)
    ),
    "keep_heads": Claim(
        "at equal parameters, keeping heads beats cutting them", "P2: the published models keep all their heads", (Lower("width", "fewer heads"),)
    ),
}  # fmt: skip


def needed(names: Sequence[str]) -> list[str]:
    """The arms of these claims, each once, in the order of ARMS."""
    found = {arm for name in names for comparison in CLAIMS[name].comparisons for arm in comparison.arms}
    return [arm for arm in ARMS if arm in found]
