"""What tests need of a sharded model: its logits, whole."""

import torch

from minitron.engine.attention import whole_context
from minitron.engine.model import Model
from minitron.engine.parallel import World, gather_shards
from minitron.engine.schedule import forward_only, whole_sequence


def whole_logits(model: Model, tokens_BS: torch.Tensor, world: World, documents_BS: torch.Tensor | None = None) -> torch.Tensor | None:
    """[B, S, V] in fp32 on the ranks of the last stage, None elsewhere."""

    def collect(_: int, hidden_SBH: torch.Tensor) -> torch.Tensor:
        hidden_SBH = whole_sequence(hidden_SBH, world)
        shard_VSB = torch.einsum("sbh,vh->vsb", hidden_SBH, model.head_weight())
        if (softcap := model.arch.logit_softcap) is not None:
            shard_VSB = softcap * torch.tanh(shard_VSB / softcap)
        whole_VSB = whole_context(gather_shards(shard_VSB.contiguous(), world).transpose(0, 1), world.groups.cp).transpose(0, 1)
        return whole_VSB[: model.arch.vocab_size].permute(2, 1, 0).float()

    found = forward_only(model, [tokens_BS], world, collect, documents_BS=[documents_BS])
    return found[0] if found else None


def of_last_stage(found: list[torch.Tensor | None]) -> torch.Tensor:
    """The one result of ranks of which only those of the last stage hold one; all of these must be equal."""
    held = [tensor for tensor in found if tensor is not None]
    assert all(torch.equal(tensor, held[0]) for tensor in held)
    return held[0]
