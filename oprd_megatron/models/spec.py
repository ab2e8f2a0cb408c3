"""Which modules a transformer block is made of: mcore's Transformer Engine spec where TE is present, our local one else."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from checkpoints_conversion.architecture import Architecture, LongRope
from oprd_megatron.errors import LayoutError
from oprd_megatron.models.attention import SDPACoreAttention
from oprd_megatron.models.experts import local_experts, router_class
from oprd_megatron.models.norm import NormedRowParallelLinear, RMSNorm
from oprd_megatron.models.rotary import RotarySelfAttention, has_two_sets
from oprd_megatron.models.weight_only import (
    WeightOnlyColumnParallelLinear,
    WeightOnlyNormedRowParallelLinear,
    WeightOnlyRowParallelLinear,
)

INPUT_NORM_KEY = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
FUSED_NORM_KEYS = {**INPUT_NORM_KEY, "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
"""Keys of norms in sharded checkpoints, as in mcore's own local spec: those of Transformer Engine's fused layers, so that a
checkpoint of one spec loads in the other. A layer of experts has no linear layer to fuse the second norm with."""


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch part is installed."""
    return importlib.util.find_spec("transformer_engine_torch") is not None


@dataclass(frozen=True)
class Kind:
    """What a model's layers are made of.

    Attributes:
        transformer_engine: mcore's TE modules; not yet run on a GPU by this project.
        weight_only: linear layers whose weights are stored in fp8, of our own modules.
        kept: layers (1-based) whose linear layers stay in dtype. Those at an end that TE computes in fp8 are mcore's business.
    """

    transformer_engine: bool = False
    weight_only: bool = False
    kept: frozenset[int] = frozenset()


def block_spec(architecture: Architecture, layers: Sequence[int], kind: Kind) -> TransformerBlockSubmodules:
    """Specification of one chunk of a model.

    Args:
        architecture: of the model.
        layers: of the chunk, 1-based.
        kind: of the layers.
    """
    qk_norm, experts = architecture.qk_norm, architecture.experts
    if kind.transformer_engine:
        from megatron.core.extensions.transformer_engine import TENorm
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

        layer = get_gpt_layer_with_transformer_engine_spec(
            qk_layernorm=qk_norm, num_experts=experts.num_experts if experts else None
        )
        if experts:
            layer.submodules.mlp.submodules.router = router_class(experts)
        in_dtype = layer
        if kind.kept:
            from oprd_megatron.models.kept_layer import KeptLayer

            in_dtype = replace(layer, module=KeptLayer)
        return TransformerBlockSubmodules(
            layer_specs=[in_dtype if number in kind.kept else layer for number in layers], layer_norm=TENorm
        )
    specs = [_local_layer(architecture, kind.weight_only and number not in kind.kept) for number in layers]
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=RMSNorm)


def refuse_for_transformer_engine(architecture: Architecture, cp: int) -> None:
    """Refuse what mcore's TE spec has no modules for.

    Raises:
        LayoutError: names the feature.
    """
    has_windows = any(architecture.attention_windows)
    features = {
        "norms on the outputs of attention and MLP": architecture.sandwich_norm,
        "a rotary base of their own for layers with a window": architecture.local_rotary_base is not None,
        "longrope": isinstance(architecture.rope_scaling, LongRope),
        "sliding windows with context parallelism (cp 1 would do)": has_windows and cp > 1,
        "windows of different sizes": len(set(architecture.attention_windows) - {None}) > 1,
    }
    for feature, is_wanted in features.items():
        if is_wanted:
            raise LayoutError(
                f"{architecture.family}: {feature}: not in mcore's Transformer Engine layers; uninstall "
                "transformer-engine to run this model on this project's own layers"
            )


def _local_layer(architecture: Architecture, weight_only: bool) -> ModuleSpec:
    qk_norm, experts = architecture.qk_norm, architecture.experts
    column, row, normed = ColumnParallelLinear, RowParallelLinear, NormedRowParallelLinear
    if weight_only:
        column, row = WeightOnlyColumnParallelLinear, WeightOnlyRowParallelLinear
        normed = WeightOnlyNormedRowParallelLinear
    row_parallel = normed if architecture.sandwich_norm else row
    rotary = {"architecture": architecture} if has_two_sets(architecture) else {}
    attention = ModuleSpec(
        module=RotarySelfAttention if rotary else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal, **rotary},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column,
            core_attention=partial(SDPACoreAttention, windows=architecture.attention_windows),
            linear_proj=row_parallel,
            q_layernorm=RMSNorm if qk_norm else IdentityOp,
            k_layernorm=RMSNorm if qk_norm else IdentityOp,
        ),
    )
    dense = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, linear_fc2=row_parallel))
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=local_experts(experts, MLPSubmodules(linear_fc1=column, linear_fc2=row)) if experts else dense,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=FUSED_NORM_KEYS if experts is None else INPUT_NORM_KEY,
        ),
    )
