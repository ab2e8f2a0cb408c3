"""Which modules a transformer block is made of: mcore's Transformer Engine spec where TE is present, our local one else."""

from __future__ import annotations

import importlib.util

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from oprd_megatron.models.attention import SDPACoreAttention
from oprd_megatron.models.norm import RMSNorm


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch part is installed."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


def block_spec(num_layers: int, *, qk_norm: bool, transformer_engine: bool) -> TransformerBlockSubmodules:
    """Specification of one pipeline stage.

    Args:
        num_layers: layers on this stage.
        qk_norm: RMSNorm on queries and keys per head (Qwen3).
        transformer_engine: use mcore's TE modules; not yet run on a GPU by this project.
    """
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
        return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=[_local_layer(qk_norm)] * num_layers, layer_norm=RMSNorm)


def _local_layer(qk_norm: bool) -> ModuleSpec:
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=ColumnParallelLinear,
            core_attention=SDPACoreAttention,
            linear_proj=RowParallelLinear,
            q_layernorm=RMSNorm if qk_norm else IdentityOp,
            k_layernorm=RMSNorm if qk_norm else IdentityOp,
        ),
    )
    mlp = ModuleSpec(
        module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )
