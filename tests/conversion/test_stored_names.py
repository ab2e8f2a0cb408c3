"""Names and places of parameters in Megatron checkpoints, against what mcore's own GPTModel says and writes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from checkpoints_conversion import Architecture, Sharding, mappings_for
from checkpoints_conversion.architecture import Experts
from checkpoints_conversion.convert.stored_names import canonical_place, extra_state_keys, stored_place
from checkpoints_conversion.torch_dist import (
    Chunk,
    ChunkWriter,
    StoredObject,
    StoredTensor,
    TorchDistReader,
    write_common,
    write_metadata,
)
from oprd_megatron.errors import CheckpointError
from oprd_megatron.platform import select_platform
from tests.ranks import run_ranks

SIZES = dict(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=32,
    max_position_embeddings=16,
    norm_epsilon=1e-6,
    rotary_base=10000.0,
    rope_scaling=None,
)
ARCHITECTURES = {
    "dense": Architecture(family="qwen3", tie_word_embeddings=False, qkv_bias=False, qk_norm=True, **SIZES),
    "biases": Architecture(family="qwen2", tie_word_embeddings=True, qkv_bias=True, qk_norm=False, **SIZES),
    "experts": Architecture(
        family="qwen3_moe",
        tie_word_embeddings=False,
        qkv_bias=False,
        qk_norm=True,
        experts=Experts(3, 2, ffn_hidden_size=24, normalised=True),
        **SIZES,
    ),
}
STACKED: dict[str, Any] = {}
BY_LAYER = {"non_homogeneous_layers": True}
SINGLE = {"singleton_local_shards": True}


def mcore_model(arch: Architecture, tp: int = 1) -> GPTModel:
    """mcore's own model in its local spec, without any code of ours; every parameter random."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    model_parallel_cuda_manual_seed(1)
    experts: dict[str, Any] = {}
    if arch.experts:
        experts = dict(
            num_moe_experts=3, moe_ffn_hidden_size=24, moe_router_topk=2, moe_token_dispatcher_type="allgather"
        )
    config = TransformerConfig(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        tensor_model_parallel_size=tp,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gradient_accumulation_fusion=False,
        **experts,
    )
    num_experts = arch.experts.num_experts if arch.experts else None
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts, qk_layernorm=arch.qk_norm, normalization="RMSNorm"),
        vocab_size=arch.vocab_size,
        max_sequence_length=16,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="rope",
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def sharded(model: GPTModel, metadata: dict[str, Any]) -> dict[str, Any]:
    """mcore's sharded tensors and objects of a model."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})


def describe_on_rank(arch: Architecture, metadata: dict[str, Any]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Global shapes of the tensors, and keys of the objects, that mcore would save."""
    with select_platform("cpu").scope():
        state = sharded(mcore_model(arch), metadata)
        apply_factories(state)
        values = list(nested_values(state))
    tensors = {value.key: tuple(value.global_shape) for value in values if isinstance(value, ShardedTensor)}
    return tensors, {value.unique_key for value in values if isinstance(value, ShardedObject)}


