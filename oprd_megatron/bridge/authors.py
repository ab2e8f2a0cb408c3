"""Reading `ps_bank.pt`, the file in which OPRD's published training scripts keep a fitted bridge.

Accepted are these layouts, by names and shapes; anything else is refused in one line that says what was found.

    trained   {"state_dict": {"projectors.s<S>_t<T>.weight": [r, D_S]}, "frozen_pt_weights": {"s<S>_t<T>": [r, D_T]},
              "frozen_pt_means": {"s<S>_t<T>": [D_T]}, ..}; an MLP has "projectors.s<S>_t<T>.0.weight" [H, D_S] and ".2.weight"
              [r, H], with or without ".0.bias" and ".2.bias"; "<S>_<T>" is read as well
    banks     {"P_S": {layer: [r, D_S]}, "P_T": {layer: [r, D_T]}, "mu": {layer: [D_T]}, ..}
    layers    {layer: [r, D_S]} or {layer: {"P_S" or "weight" or "proj.weight": .., "P_T" or "pca" or "components": ..,
              "mu" or "mean": ..}}

A layer is 3, "3", "layer_3", "layers.3", or "s3_t4" with both models' layers. Where it names the student's alone, the teacher's
is in the run's layer map, and P_T and mu lie under the student's layer too.

Where this comes from: `trained` is what a public fork of the scripts writes and reads (github.com/funina511/OPRD-High-Entropy,
scripts/analysis/cross_arch_preexp2_train_ps.py, read in its stored copy): layers from 0, 0 the output of the first block, the
last one after the final norm; the MLP is Linear, exact GELU, Linear without biases. The other layouts are guesses. Not one
file of the authors' own has been read.

Legend: r rank, D_T and D_S widths of teacher and student, H width of the MLP.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from checkpoints_conversion.files.messages import quoted, reason, shown
from checkpoints_conversion.files.regular_file import open_regular
from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.representation.layer_map import LayerPair

STUDENT_NAMES = ("P_S", "weight", "proj.weight")
TEACHER_NAMES = ("P_T", "pca", "components")
MEAN_NAMES = ("mu", "mean")
MLP_NAMES = {"0.weight": "fc1.weight", "0.bias": "fc1.bias", "2.weight": "fc2.weight", "2.bias": "fc2.bias"}
TRAINED = re.compile(r"projectors\.([^.]+)\.(weight|[02]\.(?:weight|bias))")
ONE_LAYER = re.compile(r"(?:layers?[._])?(\d{1,5})")
TWO_LAYERS = re.compile(r"s?(\d{1,5})_t?(\d{1,5})")


@dataclass(frozen=True)
class PsBank:
    """A bridge of the authors' code.

    Attributes:
        bridge: on the CPU, fp32.
        pairs: what it was fitted for, by ascending student layer (1-based).
        projector: of the student.
    """

    bridge: Bridge
    pairs: list[LayerPair]
    projector: Literal["linear", "mlp"]


@dataclass
class _Entry:
    """What one key of the file holds: the student's tensors by part, P_T [r, D_T], mu [D_T]."""

    student: dict[str, torch.Tensor] = field(default_factory=dict)
    projection: torch.Tensor | None = None
    mean: torch.Tensor | None = None


def read_ps_bank(path: Path, first_layer: Literal[0, 1] = 0, pairs: Sequence[LayerPair] | None = None) -> PsBank:
    """Read a bank.

    Args:
        path: the file.
        first_layer: how it counts layers.
        pairs: teacher layers (1-based) for a file that names the student's alone; others are only compared with it.

    Raises:
        CheckpointError: it cannot be read without running code, has another layout, lacks the teacher's half, or a tensor is
            not finite or has another shape than the rest.
    """
    entries = _entries(path, _load(path))
    if not any(entry.projection is not None for entry in entries.values()):
        raise CheckpointError(
            f"{path}: holds only the student's half, P_S of {len(entries)} layers; the teacher's P_T and mu are missing: fit a "
            "bridge with `oprd bridge fit`"
        )
    for key, entry in entries.items():
        parts = {"P_S": entry.student or None, "P_T": entry.projection, "mu": entry.mean}
        lacking = [name for name, part in parts.items() if part is None]
        if lacking:
            raise CheckpointError(f"{path}: {shown(key)} has no {lacking[0]}; save P_S, P_T and mu of each layer")
    by_pair = {_pair(path, key, first_layer, pairs): entry for key, entry in entries.items()}
    return _bank(path, dict(sorted(by_pair.items(), key=lambda item: item[0].student_layer)), len(entries))


def _load(path: Path) -> Mapping[Any, Any]:
    os.close(open_regular(path))
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a parser of another project on a file of a stranger: it has no list of what it raises
        raise CheckpointError(
            f"{path}: no file of torch.save (1.6 or later), truncated, or it wants to run code ({reason(error)}); "
            "save it again as plain tensors"
        ) from None
    if not isinstance(found, Mapping) or not found:
        raise CheckpointError(f"{path}: holds {type(found).__name__}, not tensors by layer; give a ps_bank.pt")
    return found


