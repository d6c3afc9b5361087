"""What a teacher says about a microbatch's tokens, and where it comes from. The losses see a signal and don't ask.

Legend: B microbatch, S sequence, T = B x S tokens (the sequence first, as activations lie), G the teacher's hidden size, v its live
vocabulary rows of this rank, K a teacher's largest tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch

from minitron import engine

Tensor = torch.Tensor


@dataclasses.dataclass(frozen=True)
class Head:
    """What turns hidden states into this rank's logits: softcap x tanh(scale x hidden x weight / softcap), or without a softcap the product.

    `weight_vH` has no vocabulary padding; `first` is the number of its first token.
    """

    weight_vH: Tensor
    first: int = 0
    scale: float = 1.0
    softcap: float | None = None


def head_of(model: engine.Model, world: engine.World) -> Head:
    """A model's head on this rank of its last stage."""
    return Head(*engine.live_head(model, world), softcap=model.arch.logit_softcap)


@dataclasses.dataclass(frozen=True)
class WholeSignal:
    """The teacher's whole distribution of each token, as hidden states and a head: its logits are made in chunks, where they are used."""

    hidden_TG: Tensor
    head: Head


@dataclasses.dataclass(frozen=True)
class TopSignal:
    """The teacher's largest tokens, and what the others have together: at the distillation temperature, the same on every tensor rank."""

    tokens_TK: Tensor  # int64, numbers of the whole vocabulary, each once
    log_probs_TK: Tensor
    tail_T: Tensor  # log-probability of all other tokens together


Signal = WholeSignal | TopSignal


class Teacher(Protocol):
    """Gives the signals of a step's microbatches: one for each on the last stage, none elsewhere. Every rank asks."""

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> Sequence[Signal | None]:
        """`step` counts from 0 and numbers the global batch."""


class NoTeacher:
    """For a student that learns from the tokens alone, by cross-entropy."""

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> list[None]:
        """None of each."""
        return [None] * len(batches)


class LiveTeacher:
    """A model on the same ranks, run forward over a step's microbatches; only its last hidden states are kept, and its logits never made.

    `watch` follows its passes, for what is wanted of it beside its predictions.
    """

    def __init__(self, model: engine.Model, world: engine.World, watch: engine.Watch | None = None) -> None:
        self.model, self.world, self.watch = model, world, watch

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> list[WholeSignal]:
        """As `Teacher` says."""

        def collect(number: int, hidden_SBG: Tensor) -> WholeSignal:
            head = head_of(self.model, self.world)
            head = dataclasses.replace(head, weight_vH=head.weight_vH.detach())
            return WholeSignal(engine.whole_sequence(hidden_SBG, self.world).flatten(0, 1), head)

        documents = [batch.documents_BS for batch in batches]
        return engine.forward_only(self.model, [batch.inputs_BS for batch in batches], self.world, collect, self.watch, documents)


class ForeignTeacher:
    """A model on the same ranks in a layout of its own: its replicas share the global batch, and its last hidden states go where they are used.

    `head`: this rank's part of its head in the student's layout, which only the last stage needs (`weights.load.load_head`).
    """

    def __init__(self, model: engine.Model, world: engine.World, head: Head, student_world: engine.World) -> None:
        self.model, self.world, self.head, self.student_world = model, world, head, student_world
        self.relay = engine.Relay(world, student_world)

    def signals(self, step: int, batches: Sequence[engine.Batch]) -> list[WholeSignal]:
        """As `Teacher` says."""
        mine_MBS = engine.to_device(torch.stack([batch.inputs_BS for batch in batches]), self.world.device)
        all_NBS = engine.every_replica(mine_MBS, self.student_world).flatten(0, 1)
        numbers = self.relay.share(len(all_NBS))  # none where the teacher has more replicas than there is to do
        share, documents = [all_NBS[number] for number in numbers], self._documents(batches, numbers)
        found_SBG = engine.forward_only(self.model, share, self.world, lambda _, hidden_SBG: hidden_SBG, documents_BS=documents)
        _, batch, length = mine_MBS.shape
        shape_SBG = (length // self.world.cp, batch, self.model.arch.hidden_size)
        arrived_SBG = self.relay.carry(found_SBG, len(all_NBS), torch.empty(shape_SBG, dtype=self.model.config.params_dtype, device="meta"))
        return [WholeSignal(hidden_SBG.flatten(0, 1), self.head) for hidden_SBG in arrived_SBG]

    def _documents(self, batches: Sequence[engine.Batch], numbers: Sequence[int]) -> list[Tensor] | None:
        """Of these microbatches out of the global batch, the document that each position is of, where documents don't see each other."""
        mine = [batch.documents_BS for batch in batches if batch.documents_BS is not None]
        if not mine:
            return None
        all_NBS = engine.every_replica(engine.to_device(torch.stack(mine), self.world.device), self.student_world).flatten(0, 1)
        return [all_NBS[number] for number in numbers]
