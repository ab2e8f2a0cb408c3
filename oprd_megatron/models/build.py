"""From an `Architecture` (what config.json says) to this rank's part of an mcore GPTModel.

Dense Llama, Qwen2/2.5 and Qwen3, tied or untied. Anything that would change the maths was refused when the
architecture was read (`checkpoints_conversion`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
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
from checkpoints_conversion.architecture import VOCAB_MULTIPLE, Llama3Rope
from checkpoints_conversion.live import load_hf_weights
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.models.spec import block_spec, has_transformer_engine
from oprd_megatron.parallel import Coords, GridLayout
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.platform import Platform

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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

    Raises:
        CheckpointError: the weights are missing, torn or of other shapes.
    """
    layout = grid.layout
    recompute = recompute or RecomputeConfig()
    padded_as = replace(architecture, vocab_size=max(vocab_size, architecture.vocab_size))
    coords = grid.coords if grid.is_member else Coords(0, 0, 0)
    sharding = Sharding.smallest(padded_as, coords.tp, layout.tp, vocab_multiple=VOCAB_MULTIPLE)
    chunks = []
    with platform.scope():
        config = transformer_config(architecture, layout, coords.pp, sharding, dtype, platform, recompute)
        for number in range(layout.vpp if grid.is_member else 0):
            chunk = GPTModel(
                config=config,
                transformer_layer_spec=block_spec(
                    len(layout.chunk_layers(coords.pp, number)),
                    qk_norm=architecture.qk_norm,
                    transformer_engine=has_transformer_engine() and platform.is_cuda,
                ),
                vocab_size=sharding.vocab_size_padded,
                max_sequence_length=architecture.max_position_embeddings,
                pre_process=grid.is_first_stage and number == 0,
                post_process=grid.is_last_stage and number == layout.vpp - 1,
                share_embeddings_and_output_weights=architecture.tie_word_embeddings,
                position_embedding_type="rope",
                rotary_base=architecture.rotary_base,
                pg_collection=grid.groups,
                vp_stage=number if layout.vpp > 1 else None,
            ).to(platform.device)
            if isinstance(architecture.rope_scaling, Llama3Rope):
                _scale_rope(chunk, architecture.rope_scaling)
            _mark_sharded_parameters(chunk)
            chunks.append(chunk)
        if chunks:
            load_hf_weights(chunks, hf_dir, sharding, architecture)
    if frozen:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    return Model(architecture, grid, sharding, config, chunks, hf_dir)


def transformer_config(
    architecture: Architecture,
    layout: GridLayout,
    stage: int,
    sharding: Sharding,
    dtype: torch.dtype,
    platform: Platform,
    recompute: RecomputeConfig,
) -> TransformerConfig:
    """mcore's configuration for one rank of the layout. Weights are loaded, never initialised; nothing is fused that
    needs CUDA kernels of its own."""
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=sharding.num_query_groups_padded * architecture.heads_per_group,
        num_query_groups=sharding.num_query_groups_padded,
        kv_channels=architecture.head_dim,
        layernorm_epsilon=architecture.norm_epsilon,
        normalization="RMSNorm",
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        qk_layernorm=architecture.qk_norm,
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
    )


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
    dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dim = dims.get(type(module))
        if dim is None:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            replicated = name == "bias" and dim == 1  # a row-parallel layer adds its bias after the reduction
            if not replicated and not hasattr(parameter, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=dim, stride=1)


def _scale_rope(chunk: GPTModel, rope: Llama3Rope) -> None:
    """Llama 3 frequency scaling. mcore passes on only `factor`, so the inverse frequencies are set here (the formula of
    transformers' `llama3` rope type)."""
    inv_freq = chunk.rotary_pos_emb.inv_freq
    wavelength = 2 * math.pi / inv_freq
    low = rope.original_max_position_embeddings / rope.low_freq_factor
    high = rope.original_max_position_embeddings / rope.high_freq_factor
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > low, inv_freq / rope.factor, torch.where(wavelength < high, inv_freq, blended))
    chunk.rotary_pos_emb.inv_freq = scaled
