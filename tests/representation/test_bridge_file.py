"""Reading a bridge: every file that is not one, or not this run's, costs one line that names it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.bridge import Bridge, bridge_rank, load_bridge
from oprd_megatron.representation.layer_map import LayerPair

CPU = torch.device("cpu")
RANK, TEACHER_WIDTH, STUDENT_WIDTH = 3, 8, 5
PAIRS = [LayerPair(1, 2), LayerPair(2, 4)]


def tensors() -> dict[str, torch.Tensor]:
    """What a bridge of PAIRS holds, and one pair more."""
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {}
    for student_layer, teacher_layer in ((1, 2), (2, 4), (3, 5)):
        shapes[f"teacher.{teacher_layer}.mean"] = (TEACHER_WIDTH,)
        shapes[f"teacher.{teacher_layer}.projection"] = (RANK, TEACHER_WIDTH)
        shapes[f"student.{student_layer}.projection"] = (RANK, STUDENT_WIDTH)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def load(path: Path) -> Bridge:
    return load_bridge(path, PAIRS, TEACHER_WIDTH, STUDENT_WIDTH, CPU)


def message(path: Path) -> str:
    """The one line that a file costs; it names the key and the file."""
    with pytest.raises(CheckpointError) as caught:
        load(path)
    text = str(caught.value)
    assert text.startswith(f"distill.bridge: {path}: ") and "\n" not in text, text
    return text


def test_a_bridge_is_read(tmp_path: Path) -> None:
    """The pairs' tensors, in fp32 whatever the file's dtype, and no others; the rank is that of the projections."""
    saved = tensors()
    save_file(saved, tmp_path / "bridge.safetensors")
    save_file({name: value.half() for name, value in saved.items()}, tmp_path / "half.safetensors")
    bridge = load(tmp_path / "bridge.safetensors")
    assert bridge.rank == bridge_rank(tmp_path / "bridge.safetensors") == RANK
    assert bridge.means.keys() == bridge.teacher.keys() == {2, 4} and bridge.student.keys() == {1, 2}
    for layer in (2, 4):
        assert torch.equal(bridge.means[layer], saved[f"teacher.{layer}.mean"])
        assert torch.equal(bridge.teacher[layer], saved[f"teacher.{layer}.projection"])
    for layer in (1, 2):
        assert torch.equal(bridge.student[layer]["projection"], saved[f"student.{layer}.projection"])
    assert load(tmp_path / "half.safetensors").teacher[2].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_s_side_of_equation_12(tmp_path: Path, dtype: torch.dtype) -> None:
    """P_T (h_T - mu), state by state, in fp32 also for a bf16 teacher."""
    save_file(tensors(), tmp_path / "bridge.safetensors")
    bridge, states = load(tmp_path / "bridge.safetensors"), torch.randn(4, TEACHER_WIDTH).to(dtype)
    found = bridge.project_teacher(4, states)
    expected = [bridge.teacher[4] @ (state.float() - bridge.means[4]) for state in states]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(expected))


@pytest.mark.parametrize("name", ["teacher.4.mean", "teacher.2.projection", "student.2.projection"])
def test_a_tensor_is_missing(tmp_path: Path, name: str) -> None:
    """A bridge for other layers: the message names what is not there and what decides it."""
    saved = tensors()
    del saved[name]
    save_file(saved, tmp_path / "bridge.safetensors")
    text = message(tmp_path / "bridge.safetensors")
    assert f"{name} is missing" in text and "distill.layers" in text


@pytest.mark.parametrize(
    ("name", "shape", "needed"),
    [
        ("teacher.2.mean", [TEACHER_WIDTH + 1], [TEACHER_WIDTH]),
        ("teacher.4.projection", [RANK, STUDENT_WIDTH], [RANK, TEACHER_WIDTH]),
        ("teacher.4.projection", [RANK + 1, TEACHER_WIDTH], [RANK, TEACHER_WIDTH]),
        ("student.2.projection", [STUDENT_WIDTH, RANK], [RANK, STUDENT_WIDTH]),
    ],
)
def test_a_tensor_has_another_shape(tmp_path: Path, name: str, shape: list[int], needed: list[int]) -> None:
    """A bridge for other models: the message has both shapes."""
    save_file({**tensors(), name: torch.zeros(shape)}, tmp_path / "bridge.safetensors")
    assert f"{name} is {shape}, but these models need {needed}" in message(tmp_path / "bridge.safetensors")


@pytest.mark.parametrize("content", [b"", b"not safetensors\nat all", b"\xff" * 64], ids=["empty", "text", "binary"])
def test_a_file_that_is_no_safetensors(tmp_path: Path, content: bytes) -> None:
    """Anything else given by mistake."""
    path = tmp_path / "bridge.safetensors"
    path.write_bytes(content)
    assert "give a bridge" in message(path)


def test_no_file(tmp_path: Path) -> None:
    """A path that leads nowhere, and a directory."""
    assert "cannot read it" in message(tmp_path / "nowhere.safetensors")
    assert "cannot read it" in message(tmp_path)


@pytest.mark.parametrize(
    "saved",
    [
        {"model.embed_tokens.weight": torch.zeros(4, 4)},
        {"teacher.2.mean": torch.zeros(TEACHER_WIDTH)},
        {"student.1.projection": torch.zeros(())},
        {"student.bias": torch.zeros(3)},
    ],
    ids=["a model", "half a bridge", "a scalar", "another student"],
)
def test_safetensors_that_are_no_bridge(tmp_path: Path, saved: dict[str, torch.Tensor]) -> None:
    """Tensors, but not a bridge's."""
    save_file(saved, tmp_path / "bridge.safetensors")
    message(tmp_path / "bridge.safetensors")
