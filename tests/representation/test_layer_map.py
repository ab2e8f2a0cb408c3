"""Layer maps and layer sets (OPRD Eq. 11), against tables and against exact fractions."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.representation.layer_map import (
    LayerPair,
    layer_set,
    proportional_layer,
    read_map,
    resolve_layer_pairs,
)

# fmt: off
TABLES = {
    (28, 36): [1, 2, 4, 5, 6, 7, 9, 10, 11, 13, 14, 15, 17, 18, 19, 20, 22, 23, 24, 26, 27, 28, 30, 31, 32, 33, 35, 36],
    (28, 80): [1, 4, 7, 10, 13, 16, 19, 21, 24, 27, 30, 33, 36, 39, 42, 45, 48, 51, 54, 57, 60, 62, 65, 68, 71, 74, 77,
               80],
    (24, 30): [1, 2, 4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20, 21, 22, 24, 25, 26, 27, 29, 30],
    (28, 28): list(range(1, 29)),
    (4, 2): [1, 1, 2, 2],
    (2, 9): [1, 9],
}
HALVES = {
    (3, 2): [1, 1, 2],           # 0.5 -> 0
    (3, 4): [1, 3, 4],           # 1.5 -> 2
    (3, 6): [1, 3, 6],           # 2.5 -> 2
    (3, 8): [1, 5, 8],           # 3.5 -> 4
    (5, 3): [1, 1, 2, 3, 3],     # 0.5 -> 0, 1.5 -> 2
    (5, 7): [1, 3, 4, 5, 7],     # 1.5 -> 2, 4.5 -> 4
    (7, 10): [1, 3, 4, 5, 7, 9, 10],  # 1.5 -> 2, 4.5 -> 4, 7.5 -> 8
}
# fmt: on


@pytest.mark.parametrize("depths", [*TABLES, *HALVES])
def test_proportional_map_equals_table(depths: tuple[int, int]) -> None:
    """Eq. 11 layer by layer; exact halves go to the even neighbour (of the 0-based value, as in the equation)."""
    students, teachers = depths
    table = (TABLES | HALVES)[depths]
    assert [proportional_layer(layer, students, teachers) for layer in range(1, students + 1)] == table


def test_proportional_map_equals_exact_fractions() -> None:
    """For all depths to 40: round-half-even of the exact fraction, first to first, last to last, monotone."""
    for students in range(2, 41):
        for teachers in range(1, 41):
            found = [proportional_layer(layer, students, teachers) for layer in range(1, students + 1)]
            exact = [Fraction((layer - 1) * (teachers - 1), students - 1) for layer in range(1, students + 1)]
            assert found == [round(value) + 1 for value in exact]
            assert (found[0], found[-1]) == (1, teachers)
            assert found == sorted(found)
            if teachers >= students:
                assert len(set(found)) == students


def test_student_of_one_layer() -> None:
    """Eq. 11 divides by zero there: the only layer is the last one, taught by the teacher's last."""
    assert proportional_layer(1, 1, 7) == 7


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("all", 5, [1, 2, 3, 4, 5]),
        ("last", 5, [5]),
        ("even", 5, [1, 3, 5]),
        ("odd", 5, [2, 4]),
        ("even", 6, [1, 3, 5]),
        ("odd", 6, [2, 4, 6]),
        ("even", 1, [1]),
        ([4, 1, 3], 5, [1, 3, 4]),
        ([5], 5, [5]),
    ],
)
def test_layer_sets(layers: str | list[int], depth: int, expected: list[int]) -> None:
    """The authors' words: even is 1, 3, 5, .. and odd is 2, 4, 6, ..; a list is sorted."""
    assert layer_set(layers, depth) == expected


def test_proportional_pairs_of_a_set() -> None:
    """A set only selects: the map is that of the whole depth."""
    pairs = resolve_layer_pairs(DistillConfig(layers="odd"), 6, 11)
    assert pairs == [LayerPair(2, 3), LayerPair(4, 7), LayerPair(6, 11)]
    assert resolve_layer_pairs(DistillConfig(layers="last"), 28, 36) == [LayerPair(28, 36)]
    assert [pair.teacher_layer for pair in resolve_layer_pairs(DistillConfig(), 28, 36)] == TABLES[28, 36]


