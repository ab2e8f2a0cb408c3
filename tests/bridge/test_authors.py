"""The authors' ps_bank.pt: documented layouts are read, everything else is refused in one line, and nothing in it is run."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from oprd_megatron.bridge.authors import read_ps_bank
from oprd_megatron.errors import CheckpointError
from oprd_megatron.representation.layer_map import LayerPair

RANK, TEACHER_WIDTH, STUDENT_WIDTH = 3, 8, 6
PAIRS = [(0, 0), (1, 2), (2, 4)]
"""As in the files: layers from 0."""
OUR_PAIRS = [LayerPair(1, 1), LayerPair(2, 3), LayerPair(3, 5)]


def parts() -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return {
        pair: {
            "P_S": torch.randn(RANK, STUDENT_WIDTH),
            "P_T": torch.randn(RANK, TEACHER_WIDTH),
            "mu": torch.randn(TEACHER_WIDTH),
        }
        for pair in PAIRS
    }


def trained(key: str = "s{}_t{}", **changes: Any) -> dict[str, Any]:
    """The layout of the public training scripts."""
    named = {key.format(*pair): each for pair, each in parts().items()}
    values = {
        "rank": RANK,
        "best_epoch": 19,
        "saved_from": "best_val",
        "projector_type": "linear",
        "mlp_hidden_mult": None,
        "layer_pairs": [{"student_layer": s, "teacher_layer": t} for s, t in PAIRS],
        "state_dict": OrderedDict((f"projectors.{name}.weight", each["P_S"]) for name, each in named.items()),
        "frozen_pt_weights": {name: each["P_T"] for name, each in named.items()},
        "frozen_pt_means": {name: each["mu"] for name, each in named.items()},
    }
    return values | changes


def banks(key: str = "s{}_t{}") -> dict[str, Any]:
    found: dict[str, Any] = {"rank": RANK, "epochs": 20}
    for name in ("P_S", "P_T", "mu"):
        found[name] = {key.format(*pair): each[name] for pair, each in parts().items()}
    return found


def layers(key: Any = "layer_{}", names: tuple[str, str, str] = ("P_S", "P_T", "mu")) -> dict[Any, Any]:
    def named(pair: tuple[int, int]) -> Any:
        return pair[0] if key is int else key.format(*pair)

    return {
        named(pair): {new: each[old] for new, old in zip(names, ("P_S", "P_T", "mu"), strict=True)}
        for pair, each in parts().items()
    }


def saved(folder: Path, value: Any, **settings: Any) -> Path:
    path = folder / "ps_bank.pt"
    torch.save(value, path, **settings)
    return path


def message(path: Path, **arguments: Any) -> str:
    """The one line of the error that reading ends with."""
    with pytest.raises(CheckpointError) as caught:
        read_ps_bank(path, **arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 500 and text.startswith(str(path))
    return text


@pytest.mark.parametrize(
    "value",
    [
        trained(),
        trained("{}_{}"),
        trained(subspace_mode="full"),
        banks(),
        banks("layer_{}"),
        banks("{}"),
        layers("s{}_t{}"),
        layers(int),
        layers("{}", ("weight", "pca", "mean")),
        layers("layers.{}", ("proj.weight", "components", "mean")),
    ],
)
def test_every_layout_is_the_same_bridge(tmp_path: Path, value: Any) -> None:
    """Layers from 1, each tensor where it belongs, whatever the names."""
    bank = read_ps_bank(saved(tmp_path, value), pairs=OUR_PAIRS)
    assert bank.pairs == OUR_PAIRS and bank.projector == "linear" and bank.bridge.rank == RANK
    for (student, teacher), each in parts().items():
        assert torch.equal(bank.bridge.student[student + 1]["projection"], each["P_S"])
        assert torch.equal(bank.bridge.teacher[teacher + 1], each["P_T"])
        assert torch.equal(bank.bridge.means[teacher + 1], each["mu"])
    assert len(bank.bridge.student) == len(bank.bridge.teacher) == len(bank.bridge.means) == 3


def test_where_layers_begin_is_the_callers_word(tmp_path: Path) -> None:
    """A bank that counts from 1 has no layer 0; layers of both models shift together."""
    assert "s0_t0 is layer 0" in message(saved(tmp_path, trained()), first_layer=1)
    value = {"s1_t1": layers("s{}_t{}")["s0_t0"], "s2_t3": layers("s{}_t{}")["s1_t2"]}
    path = saved(tmp_path, value)
    assert read_ps_bank(path, first_layer=1).pairs == [LayerPair(1, 1), LayerPair(2, 3)]
    assert read_ps_bank(path).pairs == [LayerPair(2, 2), LayerPair(3, 4)]


def test_layers_come_in_order(tmp_path: Path) -> None:
    """By number, not by text: 10 after 2."""
    each = layers(int)[0]
    path = saved(tmp_path, {f"s{layer}_t{layer}": each for layer in (10, 2, 0)})
    assert [pair.student_layer for pair in read_ps_bank(path).pairs] == [1, 3, 11]


@pytest.mark.parametrize("bias", [False, True])
def test_an_mlp_computes_what_it_did(tmp_path: Path, bias: bool) -> None:
    """The scripts' Sequential(Linear, GELU, Linear) under our names, absent biases as zeros."""
    torch.manual_seed(0)
    mlps = {
        pair: nn.Sequential(nn.Linear(STUDENT_WIDTH, 12, bias=bias), nn.GELU(), nn.Linear(12, RANK, bias=bias))
        for pair in PAIRS
    }
    state = nn.ModuleDict({"s{}_t{}".format(*pair): mlp for pair, mlp in mlps.items()}).state_dict(prefix="projectors.")
    bank = read_ps_bank(saved(tmp_path, trained(state_dict=state, projector_type="mlp")))
    assert bank.projector == "mlp"
    states = torch.randn(7, STUDENT_WIDTH)
    for (student, _), mlp in mlps.items():
        torch.testing.assert_close(bank.bridge.project_student(student + 1, states), mlp(states))


