"""The mixture of experts in place of a layer's MLP: mcore's MoELayer, its experts one after the other (SequentialMLP).

With router logits z [tokens, E] in the model's dtype and k experts a token, transformers computes the weights of a token's
experts in fp32 and rounds them to the model's dtype:

    normalised      softmax over the k largest z      (= softmax over all E, the k largest scaled to sum to one)
    otherwise       the k largest of softmax(z)       (mcore: `moe_router_pre_softmax`)

A token's expert output is weighted before the second linear layer, where transformers does it after: the same up to rounding.
Routing depends on a token alone, so recomputation routes alike and packing changes nothing. No token is dropped, and no loss
balances the experts' load.

The router's weight is whole on every tensor-parallel rank, an expert's are cut like an MLP's; there is no expert parallelism
in a run. Tensor parallelism trains only with sequence parallelism, where every rank routes tokens of its own: the dispatcher
gathers the tokens of all ranks, and copies of one token on each rank would be counted as many times in the experts' gradients
(the states are right either way, so a frozen teacher may). See `check_experts` in parallel/layout.py.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch.nn.functional import linear

from checkpoints_conversion.architecture import Experts


class Router(TopKRouter):
    """mcore's router on torch's linear layer. mcore's own needs Transformer Engine by mistake: without it the name of TE's
    kernel is undefined (0.16.1, moe_utils.py, `te_general_gemm`)."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        """Logits [P_local, 1, E] of hidden states [P_local, 1, D], in their dtype."""
        return linear(input, self.weight)


class SingleExpertRouter(Router):
    """One expert a token, with weight 1: normalised top-1 routing, whose router gets no gradient. mcore refuses to configure
    it, so it is set up unnormalised."""

    def routing(
        self, logits: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(weights, which of them count), both [tokens, E], of router logits [P_local, 1, E]."""
        _, is_chosen = super().routing(logits, padding_mask)
        return is_chosen.to(logits.dtype), is_chosen


def local_experts(experts: Experts, layers: MLPSubmodules) -> ModuleSpec:
    """A layer's experts on these linear layers."""
    mlps = ModuleSpec(module=SequentialMLP, submodules=layers)
    return ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=mlps, router=router_class(experts)))


def router_class(experts: Experts) -> type[Router]:
    """What routes the tokens."""
    return SingleExpertRouter if experts.normalised and experts.top_k == 1 else Router


def expert_settings(experts: Experts | None) -> dict[str, Any]:
    """What mcore's configuration says about the experts; nothing for a dense model."""
    if experts is None:
        return {}
    return dict(
        num_moe_experts=experts.num_experts,
        moe_ffn_hidden_size=experts.ffn_hidden_size,
        moe_router_topk=experts.top_k,
        moe_router_pre_softmax=not experts.normalised or experts.top_k == 1,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
    )
