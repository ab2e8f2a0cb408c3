"""What the mixture-of-experts families share: reading how many experts there are, and the rows of a layer's experts.

Files hold one tensor a projection and expert, as published; transformers 5 keeps the experts of a layer in one tensor in
memory and splits it when it saves (`save_pretrained`, unless told `save_original_format=False`).

An expert's Megatron name has its number in the whole model, `mlp.experts.local_experts.{expert}`, as in a model without
expert parallelism.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from checkpoints_conversion import mappings as m
from checkpoints_conversion.architecture import Architecture, Experts
from checkpoints_conversion.families.values import read_size
from oprd_megatron.errors import CheckpointError

MAX_EXPERTS = 100_000
"""No model has as many, over all layers; the table has two rows for each."""
HARMLESS_ROUTER_KEYS = frozenset({"router_aux_loss_coef", "output_router_logits"})
"""They add a loss to transformers' own training; what a layer computes does not depend on them."""


@dataclass(frozen=True)
class ExpertNames:
    """What a Hugging Face layer calls its experts."""

    block: str
    """Where they and the router are in the layer."""
    gate: str
    up: str
    down: str


EXPERT_NAMES = {
    "qwen3_moe": ExpertNames("mlp", "gate_proj", "up_proj", "down_proj"),
    "mixtral": ExpertNames("block_sparse_moe", "w1", "w3", "w2"),
}
"""By family, as in files."""


def with_experts(
    arch: Architecture, config: dict[str, Any], path: Path, *, num_experts: int, ffn_hidden_size: int, normalised: bool
) -> Architecture:
    """The architecture with experts in every layer; `ffn_hidden_size` becomes theirs, because no layer has another MLP.

    Args:
        arch: what all families read.
        config, path: the parsed config.json and where it came from.
        num_experts: of a layer.
        ffn_hidden_size: of an expert.
        normalised: see `Experts`.

    Raises:
        CheckpointError: no `num_experts_per_tok`, or more than there are experts; or too many of them.
    """
    top_k = read_size(config, "num_experts_per_tok", path)
    if top_k > num_experts:
        raise CheckpointError(f"{path}: num_experts_per_tok {top_k} is more than the {num_experts} experts")
    if num_experts * arch.num_layers > MAX_EXPERTS:
        raise CheckpointError(f"{path}: {num_experts} experts in {arch.num_layers} layers are more than {MAX_EXPERTS}")
    return replace(
        arch, ffn_hidden_size=ffn_hidden_size, experts=Experts(num_experts, top_k, ffn_hidden_size, normalised)
    )


def expert_rows(arch: Architecture) -> tuple[m.Mapping, ...]:
    """The rows of a layer that stand in place of its MLP: the router, then expert by expert."""
    assert arch.experts is not None
    names = EXPERT_NAMES[arch.family]
    ours, theirs = "decoder.layers.{layer}.mlp", f"model.layers.{{layer}}.{names.block}"
    width, ffn = arch.hidden_size, arch.experts.ffn_hidden_size
    rows: list[m.Mapping] = [
        m.Replicated(f"{ours}.router.weight", (f"{theirs}.gate.weight",), (arch.experts.num_experts, width))
    ]
    for expert in range(arch.experts.num_experts):
        name, hf_name = f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}"
        gate_up = (f"{hf_name}.{names.gate}.weight", f"{hf_name}.{names.up}.weight")
        rows += [
            m.GatedMLP(f"{name}.linear_fc1.weight", gate_up, (ffn, width)),
            m.RowParallel(f"{name}.linear_fc2.weight", (f"{hf_name}.{names.down}.weight",), (width, ffn)),
        ]
    return tuple(rows)
