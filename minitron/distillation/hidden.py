"""The loss between hidden states of student and teacher, on whichever stage they arise (arXiv 2407.14679, section 2.4: L_logits + alpha x L_is).

The teacher's states are kept during its pass and shipped to the stages that hold the student's layers. There, hooks on the
student's blocks compute the loss and its gradient in the forward pass, and the gradient joins the one that comes back through
the block: as with a router's auxiliary loss, no schedule needs to know of it.

A point numbers hidden states: 0 is what the embedding puts out, n what block n (from 1) puts out, before any final norm.

Legend: B microbatch, S sequence (a rank's part under sequence and context parallelism), H and G hidden sizes of student and teacher.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.utils.hooks import RemovableHandle

from minitron import engine
from minitron.arch.arch import Arch
from minitron.arch.shards import stage_of
from minitron.config.schema import Hidden, Train
from minitron.distillation.step import counted_mask
from minitron.errors import refuse

Tensor = torch.Tensor


def one_minus_cosine(student_SBG: Tensor, teacher_SBG: Tensor) -> Tensor:
    """Per token [S, B]: 1 - cosine."""
    return 1.0 - torch.nn.functional.cosine_similarity(student_SBG, teacher_SBG, dim=-1)


def mean_square(student_SBG: Tensor, teacher_SBG: Tensor) -> Tensor:
    """Per token [S, B]: the mean over channels of the squared difference."""
    return (student_SBG - teacher_SBG).square().mean(dim=-1)


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": one_minus_cosine, "mse": mean_square}


def summed(kind: str, student_SBH: Tensor, teacher_SBG: Tensor, mask_SB: Tensor, weight_GH: Tensor | None = None) -> Tensor:
    """The loss of a kind, of `KINDS`, over the tokens that count, in fp32; a weight projects the student's states.

    Where nothing counts the states are zeros before anything is computed of them: a gradient of 0 times infinity would be no number.
    """
    student_SBG, teacher_SBG = (torch.where(mask_SB[..., None], states, 0.0).float() for states in (student_SBH, teacher_SBG))
    if weight_GH is not None:
        student_SBG = student_SBG @ weight_GH.t()
    return torch.where(mask_SB, KINDS[kind](student_SBG, teacher_SBG), 0.0).sum()


class Pair(NamedTuple):
    """Points that are compared."""

    student: int
    teacher: int


def pairs_of(settings: Hidden, student: Arch, teacher: Arch) -> list[Pair]:
    """The pairs that the settings name. Raises RequestError where a model has no such layer, or where sizes differ and nothing bridges them."""
    if student.hidden_size != teacher.hidden_size and not settings.projection:
        sizes = f"the student's hidden size is {student.hidden_size}, the teacher's {teacher.hidden_size}"
        raise refuse("distill.hidden.projection", settings.projection, f"{sizes}; true is needed")
    ours = points("layers", settings.layers or [], student.num_layers, "student")
    theirs = points("teacher_layers", settings.teacher_layers or [], teacher.num_layers, "teacher")
    return [Pair(0, 0)] * settings.embeddings + [Pair(*pair) for pair in zip(ours, theirs, strict=True)]


def points(name: str, layers: list[int], count: int, whose: str) -> list[int]:
    """Layers counted from 1, or from the end as -1, as points."""
    for layer in layers:
        if not 1 <= abs(layer) <= count:
            raise refuse(f"distill.hidden.{name}", layers, f"the {whose} has the layers 1 to {count}, from the end -1 to -{count}")
    return [layer if layer > 0 else count + 1 + layer for layer in layers]


def stage_with(point: int, model: engine.Model, world: engine.World) -> int:
    """The pipeline rank on which a point arises."""
    return stage_of(point - 1, model.arch.num_layers, world.pp, world.vpp) if point else 0


def hook_points(model: engine.Model, hooks: Sequence[tuple[int, Callable[[Tensor], Tensor | None]]]) -> list[RemovableHandle]:
    """Call each hook with the hidden states of its point, where this rank has them; what it returns, if anything, takes their place."""
    modules = {number + 1: block for number, block in model.blocks()}
    if model.chunks[0].pre_process:
        modules[0] = model.chunks[0].embedding

    def on(module: torch.nn.Module, hook: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        def replace(module: Any, args: Any, output: Any) -> Any:
            first, *rest = output if isinstance(output, tuple) else (output,)
            changed = hook(first)
            return None if changed is None else (changed, *rest) if isinstance(output, tuple) else changed

        return module.register_forward_hook(replace)

    return [on(modules[point], hook) for point, hook in hooks if point in modules]


class TeacherStates:
    """The teacher's hidden states of each pair: kept during its pass, then brought to where the student's arise.

    `watch` the teacher's passes with it. Outside of these the hooks do nothing.
    """

    def __init__(self, pairs: Sequence[Pair], student: engine.Model, teacher: engine.Model, world: engine.World) -> None:
        self.world, self.width, self.dtype = world, teacher.arch.hidden_size, teacher.config.params_dtype
        self.current: int | None = None
        self.states: dict[tuple[int, int], Tensor] = {}  # (microbatch, number of the pair)
        self.routes = [(stage_with(pair.teacher, teacher, world), stage_with(pair.student, student, world)) for pair in pairs]
        self.handles = hook_points(teacher, [(pair.teacher, self._keeper(index)) for index, pair in enumerate(pairs)])

    def close(self) -> None:
        """The teacher stays without it."""
        for handle in self.handles:
            handle.remove()
        self.states.clear()

    def begin(self, microbatch: int | None) -> None:
        """As `engine.Watch` says."""
        self.current = microbatch

    def end(self, microbatch: int) -> None:
        """As `engine.Watch` says."""
        self.current = None

    def _keeper(self, pair: int) -> Callable[[Tensor], None]:
        def keep(hidden_SBG: Tensor) -> None:
            if self.current is not None:
                self.states[self.current, pair] = hidden_SBG

        return keep

    def bring(self, shapes_SB: Sequence[tuple[int, int]]) -> None:
        """Ship what was kept of each microbatch, each tensor rank its part. All stages go through one order, so none waits in a circle."""
        for number, shape_SB in enumerate(shapes_SB):
            for pair, route in enumerate(self.routes):
                if self.world.pp_rank in route and route[0] != route[1]:
                    moved = engine.move_between_stages(self.states.pop((number, pair), None), *route, (*shape_SB, self.width), self.dtype, self.world)
                    if moved is not None:
                        self.states[number, pair] = moved


class Projection:
    """One matrix [G, H] from the student's hidden states to the teacher's, without bias, with an AdamW of its own; the same on every rank.

    Starts as the identity where the sizes agree, else with orthonormal rows or columns, from the seed: lengths and angles stay.
    """

    def __init__(self, student_size: int, teacher_size: int, settings: Train, seed: int, world: engine.World) -> None:
        weight_GH = torch.eye(teacher_size, student_size)
        if student_size != teacher_size:
            torch.nn.init.orthogonal_(weight_GH, generator=torch.Generator().manual_seed(seed))
        self.settings, self.world = settings, world
        self.weight_GH = torch.nn.Parameter(weight_GH.to(world.device))
        if world.size > 1:  # machines may factorise differently
            dist.broadcast(self.weight_GH.data, src=0)
        self.gradient_GH = torch.zeros_like(self.weight_GH)  # of this rank's sum over tokens, without alpha
        self.optimizer = torch.optim.AdamW(
            [self.weight_GH], lr=settings.lr, betas=(settings.beta1, settings.beta2), weight_decay=settings.weight_decay
        )

    def update(self, scale: float, lr: float) -> float:
        """A step by the sum over the global batch times `scale`; returns the gradient's norm before clipping. One not finite changes nothing."""
        self.weight_GH.grad = engine.sum_over_tokens([self.gradient_GH], self.world)[0] * scale
        norm = torch.nn.utils.clip_grad_norm_([self.weight_GH], self.settings.clip_grad or math.inf).item()
        if math.isfinite(norm):
            self.optimizer.param_groups[0]["lr"] = lr
            self.optimizer.step()
        return norm