def saved_on_rank(arch: Architecture, tp: int, metadata: dict[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    """Save mcore's model with mcore; the local parameters under our names."""
    with select_platform("cpu").scope():
        model = mcore_model(arch, tp)
        dist_checkpointing.save({"model": sharded(model, metadata)}, str(folder))
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def load_on_rank(arch: Architecture, folder: Path) -> dict[str, torch.Tensor]:
    """Load a directory into mcore's model, with mcore's default strictness; the parameters under our names."""
    with select_platform("cpu").scope():
        model = mcore_model(arch)
        loaded = dist_checkpointing.load({"model": sharded(model, STACKED)}, str(folder))
        model.load_state_dict(loaded["model"])
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def num_experts_of(arch: Architecture) -> int | None:
    """As the functions under test take it."""
    return arch.experts.num_experts if arch.experts else None


def canonical_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Key and global shape of all we would write."""
    shapes = {}
    for mapping in mappings_for(arch).values():
        if mapping.exported:
            key, leading = canonical_place(mapping.megatron_name, arch.num_layers, num_experts_of(arch))
            shapes[key] = (*(size for _, size in leading), *mapping.shape(Sharding.smallest(arch)))
    return shapes


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_canonical_layout_is_mcores(kind: str) -> None:
    """What we write has the keys and global shapes that mcore's GPTModel asks for by default, all of them and no others.
    One differs on purpose: the norm before experts, which mcore's local spec saves as part of an MLP that is not there,
    and Transformer Engine's on its own."""
    arch = ARCHITECTURES[kind]
    ((tensors, _),) = run_ranks(1, describe_on_rank, arch, STACKED)
    if arch.experts:
        tensors["decoder.layers.pre_mlp_layernorm.weight"] = tensors.pop(
            "decoder.layers.mlp.linear_fc1.layer_norm_weight"
        )
    assert canonical_shapes(arch) == tensors


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_object_mcore_asks_for_is_named(kind: str) -> None:
    """mcore's local layers ask for no `_extra_state` that we do not name, and no name is given twice."""
    arch = ARCHITECTURES[kind]
    ((_, objects),) = run_ranks(1, describe_on_rank, arch, STACKED)
    keys = extra_state_keys(arch)
    assert objects and objects <= set(keys) and len(set(keys)) == len(keys)


@pytest.mark.parametrize("metadata", [STACKED, BY_LAYER], ids=["stacked", "by layer"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_parameters_are_found_in_what_mcore_saves(kind: str, metadata: dict[str, Any], tmp_path: Path) -> None:
    """Whichever layout mcore saved, the place found for a parameter holds exactly that parameter: gate rows over up rows."""
    arch = ARCHITECTURES[kind]
    folder = tmp_path / "saved"
    folder.mkdir()
    (parameters,) = run_ranks(1, saved_on_rank, arch, 1, metadata, folder)
    assert parameters.keys() == {name for name, mapping in mappings_for(arch).items() if mapping.exported}
    for name, parameter in parameters.items():
        assert torch.equal(read_parameter(folder, arch, name), parameter), name


def read_parameter(folder: Path, arch: Architecture, name: str) -> torch.Tensor:
    """A whole parameter out of a checkpoint, by our name."""
    with TorchDistReader(folder) as reader:
        shapes = {key: stored.shape for key, stored in reader.tensors.items()}
        place = stored_place(shapes, name, arch.num_layers, num_experts_of(arch))
        shape = shapes[place.key][len(place.leading) :]
        found = torch.empty(shape)
        offsets, sizes = (*place.leading, *(0 for _ in shape)), (*(1 for _ in place.leading), *shape)
        reader.read_into(place.key, offsets, sizes, memoryview(found.numpy()).cast("B"))
    return found


def test_gate_rows_come_before_up_rows_for_any_tp(tmp_path: Path) -> None:
    """Saved at TP2, where each rank holds half of gate over half of up, linear_fc1 in the file is gate over up, whole."""
    arch = ARCHITECTURES["dense"]
    ranks = run_ranks(2, saved_on_rank, arch, 2, STACKED, tmp_path)
    for layer in range(arch.num_layers):
        name = f"decoder.layers.{layer}.mlp.linear_fc1.weight"
        gates, ups = zip(*(rank[name].chunk(2) for rank in ranks), strict=True)
        assert torch.equal(read_parameter(tmp_path, arch, name), torch.cat([*gates, *ups]))


def write_as_we_do(arch: Architecture, folder: Path, object_keys: list[str]) -> dict[str, torch.Tensor]:
    """A checkpoint of random parameters at their canonical places, and of empty objects that share one container."""
    tensors: dict[str, StoredTensor] = {}
    parameters = {}
    shapes = canonical_shapes(arch)
    with ChunkWriter(folder / "__0_0.distcp") as writer:
        for mapping in mappings_for(arch).values():
            if not mapping.exported:
                continue
            key, leading = canonical_place(mapping.megatron_name, arch.num_layers, num_experts_of(arch))
            value = torch.randn(mapping.shape(Sharding.smallest(arch)))
            offsets = (*(index for index, _ in leading), *(0 for _ in value.shape))
            sizes = (*(1 for _ in leading), *value.shape)
            writer.begin("F32", sizes)
            writer.write(memoryview(value.numpy()).cast("B"))
            start, length, _ = writer.end()
            chunks = tensors[key].chunks if key in tensors else ()
            chunk = Chunk(offsets, sizes, "__0_0.distcp", start, length)
            tensors[key] = StoredTensor(key, shapes[key], "F32", (*chunks, chunk))
            parameters[mapping.megatron_name] = value
        buffer = io.BytesIO()
        torch.save([None], buffer)
        place = writer.write_object(buffer.getvalue())
    write_common(folder, {})
    write_metadata(folder, tensors.values(), [StoredObject(key, "__0_0.distcp", *place) for key in object_keys])
    return parameters


@pytest.mark.parametrize("kind", ["dense", "biases"])
def test_mcore_loads_the_canonical_layout_at_its_default_strictness(kind: str, tmp_path: Path) -> None:
    """Tensors at canonical places, with the objects that `extra_state_keys` names, load into mcore's own GPTModel."""
    arch = ARCHITECTURES[kind]
    written = write_as_we_do(arch, tmp_path, extra_state_keys(arch))
    (loaded,) = run_ranks(1, load_on_rank, arch, tmp_path)
    assert all(torch.equal(loaded[name], value) for name, value in written.items())


def test_without_the_objects_mcore_refuses(tmp_path: Path) -> None:
    """The reason for `extra_state_keys`: mcore's default strictness wants every object."""
    write_as_we_do(ARCHITECTURES["dense"], tmp_path, [])
    with pytest.raises(AssertionError, match="Missing key in checkpoint state_dict"):
        run_ranks(1, load_on_rank, ARCHITECTURES["dense"], tmp_path)


def test_gate_and_up_apart_are_refused_by_name() -> None:
    """mcore's singleton_local_shards stores gate and up as two tensors; that is said, not taken for a missing tensor."""
    arch = ARCHITECTURES["dense"]
    ((tensors, _),) = run_ranks(1, describe_on_rank, arch, SINGLE)
    assert stored_place(tensors, "decoder.layers.1.mlp.linear_fc2.weight", 2, None).leading == ()
    with pytest.raises(CheckpointError, match=r"two tensors, gate \(_w\) and up \(_v\)"):
        stored_place(tensors, "decoder.layers.1.mlp.linear_fc1.weight", 2, None)


@pytest.mark.parametrize(
    ("key", "leading"),
    [
        ("decoder.layers.self_attention.linear_qkv.layer_norm_weight", (3,)),
        ("decoder.layers.3.self_attention.linear_qkv.layer_norm_weight", ()),
        ("decoder.layers.input_layernorm.weight", (3,)),
        ("decoder.layers.3.input_layernorm.weight", ()),
        ("module.decoder.layers.self_attention.linear_qkv.layer_norm_weight", (3,)),
    ],
)
def test_a_norm_is_found_under_every_name_it_has(key: str, leading: tuple[int, ...]) -> None:
    """Fused or on its own, stacked or by layer, and behind NeMo 2's prefix."""
    shape = (4, 16) if leading else (16,)
    place = stored_place({key: shape}, "decoder.layers.3.input_layernorm.weight", 4, None)
    assert (place.key, place.leading) == (key, leading)


@pytest.mark.parametrize(
    ("key", "shape", "leading"),
    [
        ("decoder.layers.mlp.experts.experts.linear_fc2.weight", (4, 8, 16, 24), (3, 5)),
        ("decoder.layers.3.mlp.experts.experts.linear_fc2.weight", (8, 16, 24), (5,)),
        ("decoder.layers.3.mlp.experts.experts.5.linear_fc2.weight", (16, 24), ()),
        ("decoder.layers.mlp.experts.experts.5.linear_fc2.weight", (4, 16, 24), (3,)),
        ("decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight", (16, 24), ()),
    ],
)
def test_an_expert_is_found_stacked_or_alone(key: str, shape: tuple[int, ...], leading: tuple[int, ...]) -> None:
    """Two axes before the parameter's own, one or none."""
    place = stored_place({key: shape}, "decoder.layers.3.mlp.experts.local_experts.5.linear_fc2.weight", 4, 8)
    assert (place.key, place.leading) == (key, leading)


@pytest.mark.parametrize(
    ("tensors", "name", "message"),
    [
        ({}, "decoder.layers.0.mlp.linear_fc2.weight", "mlp.linear_fc2.weight is not in the checkpoint"),
        ({}, "output_layer.weight", "as if its embeddings were tied"),
        ({"decoder.layers.mlp.linear_fc2.weight": (5, 16, 24)}, "decoder.layers.0.mlp.linear_fc2.weight", r"\[4\]"),
        (
            {
                "decoder.layers.pre_mlp_layernorm.weight": (4, 16),
                "decoder.layers.mlp.linear_fc1.layer_norm_weight": (4, 16),
            },
            "decoder.layers.0.pre_mlp_layernorm.weight",
            "stored twice",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors: dict[str, tuple[int, ...]], name: str, message: str) -> None:
    """Missing, twice, or for another number of layers: one line that names the tensor."""
    with pytest.raises(CheckpointError, match=message) as caught:
        stored_place(tensors, name, 4, None)
    assert "\n" not in str(caught.value)
