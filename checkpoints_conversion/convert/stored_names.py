"""Which tensor of a Megatron checkpoint holds which parameter, and where in it.

This project names a parameter by its layer and expert, as in mcore's local spec: `decoder.layers.3.input_layernorm.weight`,
`decoder.layers.3.mlp.experts.local_experts.5.linear_fc1.weight`. Files are written in several other ways:

    stacked      all layers in one tensor, `decoder.layers.mlp.linear_fc2.weight` [L, D, F]; mcore's way, and what is written
                 here. Experts likewise: `decoder.layers.mlp.experts.experts.linear_fc2.weight` [L, E, D, F]
    by layer     `decoder.layers.3.mlp.linear_fc2.weight`: models whose layers differ (`non_homogeneous_layers`)
    fused norms  a norm belongs to the linear layer that follows it, `self_attention.linear_qkv.layer_norm_weight`: Transformer
                 Engine, and what mcore's local spec saves too
    own norms    `input_layernorm.weight`: this project's training runs
    NeMo 2       all of it behind `module.`

Shapes: L layers, E experts, D hidden width, F feed-forward width. In each, `linear_fc1` is [2F, D]: gate over up.

`canonical_place` says where a parameter is written, `stored_place` where it is found. Beside its tensors a checkpoint holds an
empty object for each linear layer, of which mcore asks for its FP8 state; `extra_state_keys` names them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.files.messages import shown
from oprd_megatron.errors import CheckpointError

FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
"""Within a layer: a norm of its own -> the same as part of the linear layer that follows it."""
PREFIXES = ("", "module.")
"""Before every key: nothing, or NeMo 2's."""

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class StoredPlace:
    """A parameter in a checkpoint: the tensor, and the indices of its first axes that select the parameter."""

    key: str
    leading: tuple[int, ...]


