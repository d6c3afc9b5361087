"""Distillation by the book: two plain `transformers` models, torch's AdamW, whole logits."""

import math
from pathlib import Path

import torch

from minitron.config.schema import Train
from tests.oracles.models import hf_model


def learning_rate(settings: Train, step: int) -> float:
    """Of the step that makes `step` steps done: linear warm-up from 0 to lr, then a half cosine down to min_lr at the last step."""
    if step <= settings.warmup_steps:
        return settings.lr * step / settings.warmup_steps
    done = (step - settings.warmup_steps) / (settings.steps - settings.warmup_steps)
    return settings.min_lr + (settings.lr - settings.min_lr) * (1 + math.cos(math.pi * done)) / 2


def distil(
    student_folder: Path, teacher_folder: Path, batches_BS: list[torch.Tensor], settings: Train, temperature: float
) -> tuple[list[dict], dict]:
    """A line per step (loss before it, gradient norm before clipping, learning rate), and the student's tensors at the end."""
    student, teacher = hf_model(student_folder), hf_model(teacher_folder)
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
        loss = torch.nn.functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2 / inputs.numel()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), settings.clip_grad or math.inf)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step)
        optimizer.step()
        lines.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": learning_rate(settings, step)})
    return lines, {name: tensor.detach() for name, tensor in student.state_dict().items()}
