"""Every setting: its name, type, default and meaning. A group is a frozen dataclass that checks itself on construction.

This file, with cluster.py for SLURM, planning.py for plans, evaluation.py and speed.py, is the only place where a default lives; the YAML files under
`configs/` hold choices that differ from it.
`setting(default, "meaning", ...)` (setting.py) carries what `--help` prints and the simple checks.
"""

import dataclasses
from typing import Any

from minitron.config.cluster import Slurm
from minitron.config.evaluation import Eval
from minitron.config.planning import Planning
from minitron.config.setting import MISSING, setting
from minitron.config.speed import Speed
from minitron.errors import refuse

# what a search may be bounded by: targets, met from either side, then limits
TARGETS, LIMITS = ("params", "non_embedding_params", "active_params"), ("memory_gb", "gflops_per_token", "latency_ms")
BUDGETS = TARGETS + LIMITS


@dataclasses.dataclass(frozen=True)
class Run:
    dir: str = setting(MISSING, "folder that receives every file of this run; the same command continues in it")
    checkpoint: str | int = setting(
        "last", "which of the training's checkpoints evaluate and export read: last, best (least validation loss), or the step of one"
    )
    until: str | None = setting(None, "stage after which minitron compress ends; the same command without it goes on (null: the last one)",
                                allowed=("data", "calibrate", "search", "prune", "distill", "evaluate"))  # fmt: skip

    def __post_init__(self) -> None:
        if isinstance(self.checkpoint, str) and self.checkpoint not in ("last", "best"):
            raise refuse("run.checkpoint", self.checkpoint, "last, best or the step of a checkpoint is needed")


@dataclasses.dataclass(frozen=True)
class Model:
    path: str = setting(
        MISSING,
        "the model to compress: a Hugging Face folder, a hub id, a .gguf file, or package:NAME/FILE for a file inside an installed Python package",
    )
    shape: dict[str, int | float | bool | str | None] = setting(
        {},
        "what the config.json of a model without files would say, as KEY: value (model_type, hidden_size, ...); minitron plan reads it without "
        "model.path",
    )


@dataclasses.dataclass(frozen=True)
class Target:
    """Sizes of the compressed model: a size (whole number), a kept fraction (between 0 and 1), or null to leave the axis alone.

    Sizes of a layer may also be a list, one size per kept layer; such a model can be distilled and evaluated, but transformers can't express it.
    """

    num_layers: int | float | None = setting(None, "transformer layers to keep", above=0)
    hidden_size: int | float | None = setting(None, "width of the residual stream", above=0)
    ffn_hidden_size: int | float | list[int] | None = setting(None, "MLP neurons per layer; a list: of each kept layer", above=0)
    num_attention_heads: int | float | list[int] | None = setting(None, "query heads per layer, the same number in every KV group", above=0)
    num_query_groups: int | float | list[int] | None = setting(None, "KV groups per layer", above=0)
    num_moe_experts: int | float | None = setting(None, "experts of each layer that has them; null where a model has none", above=0)
    moe_ffn_hidden_size: int | float | None = setting(None, "neurons of each expert; null where a model has none", above=0)
    moe_shared_expert_intermediate_size: int | float | None = setting(
        None, "neurons of the expert that every token goes through; null where a model has none", above=0
    )
    layers_by: str = setting(
        "bi",
        "what ranks layers: bi, Block Importance; loss, without each of them; block, the contiguous block without which it is lowest goes; "
        "choices, block_choices: the same by right answers",
        allowed=("bi", "loss", "block", "choices", "block_choices"),
    )
    rounds: int = setting(
        1, "cut in so many equal steps, and before each but the first measure importance again, as calibrate does, on what is left", least=1
    )
    merge_heads: bool = setting(False, "add what pruned query heads differ by to the heads of their group that stay (head residual merge)")
    multiple_of: int = setting(8, "hidden and MLP sizes that come from a fraction are rounded to a multiple of this", least=1)

    @property
    def sizes(self) -> dict[str, Any]:
        """The sizes that are asked for, by name."""
        return {field.name: value for field in dataclasses.fields(self) if field.default is None and (value := getattr(self, field.name)) is not None}