def canonical_place(
    megatron_name: str, num_layers: int, num_experts: int | None
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Where a parameter is written: mcore's stacked layout under Transformer Engine's names.

    The norm before experts stays on its own, as Transformer Engine's spec has it (what follows it is the router).

    Args:
        megatron_name: with 0-based global layer index.
        num_layers: of the model.
        num_experts: of a layer; None for a dense model.

    Returns:
        The key, and (index, size) of each axis before the parameter's own.
    """
    in_layer = _LAYER.fullmatch(megatron_name)
    if in_layer is None:
        return megatron_name, ()
    layer, rest = int(in_layer[1]), in_layer[2]
    leading = [(layer, num_layers)]
    of_expert = _EXPERT.fullmatch(rest)
    if of_expert is not None:
        assert num_experts is not None, f"{megatron_name} in a dense model"
        leading.append((int(of_expert[1]), num_experts))
        rest = f"mlp.experts.experts.{of_expert[2]}"
    elif num_experts is None or rest == "input_layernorm.weight":
        rest = FUSED_NORMS.get(rest, rest)
    return f"decoder.layers.{rest}", tuple(leading)


def second_key(megatron_name: str, num_experts: int | None) -> str | None:
    """Where a parameter is written once more: mcore's local spec looks for the norm before experts where it has that of a
    dense layer, Transformer Engine's under its own name. It is a vector, and with both any spec loads the checkpoint."""
    if num_experts is None or not megatron_name.endswith(".pre_mlp_layernorm.weight"):
        return None
    return f"decoder.layers.{FUSED_NORMS['pre_mlp_layernorm.weight']}"


def stored_place(
    tensors: Mapping[str, tuple[int, ...]], megatron_name: str, num_layers: int, num_experts: int | None
) -> StoredPlace:
    """Where a parameter is in a checkpoint, whichever of the layouts above wrote it.

    Args:
        tensors: global shape of every stored tensor.
        megatron_name: with 0-based global layer index.
        num_layers, num_experts: what config.json implies.

    Raises:
        CheckpointError: it is not there, twice, stored with gate and up apart, or for another number of layers or experts.
    """
    candidates = list(_candidates(megatron_name, num_layers, num_experts))
    found = [(key, leading) for key, leading in candidates if key in tensors]
    if len(found) > 1 and second_key(megatron_name, num_experts) is None:
        raise CheckpointError(
            f"{megatron_name} is stored twice, as {shown(found[0][0])} and {shown(found[1][0])}; save the checkpoint again"
        )
    if not found:
        raise CheckpointError(_missing(tensors, megatron_name, [key for key, _ in candidates]))
    key, leading = found[0]
    sizes = tuple(size for _, size in leading)
    if tensors[key][: len(sizes)] != sizes:
        raise CheckpointError(
            f"{shown(key)} is stored as {list(tensors[key])}, but config.json implies {list(sizes)} as its first "
            "sizes (layers, experts); give the config.json that belongs to the checkpoint"
        )
    return StoredPlace(key, tuple(index for index, _ in leading))


def _candidates(
    megatron_name: str, num_layers: int, num_experts: int | None
) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    """Every (key, leading axes) that may hold a parameter, the canonical one first."""
    in_layer = _LAYER.fullmatch(megatron_name)
    for prefix in PREFIXES:
        if in_layer is None:
            yield prefix + megatron_name, ()
            continue
        layer = (int(in_layer[1]), num_layers)
        for rest, experts in _names_in_layer(in_layer[2], num_experts):
            yield f"{prefix}decoder.layers.{rest}", (layer, *experts)
            yield f"{prefix}decoder.layers.{layer[0]}.{rest}", experts


def _names_in_layer(rest: str, num_experts: int | None) -> Iterator[tuple[str, tuple[tuple[int, int], ...]]]:
    of_expert = _EXPERT.fullmatch(rest)
    if of_expert is None:
        if rest in FUSED_NORMS:
            yield FUSED_NORMS[rest], ()
        yield rest, ()
        return
    assert num_experts is not None, f"{rest} in a dense model"
    expert, linear = int(of_expert[1]), of_expert[2]
    yield f"mlp.experts.experts.{linear}", ((expert, num_experts),)
    yield f"mlp.experts.experts.{expert}.{linear}", ()
    yield rest, ()


def _missing(tensors: Mapping[str, tuple[int, ...]], megatron_name: str, keys: list[str]) -> str:
    apart = next((key for key in keys if f"{key}_w" in tensors and f"{key}_v" in tensors), None)
    if apart is not None:
        return (
            f"{shown(apart)} is stored as two tensors, gate (_w) and up (_v), by mcore's singleton_local_shards; "
            "save the checkpoint without it"
        )
    if megatron_name == "output_layer.weight":
        return (
            "output_layer.weight is not in the checkpoint, as if its embeddings were tied, but config.json says "
            "tie_word_embeddings false; give the config.json that belongs to it"
        )
    return (
        f"{megatron_name} is not in the checkpoint (looked for {keys[0]}, {keys[1]} and more); is it another model's?"
    )


def extra_state_keys(arch: Architecture) -> list[str]:
    """Keys of the empty objects that mcore asks for beside the tensors: FP8 states of Transformer Engine's layers. mcore's own
    linear layers ask too, and loading with its default strictness fails where one is missing ("Missing key in checkpoint
    state_dict"). Every object is `[None]` as `torch.save` writes it, and none is asked for twice.

    Returns:
        `ShardedObject.unique_key` of each: the key, then index and size of every axis that it is stacked along.
    """
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention"]
    if arch.qk_norm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    if arch.sandwich_norm:
        modules += ["self_attention.linear_proj.post_layernorm", "mlp.linear_fc2.post_layernorm"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"] if arch.experts is None else ["pre_mlp_layernorm"]
    keys = [_object_key("decoder.final_layernorm", (0,), (1,))]
    for layer in range(arch.num_layers):
        keys += [_object_key(f"decoder.layers.{module}", (layer,), (arch.num_layers,)) for module in modules]
        for expert in range(arch.experts.num_experts if arch.experts else 0):
            at, of = (layer, expert), (arch.num_layers, arch.experts.num_experts if arch.experts else 0)
            keys += [_object_key(f"decoder.layers.mlp.experts.experts.linear_fc{i}", at, of) for i in (1, 2)]
    return keys


def _object_key(module: str, index: tuple[int, ...], size: tuple[int, ...]) -> str:
    return f"{module}._extra_state/shard_{'.'.join(map(str, index))}_{'.'.join(map(str, size))}"
