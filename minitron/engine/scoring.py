"""What a sharded model makes of text: language-model loss, perplexity, speed.

Legend: B microbatch, S sequence (a context rank's part), T = S + 1 tokens, N = B x S, H hidden, v vocabulary rows of this rank.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

from minitron.engine.batch import to_device
from minitron.engine.model import Model
from minitron.engine.parallel import World
from minitron.engine.schedule import forward_only, in_passes, local_part, whole_sequence
from minitron.engine.vocab import live_head, token_losses

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Score:
    """`loss` in nats per token over `tokens` predicted tokens; `tokens_per_second` over all ranks."""

    loss: float
    tokens: int
    tokens_per_second: float

    @property
    def perplexity(self) -> float:
        """exp(loss): per token of this tokenizer, at this window length."""
        return math.exp(min(self.loss, 700.0))


def language_model_score(model: Model, batches: Iterable[tuple[Tensor, Tensor]], world: World, advance: Callable[[int], None] | None = None) -> Score:
    """Mean next-token loss over windows of tokens. Every rank returns the same.

    `batches` yields (tokens [B, T], counted bool): [B], windows that only fill up a batch are not counted, or [B, S], nor are the predictions that
    an earlier window made already.
    """
    started = time.perf_counter()
    sums = torch.zeros(2, dtype=torch.float64, device=world.device)  # of losses, and how many they are
    for group in in_passes(batches, world, lambda batch: batch[0].shape):

        def collect(number: int, hidden_SBH: Tensor, group: list[tuple[Tensor, Tensor]] = group) -> None:
            tokens_BT, counted = group[number]
            losses_BS = position_losses(model, hidden_SBH, tokens_BT, world)
            counted_BS = to_device(local_part(by_position(counted, tokens_BT), world), world.device)
            sums.add_(torch.stack([torch.where(counted_BS, losses_BS.double(), 0.0).sum(), counted_BS.sum()]))

        forward_only(model, [tokens_BT[:, :-1] for tokens_BT, _ in group], world, collect)
        if advance is not None:
            advance(sum(int(by_position(counted, tokens_BT).any(dim=1).sum()) for tokens_BT, counted in group))
    total, count = from_last_stages(sums, world).tolist()
    return Score(total / max(count, 1), int(count), count / (time.perf_counter() - started))


def by_position(counted: Tensor, tokens_BT: Tensor) -> Tensor:
    """[B, S] of [B] or [B, S]."""
    return counted[:, None].expand_as(tokens_BT[:, 1:]) if counted.dim() == 1 else counted


def position_losses(model: Model, hidden_SBH: Tensor, tokens_BT: Tensor, world: World) -> Tensor:
    """Cross-entropy in nats of the prediction made at each position that this context rank holds, fp32 [B, S]; from last hidden states."""
    labels_BS = to_device(local_part(tokens_BT[:, 1:], world), world.device)
    hidden_NH = whole_sequence(hidden_SBH, world).transpose(0, 1).flatten(0, 1)
    weight_vH, first = live_head(model, world)
    return token_losses(hidden_NH, weight_vH, first, labels_BS.flatten(), world, softcap=model.arch.logit_softcap).view_as(labels_BS)


def from_last_stages(sums: Tensor, world: World) -> Tensor:
    """What the last stages summed over the tokens they saw, over all replicas and context ranks, on every rank; `sums` is changed in place."""
    # tensor ranks hold the same sums; pipeline stages before the last hold none
    dist.all_reduce(sums, group=world.groups.dp_cp)
    if world.pp > 1:
        dist.broadcast(sums, src=dist.get_global_rank(world.groups.pp, world.pp - 1), group=world.groups.pp)
    return sums
