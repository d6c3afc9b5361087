"""What a sharded model makes of text: language-model loss, perplexity, speed.

Legend: B microbatch, S sequence, T = B x S tokens, H hidden.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist

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

    `batches` yields (tokens [B, S + 1], valid [B] bool): windows that only fill up a batch are not counted.
    """
    started, total, count = time.perf_counter(), 0.0, 0
    for group in in_passes(batches, world, lambda batch: batch[0].shape):

        def collect(number: int, hidden_SBH: Tensor, group: list[tuple[Tensor, Tensor]] = group) -> tuple[float, int]:
            tokens_BS, valid_B = group[number]
            labels_BS = local_part(tokens_BS[:, 1:], world).to(world.device)
            hidden_TH = whole_sequence(hidden_SBH, world).transpose(0, 1).flatten(0, 1)
            weight_vH, first = live_head(model, world)
            losses_T = token_losses(hidden_TH, weight_vH, first, labels_BS.flatten(), world)
            counted_T = valid_B.to(world.device)[:, None].expand_as(labels_BS).flatten()
            return float(losses_T[counted_T].double().sum()), int(counted_T.sum())

        for loss_sum, tokens in forward_only(model, [tokens_BS[:, :-1] for tokens_BS, _ in group], world, collect):
            total, count = total + loss_sum, count + tokens
        if advance is not None:
            advance(sum(int(valid_B.sum()) for _, valid_B in group))
    # tensor ranks hold the same sums; pipeline stages before the last hold none
    sums = torch.tensor([total, count], dtype=torch.float64, device=world.device)
    dist.all_reduce(sums, group=world.groups.dp_cp)
    if world.pp > 1:
        dist.broadcast(sums, src=dist.get_global_rank(world.groups.pp, world.pp - 1), group=world.groups.pp)
    total, count = sums[0].item(), int(sums[1].item())
    return Score(total / max(count, 1), count, count / (time.perf_counter() - started))
