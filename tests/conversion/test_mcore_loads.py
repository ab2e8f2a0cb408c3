"""What `oprd convert import` writes, loaded by mcore alone: its own spec, parallel state and `dist_checkpointing.load`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conversion_models import write_tiny_model
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig
from safetensors.torch import load_file

from checkpoints_conversion import Architecture, HFReader, Sharding, mappings_for, read_architecture
from checkpoints_conversion.convert.hf_to_megatron import import_hf
from checkpoints_conversion.convert.megatron_to_hf import export_megatron
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.live.weights import canonical_parameters
from oprd_megatron.models.experts import expert_settings
from oprd_megatron.parallel.grid import init_mcore_globals
from oprd_megatron.platform import select_platform
from tests.ranks import run_ranks

SECONDS = 300
LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (1, 2, 2), (2, 1, 2)]
"""(tp, pp, ep); with ep 2 the experts are not cut by tp, as mcore wants it without sequence parallelism."""
SIZES: dict[str, Any] = {"num_hidden_layers": 2, "num_key_value_heads": 2, "intermediate_size": 96}


def plain_model(arch: Architecture, tp: int, pp: int, ep: int) -> GPTModel:
    """This rank's part of a model as Megatron-LM builds it on a CPU, all weights NaN."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tp, pp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1, create_gloo_process_groups=False
    )
    init_mcore_globals(0, parallel_state.get_tensor_model_parallel_rank())
    experts = expert_settings(arch.experts) if arch.experts else {}
    config = TransformerConfig(
        num_layers=arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_query_groups, kv_channels=arch.head_dim,
        normalization="RMSNorm", activation_func=torch.nn.functional.silu, gated_linear_unit=True, add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias, qk_layernorm=arch.qk_norm, tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp, pipeline_dtype=torch.float32, expert_model_parallel_size=ep,
        expert_tensor_parallel_size=1, perform_initialization=False, use_cpu_initialization=True,
        bias_activation_fusion=False, gradient_accumulation_fusion=False, **experts,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        arch.experts.num_experts if arch.experts else None, qk_layernorm=arch.qk_norm, normalization="RMSNorm"
    )
    model = GPTModel(
        config, spec, Sharding.smallest(arch, 0, tp, vocab_multiple=128).vocab_size_padded, arch.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(), post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=arch.tie_word_embeddings, position_embedding_type="rope",
    )  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    return model


@torch.no_grad()
def load_on_rank(hf_dir: Path, checkpoint: Path, layouts: list[tuple[int, int, int]]) -> None:
    """Load at every layout and compare each parameter with this rank's slice of the Hugging Face file."""
    arch = read_architecture(hf_dir)
    moe_utils.te_general_gemm = None  # mcore forgets to define it where Transformer Engine is absent
    with select_platform("cpu").scope():
        for tp, pp, ep in layouts:
            model = plain_model(arch, tp, pp, ep)
            metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
            state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, str(checkpoint))
            model.load_state_dict(state["model"])
            tp_rank = parallel_state.get_tensor_model_parallel_rank()
            with HFReader(hf_dir) as reader:
                for name, parameter in canonical_parameters([model]).items():
                    cut = tp if ".mlp.experts." not in name else 1
                    sharding = Sharding.smallest(arch, tp_rank if cut == tp else 0, cut, vocab_multiple=128)
                    expected = torch.empty_like(parameter)
                    mappings_for(arch)[name].load(expected, reader.read, sharding)
                    assert torch.equal(parameter, expected), f"{name} at tp {tp} pp {pp} ep {ep}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "qwen3_moe", "mixtral"])
def test_plain_mcore_loads_it_at_any_layout(family: str, tied: bool, tmp_path: Path) -> None:
    """At its default strictness, tp 1/2 x pp 1/2 x ep 1/2: every parameter is the file's, bit for bit, whichever cut."""
    write_tiny_model(family, tmp_path / "hf", tied, **SIZES)
    cut = Options(workers=1, tp=2, pp=2) if tied else Options(workers=1)
    import_hf(tmp_path / "hf", tmp_path / "megatron", cut, Progress())
    layouts = [layout for layout in LAYOUTS if layout[2] == 1 or family in ("qwen3_moe", "mixtral")]
    run_ranks(4, load_on_rank, tmp_path / "hf", tmp_path / "megatron" / "release", layouts, timeout_seconds=SECONDS)


def save_on_rank(hf_dir: Path, folder: Path, tp: int, pp: int, ep: int) -> None:
    """Fill a plain model from the Hugging Face file and have mcore save it."""
    arch = read_architecture(hf_dir)
    moe_utils.te_general_gemm = None
    with select_platform("cpu").scope():
        model = plain_model(arch, tp, pp, ep)
        tp_rank = parallel_state.get_tensor_model_parallel_rank()
        with HFReader(hf_dir) as reader, torch.no_grad():
            for name, parameter in canonical_parameters([model]).items():
                cut = tp if ".mlp.experts." not in name else 1
                sharding = Sharding.smallest(arch, tp_rank if cut == tp else 0, cut, vocab_multiple=128)
                mappings_for(arch)[name].load(parameter, reader.read, sharding)
        metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
        dist_checkpointing.save({"model": model.sharded_state_dict(metadata=metadata)}, str(folder))


@pytest.mark.parametrize(("family", "layout"), [("qwen2", (2, 2, 1)), ("llama", (1, 2, 1)), ("qwen3_moe", (2, 1, 2))])
def test_what_plain_mcore_saves_is_exported(family: str, layout: tuple[int, int, int], tmp_path: Path) -> None:
    """A checkpoint by mcore alone, at another layout and padding, becomes the Hugging Face file again, bit for bit."""
    write_tiny_model(family, tmp_path / "hf", family == "llama", **SIZES)
    (tmp_path / "saved").mkdir()
    run_ranks(4, save_on_rank, tmp_path / "hf", tmp_path / "saved", *layout, timeout_seconds=SECONDS)
    export_megatron(tmp_path / "saved", tmp_path / "back", Options(workers=1), Progress(), like=tmp_path / "hf")
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("back", "hf"))
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
