"""In which space the two models' states are compared (`distill.mode`).

    mode               student             teacher            travels   widths
    identity           h_S                 h_T                d_T       equal       Eq. 6
    low_rank           P_S h_S             P_T (h_T - mu)     r         any         Eq. 14, the bridge is frozen
    low_rank_residual  the same, without the first H directions of P_T and P_S: the complement of a frozen head
    linear             W h_S               h_T                d_T       any         W is trained with the student

The teacher's side runs on the teacher's ranks, before anything travels; the student's inside the loss, where its layer lives.

W lives beside the student's layers, in the model that is trained, as `state_maps.<layer>.weight` [D_T, D_S]: so mcore's DDP,
optimizer, gradient clip and checkpoint treat it as one more parameter. Each tensor-parallel rank computes W's gradient from the
rows that it supervises; `add_over_tensor_parallel` adds them up once a step.

Legend: N rows on this rank, D_T and D_S widths, r rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.models import Model
from oprd_megatron.representation.bridge import LINEAR, Bridge, bridge_rank, load_bridge
from oprd_megatron.representation.layer_map import LayerPair

MODULE = "state_maps"
"""Name of the trained maps in a chunk of the student."""


class Space(Protocol):
    """Where states are compared.

    Attributes:
        width: numbers of a state that travel.
        is_watched: `inside` can be told: the student's side is a frozen linear projection.
    """

    width: int
    is_watched: bool

    def of_teacher(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """[N, D_T] of any float dtype -> [N, width]."""
        ...

    def of_student(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        """[N, D_S] fp32 -> [N, width] fp32, differentiable in the states and in `trained(layer)`."""
        ...

    def trained(self, layer: int) -> torch.nn.Parameter | None:
        """The student layer's trained map on this rank, if there is one."""
        ...

    def inside(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        """Share of each state's square length that the student's projection sees: [N, D_S] fp32 -> [N]; None unless
        `is_watched`."""
        ...


class Identity:
    """States as they are."""

    is_watched = False

    def __init__(self, width: int) -> None:
        self.width = width

    def of_teacher(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        return states

    def of_student(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        return states

    def trained(self, layer: int) -> torch.nn.Parameter | None:
        return None

    def inside(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        return None


class LowRank(Identity):
    """Both sides through a frozen bridge, which a refit may replace; `head` directions are left out."""

    def __init__(self, bridge: Bridge, head: int = 0) -> None:
        super().__init__(bridge.rank - head)
        self.head = head
        self.replace(bridge)

    def replace(self, bridge: Bridge) -> None:
        """Go on with another bridge of the same rank."""
        self.whole, self.bridge = bridge, bridge.sliced(slice(self.head, bridge.rank))
        bridge = self.bridge
        self._bases = {
            layer: torch.linalg.qr(parts[LINEAR].T)[0] for layer, parts in bridge.student.items() if LINEAR in parts
        }  # [D_S, r], orthonormal columns that span what P_S sees
        self.is_watched = bool(self._bases)

    def of_teacher(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        return self.bridge.project_teacher(layer, states)

    def of_student(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        return self.bridge.project_student(layer, states)

    def inside(self, layer: int, states: torch.Tensor) -> torch.Tensor | None:
        if layer not in self._bases:
            return None
        tiny = torch.finfo(torch.float32).tiny
        return (states @ self._bases[layer]).square().sum(-1) / states.square().sum(-1).clamp_min(tiny)


class Linear(Identity):
    """The student's side through a trained matrix for each layer; this rank has those of its stage."""

    def __init__(self, width: int, weights: dict[int, torch.nn.Parameter]) -> None:
        super().__init__(width)
        self.weights = weights

    def of_student(self, layer: int, states: torch.Tensor) -> torch.Tensor:
        return states @ self.weights[layer].float().T

    def trained(self, layer: int) -> torch.nn.Parameter | None:
        return self.weights[layer]


def build_space(
    config: DistillConfig, pairs: Sequence[LayerPair], teacher: Model, student: Model, device: torch.device
) -> Space:
    """The space that a run's config asks for; `linear` adds its maps to the student, so build it before the optimizer.

    Raises:
        ConfigError, CheckpointError: the mode does not go with the widths, or its file is missing or does not fit.
    """
    widths = teacher.architecture.hidden_size, student.architecture.hidden_size
    check_space(config, *widths)
    if config.space == "linear":
        return Linear(widths[0], add_state_maps(student, pairs, widths[0], device))
    return frozen_space(config, pairs, *widths, device)


def frozen_space(
    config: DistillConfig, pairs: Sequence[LayerPair], teacher_width: int, student_width: int, device: torch.device
) -> Identity:
    """A space in which nothing is trained: states as they are, or through the config's bridge."""
    if config.bridge is None:
        return Identity(teacher_width)
    bridge = load_bridge(config.bridge, pairs, teacher_width, student_width, device)
    return LowRank(bridge, head=config.bridge_head)


def check_space(config: DistillConfig, teacher_width: int, student_width: int) -> None:
    """Refuse a mode that cannot work with these widths.

    Raises:
        ConfigError: one line.
    """
    if config.space == "identity" and teacher_width != student_width:
        raise ConfigError(
            f"teacher and student differ in width ({teacher_width} and {student_width}), which distill.mode identity "
            "cannot align; fit a bridge (`oprd bridge fit`) and set distill.bridge, or set distill.mode: linear"
        )
    if config.space in ("low_rank", "low_rank_residual") and config.bridge is None:
        raise ConfigError(f"distill.mode: {config.space} needs distill.bridge; make the file with `oprd bridge fit`")
    if config.bridge is not None:
        refuse_head(config, bridge_rank(config.bridge))


def resume_bridge(space: Space, checkpoint: Path, pairs: Sequence[LayerPair], teacher: Model, student: Model) -> None:
    """Go on with the bridge that a checkpoint holds, if it holds one."""
    if isinstance(space, LowRank) and checkpoint.is_file():
        device = next(iter(space.whole.means.values())).device
        widths = teacher.architecture.hidden_size, student.architecture.hidden_size
        space.replace(load_bridge(checkpoint, pairs, *widths, device))


def refuse_head(config: DistillConfig, rank: int) -> None:
    """Raises:
    ConfigError: nothing of a bridge of this rank is left without its head.
    """
    if config.bridge_head >= rank:
        raise ConfigError(
            f"distill.bridge_head: {config.bridge_head} leaves nothing of a bridge of rank {rank}; lower it, or fit a bridge "
            "of a higher bridge.rank"
        )


class StateMap(torch.nn.Module):
    """One trained map W [D_T, D_S]: the identity for equal widths, else drawn as torch's linear layers are, from the layer's
    number alone, so that it does not depend on the layout."""

    def __init__(
        self, layer: int, teacher_width: int, student_width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        if teacher_width == student_width:
            weight = torch.eye(teacher_width)
        else:
            generator, bound = torch.Generator().manual_seed(layer), student_width**-0.5
            weight = torch.empty(teacher_width, student_width).uniform_(-bound, bound, generator=generator)
        self.weight = torch.nn.Parameter(weight.to(device, dtype))


def add_state_maps(
    student: Model, pairs: Sequence[LayerPair], teacher_width: int, device: torch.device
) -> dict[int, torch.nn.Parameter]:
    """Give the student's chunks on this rank a map for each supervised layer that they hold: {student layer: W}."""
    weights: dict[int, torch.nn.Parameter] = {}
    width, dtype = student.architecture.hidden_size, student.config.params_dtype
    supervised = {pair.student_layer for pair in pairs}
    for chunk in student.chunks:
        here = sorted(supervised & {int(block.layer_number) for block in chunk.decoder.layers})
        if not hasattr(chunk, MODULE):
            maps = {str(layer): StateMap(layer, teacher_width, width, dtype, device) for layer in here}
            chunk.add_module(MODULE, torch.nn.ModuleDict(maps))
        weights |= {layer: getattr(chunk, MODULE)[str(layer)].weight for layer in here}
    return weights


def state_maps(chunk: torch.nn.Module) -> dict[int, torch.nn.Parameter]:
    """{student layer: W} of a chunk; empty where none were added."""
    maps = getattr(chunk, MODULE, None)
    return {} if maps is None else {int(layer): state_map.weight for layer, state_map in maps.items()}


def add_over_tensor_parallel(chunk: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of a chunk's maps over tensor-parallel ranks, each of which has those of its own rows. Collective:
    one all-reduce for each map. Before mcore's reduction over data-parallel ranks."""
    for weight in state_maps(chunk).values() if group.size() > 1 else ():
        dist.all_reduce(weight.main_grad, group=group)  # type: ignore[attr-defined]
