"""The trainer's weights into the engine. `probe` proves that they arrived."""

from __future__ import annotations

from checkpoints_conversion.live.weights import stream_hf_weights
from oprd_megatron.models import Model
from oprd_megatron.rollout.engine import RolloutEngine


def sync_weights(engine: RolloutEngine | None, model: Model, version: int) -> None:
    """Stream the model's tensors under Hugging Face names into this rank's engine, if it holds one. Collective over the
    model's grid."""
    if not model.grid.is_member:
        return
    groups = model.grid.groups
    tensors = stream_hf_weights(model.chunks, model.architecture, model.sharding, groups.tp, groups.pp)
    try:
        if engine is not None:
            engine.update_weights(version, tensors)
    finally:
        for _ in tensors:  # the stream is collective: a rank without an engine takes its part and keeps nothing
            pass
