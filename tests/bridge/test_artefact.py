"""A bridge on disk: what is written is read, and everything else is refused in one line that says why."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from oprd_megatron.bridge.artefact import (
    BridgeInfo,
    Fingerprints,
    HeldOut,
    RankScore,
    check_bridge,
    info_file,
    read_info,
    write_bridge,
)
from oprd_megatron.bridge.fingerprint import ModelFingerprint
from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.bridge import Bridge, load_bridge
from oprd_megatron.representation.layer_map import LayerPair

RANK, TEACHER_WIDTH, STUDENT_WIDTH, HIDDEN = 3, 8, 6, 5
PAIRS = [(1, 1), (2, 3), (4, 5)]
TEACHER = ModelFingerprint(
    path="models/A", family="qwen3", width=TEACHER_WIDTH, layers=5, vocab=99, config="a" * 64, weights="b" * 64
)
STUDENT = ModelFingerprint(
    path="models/S", family="qwen3", width=STUDENT_WIDTH, layers=4, vocab=99, config="c" * 64, weights="d" * 64
)
MODELS = Fingerprints(teacher=TEACHER, student=STUDENT, teacher_tokenizer="e" * 64, student_tokenizer="f" * 64)


def make_info(**changes: Any) -> BridgeInfo:
    each = [0.5] * len(PAIRS)
    values: dict[str, Any] = dict(
        projector="linear",
        rank=RANK,
        layer_map=PAIRS,
        fit={"rows": 4096, "solver": "ridge", "prompts": "dapo.jsonl"},
        held_out=HeldOut(cosine=each, explained_variance=each, inside=each),
        ranks={1: RankScore(cosine=0.4, explained_variance=0.1), 3: RankScore(cosine=0.5, explained_variance=0.2)},
        fingerprints=MODELS,
    )
    return BridgeInfo(**(values | changes))


def make_bridge(projector: str = "linear") -> Bridge:
    """Tensors are slices of larger ones, as a rank of one eigendecomposition is."""
    torch.manual_seed(0)
    basis = {teacher: torch.randn(TEACHER_WIDTH, TEACHER_WIDTH) for _, teacher in PAIRS}
    shapes: dict[str, tuple[int, ...]] = {"projection": (RANK, STUDENT_WIDTH)}
    if projector == "mlp":
        shapes = {"fc1.weight": (HIDDEN, STUDENT_WIDTH), "fc1.bias": (HIDDEN,), "fc2.weight": (RANK, HIDDEN)}
        shapes |= {"fc2.bias": (RANK,)}
    return Bridge(
        RANK,
        means={layer: whole[RANK] for layer, whole in basis.items()},
        teacher={layer: whole[:RANK] for layer, whole in basis.items()},
        student={student: {part: torch.randn(shape) for part, shape in shapes.items()} for student, _ in PAIRS},
    )


def written(folder: Path, projector: str = "linear") -> Path:
    path = folder / "x.safetensors"
    write_bridge(path, make_bridge(projector), make_info(projector=projector))
    return path


def message(call: Any, *arguments: Any, **named: Any) -> str:
    """The one line of the error that a call ends with."""
    with pytest.raises(CheckpointError) as caught:
        call(*arguments, **named)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500
    return text


def rewritten(path: Path, tensors: dict[str, torch.Tensor], **changes: Any) -> Path:
    """Other tensors and json values under a sha256 that fits: what only a stranger would make."""
    save_file(tensors, path)
    return resealed(path, **changes)


def resealed(path: Path, **changes: Any) -> Path:
    values = json.loads(info_file(path).read_text()) | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    info_file(path).write_text(json.dumps(values | changes))
    return path


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_what_is_written_is_read(tmp_path: Path, projector: str) -> None:
    """Every tensor under its documented name, bit for bit, and every value of the description."""
    path, bridge = written(tmp_path, projector), make_bridge(projector)
    info = read_info(path)
    assert info.model_copy(update={"sha256": None}) == make_info(projector=projector)
    found = load_file(path)
    for student, teacher in PAIRS:
        assert torch.equal(found.pop(f"teacher.{teacher}.mean"), bridge.means[teacher])
        assert torch.equal(found.pop(f"teacher.{teacher}.projection"), bridge.teacher[teacher])
        for part, tensor in bridge.student[student].items():
            assert torch.equal(found.pop(f"student.{student}.{part}"), tensor)
    assert not found
    pairs = [LayerPair(*pair) for pair in PAIRS[1:]]
    loaded = load_bridge(path, pairs, TEACHER_WIDTH, STUDENT_WIDTH, torch.device("cpu"))
    assert all(torch.equal(tensor, bridge.tensors()[name]) for name, tensor in loaded.tensors().items())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


def test_the_description_reads_well(tmp_path: Path) -> None:
    """Lists stay on one line, and the names are those of the format."""
    lines = info_file(written(tmp_path)).read_text().splitlines()
    assert '  "layer_map": [[1, 1], [2, 3], [4, 5]],' in lines
    assert '  "rank": 3,' in lines and '  "format": 1,' in lines
    assert json.loads("".join(lines))["ranks"]["3"] == {"cosine": 0.5, "explained_variance": 0.2}


def test_an_existing_bridge_is_kept(tmp_path: Path) -> None:
    """Neither file of a bridge is replaced."""
    path = written(tmp_path)
    before = path.read_bytes(), info_file(path).read_bytes()
    assert "is there already" in message(write_bridge, path, make_bridge(), make_info())
    assert (path.read_bytes(), info_file(path).read_bytes()) == before
    path.unlink()
    assert "x.json: is there already" in message(write_bridge, path, make_bridge(), make_info())
    assert info_file(path).read_bytes() == before[1] and not path.exists()


def test_a_crash_leaves_nothing_that_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two files: a bridge has no json, or, where its file was copied, that of another one. Both are refused."""
    import oprd_megatron.bridge.artefact as module

    def crash(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_atomically", crash)
        assert "No space left" in message(write_bridge, path, make_bridge(), make_info())
    assert "x.json: missing" in message(read_info, path)
    path.unlink()
    write_bridge(path, make_bridge(), make_info())
    other = make_bridge()
    other.means[1].add_(1.0)
    write_bridge(tmp_path / "other.safetensors", other, make_info())
    (tmp_path / "other.safetensors").replace(path)
    info_file(tmp_path / "other.safetensors").unlink()
    assert "another sha256" in message(read_info, path)
    with monkeypatch.context() as patch:
        patch.setattr(module.os, "fsync", crash)
        message(write_bridge, tmp_path / "y.safetensors", make_bridge(), make_info())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["x.json", "x.safetensors"]


def test_a_directory_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """The writer's own library raises errors that are no OSError."""
    assert "cannot be written" in message(write_bridge, tmp_path / "no" / "x.safetensors", make_bridge(), make_info())


def test_only_what_fits_its_description_is_written(tmp_path: Path) -> None:
    """Rank, names, shapes, dtype and finite numbers are checked before a byte is written; the tensor is named."""
    path = tmp_path / "x.safetensors"

    def refused(bridge: Bridge, **changes: Any) -> str:
        return message(write_bridge, path, bridge, make_info(**changes))

    assert "rank 3, its description says 2" in refused(make_bridge(), rank=2)
    bridge = make_bridge()
    bridge.teacher[3] = bridge.teacher[3].T
    assert "teacher.3.projection is [8, 3], but must be [3, 8] (it is transposed)" in refused(bridge)
    bridge = make_bridge()
    bridge.student[4]["projection"][1, 2] = torch.nan
    assert "student.4.projection holds numbers that are not finite" in refused(bridge)
    bridge = make_bridge()
    bridge.means[5] = bridge.means[5].bfloat16()
    assert "teacher.5.mean is BF16" in refused(bridge)
    bridge = make_bridge()
    del bridge.means[5]
    assert "teacher.5.mean is missing" in refused(bridge)
    bridge = make_bridge()
    bridge.means[2] = bridge.means[1]
    assert "teacher.2.mean belongs to no pair" in refused(bridge)
    assert "student.1.fc1.bias is missing" in refused(make_bridge(), projector="mlp")
    assert "ends in .safetensors" in message(write_bridge, tmp_path / "x.pt", make_bridge(), make_info())
    assert not list(tmp_path.iterdir())


def test_torn_and_swapped_files_are_refused(tmp_path: Path) -> None:
    """Cut anywhere, or with another bridge's json."""
    path = written(tmp_path)
    whole, text = path.read_bytes(), info_file(path).read_text()
    for size in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "another sha256" in message(read_info, path)
    path.write_bytes(whole)
    for size in (0, 1, len(text) // 2):
        info_file(path).write_text(text[:size])
        assert "not valid JSON" in message(read_info, path)
    info_file(path).unlink()
    assert "x.json: missing" in message(read_info, path)
    assert "cannot be read" in message(read_info, tmp_path / "none.safetensors")
    path.unlink()
    os.mkfifo(path)
    assert "not a regular file" in message(read_info, path)


def test_hostile_tensors_are_refused_under_a_fitting_sha256(tmp_path: Path) -> None:
    """A header of 2**60 bytes, a pickle, NaN, another dtype, a transposed or unknown tensor: one line, with the name."""
    path = written(tmp_path)
    tensors = load_file(path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    assert "its header claims" in message(read_info, resealed(path))
    torch.save({"teacher.1.mean": torch.zeros(8)}, path)
    assert "damaged safetensors" in message(read_info, resealed(path))
    nan = tensors | {"teacher.3.mean": torch.full((TEACHER_WIDTH,), torch.nan)}
    assert "teacher.3.mean holds numbers that are not finite" in message(read_info, rewritten(path, nan))
    infinite = tensors | {"student.2.projection": torch.full((RANK, STUDENT_WIDTH), torch.inf)}
    assert "student.2.projection holds" in message(read_info, rewritten(path, infinite))
    half = {name: tensor.half() for name, tensor in tensors.items()}
    assert "is F16, but a bridge is F32" in message(read_info, rewritten(path, half))
    turned = tensors | {"student.2.projection": torch.zeros(STUDENT_WIDTH, RANK)}
    assert "(it is transposed)" in message(read_info, rewritten(path, turned))
    more = tensors | {"student.3.projection": torch.zeros(RANK, STUDENT_WIDTH)}
    assert "student.3.projection belongs to no pair" in message(read_info, rewritten(path, more))
    del tensors["teacher.1.mean"]
    assert "teacher.1.mean is missing" in message(read_info, rewritten(path, tensors))


def test_hostile_mlps_are_refused(tmp_path: Path) -> None:
    """The width between an MLP's layers is free, but all four tensors must agree on it, and it is not 0."""
    path = written(tmp_path, "mlp")
    tensors = load_file(path)
    other = tensors | {"student.1.fc2.weight": torch.zeros(RANK, HIDDEN + 1)}
    assert "student.1.fc2.weight is [3, 6], but must be [3, 5]" in message(read_info, rewritten(path, other))
    none = tensors | {"student.1.fc1.bias": torch.zeros(0)}
    assert "student.1.fc1" in message(read_info, rewritten(path, none))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": 2}, "has format 2, this version reads format 1"),
        ({"format": True}, "has format True, this version"),
        ({"format": "1"}, "has format '1', this version"),
        ({"rank": 7}, "rank 7 is above the student's width 6"),
        ({"rank": "3"}, "rank: Input should be a valid integer"),
        ({"rank": 0}, "rank: Input should be greater than 0"),
        ({"projector": "conv"}, "projector: Input should be 'linear' or 'mlp'"),
        ({"colour": 1}, "colour: Extra inputs are not permitted"),
        ({"sha256": None}, "another sha256"),
        ({"layer_map": []}, "layer_map names no pair"),
        ({"layer_map": [[1, 1], [1, 3], [4, 5]]}, "layer_map names student layer 1 twice"),
        ({"layer_map": [[0, 1], [2, 3], [4, 5]]}, "layer_map.0.0: Input should be greater than 0"),
        ({"layer_map": [[1, 1], [2, 3], [4, 6]]}, "pairs 4 with 6, but student and teacher have 4 and 5 layers"),
        ({"layer_map": [[1, 1], [2, 3]]}, "held_out.cosine has 3 numbers for 2 pairs"),
        ({"held_out": {"cosine": [0.1] * 3, "explained_variance": [0.1] * 3}}, "held_out.inside: Field required"),
        ({"held_out": {"cosine": [float("nan")] * 3}}, "held_out.cosine.0: Input should be a finite number"),
        ({"fit": {"deep": [{"loss": float("nan")}]}}, "fit: holds a number that is not finite"),
        ({"ranks": {"-1": {"cosine": 0.1, "explained_variance": 0.1}}}, "greater than 0"),
        ({"ranks": {"1": {"cosine": float("inf"), "explained_variance": 0.1}}}, "finite number"),
    ],
)
def test_a_description_that_is_wrong_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    """Unknown, missing and impossible values: one line that names the key."""
    text = message(read_info, resealed(written(tmp_path), **changes))
    assert expected in text and "x." in text


@pytest.mark.parametrize(
    "text", ["[]", "1", "null", "{}", '{"format": 1, "format": 1}', "[" * 10**5, '{"format": 1e999}']
)
def test_json_that_describes_no_bridge_is_refused(tmp_path: Path, text: str) -> None:
    """Whatever else is in the file: one line, no traceback."""
    path = written(tmp_path)
    info_file(path).write_text(text)
    assert "x.json: " in message(read_info, path)


def test_numbers_that_are_not_finite_are_not_described() -> None:
    """JSON has no NaN, and a NaN in a measurement is a defect of the fit: the description cannot be made."""
    with pytest.raises(ValidationError, match="finite number"):
        make_info(fit={"deep": [{"loss": float("inf")}]})
    with pytest.raises(ValidationError, match="finite number"):
        RankScore(cosine=float("nan"), explained_variance=0.0)


def test_a_bridge_is_used_with_what_it_was_fitted_for() -> None:
    """The same models and any subset of its pairs pass, wherever the models lie now."""
    moved = MODELS.model_copy(update={"teacher": TEACHER.model_copy(update={"path": "elsewhere"})})
    check_bridge(Path("x.safetensors"), make_info(), [LayerPair(*pair) for pair in PAIRS], moved)
    check_bridge(Path("x.safetensors"), make_info(), [LayerPair(2, 3)], moved)


@pytest.mark.parametrize(
    ("role", "changes", "what"),
    [
        ("teacher", {"weights": "0" * 64}, "weights"),
        ("teacher", {"width": 960}, "width (8 and 960)"),
        ("student", {"layers": 9}, "layers (4 and 9)"),
        ("student", {"vocab": 9}, "vocab (99 and 9)"),
        ("teacher", {"family": "llama"}, "family (qwen3 and llama)"),
        ("student", {"config": "0" * 64}, "config (their sizes are equal)"),
    ],
)
def test_a_bridge_of_another_model_is_refused(role: str, changes: dict[str, Any], what: str) -> None:
    """The line names key, file, both models and what differs."""
    other = getattr(MODELS, role).model_copy(update=changes | {"path": "models/B"})
    models = MODELS.model_copy(update={role: other})
    text = message(check_bridge, Path("x.safetensors"), make_info(), [LayerPair(2, 3)], models, key="bridge.path")
    own = getattr(MODELS, role)
    assert text == (
        f"bridge.path: x.safetensors: was fitted for {role} {own.path} (width {own.width}, {own.layers} layers), this run's "
        f"{role} models/B differs in its {what}; fit it again with `oprd bridge fit`"
    )


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_bridge_of_another_tokenizer_is_refused(role: str) -> None:
    """Tokens decide what states there are, also where the models are the same."""
    models = MODELS.model_copy(update={f"{role}_tokenizer": "0" * 64})
    text = message(check_bridge, Path("x.safetensors"), make_info(), [LayerPair(2, 3)], models)
    assert text.startswith(f"distill.bridge: x.safetensors: was fitted with another {role} tokenizer;")


def test_another_layer_map_is_refused() -> None:
    """A pair that the bridge does not have, and a student layer with another teacher layer."""
    text = message(check_bridge, Path("x.safetensors"), make_info(), [LayerPair(2, 3), LayerPair(4, 4)], MODELS)
    assert "maps student layer 4 to teacher layer 5, this run to 4" in text
    text = message(check_bridge, Path("x.safetensors"), make_info(), [LayerPair(3, 4)], MODELS)
    assert "has no pair for student layer 3, only for 1, 2, 4" in text
