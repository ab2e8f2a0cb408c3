"""A fitted bridge on disk: two files that only count together.

    NAME.safetensors    teacher.<layer>.mean [D_T], teacher.<layer>.projection [r, D_T],
                        student.<layer>.projection [r, D_S], or for the MLP
                        student.<layer>.fc1.weight [H, D_S], .fc1.bias [H], .fc2.weight [r, H], .fc2.bias [r]
    NAME.json           what it is (`BridgeInfo`), for people too; written last, with the sha256 of the other

Layers are 1-based, tensors fp32. A crash while writing leaves no json, or one whose sha256 does not fit: both are refused, and
so is a bridge that was fitted for other models, tokenizers or layers than a run has.

Legend: r rank, D_T and D_S widths of teacher and student, H width of the MLP.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, JsonValue, PositiveInt, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.torch import save_file

from checkpoints_conversion.files.dtypes import SAFETENSORS_NAMES
from checkpoints_conversion.files.json_file import parse
from checkpoints_conversion.files.messages import quoted, reason, shown
from checkpoints_conversion.files.regular_file import open_regular, read_whole
from checkpoints_conversion.files.safetensors_file import SafetensorsFile
from oprd_megatron.bridge.fingerprint import ModelFingerprint, Sha256
from oprd_megatron.errors import CheckpointError
from oprd_megatron.logging import write_atomically
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.representation.layer_map import LayerPair

FORMAT: Literal[1] = 1
SUFFIX = ".safetensors"
MAX_JSON_BYTES = 4 * 2**20
MLP_PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
FIT_AGAIN = "fit it again with `oprd bridge fit`"


class Strict(BaseModel):
    """Frozen, no unknown keys, no conversions, only finite numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class HeldOut(Strict):
    """Measured on rows that the fit did not see; one number a pair, in the order of `layer_map`."""

    cosine: list[float]
    explained_variance: list[float]
    inside: list[float]


class RankScore(Strict):
    """Held-out means over the pairs at one rank."""

    cosine: float
    explained_variance: float


class Fingerprints(Strict):
    """The two models and their tokenizers (`fingerprint.py`)."""

    teacher: ModelFingerprint
    student: ModelFingerprint
    teacher_tokenizer: Sha256
    student_tokenizer: Sha256


class BridgeInfo(Strict):
    """The json beside a bridge."""

    format: Literal[1] = FORMAT
    projector: Literal["linear", "mlp"]
    rank: PositiveInt
    layer_map: list[tuple[PositiveInt, PositiveInt]]
    """(student layer, teacher layer), 1-based."""
    fit: dict[str, JsonValue]
    """How it was fitted: rows, prompts, seed, solver, .."""
    held_out: HeldOut | None
    """None: not measured (a bridge of somebody else's)."""
    ranks: dict[PositiveInt, RankScore]
    """What other ranks would have reached."""
    fingerprints: Fingerprints
    sha256: Sha256 | None = None
    """Of the safetensors file; None until it is written."""

    @field_validator("fit")
    @classmethod
    def _only_finite(cls, fit: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(fit, allow_nan=False)
        except ValueError:
            raise ValueError("holds a number that is not finite") from None
        return fit

    @model_validator(mode="after")
    def _check(self) -> Self:
        teacher, student = self.fingerprints.teacher, self.fingerprints.student
        if not self.layer_map:
            raise ValueError("layer_map names no pair")
        layer, count = Counter(student_layer for student_layer, _ in self.layer_map).most_common(1)[0]
        if count > 1:
            raise ValueError(f"layer_map names student layer {layer} twice")
        for student_layer, teacher_layer in self.layer_map:
            if student_layer > student.layers or teacher_layer > teacher.layers:
                raise ValueError(
                    f"layer_map pairs {student_layer} with {teacher_layer}, but student and teacher have "
                    f"{student.layers} and {teacher.layers} layers"
                )
        for name, width in (("teacher", teacher.width), ("student", student.width)):
            if self.rank > width:
                raise ValueError(f"rank {self.rank} is above the {name}'s width {width}")
        for name, values in self.held_out or ():
            if len(values) != len(self.layer_map):
                raise ValueError(f"held_out.{name} has {len(values)} numbers for {len(self.layer_map)} pairs")
        return self


def write_bridge(path: Path, bridge: Bridge, info: BridgeInfo) -> None:
    """Write both files, the json last.

    Args:
        path: NAME.safetensors in an existing directory.
        bridge: fp32 tensors on any device; views of larger tensors are cut out.
        info: its `sha256` is not read.

    Raises:
        CheckpointError: a file is there already, a tensor does not fit `info` or is not finite, or the disk refuses.
    """
    info_path = info_file(path)
    for present in (path, info_path):
        if present.exists():
            raise CheckpointError(f"{present}: is there already; nothing is overwritten, choose another name")
    tensors = bridge.tensors()
    _check_tensors(path, {name: _described(tensor) for name, tensor in tensors.items()}, info, bridge.rank)
    for name, tensor in tensors.items():
        _check_finite(path, name, tensor)
    staging = path.with_name(f".{path.name}.incomplete")
    try:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, staging)
        staging.chmod(0o644)  # safetensors lets the owner alone read
        with staging.open("rb") as file:
            os.fsync(file.fileno())
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        os.replace(staging, path)
        write_atomically(info_path, _text(info.model_copy(update={"sha256": sha256}).model_dump(mode="json")) + "\n")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be written ({reason(error)}); check directory and disk") from None
    finally:
        staging.unlink(missing_ok=True)


