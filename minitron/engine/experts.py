"""Mixtures of experts on Megatron's MoE layer: which tokens go to which expert, and tensor parallelism inside the experts.

A block's experts lie whole on the expert-parallel ranks, each with the next ones in order, and are cut over the tensor ranks as an MLP is. Tokens
travel to their experts and back all to all.

Shapes: T tokens of this rank, E experts, K experts that a token is sent to, H hidden.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import Router
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from minitron.arch.arch import Arch

Tensor = torch.Tensor


def expert_settings(arch: Arch) -> dict[str, Any]:
    """Megatron's settings of a model with experts. No token is dropped, and no loss balances them."""
    if arch.num_moe_experts is None:
        return {}
    return {
        "num_moe_experts": arch.num_moe_experts,
        "moe_router_topk": arch.moe_router_topk,
        "moe_ffn_hidden_size": arch.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": arch.moe_shared_expert_intermediate_size,
        "moe_shared_expert_gate": arch.moe_shared_expert_gate,
        "moe_layer_freq": [int(arch.routes(number)) for number in range(arch.num_layers)],
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": "none",
        "moe_router_pre_softmax": True,  # Megatron refuses to send tokens to one expert otherwise; `TokenRouter` does as the architecture says
    }


class TokenRouter(Router):
    """Which experts a token is sent to, and their weights, in the very steps of transformers: logits in the model's type, their softmax in fp32."""

    def routing(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [T, E] -> what each expert's output is multiplied by [T, E], 0 where the token is not sent, and where it is, bool [T, E]."""
        weights_TK, experts_TK = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(self.config.moe_router_topk, dim=-1)
        if not self.config.weights_of_all:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        chosen_TE = torch.zeros_like(logits, dtype=torch.bool).scatter(1, experts_TK, True)
        return torch.zeros_like(logits).scatter(1, experts_TK, weights_TK.type_as(logits)), chosen_TE

    def forward(self, hidden_SBH: Tensor, padding_mask: Any = None) -> tuple[Tensor, Tensor]:
        """As `routing`, of hidden states."""
        return self.routing(torch.nn.functional.linear(hidden_SBH.flatten(0, -2), self.weight))


class Experts(SequentialMLP):
    """Megatron's experts. Where each tensor rank has every token (no sequence parallelism), what they put out is summed over these, as an MLP's is;
    Megatron's dispatcher, which would gather the same tokens from each of them, is told of none (`whole_tokens`)."""

    def forward(self, tokens_TH: Tensor, tokens_per_expert: Tensor, weights_T: Tensor) -> tuple[Tensor, None]:
        """Tokens in the order of their experts, each with its weight."""
        if self.config.sequence_parallel:
            return super().forward(tokens_TH, tokens_per_expert, weights_T)
        copied = (copy_to_tensor_model_parallel_region(tensor, self.tp_group) for tensor in (tokens_TH, weights_T))
        out_TH, _ = super().forward(next(copied), tokens_per_expert, next(copied))
        return reduce_from_tensor_model_parallel_region(out_TH, self.tp_group), None


class OneRank:
    """Stands in for a process group of this rank alone."""

    def size(self) -> int:
        """How many there are."""
        return 1

    def rank(self) -> int:
        """Which of them this is."""
        return 0


def whole_tokens(layer: MoELayer, groups: Any) -> None:
    """Have a layer's tokens dispatched on each tensor rank by itself, as each has all of them."""
    own = copy.copy(groups)
    own.expt_tp, own.tp_ep = OneRank(), groups.ep
    layer.token_dispatcher = MoEAlltoAllTokenDispatcher(layer.num_local_experts, layer.local_expert_indices, layer.config, own)
    layer.attn_tp_group = OneRank()  # Megatron looks at its size alone, and refuses to train where it is more


def expert_spec() -> ModuleSpec:
    """A block's experts in place of its MLP, of plain torch modules."""
    matrices = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    shared = ModuleSpec(module=SharedExpertMLP, submodules=matrices)
    return ModuleSpec(
        module=MoELayer, submodules=MoESubmodules(experts=ModuleSpec(module=Experts, submodules=matrices), shared_experts=shared, router=TokenRouter)
    )


@contextlib.contextmanager
def expert_outputs(layer: MoELayer, see: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """In this block `see(outputs_PH, chosen_TE)` is called in every pass through a layer, on the rank whose tokens they are: with what each chosen
    expert gives each token (P pairs, in the order of the experts), its weight included, whole over the tensor ranks, and with who chose whom.

    This is where the dispatcher has brought the outputs back, and where no module ends, so that no hook can be put.
    """
    dispatcher = layer.token_dispatcher
    usual = dispatcher.combine_postprocess

    def seen(outputs_PH: Tensor) -> Tensor:
        see(outputs_PH.detach(), dispatcher.routing_map)
        combined: Tensor = usual(outputs_PH)
        return combined

    dispatcher.combine_postprocess = seen
    try:
        yield
    finally:
        del dispatcher.combine_postprocess
