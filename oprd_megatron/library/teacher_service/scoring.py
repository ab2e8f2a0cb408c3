"""A teacher that answers questions: its states, projected, on rank 0. However the teacher is sharded, the router brings them
there: the plan is made for a student of one rank, rank 0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from oprd_megatron.bridge.artefact import BridgeInfo, read_info
from oprd_megatron.bridge.fingerprint import ModelFingerprint, model_fingerprint, tokenizer_fingerprint
from oprd_megatron.config import RunConfig
from oprd_megatron.errors import CheckpointError, ConfigError
from oprd_megatron.library.batches import Step
from oprd_megatron.library.teacher_service.frames import Question, ServiceInfo
from oprd_megatron.library.teachers import InProcessTeacher, Wanted
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.platform import Platform
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import TokenPlacement
from oprd_megatron.representation.space import Identity, frozen_space
from oprd_megatron.rollout.tokenizer import load_tokenizer


class Scorer:
    """The teacher of a service. Collective over the world: all ranks make it, and all call `score` with the same question.

    Args:
        config: its `teacher` and, of `distill`, bridge, bridge_head, final_state and wire.
        platform: of this rank.
        max_frame_bytes: longest frame, either way.

    Attributes:
        info: what clients are told.
    """

    def __init__(self, config: RunConfig, platform: Platform, max_frame_bytes: int) -> None:
        section, distill = config.teacher, config.distill
        if distill.wire == "fp8":
            raise ConfigError("distill.wire: fp8 is for the trainer's own ranks; a teacher service sends fp32 or bf16")
        bridge = None if distill.bridge is None else read_info(distill.bridge)
        self.distill, self.platform = distill, platform
        self.teacher = InProcessTeacher.load(
            section.path, section.parallel, platform=platform, dtype=section.dtype, precision=section.precision,
            pad_heads=section.pad_heads,
        )  # fmt: skip
        architecture = self.teacher.model.architecture
        fingerprint = model_fingerprint(section.path, architecture)
        if bridge is not None:
            check_fitted_for(distill.bridge, bridge, fingerprint)
        self.space = self._space(bridge)
        layers = {layer for _, layer in bridge.layer_map} if bridge else range(1, architecture.num_layers + 1)
        wire = self.teacher.wire(distill, self.space)
        self.info = ServiceInfo(
            teacher=fingerprint,
            tokenizer=tokenizer_fingerprint(load_tokenizer(section.path)),
            final_state=distill.final_state,
            layers=sorted(layers),
            bridge=bridge.sha256 if bridge else None,
            width=self.space.width,
            dtype="bf16" if wire.name == "bf16" else "fp32",
            context=architecture.max_position_embeddings,
            max_frame_bytes=max_frame_bytes,
        )

    def _space(self, bridge: BridgeInfo | None) -> Identity:
        if bridge is None:
            return Identity(self.teacher.width)
        pairs = [LayerPair(*pair) for pair in bridge.layer_map]
        widths = bridge.fingerprints.teacher.width, bridge.fingerprints.student.width
        return frozen_space(self.distill, pairs, *widths, self.platform.device)

    def score(self, question: Question) -> dict[int, torch.Tensor]:
        """{layer: [P, C]} on rank 0, nothing elsewhere."""
        layout = GridLayout(1, 1, 1, False, (len(question.layers),))
        pairs = [LayerPair(number, layer) for number, layer in enumerate(question.layers, 1)]
        row, zero = np.arange(question.num_states), np.zeros(question.num_states, dtype=np.int64)
        tokens = TokenPlacement(zero, zero, zero, row, zero, row, replicated=True)
        step = Step(question.sequences, question.positions, [0] * len(question.sequences), tokens, len(row), 1)
        grid = Grid(layout, dist.get_rank(), ProcessGroupCollection())
        delivery, order = self.teacher.deliver(Wanted(step, pairs, grid, self.distill, self.space, self.platform))
        if not grid.is_member:
            return {}
        states = {}
        for layer in question.layers:
            rows = delivery.rows(0, layer)
            empty = torch.empty(0, delivery.wire.columns, dtype=delivery.wire.dtype)
            states[layer] = (empty if rows is None else rows.cpu())[np.argsort(order)]
        return states


def check_fitted_for(path: Path | None, bridge: BridgeInfo, teacher: ModelFingerprint) -> None:
    """Raises:
    CheckpointError: the bridge was fitted for another teacher.
    """
    difference = bridge.fingerprints.teacher.difference(teacher)
    if difference:
        raise CheckpointError(
            f"distill.bridge: {path}: was fitted for teacher {bridge.fingerprints.teacher.path}, {teacher.path} differs in its "
            f"{difference}; give the bridge of this teacher, or fit one with `oprd bridge fit`"
        )