def _entries(path: Path, found: Mapping[Any, Any]) -> dict[str, _Entry]:
    """The file's content by layer key, whatever its layout."""
    mode = found.get("subspace_mode")
    if mode not in (None, "full"):
        raise CheckpointError(
            f"{path}: subspace_mode is {quoted(mode)}, which no bridge here computes; give a bank of mode full"
        )
    entries: dict[str, _Entry] = {}
    if "state_dict" in found:
        for name, value in _by_name(path, "state_dict", found["state_dict"]).items():
            match = TRAINED.fullmatch(name)
            if match is None:
                raise CheckpointError(f"{path}: state_dict holds {shown(name)}, not projectors.s<S>_t<T>.weight")
            part = MLP_NAMES.get(match[2], "projection")
            entries.setdefault(match[1], _Entry()).student[part] = _tensor(path, name, value)
        _add_teacher(path, found, "frozen_pt_weights", "frozen_pt_means", entries)
    elif "P_S" in found:
        for key, value in _by_name(path, "P_S", found["P_S"]).items():
            entries.setdefault(key, _Entry()).student["projection"] = _tensor(path, f"P_S of {key}", value)
        _add_teacher(path, found, "P_T", "mu", entries)
    else:
        for key, value in _by_name(path, "the file", found).items():
            entries[key] = _layer_entry(path, key, value)
    declared = found.get("rank")
    ranks = sorted({entry.projection.shape[0] for entry in entries.values() if entry.projection is not None})
    if declared is not None and ranks and (type(declared) is not int or ranks != [declared]):
        raise CheckpointError(f"{path}: says rank {quoted(declared)}, but its P_T have {ranks}; save it again")
    return entries


def _by_name(path: Path, where: str, section: Any) -> dict[str, Any]:
    """A dict of the file with its keys as text."""
    if not isinstance(section, Mapping):
        raise CheckpointError(f"{path}: {where} is {type(section).__name__}, not tensors by layer; give a ps_bank.pt")
    found = {str(key): value for key, value in section.items()}
    if len(found) < len(section):
        raise CheckpointError(f"{path}: {where} has a layer both as number and as text; keep one of them")
    return found


def _add_teacher(path: Path, found: Mapping[Any, Any], weights: str, means: str, entries: dict[str, _Entry]) -> None:
    for key, value in _by_name(path, weights, found.get(weights, {})).items():
        entries.setdefault(key, _Entry()).projection = _tensor(path, f"{weights} of {key}", value)
    for key, value in _by_name(path, means, found.get(means, {})).items():
        entries.setdefault(key, _Entry()).mean = _tensor(path, f"{means} of {key}", value, dims=1)


def _layer_entry(path: Path, key: str, value: Any) -> _Entry:
    """One layer of the layout `layers`."""
    if not (ONE_LAYER.fullmatch(key) or TWO_LAYERS.fullmatch(key)):
        raise CheckpointError(
            f"{path}: holds {shown(key)}, which is no layer, no state_dict and no P_S; the layouts that are read are in "
            "oprd_megatron/bridge/authors.py"
        )
    if not isinstance(value, Mapping):
        return _Entry({"projection": _tensor(path, f"layer {key}", value)})
    entry = _Entry()
    for name, part in value.items():
        where = f"{name} of layer {key}"
        if name in STUDENT_NAMES and not entry.student:
            entry.student["projection"] = _tensor(path, where, part)
        elif name in TEACHER_NAMES and entry.projection is None:
            entry.projection = _tensor(path, where, part)
        elif name in MEAN_NAMES and entry.mean is None:
            entry.mean = _tensor(path, where, part, dims=1)
        else:
            raise CheckpointError(
                f"{path}: layer {shown(key)} holds {shown(name)}; expected one each of {', '.join(STUDENT_NAMES)} | "
                f"{', '.join(TEACHER_NAMES)} | {', '.join(MEAN_NAMES)}"
            )
    return entry


def _tensor(path: Path, name: str, value: Any, dims: int | None = None) -> torch.Tensor:
    """A plain tensor of finite floats as fp32; biases and means have one dimension, everything else two."""
    dims = dims or (1 if name.endswith(".bias") else 2)
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.device.type != "cpu":
        raise CheckpointError(f"{path}: {shown(name)} is {type(value).__name__}, not a plain tensor; save it as one")
    if not value.is_floating_point():
        raise CheckpointError(f"{path}: {shown(name)} is {value.dtype}, not floating point; save it as float32")
    if value.dim() != dims or not value.numel():
        raise CheckpointError(
            f"{path}: {shown(name)} is {list(value.shape)}, but must have {dims} dimensions; save it so"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {shown(name)} is {list(value.shape)}, larger than its data; save it contiguous")
    found = value.detach().to(torch.float32).clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(found).all()):
        raise CheckpointError(f"{path}: {shown(name)} holds numbers that are not finite in float32; fit it again")
    return found


