"""Supervised positions: golden indices for every mode and anchor, and golden rows of states, predictors and targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from oprd_megatron.config.output import FullTerm
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.grid import Grid
from oprd_megatron.representation.batch import Chunk, Planner, Sample
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.outputs import Supervised
from oprd_megatron.representation.placement import Arrangement, TokenPlacement
from oprd_megatron.representation.positions import predicting_positions, supervised_positions
from tests.grids import grid

K = 3
MODES = ("all", "last", "last_k", "first_k")
# fmt: off
GOLDEN = {
    # (prompt, response): {anchor: indices under MODES}; k = 3
    (5, 7): {"token":     ([5, 6, 7, 8, 9, 10, 11], [11], [9, 10, 11], [5, 6, 7]),
             "predictor": ([4, 5, 6, 7, 8, 9, 10],  [10], [8, 9, 10],  [4, 5, 6])},
    (3, 2): {"token":     ([3, 4], [4], [3, 4], [3, 4]),
             "predictor": ([2, 3], [3], [2, 3], [2, 3])},
    (2, 3): {"token":     ([2, 3, 4], [4], [2, 3, 4], [2, 3, 4]),
             "predictor": ([1, 2, 3], [3], [1, 2, 3], [1, 2, 3])},
    (1, 1): {"token":     ([1], [1], [1], [1]),
             "predictor": ([0], [0], [0], [0])},
    (4, 0): {"token":     ([], [], [], []),
             "predictor": ([], [], [], [])},
    (0, 0): {"token":     ([], [], [], []),
             "predictor": ([], [], [], [])},
    # Nothing predicts y_1 of a rollout without a prompt: that position is left out.
    (0, 4): {"token":     ([0, 1, 2, 3], [3], [1, 2, 3], [0, 1, 2]),
             "predictor": ([0, 1, 2],    [2], [0, 1, 2], [0, 1])},
    (0, 1): {"token":     ([0], [0], [0], [0]),
             "predictor": ([], [], [], [])},
    (0, 3): {"token":     ([0, 1, 2], [2], [0, 1, 2], [0, 1, 2]),
             "predictor": ([0, 1],    [1], [0, 1],    [0, 1])},
}
# fmt: on


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("anchor", ["token", "predictor"])
@pytest.mark.parametrize("lengths", GOLDEN)
def test_golden_indices(lengths: tuple[int, int], anchor: str, mode: str) -> None:
    """0-based indices, ascending: never a prompt token under `token`, never the last one under `predictor`."""
    config = DistillConfig(positions=mode, k=K, position_anchor=anchor)
    expected = GOLDEN[lengths][anchor][MODES.index(mode)]
    assert list(supervised_positions(*lengths, config)) == expected


def test_token_anchor_is_the_authors_slice() -> None:
    """With k = T the token anchor is `ids[-T:]`, the slice of the released code."""
    prompt, response = 6, 4
    config = DistillConfig(positions="last_k", k=response)
    assert list(supervised_positions(prompt, response, config)) == list(range(prompt + response))[-response:]


def test_k_matters_only_where_it_is_named() -> None:
    """`all` and `last` ignore k; the default k covers short responses whole."""
    for k in (1, 2, 100):
        assert list(supervised_positions(2, 5, DistillConfig(positions="all", k=k))) == [2, 3, 4, 5, 6]
        assert list(supervised_positions(2, 5, DistillConfig(positions="last", k=k))) == [6]
    assert list(supervised_positions(2, 5, DistillConfig())) == [2, 3, 4, 5, 6]
    assert len(supervised_positions(2, 5000, DistillConfig())) == 2000


# Three ragged rollouts in one pack: prompts of 5, 1 and 3 tokens. Ids say where they are: 10, 20 or 30 + position.
PROMPTS = ((10, 11, 12, 13, 14), (20,), (30, 31, 32))
RESPONSES = ((15, 16, 17, 18), (21, 22, 23), (33, 34, 35))
TEACHER_PROMPTS = ((91, 92), (93, 94, 95, 96, 97, 98), None)
"""What a teacher with privileged text reads before the same responses."""
# fmt: off
TABLE = [
    # y_t          |  state AT y_t (token anchor)          |  state that PREDICTS y_t               | in the teacher's
    # sample t  id |  packed  cp 2 (rank, row)  sp (rank, row) | packed id  cp 2     sp             | own pack: AT, PREDICTS
    (0, 1, 15,        5,      (1, 2),           (0, 5),          4,    14,  (1, 1),  (0, 4),          2,  1),
    (0, 2, 16,        6,      (1, 3),           (0, 6),          5,    15,  (1, 2),  (0, 5),          3,  2),
    (0, 3, 17,        7,      (1, 4),           (0, 7),          6,    16,  (1, 3),  (0, 6),          4,  3),
    (0, 4, 18,        8,      (1, 5),           (0, 8),          7,    17,  (1, 4),  (0, 7),          5,  4),
    (1, 1, 21,       10,      (1, 6),           (1, 0),          9,    20,  (0, 6),  (0, 9),         12, 11),
    (1, 2, 22,       11,      (1, 7),           (1, 1),         10,    21,  (1, 6),  (1, 0),         13, 12),
    (1, 3, 23,       12,      (0, 7),           (1, 2),         11,    22,  (1, 7),  (1, 1),         14, 13),
    (2, 1, 33,       16,      (1, 9),           (1, 6),         15,    32,  (1, 8),  (1, 5),         18, 17),
    (2, 2, 34,       17,      (1, 10),          (1, 7),         16,    33,  (1, 9),  (1, 6),         19, 18),
    (2, 3, 35,       18,      (1, 11),          (1, 8),         17,    34,  (1, 10), (1, 7),         20, 19),
]
# fmt: on
SAMPLE, T, TARGET, AT, AT_CP, AT_SP, BEFORE, BEFORE_ID, BEFORE_CP, BEFORE_SP, THEIR_AT, THEIR_BEFORE = zip(
    *TABLE, strict=True
)
PACKED, CP_2, SP_2 = grid(1, 1, 1, (2,)), grid(1, 1, 1, (2,), cp=2), grid(2, 1, 1, (2,), sp=True)


def chunk_of(
    teacher: GridLayout,
    student: GridLayout,
    anchor: str = "token",
    predicted: Callable[[Sample], Sequence[int]] = lambda sample: range(len(sample.response_ids)),
    privileged: bool = False,
) -> Chunk:
    """The three rollouts, planned as one pack of each model."""
    config = DistillConfig(positions="all", position_anchor=anchor)
    planner = Planner([LayerPair(1, 1)], teacher, student, config, 8, 3, predicted=predicted, output_bytes=4)
    theirs = TEACHER_PROMPTS if privileged else (None, None, None)
    samples = [
        Sample(prompt, response, teacher_prompt_ids=asked)
        for prompt, response, asked in zip(PROMPTS, RESPONSES, theirs, strict=True)
    ]
    (chunk,) = planner.plan(samples).chunks
    return chunk


def ids_at(tokens: TokenPlacement, fed: Arrangement, read: list[tuple[int, ...]], layout: GridLayout) -> list[int]:
    """The ids that the model is fed in the rows where tokens are placed."""
    shares = {}
    for rank in layout.ranks:
        coords = layout.coords(rank)
        (batch,) = micro_batches(read, fed, Grid(layout, rank, None))
        parts = batch.ids.tensor_split(layout.tp) if layout.sp else [batch.ids] * layout.tp
        shares[coords.cp, coords.tp] = parts[coords.tp].tolist()
    places = zip(tokens.cp, tokens.shard, tokens.local_row, strict=True)
    return [shares[cp, shard][row] for cp, shard, row in places]


PLACED = {
    # layout: (its grid, what its (rank, row) are: AT, PREDICTS)
    "packed": (PACKED, [(0, row) for row in AT], [(0, row) for row in BEFORE]),
    "cp2": (CP_2, AT_CP, BEFORE_CP),
    "tp2sp": (SP_2, AT_SP, BEFORE_SP),
}


@pytest.mark.parametrize("layout", PLACED)
def test_golden_rows(layout: str) -> None:
    """Each response token of a pack, on paper: row, rank and id of the state at it and of the one that predicts it, and the id
    that logits there are of; also where a cut of context or sequence parallelism lies between the two."""
    student, at, before = PLACED[layout]
    chunk = chunk_of(PACKED, student)
    side, outputs = chunk.student, chunk.outputs
    assert outputs is not None and outputs.teacher is not None
    read = [sample.ids for sample in chunk.samples]
    ranks = lambda tokens: tokens.shard if layout == "tp2sp" else tokens.cp  # noqa: E731
    assert list(zip(ranks(side.tokens), side.tokens.local_row, strict=True)) == list(at)
    assert ids_at(side.tokens, side.arrangement, read, student) == list(TARGET)
    assert list(zip(ranks(outputs.student), outputs.student.local_row, strict=True)) == list(before)
    assert ids_at(outputs.student, side.arrangement, read, student) == list(BEFORE_ID)
    assert outputs.targets.tolist() == list(TARGET)
    assert list(zip(outputs.sample, outputs.index + 1, strict=True)) == list(zip(SAMPLE, T, strict=True))
    assert outputs.teacher.row.tolist() == list(BEFORE)
    predictor = chunk_of(PACKED, student, "predictor").student.tokens
    assert (predictor.row == outputs.student.row).all() and (predictor.local_row == outputs.student.local_row).all()


@pytest.mark.parametrize("layout", PLACED)
def test_a_teacher_with_another_prompt(layout: str) -> None:
    """Response tokens are matched by their number: the teacher's rows are where its own prompt puts them, the student's stay,
    and both are of the same y_t."""
    student, _, before = PLACED[layout]
    chunk = chunk_of(PACKED, student, privileged=True)
    teacher, outputs = chunk.teacher, chunk.outputs
    assert outputs is not None and outputs.teacher is not None
    read = [sample.teacher_ids for sample in chunk.samples]
    assert (teacher.tokens.row.tolist(), outputs.teacher.row.tolist()) == (list(THEIR_AT), list(THEIR_BEFORE))
    assert ids_at(teacher.tokens, teacher.arrangement, read, PACKED) == list(TARGET) == outputs.targets.tolist()
    ranks = outputs.student.shard if layout == "tp2sp" else outputs.student.cp
    assert list(zip(ranks, outputs.student.local_row, strict=True)) == list(before)
    whole = [token for ids in read for token in ids]
    assert [whole[row + 1] for row in outputs.teacher.row] == outputs.targets.tolist()


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        ([{"positions": "all"}], [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]),
        ([{"positions": "last"}], [(0, 4), (1, 3), (2, 3)]),
        ([{"positions": "last_k", "first_or_last": 2}], [(0, 3), (0, 4), (1, 2), (1, 3), (2, 2), (2, 3)]),
        ([{"positions": "first_k", "first_or_last": 1}], [(0, 1), (1, 1), (2, 1)]),
        (
            [{"positions": "last"}, {"positions": "first_k", "first_or_last": 2}],
            [(0, 1), (0, 2), (0, 4), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)],
        ),
        (
            [{"positions": "last_k", "first_or_last": 3}],
            [(0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)],
        ),
    ],
)
@pytest.mark.parametrize("privileged", [False, True])
def test_golden_rows_of_terms(
    terms: list[dict[str, object]], expected: list[tuple[int, int]], privileged: bool
) -> None:
    """Of what several terms supervise each token is there once, in order, and its row and id are those of the table."""
    predicted = Supervised([FullTerm(kind="full", **keys) for keys in terms])  # type: ignore[arg-type]
    outputs = chunk_of(PACKED, CP_2, predicted=predicted, privileged=privileged).outputs
    assert outputs is not None and outputs.teacher is not None
    lines = [TABLE[list(zip(SAMPLE, T, strict=True)).index(token)] for token in expected]
    assert list(zip(outputs.sample, outputs.index + 1, strict=True)) == expected
    assert outputs.targets.tolist() == [line[2] for line in lines]
    assert list(zip(outputs.student.cp, outputs.student.local_row, strict=True)) == [line[8] for line in lines]
    assert outputs.teacher.row.tolist() == [line[11 if privileged else 6] for line in lines]


def test_nothing_predicts_the_first_token_without_a_prompt() -> None:
    """A defect of the caller, not row -1."""
    assert predicting_positions(0, [1, 2]) == [0, 1] and predicting_positions(3, []) == []
    with pytest.raises(AssertionError):
        predicting_positions(0, [0])
