"""Distillation by the book: two plain `transformers` models, torch's AdamW, whole logits."""

import math
from pathlib import Path

import torch

from minitron.config.schema import Hidden, Train
from tests.oracles.models import hf_model


def learning_rate(settings: Train, step: int) -> float:
    """Of the step that makes `step` steps done: linear warm-up from 0 to lr, then a half cosine down to min_lr at the last step."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2


def distil(
    student_folder: Path, teacher_folder: Path, batches_BS: list[torch.Tensor], settings: Train, temperature: float,
    hidden: Hidden | None = None, seed: int = 0, counted_BS: torch.Tensor | None = None,
) -> tuple[list[dict], dict]:  # fmt: skip
    """A line per step (loss before it, gradient norm before clipping, learning rate), and the student's tensors at the end.

    `hidden` adds its loss; its lines have kd_loss, hidden_loss and alpha too, and the tensors "projection". `seed` is that of
    the projection. `counted_BS`: the positions that count, in every batch.
    """
    student, teacher = hf_model(student_folder), hf_model(teacher_folder)
    beside = HiddenLoss(student, teacher, hidden, settings, seed) if hidden is not None else None
    matrices = [tensor for tensor in student.parameters() if tensor.dim() > 1]
    vectors = [tensor for tensor in student.parameters() if tensor.dim() == 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=1e-8)
    lines = []
    for step, tokens_BS in enumerate(batches_BS, start=1):
        inputs = tokens_BS[:, :-1]
        with torch.no_grad():
            log_teacher = (teacher(inputs).logits / temperature).log_softmax(-1)
        log_student = (student(inputs).logits / temperature).log_softmax(-1)
        counted = torch.ones_like(inputs, dtype=torch.bool) if counted_BS is None else counted_BS
        kl_BS = torch.nn.functional.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
        loss = kd_loss = kl_BS[counted].mean()
        if beside is not None:
            loss, figures = beside(inputs, counted, kd_loss)
        lines.append(learned(student, optimizer, loss, settings, step))
        if beside is not None:
            lines[-1] |= {**figures, **beside.step(learning_rate(settings, step))}
    tensors = {name: tensor.detach() for name, tensor in student.state_dict().items()}
    if beside is not None and beside.projection is not None:
        tensors["projection"] = beside.projection.weight.detach()
    return lines, tensors


class HiddenLoss:
    """alpha x the loss between hidden states, with a projection trained beside."""

    def __init__(self, student, teacher, hidden: Hidden, settings: Train, seed: int) -> None:
        self.models, self.hidden, self.clip = (student, teacher), hidden, settings.clip_grad or math.inf
        self.alpha = 0.0 if hidden.alpha == "dynamic" else hidden.alpha
        self.projection = None
        if hidden.projection:
            sizes = student.config.hidden_size, teacher.config.hidden_size
            self.projection = torch.nn.Linear(*sizes, bias=False)
            if sizes[0] == sizes[1]:
                torch.nn.init.eye_(self.projection.weight)
            else:
                torch.nn.init.orthogonal_(self.projection.weight, generator=torch.Generator().manual_seed(seed))
            betas = (settings.beta1, settings.beta2)
            self.optimizer = torch.optim.AdamW(self.projection.parameters(), lr=settings.lr, betas=betas, weight_decay=settings.weight_decay)

    def __call__(self, inputs, counted, kd_loss) -> tuple[torch.Tensor, dict[str, float]]:
        """The whole loss, and its parts."""
        ours, theirs = (hidden_states(model, inputs) for model in self.models)
        # the embedding's are the first of a list, so layers counted from 1 or from the end are places in it
        pairs = [*zip(self.hidden.layers or [], self.hidden.teacher_layers or [], strict=True), *[(0, 0)] * self.hidden.embeddings]
        total = torch.zeros(())
        for mine, wanted in pairs:
            state, target = ours[mine], theirs[wanted].detach()
            state = state if self.projection is None else self.projection(state)
            if self.hidden.kind == "mse":
                total = total + ((state - target) ** 2).mean(-1)[counted].mean()
            else:
                unit, target_unit = (x / x.norm(dim=-1, keepdim=True) for x in (state, target))
                total = total + (1 - (unit * target_unit).sum(-1))[counted].mean()
        figures = {"kd_loss": kd_loss.item(), "hidden_loss": total.item(), "alpha": self.alpha}
        loss = kd_loss + self.alpha * total
        if self.hidden.alpha == "dynamic":
            self.alpha = figures["kd_loss"] / figures["hidden_loss"]
        if self.projection is not None:
            self.optimizer.zero_grad()
        return loss, figures

    def step(self, lr: float) -> dict[str, float]:
        """Update the projection."""
        if self.projection is None:
            return {}
        norm = torch.nn.utils.clip_grad_norm_(self.projection.parameters(), self.clip)
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        return {"projection_grad_norm": norm.item()}


def hidden_states(model, inputs) -> list[torch.Tensor]:
    """What the embedding and each block put out. transformers gives the last block's behind the final norm, so that one is caught before it."""
    caught = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    states = model.model(inputs, output_hidden_states=True).hidden_states
    handle.remove()
    assert len(states) == model.config.num_hidden_layers + 1
    return [*states[:-1], caught[0]]


def learned(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor, settings: Train, step: int) -> dict:
    """One step down a loss, the `step`-th from 1, and its line."""
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(settings, step)}


def next_token(folder: Path, batches_BT: list[torch.Tensor], settings: Train) -> list[dict]:
    """As `distil`'s lines, of a model that learns the next token by transformers' own loss."""
    model = hf_model(folder)
    groups = [{"params": [t for t in model.parameters() if (t.dim() > 1) == decays], "weight_decay": decay}
              for decays, decay in ((True, settings.weight_decay), (False, 0.0))]  # fmt: skip
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=1e-8)
    lines = []
    for step, tokens_BT in enumerate(batches_BT, start=1):
        loss = model(tokens_BT, labels=tokens_BT).loss
        lines.append(learned(model, optimizer, loss, settings, step))
    return lines
