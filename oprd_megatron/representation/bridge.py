"""The low-rank bridge at work (OPRD-Bridge, Eq. 12 and 14): frozen projections of both models' states into one small space.

    teacher layer:  P_T (h_T - mu)      [r, D_T] x [D_T], on the teacher's rank, before anything travels
    student layer:  P_S h_S             [r, D_S] x [D_S], inside the loss

A bridge file is safetensors with, for every pair of layers (1-based), `teacher.<layer>.mean` [D_T],
`teacher.<layer>.projection` [r, D_T] and the student's projector: `student.<layer>.projection` [r, D_S], or the two layers of
an MLP, `student.<layer>.fc1.weight` [H, D_S], `.fc1.bias` [H], `.fc2.weight` [r, H], `.fc2.bias` [r]; all fp32.
How they are found is `oprd_megatron.bridge`'s business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.functional import gelu, linear

from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.layer_map import LayerPair

LINEAR = "projection"


@dataclass(frozen=True)
class Bridge:
    """Projections of one run, on this rank's device.

    Attributes:
        rank: r.
        means: {teacher layer: mu [D_T]}.
        teacher: {teacher layer: P_T [r, D_T]}.
        student: {student layer: {part: tensor}}: `projection` [r, D_S], or the four tensors of an MLP.
    """

    rank: int
    means: dict[int, torch.Tensor]
    teacher: dict[int, torch.Tensor]
    student: dict[int, dict[str, torch.Tensor]]

    def project_teacher(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """P_T (h_T - mu): [N, D_T] of any float dtype -> [N, r] fp32."""
        return (states.float() - self.means[layer]) @ self.teacher[layer].T

    def project_student(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """P_S h_S: [N, D_S] fp32 -> [N, r] fp32; gradients flow to the states alone."""
        return project(self.student[layer], states)

    def sliced(self, directions: slice) -> Bridge:
        """A part of the directions: they are sorted by variance, and each has a regression of its own."""
        student = {
            layer: {
                name: part[directions] if name in (LINEAR, "fc2.weight", "fc2.bias") else part
                for name, part in parts.items()
            }
            for layer, parts in self.student.items()
        }
        rank = len(range(*directions.indices(self.rank)))
        return replace(
            self, rank=rank, teacher={layer: p[directions] for layer, p in self.teacher.items()}, student=student
        )

    def contiguous(self) -> dict[str, torch.Tensor]:
        """`tensors`, each with memory of its own, as safetensors wants them."""
        return {name: part.clone(memory_format=torch.contiguous_format) for name, part in self.tensors().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """By their names in a file."""
        named = {f"teacher.{layer}.mean": mean for layer, mean in self.means.items()}
        named |= {f"teacher.{layer}.{LINEAR}": projection for layer, projection in self.teacher.items()}
        for layer, parts in self.student.items():
            named |= {f"student.{layer}.{part}": tensor for part, tensor in parts.items()}
        return named


def project(parts: dict[str, torch.Tensor], states: torch.Tensor) -> torch.Tensor:
    """A student's projector, linear or an MLP: [N, D_S] fp32 -> [N, r]."""
    if LINEAR in parts:
        return states @ parts[LINEAR].T
    return linear(gelu(linear(states, parts["fc1.weight"], parts["fc1.bias"])), parts["fc2.weight"], parts["fc2.bias"])


def bridge_rank(path: Path) -> int:
    """r of a bridge file, from its header.

    Raises:
        CheckpointError: not a bridge file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            found = [name for name in names if name.startswith("teacher.") and name.endswith(LINEAR)]
            shape = file.get_slice(found[0]).get_shape() if found else []
            if len(shape) == 2:
                return int(shape[0])
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"distill.bridge: {path}: cannot read it ({error}); give a bridge, or make it with `oprd bridge fit`"
        ) from None
    raise CheckpointError(f"distill.bridge: {path}: holds no teacher.<layer>.projection; this is not a bridge")


def load_bridge(
    path: Path, pairs: Sequence[LayerPair], teacher_width: int, student_width: int, device: torch.device
) -> Bridge:
    """Read the projections of these pairs.

    Raises:
        CheckpointError: a projection is missing or has another shape.
    """
    rank = bridge_rank(path)
    with safe_open(path, framework="pt") as file:
        present = set(file.keys())

        def read(name: str, *shape: int | None) -> torch.Tensor:
            if name not in present:
                raise CheckpointError(
                    f"distill.bridge: {path}: {name} is missing; fit the bridge for this run's distill.layers and layer_map"
                )
            tensor = file.get_tensor(name).to(device, torch.float32)
            if len(tensor.shape) != len(shape) or any(
                b not in (None, a) for a, b in zip(tensor.shape, shape, strict=True)
            ):
                needed = "[" + ", ".join("any" if size is None else str(size) for size in shape) + "]"
                raise CheckpointError(
                    f"distill.bridge: {path}: {name} is {list(tensor.shape)}, but these models need {needed}"
                )
            return tensor

        def projector(layer: int) -> dict[str, torch.Tensor]:
            if f"student.{layer}.fc1.weight" not in present:
                return {LINEAR: read(f"student.{layer}.{LINEAR}", rank, student_width)}
            first = read(f"student.{layer}.fc1.weight", None, student_width)
            shapes = {"fc1.bias": (len(first),), "fc2.weight": (rank, len(first)), "fc2.bias": (rank,)}
            return {"fc1.weight": first} | {
                name: read(f"student.{layer}.{name}", *shape) for name, shape in shapes.items()
            }

        teacher_layers = sorted({pair.teacher_layer for pair in pairs})
        return Bridge(
            rank,
            means={layer: read(f"teacher.{layer}.mean", teacher_width) for layer in teacher_layers},
            teacher={layer: read(f"teacher.{layer}.{LINEAR}", rank, teacher_width) for layer in teacher_layers},
            student={pair.student_layer: projector(pair.student_layer) for pair in pairs},
        )
