"""What a sharded model says of single tokens: how probable they are where they stand, and which it would write itself.

The head is applied at the positions that are asked for alone: nobody ever holds logits of whole sequences.

Legend: B sequences of a microbatch, S positions, N requests, M predictions of a microbatch, H hidden.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from minitron.engine.batch import to_device
from minitron.engine.model import Model
from minitron.engine.parallel import World, most_of_expert_ranks
from minitron.engine.schedule import forward_only, in_passes, local_part, whole_sequence
from minitron.engine.scoring import from_last_stages
from minitron.engine.vocab import judged_tokens, live_head

Tensor = torch.Tensor


class Judged(NamedTuple):
    """A microbatch and M predictions made in it."""

    inputs_BS: Tensor
    rows_M: Tensor  # int: which sequence a prediction is made in,
    positions_M: Tensor  # int: and at which of its positions
    labels_M: Tensor  # int: the token that is judged
    requests_M: Tensor  # int: the request that it belongs to


def judge(
    model: Model, batches: Iterable[Judged], world: World, requests: int, advance: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Of each request the loss of its tokens in nats, summed, and whether each of them is the most probable one: float64 [N], bool [N].

    Every rank returns the same. `batches` are this replica's; a request may lie in one replica's alone. `advance` is told how many are done.
    """
    sums_2N = torch.zeros(2, requests, dtype=torch.float64, device=world.device)
    for group in in_passes(batches, world, lambda batch: batch.inputs_BS.shape):

        def collect(number: int, hidden_SBH: Tensor, group: list[Judged] = group) -> None:
            _, rows_M, positions_M, labels_M, requests_M = group[number]
            here_M, losses_M, likeliest_M = predictions(model, hidden_SBH, rows_M, positions_M, labels_M, world)
            found_2M = torch.stack([losses_M.double(), (likeliest_M != to_device(labels_M[here_M], world.device)).double()])
            sums_2N.index_add_(1, to_device(requests_M[here_M], world.device), found_2M)

        forward_only(model, [batch.inputs_BS for batch in group], world, collect)
        if advance is not None:
            advance(len(group))
    losses_N, misses_N = from_last_stages(sums_2N, world)
    return losses_N, misses_N == 0


def predictions(
    model: Model, hidden_SBH: Tensor, rows_M: Tensor, positions_M: Tensor, labels_M: Tensor, world: World
) -> tuple[Tensor, Tensor, Tensor]:
    """From last hidden states, of the predictions whose positions this context rank holds: which they are [m], the losses of their labels [m]
    and the most probable tokens [m]."""
    hidden_SBH = whole_sequence(hidden_SBH, world)
    held_S = local_part(torch.arange(len(hidden_SBH) * world.cp)[None], world)[0]
    place_S = torch.full((len(held_S) * world.cp,), -1)
    place_S[held_S] = torch.arange(len(held_S))
    here_M = (place_S[positions_M] >= 0).nonzero()[:, 0]
    hidden_MH = hidden_SBH[to_device(place_S[positions_M][here_M], world.device), to_device(rows_M[here_M], world.device)]
    weight_vH, first = live_head(model, world)
    labels_M = to_device(labels_M[here_M], world.device)
    losses_M, likeliest_M = judged_tokens(hidden_MH, weight_vH, first, labels_M, world, softcap=model.arch.logit_softcap)
    return here_M, losses_M, likeliest_M


def write_greedily(
    model: Model,
    prompts: Sequence[list[int]],
    world: World,
    ended: Callable[[int, list[int]], bool],
    tokens: int,
    multiple_of: int,
    advance: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """What the model writes after each prompt, the most probable token every time, until `ended(number of the prompt, tokens so far)`.

    Every rank calls it with the same and returns the same; replicas share the prompts. No keys and values are kept: each token takes a pass over all
    before it, of sequences whose lengths are padded to `multiple_of`, at most `tokens` tokens (or one sequence) in a microbatch.
    """
    waiting = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))[world.dp_rank :: world.dp]
    written: dict[int, list[int]] = {number: [] for number in waiting}
    at_once = 1 if world.pp == 1 else 4 * world.pp  # microbatches that keep pipeline stages busy
    while most_of_expert_ranks(len(waiting), world):
        most = max(1, tokens // len(prompts[waiting[0]])) * at_once if waiting else 0
        writing, waiting = waiting[:most], waiting[most:]
        while most_of_expert_ranks(len(writing), world):
            found = next_tokens(model, [prompts[number] + written[number] for number in writing], world, tokens, multiple_of)
            for number, token in zip(writing, found, strict=True):
                written[number].append(token)
            left = [number for number in writing if not ended(number, written[number])]
            if advance is not None and len(left) < len(writing):
                advance(len(writing) - len(left))
            writing = left
    everything: list[dict[int, list[int]]] = [written]
    if world.dp > 1:
        everything = [{} for _ in range(world.dp)]
        dist.all_gather_object(everything, written, group=world.groups.dp)
    merged = {number: text for part in everything for number, text in part.items()}
    return [merged[number] for number in range(len(prompts))]


def next_tokens(model: Model, texts: Sequence[list[int]], world: World, tokens: int, multiple_of: int) -> list[int]:
    """The most probable token after each text, on every rank of a replica."""
    length = multiple_of * math.ceil(max(map(len, texts), default=1) / multiple_of)
    most = max(1, tokens // length)
    found_N = torch.zeros(len(texts), dtype=torch.int64, device=world.device)
    batches = []
    for start in range(0, len(texts), most):
        part = texts[start : start + most]
        inputs_BS = torch.zeros(len(part), length, dtype=torch.int64)
        for row, text in enumerate(part):
            inputs_BS[row, : len(text)] = torch.tensor(text)
        last_B = torch.tensor([len(text) - 1 for text in part])
        rows_B = torch.arange(len(part))
        batches.append(Judged(inputs_BS, rows_B, last_B, torch.zeros_like(last_B), rows_B + start))
    for group in in_passes(batches, world, lambda batch: batch.inputs_BS.shape):

        def collect(number: int, hidden_SBH: Tensor, group: list[Judged] = group) -> None:
            _, rows_M, positions_M, labels_M, requests_M = group[number]
            here_M, _, likeliest_M = predictions(model, hidden_SBH, rows_M, positions_M, labels_M, world)
            found_N[to_device(requests_M[here_M], world.device)] = likeliest_M

        forward_only(model, [batch.inputs_BS for batch in group], world, collect)
    if world.cp > 1:
        dist.all_reduce(found_N, group=world.groups.cp)
    if world.pp > 1:
        dist.broadcast(found_N, src=dist.get_global_rank(world.groups.pp, world.pp - 1), group=world.groups.pp)
    return found_N.tolist()