def test_bf16_and_transposed_storage_are_read(tmp_path: Path) -> None:
    """Values count, not how they are stored: the result is fp32, contiguous, and keeps no map of the file."""
    value = trained()
    value["frozen_pt_weights"]["s1_t2"] = value["frozen_pt_weights"]["s1_t2"].T.contiguous().T
    value["frozen_pt_means"]["s0_t0"] = value["frozen_pt_means"]["s0_t0"].bfloat16()
    path = saved(tmp_path, value)
    bridge = read_ps_bank(path).bridge
    path.unlink()
    assert torch.equal(bridge.teacher[3], parts()[1, 2]["P_T"]) and bridge.teacher[3].is_contiguous()
    assert torch.equal(bridge.means[1], parts()[0, 0]["mu"].bfloat16().float())


def test_one_teacher_layer_of_two_student_layers(tmp_path: Path) -> None:
    """A deeper student: the same projection twice is one, two different ones are refused."""
    value = layers("s{}_t{}")
    same = {"s0_t0": value["s0_t0"], "s1_t0": value["s1_t2"] | {k: value["s0_t0"][k] for k in ("P_T", "mu")}}
    assert list(read_ps_bank(saved(tmp_path, same)).bridge.teacher) == [1]
    other = {"s0_t0": value["s0_t0"], "s1_t0": value["s1_t2"]}
    assert "teacher layer 1 has another P_T or mu" in message(saved(tmp_path, other))
    assert "a student layer is there twice" in message(
        saved(
            tmp_path,
            {"0": value["s0_t0"], "s0_t0": value["s0_t0"]},
        ),
        pairs=OUR_PAIRS,
    )
    assert "both as number and as text" in message(saved(tmp_path, {0: value["s0_t0"], "0": value["s0_t0"]}))