def read_info(path: Path) -> BridgeInfo:
    """What a bridge is, after a check of all of it: both files are whole, belong together and hold finite numbers.

    Raises:
        CheckpointError: one of them is missing, torn, of another format, or does not fit the other.
    """
    info_path = info_file(path)
    fd = open_regular(path)
    with open(fd, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if not info_path.exists():
        raise CheckpointError(
            f"{info_path}: missing; copy it with {path.name}, or fit the bridge again if it was not finished"
        )
    info = _parse_info(info_path)
    if info.sha256 != sha256:
        raise CheckpointError(
            f"{path}: is not the file that {info_path.name} describes (another sha256): torn, or of another fit; "
            f"copy both files again, or {FIT_AGAIN}"
        )
    weights = SafetensorsFile(path)
    try:
        _check_tensors(
            path, {name: (entry.dtype, entry.shape) for name, entry in weights.tensors.items()}, info, info.rank
        )
        for name, entry in weights.tensors.items():
            data = weights.read_bytes(entry.start, entry.nbytes)
            _check_finite(path, name, torch.frombuffer(data, dtype=torch.float32))
    finally:
        weights.close()
    return info


def check_bridge(
    path: Path, info: BridgeInfo, pairs: Sequence[LayerPair], fingerprints: Fingerprints, key: str = "distill.bridge"
) -> None:
    """Refuse a bridge that was fitted for something else than this run.

    Args:
        path: of the bridge, for messages.
        info: of `read_info`.
        pairs: this run's; the bridge may have more.
        fingerprints: this run's.
        key: of the config, for messages.

    Raises:
        CheckpointError: it names the first thing that differs.
    """
    for role, fitted, here in (
        ("teacher", info.fingerprints.teacher, fingerprints.teacher),
        ("student", info.fingerprints.student, fingerprints.student),
    ):
        difference = fitted.difference(here)
        if difference:
            raise CheckpointError(
                f"{key}: {path}: was fitted for {role} {shown(fitted.path)} (width {fitted.width}, {fitted.layers} layers), "
                f"this run's {role} {shown(here.path)} differs in its {shown(difference)}; {FIT_AGAIN}"
            )
    for role in ("teacher", "student"):
        name = f"{role}_tokenizer"
        if getattr(info.fingerprints, name) != getattr(fingerprints, name):
            raise CheckpointError(f"{key}: {path}: was fitted with another {role} tokenizer; {FIT_AGAIN}")
    fitted_layers = dict(info.layer_map)
    for pair in pairs:
        fitted_layer = fitted_layers.get(pair.student_layer)
        if fitted_layer is None:
            raise CheckpointError(
                f"{key}: {path}: has no pair for student layer {pair.student_layer}, only for "
                f"{', '.join(map(str, sorted(fitted_layers)))}; set distill.layers to these, or {FIT_AGAIN}"
            )
        if fitted_layer != pair.teacher_layer:
            raise CheckpointError(
                f"{key}: {path}: maps student layer {pair.student_layer} to teacher layer {fitted_layer}, this run to "
                f"{pair.teacher_layer}; set distill.layer_map as it was, or {FIT_AGAIN}"
            )


def info_file(path: Path) -> Path:
    """The json beside a bridge.

    Raises:
        CheckpointError: the bridge's name does not end in .safetensors.
    """
    if path.suffix != SUFFIX:
        raise CheckpointError(f"{path}: a bridge's name ends in {SUFFIX}; give NAME{SUFFIX}, its json lies beside it")
    return path.with_suffix(".json")


def _parse_info(path: Path) -> BridgeInfo:
    text = read_whole(path, MAX_JSON_BYTES)
    try:
        values = parse(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({reason(error)}): torn or edited; {FIT_AGAIN}") from None
    if not isinstance(values, dict) or "format" not in values:
        raise CheckpointError(
            f"{path}: does not describe a bridge (no format); give the json that was written beside it"
        )
    if type(values["format"]) is not int or values["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: has format {quoted(values['format'])}, this version reads format {FORMAT}; {FIT_AGAIN}, or use "
            "the version that wrote it"
        )
    try:
        return BridgeInfo.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        what = reason(ValueError(first["msg"].removeprefix("Value error, ")))
        raise CheckpointError(f"{path}: {shown(key) + ': ' if key else ''}{what}; {FIT_AGAIN}") from None


def _described(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    name = str(tensor.dtype).removeprefix("torch.")
    return SAFETENSORS_NAMES.get(name, name), tuple(tensor.shape)


def _check_tensors(path: Path, found: Mapping[str, tuple[str, tuple[int, ...]]], info: BridgeInfo, rank: int) -> None:
    """Compare names, dtypes and shapes with what `info` implies."""
    if rank != info.rank:
        raise CheckpointError(f"{path}: the bridge has rank {rank}, its description says {info.rank}; {FIT_AGAIN}")
    expected = _expected_shapes(info, found)
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        raise CheckpointError(f"{path}: {missing[0]} is missing, which its layer_map and projector need; {FIT_AGAIN}")
    if unknown:
        raise CheckpointError(f"{path}: {shown(unknown[0])} belongs to no pair of its layer_map; {FIT_AGAIN}")
    for name, shape in expected.items():
        dtype, found_shape = found[name]
        if found_shape != shape:
            hint = " (it is transposed)" if found_shape == shape[::-1] else ""
            raise CheckpointError(
                f"{path}: {name} is {list(found_shape)}, but must be {list(shape)}{hint}; {FIT_AGAIN}"
            )
        if dtype != "F32":
            raise CheckpointError(f"{path}: {name} is {dtype}, but a bridge is F32; convert it to float32")


def _expected_shapes(info: BridgeInfo, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
    """By name. An MLP's width H is what its first bias has."""
    teacher, student = info.fingerprints.teacher, info.fingerprints.student
    shapes: dict[str, tuple[int, ...]] = {}
    for student_layer, teacher_layer in info.layer_map:
        shapes[f"teacher.{teacher_layer}.mean"] = (teacher.width,)
        shapes[f"teacher.{teacher_layer}.projection"] = (info.rank, teacher.width)
        prefix = f"student.{student_layer}"
        if info.projector == "linear":
            shapes[f"{prefix}.projection"] = (info.rank, student.width)
            continue
        _, bias = found.get(f"{prefix}.fc1.bias", ("", ()))
        width = max(1, bias[0] if bias else 1)
        of_parts = ((width, student.width), (width,), (info.rank, width), (info.rank,))
        shapes |= {f"{prefix}.{part}": shape for part, shape in zip(MLP_PARTS, of_parts, strict=True)}
    return shapes


def _check_finite(path: Path, name: str, tensor: torch.Tensor) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"{path}: {name} holds numbers that are not finite; {FIT_AGAIN}")


def _text(value: Any, indent: str = "") -> str:
    """JSON for people: what fits on a line, and every list, stays on one."""
    flat = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if not isinstance(value, dict) or len(indent) + len(flat) <= 100:
        return flat
    inner = indent + "  "
    lines = [f"{inner}{json.dumps(str(key), ensure_ascii=False)}: {_text(item, inner)}" for key, item in value.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
