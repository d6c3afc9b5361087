"""A model's most probable tokens from its hidden states and head, in chunks of tokens, over vocabulary shards: never [T, vocabulary].

Legend: T tokens, C tokens of one chunk, v live vocabulary rows of this rank, K tokens kept, R tensor ranks, G hidden.
"""

from __future__ import annotations

import torch

from minitron import engine
from minitron.distillation.fused import SPARE, Scratch
from minitron.distillation.rows import Exchange, Shard, exponentials, largest
from minitron.distillation.signal import Head, TopSignal

Tensor = torch.Tensor


@torch.no_grad()
def top_signal(hidden_TG: Tensor, head: Head, top_k: int, temperature: float, world: engine.World, chunk_tokens: int = 512,
               scratch: Scratch | None = None) -> TopSignal:  # fmt: skip
    """The `top_k` most probable next tokens of each position, the most probable first, the same on every tensor rank.

    `top_k` must be less than the whole vocabulary, so that there is a rest. Of tokens with exactly equal logits at the K-th place any may be
    taken. A caller with many microbatches keeps one `scratch`.
    """
    scratch = scratch or Scratch()
    rows = min(chunk_tokens, len(hidden_TG))
    scratch.divide(1, rows, 2 * -(-rows // SPARE), head.weight_vH)
    exchange, chunks = Exchange(world, []), []
    for hidden_CG in hidden_TG.split(chunk_tokens):
        logits_Cv = scratch.logits(0, hidden_CG, head).div_(temperature)
        tokens_CK, known_CK = largest(logits_Cv, head.first, top_k, exchange)
        # the others' mass is summed from them, not taken from 1 - the top's: that would be nothing but rounding where the top has nearly all
        shard = Shard.of(tokens_CK, head.first, logits_Cv.shape[1])
        (rest_RC,) = exchange.early(exponentials(shard.leave_out(logits_Cv), logits_Cv)[1]).unbind(dim=1)
        chunks.append((tokens_CK, torch.cat([known_CK, rest_RC.logsumexp(dim=0)[:, None]], dim=1).log_softmax(dim=1).float()))
    tokens_TK, log_probs_TB = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    return TopSignal(tokens_TK, log_probs_TB[:, :-1], log_probs_TB[:, -1])
