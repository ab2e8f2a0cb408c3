"""From an `Architecture` (what config.json says) to this rank's part of an mcore GPTModel.

Every family of `checkpoints_conversion`, tied or untied. Anything that would change the maths and is not implemented was
refused when the architecture was read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import unwrap_model

from checkpoints_conversion import Architecture, Sharding
from checkpoints_conversion.architecture import VOCAB_MULTIPLE
from checkpoints_conversion.live.weights import Store, load_hf_weights
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.models.experts import expert_settings
from oprd_megatron.models.norm import NormedRowParallelLinear
from oprd_megatron.models.rotary import Rotary, refuse_cut_sequences
from oprd_megatron.models.spec import Kind, block_spec, has_transformer_engine, refuse_for_transformer_engine
from oprd_megatron.models.weight_only import weight_only_modules
from oprd_megatron.parallel import Coords, GridLayout
from oprd_megatron.parallel.activity import here
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.parallel.precision import kept_layers, mcore_settings
from oprd_megatron.platform import Platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ACTIVATIONS = {"silu": torch.nn.functional.silu, "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh")}


@dataclass(frozen=True)
class Model:
    """One of the two models, as it lives on this rank.

    Attributes:
        architecture: what config.json says, unpadded.
        grid: this model's process groups and layout.
        sharding: padded sizes and this rank's tensor-parallel shard.
        config: mcore's configuration.
        chunks: this rank's GPTModel chunks, first to last: one, with virtual pipeline stages more, none off the grid.
        source: the Hugging Face directory that the weights came from.
    """

    architecture: Architecture
    grid: Grid
    sharding: Sharding
    config: TransformerConfig
    chunks: list[GPTModel]
    source: Path

    @property
    def head_weight(self) -> torch.Tensor:
        """The LM head's shard [V_local, D] on the last stage; the embedding's if they are tied."""
        chunk = self.chunks[-1]
        tied = self.architecture.tie_word_embeddings
        return chunk.shared_embedding_or_output_weight() if tied else chunk.output_layer.weight


def build_model(
    architecture: Architecture,
    grid: Grid,
    platform: Platform,
    *,
    dtype: torch.dtype,
    hf_dir: Path,
    frozen: bool,
    vocab_size: int = 0,
    recompute: RecomputeConfig | None = None,
    precision: PrecisionConfig | None = None,
    head: bool = True,
) -> Model:
    """Build this rank's shard and load its weights; each rank reads only its own slices. A rank that is not on the grid gets
    a model without chunks.

    Args:
        architecture: of the model in `hf_dir`.
        grid: where the model lives.
        platform: device to build on.
        dtype: parameters and compute.
        hf_dir: Hugging Face directory.
        frozen: no parameter requires a gradient (the teacher).
        vocab_size: pad the vocabulary as for this many ids, if that is more than the model's own. Two models that are
            padded alike have equal vocabulary shards.
        recompute: activation recomputation of a model that is trained.
        precision: of the linear layers; already checked (`check_precision`). A quantised weight is read in `dtype`, one
            matrix at a time.
        head: False leaves out the weight of an LM head that is not the embedding's on the same stage.

    Raises:
        CheckpointError: the weights are missing, torn or of other shapes.
        LayoutError: the architecture does not go with the layout, or with Transformer Engine.
    """
    layout = grid.layout
    recompute, precision = recompute or RecomputeConfig(), precision or PrecisionConfig()
    padded_as = replace(architecture, vocab_size=max(vocab_size, architecture.vocab_size))
    coords = grid.coords if grid.is_member else Coords(0, 0, 0)
    sharding = Sharding.smallest(padded_as, coords.tp, layout.tp, vocab_multiple=VOCAB_MULTIPLE)
    kind = layer_kind(precision, architecture.num_layers, has_transformer_engine() and platform.is_cuda)
    if kind.transformer_engine:
        refuse_for_transformer_engine(architecture, layout.cp)
    refuse_cut_sequences(architecture, layout.cp)
    chunks = []
    # Where gradients are on, Transformer Engine keeps a transposed copy of an fp8 weight, and one of bf16 in host memory.
    with platform.scope(), torch.no_grad() if frozen else contextlib.nullcontext():
        in_fp8 = mcore_settings(precision, frozen)
        config = transformer_config(architecture, layout, coords.pp, sharding, dtype, platform, recompute, in_fp8)
        for number in range(layout.vpp if grid.is_member else 0):
            chunks.append(make_chunk(architecture, grid, config, sharding, number, platform.device, kind))
        if not head and chunks and chunks[-1].post_process:
            chunks[-1].output_layer.weight = None
        if chunks:
            stores = quantised_stores(chunks, dtype)
            load_hf_weights(chunks, hf_dir, sharding, architecture, stores=stores, after_each=here.mark)
    if frozen:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    return Model(architecture, grid, sharding, config, chunks, hf_dir)


def layer_kind(precision: PrecisionConfig, num_layers: int, has_te: bool) -> Kind:
    """What a model's layers are made of, where TE can be used (`has_te`). Weights alone are quantised in our own layers; the
    ends that mcore keeps in bf16 itself are left to it."""
    if precision.linear == "weight_only":
        return Kind(weight_only=True, kept=kept_layers(precision, num_layers))
    if precision.linear == "dtype":
        return Kind(transformer_engine=has_te)
    inner = range(precision.first_layers + 1, num_layers - precision.last_layers + 1)
    return Kind(transformer_engine=has_te, kept=kept_layers(precision, num_layers) & set(inner))


def quantised_stores(chunks: list[GPTModel], dtype: torch.dtype) -> dict[torch.nn.Parameter, Store]:
    """What takes the values of this rank's quantised parameters. A slice of a TE tensor is a copy, which it is no use to fill;
    `copy_` of a whole one quantises."""
    stores = {module.weight: Store(dtype, module.store) for module in weight_only_modules(chunks)}
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        if is_float8tensor(parameter):
            stores[parameter] = Store(dtype, parameter.copy_)
    return stores


def make_chunk(
    architecture: Architecture,
    grid: Grid,
    config: TransformerConfig,
    sharding: Sharding,
    number: int,
    device: torch.device,
    kind: Kind = Kind(),  # noqa: B008 (frozen)
) -> GPTModel:
    """One of this rank's chunks as training runs it, its weights not yet loaded.

    Args:
        architecture: of the whole model.
        grid: where the model lives; this rank is on it.
        config: from `transformer_config`.
        sharding: of this rank.
        number: of the chunk, from 0; virtual pipeline stages have several.
        device: of the parameters. On `meta` they take no memory, and what is computed from the architecture is on the CPU.
        kind: of its layers.
    """
    layout, is_meta = grid.layout, device.type == "meta"
    with device if is_meta else contextlib.nullcontext():
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(architecture, layout.chunk_layers(grid.coords.pp, number), kind),
            vocab_size=sharding.vocab_size_padded,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=grid.is_first_stage and number == 0,
            post_process=grid.is_last_stage and number == layout.vpp - 1,
            share_embeddings_and_output_weights=architecture.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=architecture.rotary_base,
            pg_collection=grid.groups,
            vp_stage=number if layout.vpp > 1 else None,
        )
    chunk = chunk if is_meta else chunk.to(device)
    chunk.rotary_pos_emb = Rotary(architecture, torch.device("cpu") if is_meta else device, grid.groups.cp)
    if chunk.pre_process and architecture.embedding_scale != 1.0:
        chunk.embedding.register_forward_hook(_scaled_by(architecture.embedding_scale))
    _mark_sharded_parameters(chunk)
    return chunk


def transformer_config(
    architecture: Architecture,
    layout: GridLayout,
    stage: int,
    sharding: Sharding,
    dtype: torch.dtype,
    platform: Platform,
    recompute: RecomputeConfig,
    in_fp8: Mapping[str, Any] | None = None,
) -> TransformerConfig:
    """mcore's configuration for one rank of the layout; `in_fp8` from `mcore_settings`. Weights are loaded, never initialised;
    nothing is fused that needs CUDA kernels of its own."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=sharding.num_query_groups_padded * architecture.heads_per_group,
        num_query_groups=sharding.num_query_groups_padded,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        activation_func=ACTIVATIONS[architecture.activation],
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
        layernorm_zero_centered_gamma=architecture.zero_centred_norm,
        softmax_scale=architecture.attention_scale,
        **_window_settings(architecture),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        pipeline_model_parallel_layout=StageLayout(layout, stage) if layout.pp > 1 else None,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        sequence_parallel=layout.sp,
        recompute_granularity=None if recompute.granularity == "none" else recompute.granularity,
        recompute_method=recompute.method if recompute.granularity == "full" else None,
        recompute_num_layers=recompute.num_layers if recompute.granularity == "full" else None,
        deallocate_pipeline_outputs=True,
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not platform.is_cuda,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        batch_p2p_comm=platform.is_cuda,
        **expert_settings(architecture.experts),
        **(in_fp8 or {}),
    )