def test_explicit_pairs() -> None:
    """`all` means the layers that the pairs name, in ascending order; another set selects among them. Crossing pairs
    and one teacher layer for two student layers are allowed."""
    pairs = {4: 1, 1: 5, 2: 5}
    assert resolve_layer_pairs(DistillConfig(layer_map=pairs), 4, 5) == [
        LayerPair(1, 5),
        LayerPair(2, 5),
        LayerPair(4, 1),
    ]
    assert resolve_layer_pairs(DistillConfig(layer_map=pairs, layers="odd"), 4, 5) == [LayerPair(2, 5), LayerPair(4, 1)]
    assert resolve_layer_pairs(DistillConfig(layer_map=pairs, layers=[4]), 4, 5) == [LayerPair(4, 1)]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (
            DistillConfig(layers=[1, 5]),
            "distill.layers: student layer 5 is out of range; the student has layers 1 to 4",
        ),
        (DistillConfig(layers=[2, 2]), "distill.layers: [2, 2] names a layer twice"),
        (DistillConfig(layers=[]), "distill.layers: [] selects none of the student's 4 layers"),
        (
            DistillConfig(layer_map={5: 1}),
            "distill.layer_map: student layer 5 is out of range; the student has layers 1",
        ),
        (
            DistillConfig(layer_map={1: 7}),
            "distill.layer_map: teacher layer 7 is out of range; the teacher has layers 1",
        ),
        (
            DistillConfig(layer_map={1: 1}, layers=[1, 3]),
            "distill.layer_map: student layer 3 is in distill.layers but has",
        ),
        (
            DistillConfig(layer_map={1: 1}, layers="last"),
            "student layer 4 is in distill.layers but has no teacher layer",
        ),
        (DistillConfig(layer_map={}), "distill.layer_map: no pairs"),
    ],
)
def test_errors(config: DistillConfig, says: str) -> None:
    """One line that names the key, the layer and the range."""
    with pytest.raises(ConfigError) as caught:
        resolve_layer_pairs(config, 4, 6)
    assert says in str(caught.value) and "\n" not in str(caught.value), str(caught.value)


def test_odd_layers_of_a_one_layer_student() -> None:
    """A named set can be empty too: it is refused, not supervised silently."""
    with pytest.raises(ConfigError, match=r"distill\.layers: 'odd' selects none of the student's 1 layers"):
        layer_set("odd", 1)


def measured(folder: Path, pairs: list[tuple[Any, ...]], **changes: Any) -> Path:
    """A map file of (student layer, teacher layer, score)."""
    rows = [dict(zip(("student_layer", "teacher_layer", "score"), pair, strict=False)) for pair in pairs]
    (folder / "map.json").write_text(json.dumps({"format": 1, "pairs": rows, "note": "for people"} | changes))
    return folder / "map.json"


def refusal(folder: Path, **keys: Any) -> str:
    """The one line with which a map is refused."""
    with pytest.raises(ConfigError) as caught:
        resolve_layer_pairs(DistillConfig(**keys), 4, 6)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(folder), "")


def test_a_measured_map(tmp_path: Path) -> None:
    """Its pairs by ascending student layer, with their scores; `layers` selects among them, and a set that needs a layer which
    the file leaves out is refused."""
    path = measured(tmp_path, [(4, 6, 1.5), (1, 2, -0.25), (2, 2, 0.0)])
    pairs = resolve_layer_pairs(DistillConfig(layer_map=path), 4, 6)
    assert [(p.student_layer, p.teacher_layer, p.score) for p in pairs] == [(1, 2, -0.25), (2, 2, 0.0), (4, 6, 1.5)]
    assert resolve_layer_pairs(DistillConfig(layer_map=path, layers="odd"), 4, 6) == [LayerPair(2, 2), LayerPair(4, 6)]
    assert resolve_layer_pairs(DistillConfig(layer_map=path, layers=[1]), 4, 6) == [LayerPair(1, 2)]
    assert "student layer 3 is in distill.layers but has no teacher" in refusal(tmp_path, layer_map=path, layers="even")


def test_scores_are_optional_and_may_be_whole_numbers(tmp_path: Path) -> None:
    """A map written by hand is a map."""
    found = read_map(measured(tmp_path, [(1, 1), (2, 3, 2), (3, 4, None)]))
    assert [pair.score for pair in found] == [None, 2, None]