def _pair(path: Path, key: str, first_layer: int, pairs: Sequence[LayerPair] | None) -> LayerPair:
    """The pair (1-based) that a key of the file means."""
    shift = 1 - first_layer
    teacher_of = {pair.student_layer: pair.teacher_layer for pair in pairs or ()}
    one, two = ONE_LAYER.fullmatch(key), TWO_LAYERS.fullmatch(key)
    if one is None and two is None:
        raise CheckpointError(f"{path}: {shown(key)} names no layer; expected 3, layer_3 or s3_t4")
    student_layer = int((one or two)[1]) + shift  # type: ignore[index]  # one of them matched
    if student_layer < 1 or (two and int(two[2]) + shift < 1):
        raise CheckpointError(f"{path}: {shown(key)} is layer 0, but first_layer is {first_layer}; give first_layer 0")
    wanted = teacher_of.get(student_layer)
    if two is None and wanted is None:
        raise CheckpointError(
            f"{path}: {shown(key)} names no teacher layer, and the layer map none for student layer {student_layer}; give the "
            "layer map that it was fitted with"
        )
    teacher_layer = int(two[2]) + shift if two else wanted
    assert teacher_layer is not None
    if wanted not in (None, teacher_layer):
        raise CheckpointError(
            f"{path}: {shown(key)} pairs student layer {student_layer} with teacher layer {teacher_layer}, the layer map with "
            f"{wanted}; give the layer map that it was fitted with"
        )
    return LayerPair(student_layer, teacher_layer)


def _bank(path: Path, by_pair: dict[LayerPair, _Entry], num_keys: int) -> PsBank:
    pairs = list(by_pair)
    if len({pair.student_layer for pair in pairs}) < num_keys:
        raise CheckpointError(f"{path}: a student layer is there twice; keep one projection a layer")
    first = by_pair[pairs[0]]
    mlp = "projection" not in first.student
    lead = first.student.get("fc1.weight" if mlp else "projection")
    assert first.projection is not None
    rank, teacher_width = first.projection.shape
    student_width = 0 if lead is None else lead.shape[1] if mlp else max(lead.shape)
    bridge = Bridge(rank, {}, {}, {})
    for pair, entry in by_pair.items():
        where = f"{path}: student layer {pair.student_layer}"
        assert entry.projection is not None and entry.mean is not None
        _fits(where, "P_T", entry.projection, (rank, teacher_width))
        _fits(where, "mu", entry.mean, (teacher_width,))
        if pair.teacher_layer in bridge.teacher and not (
            torch.equal(bridge.teacher[pair.teacher_layer], entry.projection)
            and torch.equal(bridge.means[pair.teacher_layer], entry.mean)
        ):
            raise CheckpointError(
                f"{where}: teacher layer {pair.teacher_layer} has another P_T or mu for another student layer; a bridge has one"
            )
        bridge.teacher[pair.teacher_layer], bridge.means[pair.teacher_layer] = entry.projection, entry.mean
        bridge.student[pair.student_layer] = _student(where, entry.student, mlp, rank, student_width)
    return PsBank(bridge, pairs, "mlp" if mlp else "linear")


def _student(where: str, parts: dict[str, torch.Tensor], mlp: bool, rank: int, width: int) -> dict[str, torch.Tensor]:
    """One layer's projector, an MLP's missing biases as zeros."""
    if not mlp:
        if set(parts) != {"projection"}:
            raise CheckpointError(
                f"{where}: has {sorted(parts)}, but the first layer is linear; keep one kind of projector"
            )
        _fits(where, "P_S", parts["projection"], (rank, width))
        return parts
    if not {"fc1.weight", "fc2.weight"} <= set(parts) <= set(MLP_NAMES.values()):
        raise CheckpointError(f"{where}: has {sorted(parts)}, but an MLP has 0.weight and 2.weight; save it whole")
    hidden = parts["fc1.weight"].shape[0]
    shapes = {"fc1.weight": (hidden, width), "fc1.bias": (hidden,), "fc2.weight": (rank, hidden), "fc2.bias": (rank,)}
    for name, shape in shapes.items():
        if name in parts:
            _fits(where, name, parts[name], shape)
    return {name: parts.get(name, torch.zeros(shape)) for name, shape in shapes.items()}


def _fits(where: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        hint = " (it is transposed)" if tuple(tensor.shape) == shape[::-1] else ""
        raise CheckpointError(f"{where}: {name} is {list(tensor.shape)}, but must be {list(shape)}{hint}; save it so")
    if name in ("P_T", "P_S") and shape[0] > shape[1]:
        raise CheckpointError(f"{where}: {name} is {list(shape)}: rank {shape[0]} above the width; save [rank, width]")
