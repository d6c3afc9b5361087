"""The training loop: Megatron's DDP, distributed optimizer and schedules. It knows nothing of where a loss comes from.

Legend: B microbatch, S sequence, H hidden.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.utils.hooks import RemovableHandle

from minitron.config.schema import Train
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.guard import Guard
from minitron.engine.meter import Meter, peak_memory
from minitron.engine.model import Model
from minitron.engine.optimizer_state import torch_optimizers
from minitron.engine.parallel import World, any_rank, on_main, refuse_together, sum_over_tokens
from minitron.engine.schedule import LossParts, Watch, forward_backward
from minitron.engine.together import together
from minitron.errors import RequestError

Tensor = torch.Tensor


@dataclasses.dataclass
class StepLoss:
    """The loss of one step.

    `last(microbatch, hidden_SBH)`, on the last stage, turns a microbatch's last hidden states into (sum over its tokens, their count,
    sums to log). `watch` follows the student's forward passes on every stage, for losses that are computed inside the model.
    `sums()`: what such losses summed on this rank over its tokens, under the same names on every rank; added to the sums of the
    same name that `last` logs. `finish(line)`: the step's figures are known and the model has its update (unless `skipped`);
    returns further figures to log.
    """

    last: Callable[[int, Tensor], LossParts]
    watch: Watch | None = None
    sums: Callable[[], dict[str, Tensor]] = dict
    finish: Callable[[dict[str, float]], dict[str, float]] = lambda line: {}


class Extra(Protocol):
    """What is trained or remembered beside the model and goes into checkpoints with it; the same on every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""


@dataclasses.dataclass
class Task:
    """What a run of training is made of, besides the model.

    `microbatches(step)`: this rank's. `loss(step, microbatches)` is called once per step, before the model's own pass, so a
    teacher's pass belongs there; it may raise RequestError, on every rank or on none. `validate()`: figures to log now and
    then. `report(line)`: a step's metrics, on rank 0.
    `source(step)`: in words, what the samples of a step are taken from. `flops_per_token` of all models' passes, and a device's `peak_tflops`: for
    the figures of speed (None: not known).
    """

    microbatches: Callable[[int], list[Batch]]
    loss: Callable[[int, list[Batch]], StepLoss]
    validate: Callable[[], dict[str, float]]
    report: Callable[[dict[str, Any]], None]
    source: Callable[[int], str] = lambda step: "the training data"
    flops_per_token: float | None = None
    peak_tflops: float | None = None