BAD_MAPS: dict[str, bytes] = {
    "empty": b"",
    "not json": b"student: teacher",
    "not text": b"\xff\xfe\x00",
    "cut off": b'{"format": 1, "pairs": [{"student_layer": 1,',
    "a list": b'[{"student_layer": 1, "teacher_layer": 1}]',
    "a number": b"7",
    "nested too deep": b"[" * 100_000,
    "no pairs": b'{"format": 1}',
    "pairs is a number": b'{"format": 1, "pairs": 3}',
    "pairs of lists": b'{"format": 1, "pairs": [[1, 1]]}',
    "no teacher layer": b'{"format": 1, "pairs": [{"student_layer": 1}]}',
    "a fraction": b'{"format": 1, "pairs": [{"student_layer": 1.0, "teacher_layer": 1}]}',
    "a truth": b'{"format": 1, "pairs": [{"student_layer": true, "teacher_layer": 1}]}',
    "text": b'{"format": 1, "pairs": [{"student_layer": "1", "teacher_layer": 1}]}',
    "twice": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1}, {"student_layer": 1, "teacher_layer": 2}]}',
    "score is text": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1, "score": "high"}]}',
    "score is no number": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1, "score": NaN}]}',
    "score is infinite": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1, "score": 1e999}]}',
    "score is a giant": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1, "score": 1'
    + b"0" * 400
    + b"}]}",
    "score is a truth": b'{"format": 1, "pairs": [{"student_layer": 1, "teacher_layer": 1, "score": true}]}',
    "another format": b'{"format": 2, "pairs": [{"student_layer": 1, "teacher_layer": 1}]}',
    "no format": b'{"pairs": [{"student_layer": 1, "teacher_layer": 1}]}',
}


@pytest.mark.parametrize("content", BAD_MAPS)
def test_a_file_that_is_no_map(tmp_path: Path, content: str) -> None:
    """One line with the key, the file and how to make one."""
    path = tmp_path / "map.json"
    path.write_bytes(BAD_MAPS[content])
    assert refusal(tmp_path, layer_map=path) == (
        "distill.layer_map: /map.json: not a layer map; make it with `oprd bridge map`"
    )


def test_no_map_file(tmp_path: Path) -> None:
    """Nothing there, or a directory."""
    assert "/map.json: No such file or directory; give proportional" in refusal(
        tmp_path, layer_map=tmp_path / "map.json"
    )
    assert "Is a directory" in refusal(tmp_path, layer_map=tmp_path)


@pytest.mark.parametrize(
    ("pairs", "says"),
    [
        ([(5, 1)], "student layer 5 is out of range; the student has layers 1 to 4"),
        ([(0, 1)], "student layer 0 is out of range"),
        ([(1, 7)], "teacher layer 7 is out of range; the teacher has layers 1 to 6"),
        ([(1, -1)], "teacher layer -1 is out of range"),
        ([(1, 10**30)], "is out of range"),
        ([], "no pairs"),
    ],
    ids=str,
)
def test_a_map_of_other_models(tmp_path: Path, pairs: list[tuple[int, int]], says: str) -> None:
    """Layers that are not there, also where `layers` does not select them."""
    assert says in refusal(tmp_path, layer_map=measured(tmp_path, pairs))
    if pairs:
        path = measured(tmp_path, [*pairs, (2, 2)])
        assert says in refusal(tmp_path, layer_map=path, layers=[2])


def test_monotone_map(tmp_path: Path) -> None:
    """Crossing pairs are refused, in a file and in the config, if asked for; ties are not crossings, and only what is
    supervised counts."""
    crossing = [(1, 3), (2, 5), (3, 4)]
    says = "is not monotone: student layer 2 learns from teacher layer 5, but layer 3 from 4"
    path = measured(tmp_path, crossing)
    for layer_map in (path, dict(crossing)):
        assert says in refusal(tmp_path, layer_map=layer_map, monotone_map=True)
        assert len(resolve_layer_pairs(DistillConfig(layer_map=layer_map), 4, 6)) == 3
        found = resolve_layer_pairs(DistillConfig(layer_map=layer_map, monotone_map=True, layers=[1, 3]), 4, 6)
        assert found == [LayerPair(1, 3), LayerPair(3, 4)]
    tied = DistillConfig(layer_map={1: 2, 2: 2, 4: 6}, monotone_map=True)
    assert len(resolve_layer_pairs(tied, 4, 6)) == 3
    assert len(resolve_layer_pairs(DistillConfig(monotone_map=True), 28, 9)) == 28
