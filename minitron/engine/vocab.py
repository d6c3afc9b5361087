"""Arithmetic over a vocabulary that is spread over tensor ranks. Nothing here ever holds more than one chunk of logits.

Legend: T tokens, C tokens of one chunk, v live vocabulary rows of this rank, H hidden.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist

from minitron.arch.axes import VOCAB
from minitron.arch.shards import held_units
from minitron.engine.model import Model
from minitron.engine.parallel import World

Tensor = torch.Tensor


def live_head(model: Model, world: World) -> tuple[Tensor, int]:
    """This rank's head weight [v, H] without vocabulary padding, and the number of its first token."""
    live, _ = held_units(VOCAB, model.arch, world.tp, world.tp_rank, sharded=True)
    weight_VH = model.head_weight()
    # where nothing is padded, no slice: its backward pass would copy the gradient of all of it
    return weight_VH if len(live) == len(weight_VH) else weight_VH[: len(live)], live.start


def all_ranks(packed_KC: Tensor, world: World) -> Tensor:
    """[tp, K, C]: every tensor rank's statistics of a chunk, in one collective."""
    if world.tp == 1:
        return packed_KC[None]
    gathered = packed_KC.new_empty(world.tp, *packed_KC.shape)
    dist.all_gather(list(gathered), packed_KC.contiguous(), group=world.groups.tp)
    return gathered


def token_losses(hidden_TH: Tensor, weight_vH: Tensor, first: int, labels_T: Tensor, world: World, chunk_tokens: int = 512,
                 softcap: float | None = None) -> Tensor:  # fmt: skip
    """Cross-entropy of each token in nats, fp32 [T], without gradients. `softcap`: of the logits (arch.Arch)."""
    return torch.cat([losses_C for losses_C, _ in _judged_chunks(hidden_TH, weight_vH, first, labels_T, world, chunk_tokens, softcap, False)])


def judged_tokens(hidden_TH: Tensor, weight_vH: Tensor, first: int, labels_T: Tensor, world: World, chunk_tokens: int = 512,
                  softcap: float | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `token_losses`, and the most probable token in place of each, int64 [T]: the first one where several are."""
    losses, likeliest = zip(*_judged_chunks(hidden_TH, weight_vH, first, labels_T, world, chunk_tokens, softcap, True), strict=True)
    return torch.cat(losses), torch.cat(likeliest)


def _judged_chunks(
    hidden_TH: Tensor, weight_vH: Tensor, first: int, labels_T: Tensor, world: World, chunk_tokens: int, softcap: float | None, likeliest: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunk by chunk losses [C] and, where asked for, the most probable tokens [C] (else nothing of use)."""
    # a processor sums over so few rows in its caches; a GPU over all of a chunk in one kernel
    rows = 8 if hidden_TH.device.type == "cpu" else chunk_tokens
    for hidden_CH, labels_C in zip(hidden_TH.split(chunk_tokens), labels_T.split(chunk_tokens), strict=True):
        logits_Cv = hidden_CH @ weight_vH.t()
        if softcap is not None:
            logits_Cv = logits_Cv.div_(softcap).tanh_().mul_(softcap)
        inside_C = (labels_C >= first) & (labels_C < first + weight_vH.shape[0])
        mine_C = torch.where(inside_C, labels_C - first, 0)
        target_C = torch.where(inside_C, logits_Cv.gather(1, mine_C[:, None])[:, 0].float(), 0.0)
        largest = _largest(logits_Cv, first) if likeliest else []
        spread_C = torch.cat([log_sum_exp(part_v.float()) for part_v in logits_Cv.split(rows)])
        ranks_rKC = all_ranks(torch.stack([spread_C, target_C, *largest]), world)
        losses_C = torch.logsumexp(ranks_rKC[:, 0], dim=0) - ranks_rKC[:, 1].sum(dim=0)
        yield losses_C, _first_of_largest(ranks_rKC[:, 2], ranks_rKC[:, 3]) if likeliest else labels_C


def _largest(logits_Cv: Tensor, first: int) -> list[Tensor]:
    """Of each row the largest logit of this rank and its token, both fp32 [C], which holds every token's number exactly."""
    index_C = logits_Cv.argmax(dim=1)
    return [logits_Cv.gather(1, index_C[:, None])[:, 0].float(), (index_C + first).float()]


def _first_of_largest(logits_rC: Tensor, tokens_rC: Tensor) -> Tensor:
    """int64 [C]: the token of the rank whose logit is the largest; ranks hold the vocabulary in order."""
    return tokens_rC.gather(0, logits_rC.argmax(dim=0, keepdim=True))[0].long()


def log_sum_exp(logits_Cv: Tensor) -> Tensor:
    """[C], as torch's, in the memory of `logits_Cv`, whose content is lost."""
    largest_C1 = logits_Cv.amax(dim=1, keepdim=True)
    # a row of -inf, or with an inf, has that for its sum: inf - inf would be none
    finite_C1 = torch.where(largest_C1.isfinite(), largest_C1, 0.0)
    return logits_Cv.sub_(finite_C1).exp_().sum(dim=1).log_().add_(finite_C1[:, 0])
