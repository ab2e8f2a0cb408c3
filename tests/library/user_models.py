"""Students as somebody else builds them, and the loop around them: mcore alone, on its global parallel state."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conversion import Architecture, Sharding, read_architecture
from checkpoints_conversion.architecture import VOCAB_MULTIPLE
from checkpoints_conversion.live.weights import canonical_parameters, load_hf_weights
from oprd_megatron.config.schema import RecomputeConfig
from oprd_megatron.models.build import make_chunk, transformer_config
from oprd_megatron.models.spec import Kind
from oprd_megatron.parallel.grid import Grid, init_mcore_globals
from oprd_megatron.parallel.layout import Coords, GridLayout, even_stages
from oprd_megatron.platform import select_platform

PLATFORM = select_platform("cpu")


@dataclass(frozen=True)
class Layout:
    """How the student lies. `packed`: thd batches and this project's spec (mcore's local one has neither cp nor sp)."""

    tp: int = 1
    pp: int = 1
    cp: int = 1
    vpp: int = 1
    sp: bool = False
    packed: bool = False
    recompute: bool = False


def chunks_of(arch: Architecture, hf_dir: Path, layout: Layout, per_token: bool) -> list[GPTModel]:
    """This rank's chunks with the weights of `hf_dir`."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        layout.tp, layout.pp, layout.vpp if layout.vpp > 1 else None, context_parallel_size=layout.cp,
        create_gloo_process_groups=False,
    )  # fmt: skip
    tp_rank, pp_rank = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    init_mcore_globals(0, tp_rank)
    sharding = Sharding.smallest(arch, tp_rank, layout.tp, vocab_multiple=VOCAB_MULTIPLE)
    if layout.packed:
        grid_layout = GridLayout(
            layout.tp, layout.pp, parallel_state.get_data_parallel_world_size(), layout.sp,
            even_stages(arch.num_layers, layout.pp * layout.vpp), cp=layout.cp, vpp=layout.vpp,
        )  # fmt: skip
        recompute = RecomputeConfig(granularity="full") if layout.recompute else RecomputeConfig()
        config = transformer_config(arch, grid_layout, pp_rank, sharding, torch.float32, PLATFORM, recompute)
        config.calculate_per_token_loss = per_token
        grid = Grid(grid_layout, dist.get_rank(), ProcessGroupCollection.use_mpu_process_groups())
        chunks = [
            make_chunk(arch, grid, config, sharding, number, PLATFORM.device, Kind()) for number in range(layout.vpp)
        ]
    else:
        chunks = [plain_chunk(arch, layout, sharding, number, per_token) for number in range(layout.vpp)]
    load_hf_weights(chunks, hf_dir, sharding, arch)
    return chunks


def plain_chunk(arch: Architecture, layout: Layout, sharding: Sharding, number: int, per_token: bool) -> GPTModel:
    """As Megatron-LM builds it on a CPU: mcore's local spec, no process groups passed."""
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups, kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_epsilon, normalization="RMSNorm", activation_func=torch.nn.functional.silu,
        gated_linear_unit=True, add_bias_linear=False, add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm,
        tensor_model_parallel_size=layout.tp, pipeline_model_parallel_size=layout.pp, pipeline_dtype=torch.float32,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, bias_activation_fusion=False,
        gradient_accumulation_fusion=False, deallocate_pipeline_outputs=True, calculate_per_token_loss=per_token,
        batch_p2p_comm=False, **(recompute if layout.recompute else {}),
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(qk_layernorm=arch.qk_norm, normalization="RMSNorm")
    stage = {"ignore_virtual": layout.vpp == 1, "vp_stage": number if layout.vpp > 1 else None}
    return GPTModel(
        config, spec, sharding.vocab_size_padded, arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        share_embeddings_and_output_weights=arch.tie_word_embeddings, position_embedding_type="rope",
        rotary_base=arch.rotary_base, vp_stage=stage["vp_stage"],
    )  # fmt: skip


def trained(chunks: list[GPTModel]) -> list[DistributedDataParallel]:
    """In mcore's DDP, gradients finalised by mcore."""
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=False)
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=number > 0) for number, chunk in enumerate(chunks)
    ]


def lm_loss(loss_mask: torch.Tensor, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Megatron-LM's loss_func."""
    mask = loss_mask.flatten().float()
    loss, tokens = torch.sum(output.flatten().float() * mask), mask.sum().to(torch.int)
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.float()])}


def lm_step(get_inputs: Any) -> Any:
    """Megatron-LM's forward_step with the loop's own loss."""

    def forward_step(data_iterator: Iterator[Any], model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        inputs, labels, loss_mask = get_inputs(data_iterator)
        return model(**inputs, labels=labels), partial(lm_loss, loss_mask)

    return forward_step


def gradients_of(chunks: list[GPTModel], arch: Architecture) -> dict[str, Any]:
    """What `assembled` of tests/representation/test_gradients.py puts together."""
    ps = parallel_state
    return {
        "gradients": {name: p.main_grad.clone() for name, p in canonical_parameters(chunks).items()},
        "coords": Coords(
            ps.get_tensor_model_parallel_rank(), ps.get_pipeline_model_parallel_rank(), ps.get_data_parallel_rank(),
            ps.get_context_parallel_rank(),
        ),
        "sharding": Sharding.smallest(
            arch, ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size(), vocab_multiple=VOCAB_MULTIPLE
        ),
    }  # fmt: skip


def architecture_of(hf_dir: Path) -> Architecture:
    """Of a directory that a test wrote."""
    return read_architecture(hf_dir)
