"""A model's most probable tokens from its hidden states and head, in chunks of tokens, over vocabulary shards: never [T, vocabulary].

Legend: T tokens, C tokens of one chunk, v live vocabulary rows of this rank, K tokens kept, R tensor ranks, M = R x K candidates, G hidden.
"""

from __future__ import annotations

import math

import torch
from torch.nn.functional import pad

from minitron import engine
from minitron.distillation.signal import Head, TopSignal

Tensor = torch.Tensor


@torch.no_grad()
def top_signal(hidden_TG: Tensor, head: Head, top_k: int, temperature: float, world: engine.World, chunk_tokens: int = 512) -> TopSignal:
    """The `top_k` most probable next tokens of each position, the most probable first, the same on every tensor rank.

    `top_k` must be less than the whole vocabulary, so that there is a rest. Of tokens with exactly equal logits at the K-th place any may be taken.
    """
    chunks = [_chunk(hidden_CG, head, top_k, temperature, world) for hidden_CG in hidden_TG.split(chunk_tokens)]
    return TopSignal(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _chunk(hidden_CG: Tensor, head: Head, top_k: int, temperature: float, world: engine.World) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [C, K], log-probabilities [C, K], the log of the others' mass [C]."""
    logits_Cv = (hidden_CG @ head.weight_vH.t()).float().div_(temperature)
    held = min(top_k, logits_Cv.shape[1])
    values_Ck, places_Ck = logits_Cv.topk(held)
    # the others' mass is summed from them, not taken from 1 - the top's: that would be nothing but rounding where the top has nearly all
    rest_C = logits_Cv.scatter_(1, places_Ck, -math.inf).logsumexp(dim=1)
    values_CK = pad(values_Ck.double(), (0, top_k - held), value=-math.inf)  # a shard may hold fewer than K
    tokens_CK = pad(places_Ck.double() + head.first, (0, top_k - held))  # fp64 holds token numbers exactly: one collective for all
    every_RXC = engine.all_ranks(torch.cat([values_CK, tokens_CK, rest_C.double()[:, None]], dim=1).t(), world)
    values_CM, tokens_CM = (part_RKC.permute(2, 0, 1).flatten(1) for part_RKC in (every_RXC[:, :top_k], every_RXC[:, top_k:-1]))
    top_CK, chosen_CK = values_CM.topk(top_k)
    left_CM = values_CM.scatter(1, chosen_CK, -math.inf)
    tail_C = torch.cat([left_CM, every_RXC[:, -1].t()], dim=1).logsumexp(dim=1)
    total_C = torch.logaddexp(top_CK.logsumexp(dim=1), tail_C)
    return tokens_CM.gather(1, chosen_CK).long(), (top_CK - total_C[:, None]).float(), (tail_C - total_C).float()
