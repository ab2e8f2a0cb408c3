"""Experts in plain mcore models: its own local spec and its own parallel state, with expert parallelism, on gloo ranks.

How mcore 0.16.1 keeps a layer of experts in a sharded (torch_dist) checkpoint, with `singleton_local_shards` off or not given,
as `sharded_entries` reads it off a real model. L layers of the model, l the layer, E experts, e the expert, D width, F an
expert's features, t of T tensor-parallel ranks of the experts. The axes of the offset are those that mcore prepends.

    key after "decoder.layers."            global shape    offset    what a rank has
    mlp.router.weight                      [L, E, D]       [l]       all
    mlp.experts.experts.linear_fc1.weight  [L, E, 2F, D]   [l, e]    two tensors: rows t F/T .. of gate, F + t F/T .. of up
    mlp.experts.experts.linear_fc2.weight  [L, E, D, F]    [l, e]    columns t F/T ..
    pre_mlp_layernorm.weight               [L, D]          [l]       all
    mlp.linear_fc1.layer_norm_weight                                 the same norm: see below

So the file has the experts of all layers in one tensor a projection, gate over up, e the number in the whole model. An empty
object goes with each linear layer: `mlp.experts.experts.linear_fc1._extra_state`, [L, E] at [l, e]. The norm before the experts
is `pre_mlp_layernorm` in Transformer Engine's spec and in this project's, but mcore's own local spec renames it as in a dense
layer. With `non_homogeneous_layers` there is no axis L, and the layer is in the key (`decoder.layers.1.mlp..`).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from checkpoints_conversion import Architecture, Sharding, check_model
from checkpoints_conversion.live.weights import load_hf_weights, stream_hf_weights
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.models.experts import expert_settings
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.platform import select_platform
from tests.models.test_parity import build
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

VOCAB, TOKENS = 509, 11
LAYERS, EXPERTS, WIDTH, FFN = 4, 4, 32, 64
TOLERANCE = 1e-5
"""Largest difference of a logit in fp32."""
SECONDS = 240


def plain_model(arch: Architecture, tp: int, pp: int, ep: int, expert_tp: int) -> tuple[GPTModel, Sharding]:
    """This rank's part of a GPTModel as Megatron-LM would build it, its weights not filled yet."""
    parallel_state.initialize_model_parallel(
        tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp, create_gloo_process_groups=False
    )
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    init_mcore_globals(0, tp_rank)
    sharding = Sharding.smallest(arch, tp_rank, tp, vocab_multiple=128)
    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups, kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_epsilon, normalization="RMSNorm", activation_func=torch.nn.functional.silu,
        gated_linear_unit=True, add_bias_linear=False, qk_layernorm=arch.qk_norm, hidden_dropout=0.0,
        attention_dropout=0.0, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        pipeline_dtype=torch.float32, expert_model_parallel_size=ep, expert_tensor_parallel_size=expert_tp,
        perform_initialization=False, use_cpu_initialization=True, bias_activation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, apply_rope_fusion=False,
        gradient_accumulation_fusion=False, persist_layer_norm=False, **expert_settings(arch.experts),
    )  # fmt: skip
    assert arch.experts is not None
    spec = get_gpt_layer_local_spec(
        num_experts=arch.experts.num_experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm"
    )
    model = GPTModel(
        config, spec, sharding.vocab_size_padded, arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tie_word_embeddings, position_embedding_type="rope",
        rotary_base=arch.rotary_base,
    )  # fmt: skip
    return model.eval(), sharding


def forward(model: GPTModel, ids: Tensor) -> Tensor | None:
    """Logits [1, S, V_local] on the last stage; a stage sends its states [S, 1, D] to the next."""
    group = parallel_state.get_pipeline_model_parallel_group()
    if not model.pre_process:
        states = torch.empty(ids.size(1), 1, WIDTH)
        dist.recv(states, parallel_state.get_pipeline_model_parallel_prev_rank(), group)
        model.set_input_tensor([states])
    length = ids.size(1)
    hidden_later = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    output = model(ids, torch.arange(length)[None], hidden_later)
    if model.post_process:
        return output
    dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank(), group)
    return None