def test_the_students_half_alone_is_named(tmp_path: Path) -> None:
    """Bare P_S by layer, or P_S without P_T and mu: it says how much is there and what is missing."""
    half = trained()
    del half["frozen_pt_weights"], half["frozen_pt_means"]
    for value in ({str(s): each["P_S"] for (s, _), each in parts().items()}, half, {"P_S": banks("{}")["P_S"]}):
        text = message(saved(tmp_path, value))
        assert "only the student's half, P_S of 3 layers; the teacher's P_T and mu are missing" in text


@pytest.mark.parametrize(
    ("lost", "expected"),
    [("frozen_pt_weights", "s1_t2 has no P_T"), ("frozen_pt_means", "s1_t2 has no mu")],
)
def test_a_part_that_is_missing_is_named(tmp_path: Path, lost: str, expected: str) -> None:
    """A mean that is absent is not taken for zero."""
    value = trained()
    del value[lost]["s1_t2"]
    assert expected in message(saved(tmp_path, value))
    value = trained()
    del value["state_dict"]["projectors.s1_t2.weight"]
    assert "s1_t2 has no P_S" in message(saved(tmp_path, value))


def test_the_layer_map_must_be_known_and_fit(tmp_path: Path) -> None:
    """A key with the student's layer alone needs the map; one with both must agree with it."""
    path = saved(tmp_path, layers("layer_{}"))
    assert "layer_0 names no teacher layer" in message(path)
    assert "none for student layer 3" in message(path, pairs=OUR_PAIRS[:2])
    path = saved(tmp_path, trained())
    text = message(path, pairs=[LayerPair(2, 2)])
    assert "s1_t2 pairs student layer 2 with teacher layer 3, the layer map with 2" in text


def swapped(section: str, key: str, value: Any) -> dict[str, Any]:
    found = trained()
    found[section][key] = value
    return found


WEIGHT = "projectors.s1_t2.weight"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1, 2], "holds list, not tensors by layer"),
        ({}, "holds dict"),
        (torch.zeros(3), "holds Tensor"),
        ({"epoch": 1}, "holds epoch, which is no layer"),
        ({"model.embed_tokens.weight": torch.zeros(3, 4)}, "holds model.embed_tokens.weight, which is no layer"),
        ({"a\nb": 1}, r"holds a\nb"),
        ({-1: torch.zeros(3, 4)}, "holds -1, which is no layer"),
        ({0: 3.5}, "layer 0 is float, not a plain tensor"),
        ({0: {"P_S": torch.zeros(3, 4), "bias": torch.zeros(3)}}, "layer 0 holds bias; expected one each"),
        ({0: {"P_S": torch.zeros(3, 4), "weight": torch.zeros(3, 4)}}, "layer 0 holds weight; expected one each"),
        ({"state_dict": 3}, "state_dict is int"),
        ({"P_S": torch.zeros(3, 3, 4)}, "P_S is Tensor"),
        (
            {"P_S": {"x": torch.zeros(3, 4)}, "P_T": {"x": torch.zeros(3, 4)}, "mu": {"x": torch.zeros(4)}},
            "x names no layer",
        ),
        (trained(subspace_mode="residual"), "subspace_mode is 'residual'"),
        (trained(subspace_mode="direct"), "subspace_mode is 'direct'"),
        (trained(rank=4), "says rank 4, but its P_T have [3]"),
        (trained(rank=torch.zeros(2)), "but its P_T have [3]"),
        (swapped("state_dict", "head.weight", torch.zeros(3, 4)), "state_dict holds head.weight"),
        (
            swapped("state_dict", WEIGHT, torch.zeros(STUDENT_WIDTH, RANK)),
            "P_S is [6, 3], but must be [3, 6] (it is transposed)",
        ),
        (swapped("state_dict", WEIGHT, torch.zeros(RANK, 7)), "student layer 2: P_S is [3, 7], but must be [3, 6]"),
        (swapped("state_dict", WEIGHT, torch.zeros(RANK)), f"{WEIGHT} is [3], but must have 2 dimensions"),
        (swapped("state_dict", WEIGHT, torch.zeros(RANK, 6).int()), "is torch.int32, not floating point"),
        (
            swapped("state_dict", WEIGHT, torch.full((RANK, 6), torch.nan)),
            f"{WEIGHT} holds numbers that are not finite",
        ),
        (swapped("state_dict", WEIGHT, torch.full((RANK, 6), 1e300, dtype=torch.float64)), "not finite in float32"),
        (swapped("state_dict", WEIGHT, torch.zeros(1).expand(2**20, 2**20)), "larger than its data"),
        (swapped("state_dict", WEIGHT, torch.zeros(RANK, 6).to_sparse()), "not a plain tensor"),
        (swapped("state_dict", WEIGHT, torch.zeros(RANK, 0)), "must have 2 dimensions"),
        (swapped("state_dict", "projectors.s1_t2.0.weight", torch.zeros(12, 6)), "the first layer is linear"),
        (swapped("frozen_pt_means", "s1_t2", torch.full((8,), torch.inf)), "frozen_pt_means of s1_t2 holds"),
        (swapped("frozen_pt_means", "s1_t2", torch.zeros(7)), "mu is [7], but must be [8]"),
        (swapped("frozen_pt_weights", "s1_t2", torch.zeros(RANK, 9)), "P_T is [3, 9], but must be [3, 8]"),
    ],
)
def test_anything_else_is_refused_by_name(tmp_path: Path, value: Any, expected: str) -> None:
    """Layout, names, kinds, shapes and values: one line that says what was found."""
    assert expected in message(saved(tmp_path, value), pairs=OUR_PAIRS)