@dataclasses.dataclass(frozen=True)
class Parallel:
    tp: int = setting(1, "tensor-parallel ranks", least=1)
    pp: int = setting(1, "pipeline stages", least=1)
    vpp: int = setting(1, "virtual stages (model chunks) per pipeline rank", least=1)
    cp: int = setting(1, "context-parallel ranks", least=1)
    ep: int = setting(1, "expert-parallel ranks, out of the data- and context-parallel ones: each holds so many of the experts", least=1)
    sp: bool = setting(False, "sequence parallelism: activations outside the matrices split over the tensor ranks")
    timeout_minutes: float = setting(30.0, "a collective that waits longer than this for another rank ends the run", above=0)
    start_minutes: float = setting(5.0, "at the start, ranks that are not all there and in reach of one another after this end the run", above=0)


@dataclasses.dataclass(frozen=True)
class TeacherParallel:
    tp: int | None = setting(None, "tensor-parallel ranks of the teacher (null: the student's)", least=1)
    pp: int | None = setting(None, "pipeline stages of the teacher (null: the student's)", least=1)
    ep: int | None = setting(None, "expert-parallel ranks of the teacher (null: the student's)", least=1)


@dataclasses.dataclass(frozen=True)
class TeacherCache:
    folder: str | None = setting(
        None,
        "distill from the teacher's predictions that minitron cache left in this folder (null: from the teacher itself; "
        "for the verb cache: run.dir/cache)",
    )
    top_k: int = setting(64, "most probable tokens of each distribution to keep, and to read: at most as many as were kept", least=1)
    samples_per_file: int = setting(64, "sequences per file", least=1)


