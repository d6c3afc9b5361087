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

from minitron.config.schema import Train
from minitron.engine.batch import Batch
from minitron.engine.checkpoint import Checkpoints
from minitron.engine.model import Model
from minitron.engine.optimizer_state import torch_optimizers
from minitron.engine.parallel import World, any_rank, on_main, refuse_together, sum_over_tokens
from minitron.engine.schedule import LossParts, Watch, forward_backward
from minitron.errors import RequestError

Tensor = torch.Tensor
BAD_STEPS_IN_A_ROW = 5


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
    """

    microbatches: Callable[[int], list[Batch]]
    loss: Callable[[int, list[Batch]], StepLoss]
    validate: Callable[[], dict[str, float]]
    report: Callable[[dict[str, Any]], None]


class Trainer:
    """A model with its optimizer, its schedule of learning rates, the number of steps done, and by name what else its checkpoints hold."""

    def __init__(self, model: Model, settings: Train, world: World, extras: dict[str, Extra] | None = None) -> None:
        self.model, self.settings, self.world, self.step, self.extras = model, settings, world, 0, extras or {}
        config = model.config
        buffers = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.wrapped = [DistributedDataParallel(config, buffers, chunk, pg_collection=world.groups) for chunk in model.chunks]
        config.finalize_model_grads_func = finalize_model_grads
        no_sync = [wrapped.no_sync for wrapped in self.wrapped]
        config.no_sync_func = no_sync if world.vpp > 1 else no_sync[0]
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
            lr_warmup_steps=min(settings.warmup_steps, settings.steps - 1),
            lr_decay_steps=settings.steps,
            lr_decay_style=settings.schedule,
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
        return {"step": self.step, "scheduler": self.scheduler.state_dict(), "extras": extras}

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
        for name, extra in self.extras.items():
            extra.load_state_dict(state["extras"][name])

    def update(self, batches: list[Batch], loss: StepLoss) -> dict[str, float]:
        """One optimizer step. Returns the loss parts per counted token, how many these were, the gradient norm and the learning rate used.

        A step whose loss or gradient is not finite changes nothing: `skipped` is 1.
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
        if math.isfinite(grad_norm):
            self._step(grad_norm)
        line = {**parts, "grad_norm": grad_norm, "lr": lr, "skipped": int(not math.isfinite(grad_norm))}
        return {**line, **loss.finish(line)}

    @torch.no_grad()
    def _grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, before clipping."""
        self.optimizer.prepare_grads()
        return float(self.optimizer.get_grad_norm())

    @torch.no_grad()
    def _step(self, grad_norm: float) -> None:
        """Clip and update, from gradients that are ready. Megatron's own `step` does the same without asking whether they are finite."""
        if self.settings.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                clip_grad_by_total_norm_fp32(part.get_parameters(), max_norm=self.settings.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    def close(self) -> None:
        """Let go of gradients and optimizer state: Megatron ties them to the model in cycles that outlive it."""
        for wrapped in self.wrapped:
            wrapped.grad_accs.clear()
        config = self.model.config
        config.grad_scale_func = config.no_sync_func = config.finalize_model_grads_func = None


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


def ask(trainer: Trainer, task: Task, batches: list[Batch], checkpoints: Checkpoints) -> StepLoss:
    """The loss of the step to come. Where it is refused, what was trained is saved before the run ends."""
    try:
        return task.loss(trainer.step, batches)
    except RequestError as error:
        if trainer.step == (on_main(trainer.world, checkpoints.latest) or 0):
            raise
        checkpoints.save(trainer)
        raise RequestError(f"{error}; stopped at step {trainer.step}, saved in {checkpoints.path(trainer.step)}") from error


def fit(trainer: Trainer, task: Task, checkpoints: Checkpoints, stop_requested: Callable[[], bool]) -> None:
    """Train from `trainer.step` to the last step, reporting, validating and saving on the way.

    Raises RequestError after several steps in a row that were not finite, Stopped (from `checkpoints`) on a signal.
    """
    settings, world = trainer.settings, trainer.world
    bad = 0
    while trainer.step < settings.steps:
        started = time.perf_counter()
        batches = task.microbatches(trainer.step)
        line = trainer.update(batches, ask(trainer, task, batches, checkpoints))
        trainer.step += 1
        bad = bad + 1 if line["skipped"] else 0
        if bad == BAD_STEPS_IN_A_ROW:
            raise RequestError(
                f"the loss was not finite for {bad} steps in a row, up to step {trainer.step}: lower train.lr={settings.lr} or check the data"
            )
        seconds = time.perf_counter() - started
        tokens = settings.global_batch_size * settings.seq_length
        metrics = {"step": trainer.step, **line, "tokens": trainer.step * tokens, "tokens_per_second": tokens / seconds}
        if metrics["counted_tokens"] == tokens:  # every token that was read, as always where nothing is masked
            del metrics["counted_tokens"]
        if trainer.step % settings.eval_interval == 0 or trainer.step == settings.steps:
            metrics |= task.validate()
        report(task, metrics, world)
        stopping = stop_requested()
        due = trainer.step % settings.save_interval == 0 and not bad  # a good checkpoint is not given up for one amid bad steps
        if due or trainer.step == settings.steps or stopping:
            checkpoints.save(trainer)
        if stopping and trainer.step < settings.steps:
            checkpoints.stop(trainer)