class Trainer:
    """A model with its optimizer, its schedule of learning rates, the number of steps done, and by name what else its checkpoints hold."""

    def __init__(self, model: Model, settings: Train, world: World, extras: dict[str, Extra] | None = None) -> None:
        self.model, self.settings, self.world, self.step, self.extras = model, settings, world, 0, extras or {}
        self.guard = Guard(settings)
        config = model.config
        buffers = DistributedDataParallelConfig(
            use_distributed_optimizer=True,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=settings.overlap_grad_reduce,
            overlap_param_gather=settings.overlap_param_gather,
        )
        # of virtual stages the first alone is cut into buckets, as Megatron does: the others are reduced while it computes
        self.wrapped = [
            DistributedDataParallel(config, buffers, chunk, disable_bucketing=number > 0, pg_collection=world.groups)
            for number, chunk in enumerate(model.chunks)
        ]
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = per_chunk([wrapped.no_sync for wrapped in self.wrapped])
        config.grad_sync_func = per_chunk([wrapped.start_grad_sync for wrapped in self.wrapped]) if settings.overlap_grad_reduce else None
        self.head_sync = gather_before_use(model, self.wrapped[-1]) if settings.overlap_param_gather else None
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=settings.lr,
                min_lr=settings.min_lr,
                weight_decay=settings.weight_decay,
                adam_beta1=settings.beta1,
                adam_beta2=settings.beta2,
                clip_grad=settings.clip_grad,
                bf16=config.bf16,
                params_dtype=config.params_dtype,
                use_distributed_optimizer=True,
            ),
            self.wrapped,
            use_gloo_process_groups=world.device.type != "cpu",
        )
        use_fused_adam(self.optimizer)
        config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup,
            lr_decay_steps=settings.steps,
            lr_decay_style={"wsd": "WSD"}.get(settings.schedule, settings.schedule),
            wsd_decay_steps=settings.decay_steps,
            lr_wsd_decay_style=settings.decay_form,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=0,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
            override_opt_param_scheduler=True,
        )

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the sharded tensors."""
        extras = {name: extra.state_dict() for name, extra in self.extras.items()}
        return {"step": self.step, "scheduler": self.scheduler.state_dict(), "guard": self.guard.state_dict(), "extras": extras}

    def set_state(self, state: dict[str, Any]) -> None:
        """Inverse of `state`. From here on the learning rate is what today's settings give at each step, not those of the checkpoint."""
        if set(known := state.get("extras", {})) != set(self.extras):
            raise RequestError(
                f"the checkpoint holds {sorted(known) or 'nothing'} beside the model, and this training {sorted(self.extras) or 'nothing'}"
            )
        self.step = state["step"]
        for group in self.optimizer.param_groups:  # loaded with the optimizer's state; the schedule reads them there
            group.update(max_lr=self.settings.lr, min_lr=self.settings.min_lr)
        self.scheduler.load_state_dict(state["scheduler"])
        self.guard.load_state_dict(state["guard"])
        for name, extra in self.extras.items():
            extra.load_state_dict(state["extras"][name])

    def update(self, batches: list[Batch], loss: StepLoss) -> dict[str, float]:
        """One optimizer step. Returns the loss parts per counted token, how many these were, the gradient norm and the learning rate used.

        A step that the guard does not let pass changes nothing: `skipped` is 1, and `skipped_steps` tells how many these were so far.
        """
        for wrapped in self.wrapped:
            wrapped.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.scheduler.step(1)
        logs = forward_backward(self.wrapped, batches, self.world, loss.last, loss.watch)
        parts = global_means(logs, self.world, loss.sums())
        lr = self.optimizer.param_groups[0]["lr"]
        # every rank sees the same sums and the same norm, so every rank skips; a bf16 optimizer would not notice by itself
        grad_norm = self._grad_norm() if all(math.isfinite(value) for value in parts.values()) else math.nan
        if passed := self.guard.passes(parts, grad_norm):
            self._step(grad_norm)
        line = {**parts, "grad_norm": grad_norm, "lr": lr, "skipped": int(not passed), "skipped_steps": self.guard.skipped}
        return {**line, **loss.finish(line)}

    @torch.no_grad()
    def _grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, before clipping."""
        self.optimizer.prepare_grads()
        with together():
            return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def _step(self, grad_norm: float) -> None:
        """Clip and update, from gradients that are ready. Megatron's own `step` does the same without asking whether they are finite."""
        if self.settings.clip_grad > 0:
            with together():
                for part in self.optimizer.chained_optimizers:
                    if parameters := part.get_parameters():  # a stage without experts has none for the optimizer of experts
                        clip_grad_by_total_norm_fp32(parameters, max_norm=self.settings.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    def settle(self) -> None:
        """Every parameter is what the last update made of it, on every rank: with train.overlap_param_gather the next pass would see to that."""
        if self.settings.overlap_param_gather:
            for wrapped in self.wrapped:
                wrapped.start_param_sync(force_sync=True)

    def close(self) -> None:
        """Let go of gradients and optimizer state: Megatron ties them to the model in cycles that outlive it."""
        if self.head_sync is not None:
            self.head_sync.remove()
        for wrapped in self.wrapped:
            if self.settings.overlap_param_gather:
                wrapped.disable_forward_pre_hook(param_sync=True)
            wrapped.grad_accs.clear()
        config = self.model.config
        config.grad_scale_func = config.no_sync_func = config.grad_sync_func = config.finalize_model_grads_func = None


def per_chunk(functions: list[Any]) -> Any:
    """As Megatron's schedules want them: one function, or a list of virtual stages'."""
    return functions if len(functions) > 1 else functions[0]


def gather_before_use(model: Model, last: DistributedDataParallel) -> RemovableHandle | None:
    """Have the head's parameters gathered before a pass ends: the loss uses them outside the module for which Megatron would wait.

    Tied to the embedding on one rank they are waited for there. Returns the hook, None on stages before the last.
    """
    chunk = model.chunks[-1]
    if not chunk.post_process or chunk.output_layer.weight is None:
        return None
    wait = last._make_forward_pre_hook()
    return chunk.decoder.final_layernorm.register_forward_pre_hook(lambda *unused: wait(chunk.output_layer))


def use_fused_adam(optimizer: Any) -> None:
    """Without apex and Transformer Engine, Megatron falls back to torch's AdamW: take its one-pass kernel (on a CPU six times as fast)."""
    for inner in torch_optimizers(optimizer):
        for group in inner.param_groups:
            group.update(fused=True, foreach=False)


def global_means(logs: list[dict[str, Tensor]], world: World, watched: Mapping[str, Tensor] = MappingProxyType({})) -> dict[str, float]:
    """Sums per microbatch, with their count under "tokens", to means over the global batch and their count, on every rank.

    `logs` are the last stage's. `watched` are sums made on any stage; a sum of a name that `logs` have is added to it. A batch in which
    nothing counts has means of 0.
    """
    names: list[str] = sorted(logs[0]) if logs else []
    if world.pp > 1:
        box = [names]
        dist.broadcast_object_list(box, src=dist.get_global_rank(world.groups.pp, world.pp - 1), group=world.groups.pp)
        names = box[0]
    sums = torch.zeros(len(names), dtype=torch.float64, device=world.device)
    for log in logs:
        sums += torch.stack([log[name].double().to(world.device) for name in names])
    dist.all_reduce(sums, group=world.groups.dp_cp)
    if world.pp > 1:
        dist.broadcast(sums, src=dist.get_global_rank(world.groups.pp, world.pp - 1), group=world.groups.pp)
    totals = dict(zip(names, sums.tolist(), strict=True))
    for name, total in zip(watched, sum_over_tokens(list(watched.values()), world), strict=True):
        totals[name] = totals.get(name, 0.0) + total.item()
    tokens = totals.pop("tokens")
    return {**{name: total / max(tokens, 1) for name, total in totals.items()}, "counted_tokens": int(tokens)}


def report(task: Task, metrics: dict[str, Any], world: World) -> None:
    """Rank 0 reports a step; where it can't, all ranks stop with its reason."""
    failure = None
    if world.is_main:
        try:
            task.report(metrics)
        except RequestError as error:
            failure = str(error)
    if any_rank(failure is not None, world):
        refuse_together(failure, world)


def tell(trainer: Trainer, task: Task, metrics: dict[str, Any], checkpoints: Checkpoints) -> None:
    """Report a step. Where that fails, or the guard has seen enough, the run ends on all ranks, with the save in flight completed."""
    try:
        report(task, metrics, trainer.world)
        if said := trainer.guard.verdict(trainer.step, task.source(trainer.step - 1)):
            raise RequestError(said)
    except RequestError:
        checkpoints.wait(trainer.world)
        raise


def ask(trainer: Trainer, task: Task, batches: list[Batch], checkpoints: Checkpoints) -> StepLoss:
    """The loss of the step to come. Where it is refused, what was trained is saved before the run ends."""
    try:
        return task.loss(trainer.step, batches)
    except RequestError as error:
        checkpoints.wait(trainer.world)
        if trainer.step == (on_main(trainer.world, checkpoints.latest) or 0):
            raise
        trainer.settle()
        checkpoints.save(trainer)
        raise RequestError(f"{error}; stopped at step {trainer.step}, saved in {checkpoints.path(trainer.step)}") from error


def fit(trainer: Trainer, task: Task, checkpoints: Checkpoints, stop_requested: Callable[[], bool]) -> None:
    """Train from `trainer.step` to the last step, reporting, validating and saving on the way.

    Raises RequestError after `train.max_bad_steps` steps in a row that the guard left out, Stopped (from `checkpoints`) on a signal.
    """
    checkpoints.begin(trainer)
    try:
        _steps(trainer, task, checkpoints, stop_requested)
    finally:
        checkpoints.drop()


def take_step(trainer: Trainer, task: Task, checkpoints: Checkpoints) -> dict[str, Any]:
    """The next step, on all ranks together: its metrics, which are still to be told (`tell`)."""
    settings, world = trainer.settings, trainer.world
    tokens = settings.global_batch_size * settings.seq_length
    meter = Meter(tokens, world.size, task.flops_per_token, task.peak_tflops)
    started = time.perf_counter()
    batches = task.microbatches(trainer.step)
    data_seconds = time.perf_counter() - started
    line = trainer.update(batches, ask(trainer, task, batches, checkpoints))
    trainer.step += 1
    figures = meter.figures(time.perf_counter() - started, data_seconds, peak_memory(world.device))
    metrics = {"step": trainer.step, **line, "tokens": trainer.step * tokens, **figures}
    if metrics["counted_tokens"] == tokens:  # every token that was read, as always where nothing is masked
        del metrics["counted_tokens"]
    return metrics


def _steps(trainer: Trainer, task: Task, checkpoints: Checkpoints, stop_requested: Callable[[], bool]) -> None:
    settings, world, guard = trainer.settings, trainer.world, trainer.guard
    owed = False
    while trainer.step < settings.steps:
        metrics = take_step(trainer, task, checkpoints)
        last = trainer.step == settings.steps
        owed = owed or trainer.step % settings.save_interval == 0
        due = owed and not guard.in_a_row  # a good checkpoint is not given up for one amid bad steps: it waits for the next good step
        if due or last or trainer.step % settings.eval_interval == 0:  # of checkpoints the best is kept
            trainer.settle()
            metrics |= task.validate()
        tell(trainer, task, metrics, checkpoints)
        stopping = stop_requested()
        checkpoints.poll(world)
        if due or last or stopping:
            trainer.settle()
            checkpoints.save(trainer, metrics.get("valid_loss"), final=last or stopping)
            owed = False
        if stopping and not last:
            checkpoints.stop(trainer)