@dataclasses.dataclass(frozen=True)
class Teacher:
    path: str | None = setting(None, "the teacher, in the forms of model.path (null: the model that was compressed)")
    cache: TeacherCache = dataclasses.field(default_factory=TeacherCache)
    parallel: TeacherParallel = dataclasses.field(default_factory=TeacherParallel)
    offload: bool = setting(
        False, "the teacher's weights wait in pinned host memory and are on the GPU for its passes only; changes nothing with device=cpu"
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """A source is a file or folder (.txt, one document each; .jsonl .json .parquet, also compressed; or a prefix of prepared .bin/.idx), a hub id
    (ID or ID:CONFIG), package:NAME/FILE, or a blend `weight source weight source ...`; SOURCE#FIELD names the text's field for one source."""

    train: str = setting(MISSING, "text to distil and train on")
    valid: str | None = setting(None, "held-out text (null: documents held out of data.train)")
    calibration: str | None = setting(None, "text to measure importance on (null: documents of data.train)")
    calibration_fraction: float | None = setting(
        None, "share of the documents of data.train held out to measure importance on (null: none, those that train reads)", above=0, most=0.25
    )
    text_key: str = setting("text", "field that holds the text in jsonl, json and parquet sources")
    valid_fraction: float = setting(0.05, "share of the documents of data.train held out when data.valid is null", above=0, most=0.5)
    workers: int = setting(1, "processes that tokenise", least=1)
    split: str = setting("train", "split to read of a hub data set")
    prompt_key: str | None = setting(
        None,
        "field that holds a prompt, put before the text of data.text_key: its tokens are read, but not counted in the training loss (null: none)",
    )
    packing: str = setting(
        "stream",
        "training sequences: stream, windows over documents joined one after another; documents, whole documents packed into windows, with padding "
        "at the end; those longer than a window are cut into pieces",
        allowed=("stream", "documents"),
    )
    separate_documents: bool = setting(
        False, "in training, a token sees its own document alone, and the prediction of a document's first token from another's end does not count"
    )

    def __post_init__(self) -> None:
        if self.calibration is not None and self.calibration_fraction is not None:
            raise refuse("data.calibration_fraction", self.calibration_fraction, "must be null with data.calibration")
        if self.prompt_key is not None and self.prompt_key == self.text_key:
            raise refuse("data.prompt_key", self.prompt_key, "that is data.text_key, the field of the text: another field is needed")


@dataclasses.dataclass(frozen=True)
class Calibrate:
    samples: int = setting(1024, "packed sequences to measure importance on", least=1)
    seq_length: int = setting(512, "tokens per calibration sequence", least=2)
    micro_batch_size: int = setting(1, "sequences per forward pass", least=1)
    criterion: str = setting("activation", "what ranks the units", allowed=("activation", "magnitude", "random"))
    batch_agg: str = setting("l2", "aggregation over samples", allowed=("l2", "mean", "var"))
    seq_agg: str = setting("mean", "aggregation over a sample's tokens, done first", allowed=("mean", "l2", "var"))
    compile: bool = setting(
        False, "measure with compiled kernels that read each activation once: for wide models; a C++ compiler or, on a GPU, Triton is needed"
    )
    skip_layers: int | list[int] | None = setting(
        None, "also measure the loss without every run of this many layers; a list: of each of these lengths, in one walk (null: don't)", least=1
    )
    skip_samples: int = setting(64, "sequences to measure the losses of skip_layers on, at most calibrate.samples", least=1)
    choices: str | None = setting(
        None,
        "questions to answer without every run of skip_layers: a .jsonl or .parquet file, or a set of the hub in a known form, ID or ID:CONFIG "
        "(null: none)",
    )
    questions: int = setting(500, "of calibrate.choices, this many at most, the first ones", least=1)

    def __post_init__(self) -> None:
        if self.skip_layers is not None and self.criterion != "activation":
            raise refuse("calibrate.skip_layers", self.skip_layers, f"must be null with calibrate.criterion={self.criterion}")
        if self.choices is not None and self.skip_layers is None:
            raise refuse("calibrate.choices", self.choices, "calibrate.skip_layers is needed with it: the layers to leave out at a time")

    @property
    def skip_lengths(self) -> list[int]:
        """`skip_layers` as a list, each number once."""
        return sorted({self.skip_layers} if isinstance(self.skip_layers, int) else {*(self.skip_layers or [])})


@dataclasses.dataclass(frozen=True)
class Hidden:
    """A loss between what layers of student and teacher put out, beside the one on the logits; of use where many layers were cut."""

    enabled: bool = setting(False, "also pull hidden states of the student towards the teacher's")
    kind: str = setting("cosine", "per token: 1 - cosine, or the mean square over channels", allowed=("cosine", "mse"))
    layers: list[int] | None = setting([-3], "layers of the student, counted from 1, or from the end as -1 (null: none)")
    teacher_layers: list[int] | None = setting([-3], "the teacher's layer that each of them is compared to, counted likewise")
    embeddings: bool = setting(False, "compare what the embeddings put out, too")
    projection: bool = setting(False, "a learned matrix takes the student's hidden states to the teacher's size; one for all layers, not exported")
    alpha: float | str = setting(
        "dynamic", "weight of the sum over layers; dynamic: what made it as large as the loss on the logits in the step before, 0 in the first"
    )

    def __post_init__(self) -> None:
        ours, theirs = self.layers or [], self.teacher_layers or []
        if len(ours) != len(theirs):
            raise refuse("distill.hidden.teacher_layers", self.teacher_layers, f"one for each of distill.hidden.layers={self.layers} is needed")
        if self.enabled and not ours and not self.embeddings:
            raise refuse("distill.hidden.layers", self.layers, "nothing is compared: layers, or distill.hidden.embeddings=true, are needed")
        if self.alpha != "dynamic" and (isinstance(self.alpha, str) or self.alpha < 0):
            raise refuse("distill.hidden.alpha", self.alpha, "dynamic or a number of at least 0 is needed")


@dataclasses.dataclass(frozen=True)
class Distill:
    loss: str = setting(
        "forward_kl",
        "distillation loss on the logits: KL(teacher || student), KL(student || teacher), or the Jensen-Shannon divergence between the two; "
        "none: no teacher, distill.cross_entropy alone",
        allowed=("forward_kl", "reverse_kl", "jsd", "none"),
    )
    beta: float = setting(
        0.5, "jsd: the teacher's share of the mixture M: beta KL(teacher || M) + (1 - beta) KL(student || M); no other loss has it", above=0, below=1
    )
    temperature: float = setting(1.0, "temperature of both distributions; the loss is scaled by its square", above=0)
    top_k: int | None = setting(
        None, "compare the teacher's largest tokens, as many as this, and all others together (null: every token by itself)", least=1
    )
    cross_entropy: float = setting(0.0, "weight of the next-token cross-entropy, at temperature 1, that is added to the loss", least=0)
    gradients: str = setting(
        "forward",
        "when the loss makes its gradients: in its forward pass; recompute: in its backward pass, from logits made once more, which holds no "
        "gradient of the head in between",
        allowed=("forward", "recompute"),
    )
    chunk_tokens: int = setting(256, "size of the memory that the loss works in: two fp32 buffers of the logits of so many tokens", least=1)
    hidden: Hidden = dataclasses.field(default_factory=Hidden)

    def __post_init__(self) -> None:
        if self.loss == "none":
            alone = "with distill.loss=none, which has no teacher to compare with"
            if self.cross_entropy == 0:
                raise refuse("distill.cross_entropy", self.cross_entropy, "nothing is left to train on with distill.loss=none: more than 0 is needed")
            if self.top_k is not None:
                raise refuse("distill.top_k", self.top_k, f"must be null {alone}")
            if self.temperature != 1.0:
                raise refuse("distill.temperature", self.temperature, f"must be 1.0 {alone}")
            if self.hidden.enabled:
                raise refuse("distill.hidden.enabled", True, f"must be false {alone}")


@dataclasses.dataclass(frozen=True)
class Train:
    steps: int = setting(1000, "optimizer steps", least=1)
    global_batch_size: int = setting(32, "sequences per step over all ranks", least=1)
    micro_batch_size: int = setting(1, "sequences per forward pass of a rank", least=1)
    seq_length: int = setting(1024, "tokens per sequence", least=2)
    lr: float = setting(1e-4, "peak learning rate", above=0)
    min_lr: float = setting(1e-5, "learning rate at the end of the decay", least=0)
    warmup_steps: int = setting(40, "steps of linear warm-up, at most train.steps - 1", least=0)
    schedule: str = setting(
        "cosine",
        "learning rate after the warm-up: a cosine or a line down to train.min_lr at the last step; constant; wsd (warm-up, stable, decay): "
        "constant, then down over the last train.decay_steps",
        allowed=("cosine", "linear", "constant", "wsd"),
    )
    decay_steps: int | None = setting(None, "wsd: steps of the decay, the last ones of train.steps (needed there)", least=1)
    decay_form: str = setting(
        "minus_sqrt",
        "wsd: what is left of the distance to train.min_lr where a share x of the decay is done: 1 - x, a half cosine, 2^(1-x) - 1, 1 - sqrt(x)",
        allowed=("linear", "cosine", "exponential", "minus_sqrt"),
    )
    weight_decay: float = setting(0.1, "decoupled weight decay, on matrices only (embeddings are; norms and biases are not)", least=0)
    beta1: float = setting(0.9, "Adam's first decay", least=0, most=0.9999)
    beta2: float = setting(0.95, "Adam's second decay", least=0, most=0.99999)
    clip_grad: float = setting(1.0, "gradients are scaled down to this norm (0: never)", least=0)
    recompute: str = setting(
        "none",
        "activations of the trained model that are made once more for the backward pass instead of being held: none; selective, those of attention "
        "and MLP; full, all but each block's input",
        allowed=("none", "selective", "full"),
    )
    overlap_grad_reduce: bool = setting(False, "replicas add up the gradients of a bucket while the backward pass goes on with the next")
    overlap_param_gather: bool = setting(
        False, "replicas gather the parameters of a bucket, after an update, while the next forward pass goes on; needs train.overlap_grad_reduce"
    )
    spike_factor: float | None = setting(
        None, "a step whose loss is above this many times the median of the last spike_window good ones is left out (null: never)", above=1
    )
    spike_window: int = setting(32, "good steps that spike_factor looks back on; until there are as many, no loss is too high", least=1)
    max_bad_steps: int = setting(5, "steps in a row with a loss or gradient that is not finite, or a spike, after which the run stops", least=1)
    save_interval: int = setting(500, "steps between checkpoints, each with a validation", least=1)
    keep_last: int = setting(2, "newest checkpoints to keep; the one with the least validation loss stays beside them", least=1)
    keep_every: int | None = setting(None, "also keep checkpoints whose step is a multiple of this (null: none)", least=1)
    async_save: bool = setting(True, "copy what a checkpoint holds and write it beside the next steps; takes host memory for the copy")
    eval_interval: int = setting(100, "steps between validations", least=1)
    eval_tokens: int = setting(16384, "tokens of data.valid that one validation reads", least=1)

    def __post_init__(self) -> None:
        if self.global_batch_size % self.micro_batch_size:
            raise refuse("train.global_batch_size", self.global_batch_size, f"a multiple of train.micro_batch_size={self.micro_batch_size} is needed")
        if self.min_lr > self.lr:
            raise refuse("train.min_lr", self.min_lr, f"at most train.lr={self.lr} is allowed")
        most = self.steps - self.warmup
        if self.schedule == "wsd" and not 1 <= (self.decay_steps or 0) <= most:
            allowed = f"1 to {most} steps, what the warm-up leaves of train.steps={self.steps}, are needed with train.schedule=wsd"
            raise refuse("train.decay_steps", self.decay_steps, allowed)
        if self.schedule != "wsd" and self.decay_steps is not None:
            raise refuse("train.decay_steps", self.decay_steps, f"must be null with train.schedule={self.schedule}, which would not read it")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise refuse("train.overlap_param_gather", True, "train.overlap_grad_reduce=true is needed with it")

    @property
    def warmup(self) -> int:
        """Steps of the warm-up as they are done: it ends before the training does."""
        return min(self.warmup_steps, self.steps - 1)


@dataclasses.dataclass(frozen=True)
class Search:
    """Which sizes to look at, and how they are told apart. A budget for parameters is a target, met to within search.tolerance on either side;
    one for memory, arithmetic or time is a limit. Grids are lists of sizes; null takes a grid of its own, down from the model's size."""

    params: float | None = setting(None, "parameters that the compressed model is to have, all of them", above=0)
    non_embedding_params: float | None = setting(None, "the same without embedding and output layer", above=0)
    active_params: float | None = setting(None, "parameters that one token makes use of: with experts, those it is sent to", above=0)
    memory_gb: float | None = setting(
        None, "most GB (10^9 bytes) of weights and key/value cache, for search.batch_size sequences of search.seq_length", above=0
    )
    gflops_per_token: float | None = setting(None, "most GFLOP of one forward pass per token, at search.seq_length", above=0)
    latency_ms: float | None = setting(
        None,
        "most milliseconds of one forward pass over search.batch_size sequences of search.seq_length, measured block by block on this device",
        above=0,
    )
    batch_size: int = setting(1, "sequences that memory and time are counted for", least=1)
    seq_length: int = setting(4096, "tokens per sequence that memory, arithmetic and time are counted for", least=1)
    tolerance: float = setting(0.05, "share of a budget of parameters by which a model may miss it", least=0, below=1)

    num_layers: list[int] | None = setting(None, "numbers of layers to look at (null: down to 7/8 of the model's)", least=1)
    hidden_size: list[int] | None = setting(
        None, "widths to look at (null: down to half the model's, multiples of search.hidden_multiple_of)", least=1
    )
    ffn_hidden_size: list[int] | None = setting(
        None, "MLP neurons to look at (null: down to half the model's, multiples of search.ffn_multiple_of)", least=1
    )
    ffn_expansion: list[float] | None = setting(
        None, "MLP neurons to look at, as multiples of the width, in place of search.ffn_hidden_size", above=0
    )
    num_attention_heads: list[int] | None = setting(None, "query heads to look at (null: the model's)", least=1)
    num_query_groups: list[int] | None = setting(None, "KV groups to look at (null: the model's)", least=1)
    hidden_multiple_of: int = setting(64, "widths of a grid of its own are multiples of this, as tensor cores like them", least=1)
    ffn_multiple_of: int = setting(128, "MLP sizes of a grid of its own, and those of search.ffn_expansion, are multiples of this", least=1)
    values: int = setting(9, "most sizes of an axis in a grid of its own: where there are more, it is coarser", least=2)
    keep_dominated: bool = setting(False, "also look at models that another one within the budgets is at least as large as on every axis")
    max_candidates: int = setting(64, "most candidates whose loss is measured; more are refused", least=1)

    tokens: int = setting(16384, "tokens of data.valid that losses of candidates are measured on", least=1)
    finalists: int = setting(8, "candidates with the least loss before any training that are distilled", least=1)
    rungs: list[int] = setting(
        [50, 100, 200, 400], "steps of distillation after which candidates are compared; only search.survive of them go on to the next", least=1
    )
    survive: float = setting(0.5, "share of the candidates that goes on from a rung, at least two of them", above=0, most=1)
    settled: int = setting(2, "rungs in a row with one order of all that came to the last of them, after which the search ends (0: never)", least=0)
    seeds: int = setting(1, "orders of the training data that each candidate is distilled on; its loss is their mean", least=1)
    together: int | None = setting(None, "candidates trained at the same time, sharing the teacher's passes (null: as many as memory holds)", least=1)

    @property
    def budgets(self) -> dict[str, float]:
        """The budgets that are set, by name."""
        return {name: value for name in BUDGETS if (value := getattr(self, name)) is not None}

    def __post_init__(self) -> None:
        if self.ffn_hidden_size is not None and self.ffn_expansion is not None:
            raise refuse("search.ffn_expansion", self.ffn_expansion, "must be null with search.ffn_hidden_size")
        if self.rungs != sorted(set(self.rungs)):
            raise refuse("search.rungs", self.rungs, "numbers of steps that grow are needed")
        for name in TARGETS:
            if (budget := getattr(self, name)) is not None and budget < 1:
                raise refuse(f"search.{name}", budget, "a number of parameters is needed, such as 8e9 or 8B, not a share of the model's")


@dataclasses.dataclass(frozen=True)
class Family:
    """Several models one after another, each pruned from the one before: what differs between them."""

    steps: dict[str, str] = setting(
        {}, "the models, largest first, as name: its settings, such as '8b: target.hidden_size=4096 target.ffn_hidden_size=16384 train.steps=1000'"
    )
    teacher: str = setting(
        "original",
        "who teaches from the second model on: original, model.path; previous, the model that it was pruned from",
        allowed=("original", "previous"),
    )


@dataclasses.dataclass(frozen=True)
class Logging:
    interval: int = setting(1, "steps between lines of metrics.jsonl", least=1)
    progress: bool = setting(True, "progress bars on the console")
    wandb: bool = setting(False, "log to Weights & Biases too (WANDB_MODE=offline works)")
    wandb_project: str = setting("minitron", "project of the wandb run")
    tensorboard: bool = setting(False, "write run.dir/tensorboard too")
    peak_tflops: float | None = setting(
        None, "TFLOP/s that one device can reach in this dtype, for mfu (null: known of some GPUs; where it is not, there is no mfu)", above=0
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole of a run's settings."""

    run: Run = dataclasses.field(default_factory=Run)
    model: Model = dataclasses.field(default_factory=Model)
    target: Target = dataclasses.field(default_factory=Target)
    parallel: Parallel = dataclasses.field(default_factory=Parallel)
    teacher: Teacher = dataclasses.field(default_factory=Teacher)
    data: Data = dataclasses.field(default_factory=Data)
    calibrate: Calibrate = dataclasses.field(default_factory=Calibrate)
    distill: Distill = dataclasses.field(default_factory=Distill)
    train: Train = dataclasses.field(default_factory=Train)
    search: Search = dataclasses.field(default_factory=Search)
    family: Family = dataclasses.field(default_factory=Family)
    plan: Planning = dataclasses.field(default_factory=Planning)
    eval: Eval = dataclasses.field(default_factory=Eval)
    speed: Speed = dataclasses.field(default_factory=Speed)
    logging: Logging = dataclasses.field(default_factory=Logging)
    slurm: Slurm = dataclasses.field(default_factory=Slurm)
    device: str = setting("auto", "where to compute; auto takes a GPU where there is one", allowed=("auto", "cpu", "cuda"))
    spec: str = setting("auto", "modules of the blocks when training and evaluating; auto takes Transformer Engine's where a GPU has it",
                        allowed=("auto", "torch", "transformer_engine"))  # fmt: skip
    dtype: str = setting("bf16", "type of weights and activations; gradients and optimizer state are fp32", allowed=("bf16", "fp32"))
    seed: int = setting(1234, "seed of every random choice", least=0)

    @property
    def teacher_parallel(self) -> Parallel:
        """The teacher's layout: the student's, or with other ranks or stages and then neither virtual stages nor sequence parallelism."""
        own = {name: size for name in ("tp", "pp", "ep") if (size := getattr(self.teacher.parallel, name)) is not None}
        same = all(getattr(self.parallel, name) == size for name, size in own.items())
        return self.parallel if same else dataclasses.replace(self.parallel, **own, vpp=1, sp=False)
