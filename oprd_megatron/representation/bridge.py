"""The low-rank bridge at work (OPRD-Bridge, Eq. 12 and 14): fixed projections of both models' states into one small space.

    teacher layer:  P_T (h_T - mu)      [r, D_T] x [D_T], on the teacher's rank, before anything travels
    student layer:  P_S h_S             [r, D_S] x [D_S], inside the loss

A bridge file is safetensors: `teacher.<layer>.mean` [D_T], `teacher.<layer>.projection` [r, D_T] and
`student.<layer>.projection` [r, D_S] for every supervised pair (1-based layers), all fp32. How the projections are found is not
this module's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.layer_map import LayerPair


@dataclass(frozen=True)
class Bridge:
    """Projections of one run, on this rank's device.

    Attributes:
        rank: r.
        means: {teacher layer: mu [D_T]}.
        teacher: {teacher layer: P_T [r, D_T]}.
        student: {student layer: P_S [r, D_S]}.
    """

    rank: int
    means: dict[int, torch.Tensor]
    teacher: dict[int, torch.Tensor]
    student: dict[int, torch.Tensor]

    def project_teacher(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """P_T (h_T - mu): [N, D_T] of any float dtype -> [N, r] fp32."""
        return (states.float() - self.means[layer]) @ self.teacher[layer].T


def bridge_rank(path: Path) -> int:
    """r of a bridge file, from its header.

    Raises:
        CheckpointError: not a bridge file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("student.")]  # noqa: SIM118 (not a dict)
            shape = file.get_slice(names[0]).get_shape() if names else []
            if shape:
                return int(shape[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"distill.bridge: {path}: cannot read it ({error}); give a bridge (safetensors)"
        ) from None
    raise CheckpointError(f"distill.bridge: {path}: holds no student.<layer>.projection; this is not a bridge")


def load_bridge(
    path: Path, pairs: Sequence[LayerPair], teacher_width: int, student_width: int, device: torch.device
) -> Bridge:
    """Read the projections of these pairs.

    Raises:
        CheckpointError: a projection is missing or has another shape.
    """
    rank = bridge_rank(path)
    shapes: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        shapes[f"teacher.{pair.teacher_layer}.mean"] = (teacher_width,)
        shapes[f"teacher.{pair.teacher_layer}.projection"] = (rank, teacher_width)
        shapes[f"student.{pair.student_layer}.projection"] = (rank, student_width)
    tensors = {}
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())
        for name, shape in shapes.items():
            if name not in present:
                raise CheckpointError(
                    f"distill.bridge: {path}: {name} is missing; fit the bridge for this run's distill.layers and layer_map"
                )
            tensors[name] = file.get_tensor(name).to(device, torch.float32)
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(
                    f"distill.bridge: {path}: {name} is {list(tensors[name].shape)}, but these models need {list(shape)}"
                )
    return Bridge(
        rank,
        means={pair.teacher_layer: tensors[f"teacher.{pair.teacher_layer}.mean"] for pair in pairs},
        teacher={pair.teacher_layer: tensors[f"teacher.{pair.teacher_layer}.projection"] for pair in pairs},
        student={pair.student_layer: tensors[f"student.{pair.student_layer}.projection"] for pair in pairs},
    )