def test_a_bank_that_is_transposed_throughout_is_refused(tmp_path: Path) -> None:
    """All shapes agree with each other, and still the rank would be above the width."""
    value = {
        f"s{s}_t{t}": {"P_S": each["P_S"].T.contiguous(), "P_T": each["P_T"].T.contiguous(), "mu": torch.zeros(RANK)}
        for (s, t), each in parts().items()
    }
    assert "P_T is [8, 3]: rank 8 above the width" in message(saved(tmp_path, value))


def test_half_an_mlp_is_refused(tmp_path: Path) -> None:
    """One matrix of two, or two that do not fit."""
    one = {f"projectors.s{s}_t{t}.2.weight": torch.zeros(RANK, 12) for s, t in PAIRS}
    assert "an MLP has 0.weight and 2.weight" in message(saved(tmp_path, trained(state_dict=one)))
    both = one | {f"projectors.s{s}_t{t}.0.weight": torch.zeros(11, STUDENT_WIDTH) for s, t in PAIRS}
    assert "fc2.weight is [3, 12], but must be [3, 11]" in message(saved(tmp_path, trained(state_dict=both)))


class Hostile:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_no_code_of_the_file_is_run(tmp_path: Path) -> None:
    """A pickle that calls something is refused, and has not called it."""
    trace = tmp_path / "was_run"
    assert "wants to run code" in message(saved(tmp_path, trained(extra=Hostile(trace))))
    assert not trace.exists()


def test_broken_files_are_one_line(tmp_path: Path) -> None:
    """Missing, cut, noise, an old torch.save, a module, a pipe."""
    path = saved(tmp_path, trained())
    whole = path.read_bytes()
    for data in (b"", whole[:10], whole[: len(whole) // 2], whole[:-1], b"PK\x03\x04" + b"\0" * 100, os.urandom(500)):
        path.write_bytes(data)
        assert "no file of torch.save" in message(path)
    assert "no file of torch.save" in message(saved(tmp_path, trained(), _use_new_zipfile_serialization=False))
    assert "no file of torch.save" in message(saved(tmp_path, nn.Linear(2, 2)))
    path.unlink()
    assert "cannot be read" in message(path)
    os.mkfifo(path)
    assert "not a regular file" in message(path)