class _Joined(torch.autograd.Function):
    """Hidden states as they are; backward, a gradient that is known already joins the one that comes."""

    @staticmethod
    def forward(ctx: Any, hidden_SBH: Tensor, gradient_SBH: Tensor) -> Tensor:
        ctx.save_for_backward(gradient_SBH)
        return hidden_SBH.view_as(hidden_SBH)

    @staticmethod
    def backward(ctx: Any, incoming_SBH: Tensor) -> tuple[Tensor, None]:
        return incoming_SBH + ctx.saved_tensors[0], None


class HiddenLoss:
    """alpha x the sum over pairs of a loss between hidden states, a mean over the counted tokens of the global batch.

    Follows the student's passes as their watch; the teacher's are to be watched by `teacher_states`. Goes into checkpoints.

    Dynamic alpha is L_logits / L_is of the last step that was made, without gradient, from means over the global batch, and 0
    before the first: both parts share one backward pass, so this step's ratio is not known in time, and a ratio per
    microbatch would depend on how the batch is split.
    """

    def __init__(self, student: engine.Model, teacher: engine.Model, settings: Hidden, train: Train, world: engine.World, seed: int) -> None:
        self.settings, self.world = settings, world
        pairs = pairs_of(settings, student.arch, teacher.arch)
        self.alpha = 0.0 if isinstance(settings.alpha, str) else settings.alpha
        self.projection = Projection(student.arch.hidden_size, teacher.arch.hidden_size, train, seed, world) if settings.projection else None
        self.teacher_states = TeacherStates(pairs, student, teacher, world)
        self.current: int | None = None
        self.waiting: list[deque[Tensor]] = [deque() for _ in pairs]  # per pair, gradients of passes that will be made once more
        self.masks_SB: list[Tensor] = []
        self.total = torch.zeros((), dtype=torch.float64, device=world.device)
        hook_points(student, [(pair.student, self._joiner(index)) for index, pair in enumerate(pairs)])

    def start(self, batches: Sequence[engine.Batch]) -> None:
        """A step begins; the teacher's pass is over."""
        self.masks_SB = [mask_here(batch, self.world) for batch in batches]
        self.teacher_states.bring([(mask_SB.shape[0], mask_SB.shape[1]) for mask_SB in self.masks_SB])
        self.total.zero_()
        for gradients in self.waiting:
            gradients.clear()
        if self.projection is not None:
            self.projection.gradient_GH.zero_()

    def begin(self, microbatch: int | None) -> None:
        """As `engine.Watch` says."""
        self.current = microbatch

    def end(self, microbatch: int) -> None:
        """As `engine.Watch` says."""
        self.current = None

    def _joiner(self, pair: int) -> Callable[[Tensor], Tensor | None]:
        """What a student's point does: of a pass that will be made once more in the backward pass (train.recompute), nothing but the second
        time leads gradients back. Microbatches come back through a chunk in the order in which they went forward."""
        waiting = self.waiting[pair]

        def join(hidden_SBH: Tensor) -> Tensor | None:
            if engine.recomputing():
                second: Tensor = _Joined.apply(hidden_SBH, waiting.popleft())
                return second
            if self.current is None:
                return None
            teacher_SBG, mask_SB = self.teacher_states.states.pop((self.current, pair)), self.masks_SB[self.current]
            gradient_SBH = self._gradient(hidden_SBH.detach(), teacher_SBG, mask_SB)
            if not torch.is_grad_enabled():  # to be made once more
                waiting.append(gradient_SBH)
                return None
            joined: Tensor = _Joined.apply(hidden_SBH, gradient_SBH)
            return joined

        return join

    @torch.enable_grad()
    def _gradient(self, hidden_SBH: Tensor, teacher_SBG: Tensor, mask_SB: Tensor) -> Tensor:
        """Add one pair's loss and the projection's gradient to the sums; returns alpha x the gradient of the hidden states."""
        weights = [] if self.projection is None else [self.projection.weight_GH]
        loss = summed(self.settings.kind, hidden_SBH.requires_grad_(), teacher_SBG, mask_SB, *weights)
        gradient_SBH, *others = torch.autograd.grad(loss, [hidden_SBH, *weights])
        self.total += loss.detach()
        if self.projection is not None:
            self.projection.gradient_GH += others[0]
        return gradient_SBH * self.alpha

    def sums(self) -> dict[str, Tensor]:
        """Of this rank's stages."""
        return {"hidden_loss": self.total, "loss": self.alpha * self.total}

    def finish(self, line: dict[str, float]) -> dict[str, float]:
        """Update projection and alpha unless the step was skipped; the alpha that was used, and the norm of the projection's gradient."""
        figures = {"alpha": self.alpha}
        if line["skipped"]:
            return figures
        if self.projection is not None:
            figures["projection_grad_norm"] = self.projection.update(self.alpha / max(line["counted_tokens"], 1), line["lr"])
        if self.settings.alpha == "dynamic" and line["hidden_loss"] > 0:  # where nothing counted it stays
            self.alpha = line["kd_loss"] / line["hidden_loss"]
        return figures

    def state_dict(self) -> dict[str, Any]:
        """As `engine.Extra` says."""
        projection = self.projection
        learned = {} if projection is None else {"projection": projection.weight_GH.detach(), "optimizer": projection.optimizer.state_dict()}
        return {"alpha": self.alpha, **learned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As `engine.Extra` says."""
        self.alpha = state["alpha"]
        if self.projection is not None:
            self.projection.weight_GH.data.copy_(state["projection"])
            self.projection.optimizer.load_state_dict(state["optimizer"])


def mask_here(batch: engine.Batch, world: engine.World) -> Tensor:
    """Which tokens of this rank's hidden states inside the model count, bool [S, B]."""
    mask_SB = engine.to_device(counted_mask(batch, world), world.device).unflatten(0, (-1, batch.tokens_BT.shape[0]))
    return mask_SB.chunk(world.tp)[world.tp_rank] if world.sequence_parallel else mask_SB