def _window_settings(architecture: Architecture) -> dict[str, Any]:
    """Sliding windows as mcore's Transformer Engine attention reads them: (keys before the query, keys after it), and which
    layers have the window. Our own attention reads `attention_windows`."""
    sizes = {window for window in architecture.attention_windows if window is not None}
    if not sizes:
        return {}
    has_window = [int(window is not None) for window in architecture.attention_windows]
    return {"window_size": (max(sizes) - 1, 0), "window_attn_skip_freq": has_window}


class StageLayout(PipelineParallelLayerLayout):
    """mcore's free pipeline layout, told which stage this rank is.

    mcore's own methods ask its global parallel state for the stage and for virtual stages, which does not know that two
    models share this process.
    """

    def __init__(self, layout: GridLayout, stage: int) -> None:
        stages = [["decoder"] * count for count in layout.layers_per_stage]
        stages[0].insert(0, "embedding")
        stages[-1].append("loss")
        super().__init__(stages, layout.pp)
        self.grid_layout, self.stage = layout, stage

    def get_num_layers_to_build(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        return int(self.layout[self.stage if pp_rank is None else pp_rank][vp_stage or 0].count(layer_type))

    def get_layer_offset(
        self, layer_type: LayerType = LayerType.decoder, vp_stage: int | None = None, pp_rank: int | None = None
    ) -> int:
        assert layer_type == LayerType.decoder
        stage = self.stage if pp_rank is None else pp_rank
        return self.grid_layout.chunk_layers(stage, vp_stage or 0).start - 1


@contextlib.contextmanager
def without_head(chunk: torch.nn.Module) -> Iterator[None]:
    """Run a forward that ends with the final hidden state [P_local, 1, D] (after the final norm) instead of logits.

    GPTModel skips its output layer when it is not `post_process`; the decoder keeps its final norm. Only around the
    forward: mcore's gradient finalisation finds tied embeddings by the same flag.
    """
    model = unwrap_model(chunk)
    flag, model.post_process = model.post_process, False
    try:
        yield
    finally:
        model.post_process = flag


def _mark_sharded_parameters(chunk: GPTModel) -> None:
    """Tell mcore which parameters are split over tensor-parallel ranks. Its local layers say so only while they initialise
    weights, which we skip; an unmarked parameter counts as a replica, and the gradient norm would leave it out on all
    ranks but the first."""
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1, NormedRowParallelLinear: 1}
    for module in chunk.modules():
        dim = dims.get(type(module))
        if dim is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            replicated = name == "bias" and dim == 1  # a row-parallel layer adds its bias after the reduction
            if not replicated and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _scaled_by(scale: float) -> Callable[..., torch.Tensor]:
    """A forward hook that scales the embedded tokens, rounding the factor to their dtype first, as transformers does. On the
    embedding's output and not its weight: a tied head uses the weight as it is."""

    def hook(module: torch.nn.Module, inputs: object, embedded: torch.Tensor) -> torch.Tensor:
        return embedded * torch.tensor(scale, dtype=embedded.dtype, device=embedded.device)

    return hook