@torch.no_grad()
def convert_on_rank(hf_dir: Path, tp: int, pp: int, ep: int, expert_tp: int) -> Tensor | None:
    """Load, run, and stream back: the stream is the file. Returns this rank's logits."""
    arch = check_model(hf_dir)
    moe_utils.te_general_gemm = None  # mcore forgets to define it where Transformer Engine is absent
    with select_platform("cpu").scope():
        model, sharding = plain_model(arch, tp, pp, ep, expert_tp)
        expert_tp_group = parallel_state.get_expert_tensor_parallel_group()
        load_hf_weights([model], hf_dir, sharding, arch, expert_tp_group)
        logits = forward(model, torch.arange(TOKENS)[None] * 7)
        streamed = stream_hf_weights(
            [model], arch, sharding, parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(), parallel_state.get_expert_model_parallel_group(),
            expert_tp_group,
        )  # fmt: skip
        found = {name: tensor.clone() for name, tensor in streamed}
    expected = load_file(hf_dir / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    return logits


@pytest.mark.parametrize(
    ("family", "routing"),
    [("qwen3_moe", {}), ("mixtral", {}), ("qwen3_moe", {"normalised": False, "top_k": 1})],
    ids=str,
)
@pytest.mark.parametrize(
    ("tp", "pp", "ep", "expert_tp", "ranks"),
    [(1, 1, 1, 1, 1), (2, 1, 1, 2, 2), (1, 1, 2, 1, 2), (1, 2, 1, 1, 2), (2, 1, 2, 1, 2), (2, 2, 1, 2, 4), (2, 1, 2, 2, 4),
     (1, 2, 2, 1, 4), (2, 2, 2, 1, 4)],
)  # fmt: skip
def test_plain_mcore_equals_transformers(
    tp: int, pp: int, ep: int, expert_tp: int, ranks: int, family: Any, routing: dict[str, Any], tmp_path: Path
) -> None:
    """A model of mcore's own making, filled by `load_hf_weights`, has transformers' logits, and streams out what it loaded."""
    tiny_hf_model(family, tmp_path, tied=family == "mixtral", vocab_size=VOCAB, std=0.1, **routing)
    found = run_ranks(ranks, convert_on_rank, tmp_path, tp, pp, ep, expert_tp, timeout_seconds=SECONDS)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path)(torch.arange(TOKENS)[None] * 7).logits
    last_stage = [logits for logits in found if logits is not None]
    assert len(last_stage) == ranks // pp
    for first in range(0, len(last_stage), tp):  # each data-parallel rank ran the same tokens
        logits = torch.cat(last_stage[first : first + tp], dim=-1)[..., :VOCAB]
        assert (logits - expected).abs().max().item() <= TOLERANCE


def sharded_entries(hf_dir: Path, tp: int, ep: int, metadata: dict[str, Any] | None) -> list[tuple[Any, ...]]:
    """(key, global shape, offset, local shape, prepended axes) of what this rank would save of layer 2 besides attention; local
    shape and axes are None for an object."""
    arch = check_model(hf_dir)
    entries: list[tuple[Any, ...]] = []
    with select_platform("cpu").scope():
        model, _ = plain_model(arch, tp, 1, ep, tp)
        for value in model.sharded_state_dict(metadata=metadata).values():
            for part in value.build() if isinstance(value, ShardedTensorFactory) else [value]:
                if not part.key.startswith("decoder.layers.") or "attention" in part.key or part.global_offset[0] != 1:
                    continue
                is_tensor = isinstance(part, ShardedTensor)
                own = (part.local_shape, part.prepend_axis_num) if is_tensor else (None, None)
                entries.append((part.key, part.global_shape, part.global_offset, *own))
    return entries


@pytest.mark.parametrize("metadata", [None, {"singleton_local_shards": False}], ids=str)
def test_sharded_checkpoint_names(metadata: dict[str, Any] | None, tmp_path: Path) -> None:
    """The table at the top of this file, at TP 2 x EP 2: rank 3 is the second of both."""
    tiny_hf_model("qwen3_moe", tmp_path, num_layers=LAYERS, vocab_size=VOCAB)
    prefix, half = "decoder.layers.mlp.", FFN // 2
    expected: list[tuple[Any, ...]] = [
        (f"{prefix}linear_fc1.layer_norm_weight", (LAYERS, WIDTH), (1, 0), (WIDTH,), 1),
        (f"{prefix}router.weight", (LAYERS, EXPERTS, WIDTH), (1, 0, 0), (EXPERTS, WIDTH), 1),
    ]
    fc1, fc2 = (LAYERS, EXPERTS, 2 * FFN, WIDTH), (LAYERS, EXPERTS, WIDTH, FFN)
    for expert in (2, 3):
        name = f"{prefix}experts.experts.linear_fc1."
        expected += [(f"{name}weight", fc1, (1, expert, row, 0), (half, WIDTH), 2) for row in (half, FFN + half)]
        expected.append((f"{name}_extra_state", (LAYERS, EXPERTS), (1, expert), None, None))
        name = f"{prefix}experts.experts.linear_fc2."
        expected.append((f"{name}weight", fc2, (1, expert, 0, half), (WIDTH, half), 2))
        expected.append((f"{name}_extra_state", (LAYERS, EXPERTS), (1, expert), None, None))
    found = run_ranks(4, sharded_entries, tmp_path, 2, 2, metadata, timeout_seconds=SECONDS)[3]
    assert sorted(found, key=str) == sorted(expected, key=str)


def own_keys(hf_dir: Path) -> list[str]:
    """Keys of this project's own layers, without attention's."""
    model = build(hf_dir, ParallelConfig())
    with select_platform("cpu").scope():
        tensors = model.chunks[0].sharded_state_dict(metadata={"dp_cp_group": model.grid.groups.dp_cp})
    return sorted({value.key for value in tensors.values() if "layers" in value.key and "attention" not in value.key})


def test_own_checkpoint_names(tmp_path: Path) -> None:
    """This project's layers save under Transformer Engine's keys, the norm before the experts by its own name."""
    tiny_hf_model("mixtral", tmp_path, vocab_size=VOCAB)
    keys = [key for key in run_ranks(1, own_keys, tmp_path)[0] if "_extra_state" not in key]
    experts = [f"decoder.layers.mlp.experts.experts.linear_fc{n}.weight" for n in (1, 2)]
    expected = ["decoder.layers.mlp.router.weight", "decoder.layers.pre_mlp_layernorm.weight", *experts]
    assert keys == sorted(expected)
