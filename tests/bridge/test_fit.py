"""A fit on any layout equals numpy's, on transformers' states, one sample at a time; every rank holds the same bits."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from oprd_megatron.bridge.fit import owners_of
from oprd_megatron.bridge.rows import split_rows
from oprd_megatron.errors import DataError
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.rollout.tokenizer import load_tokenizer
from tests.bridge.stage1_on_ranks import Fit, Fitted, build_stage, fit_on_ranks, fresh_world
from tests.bridge.stage1_reference import (
    DEPTHS,
    LAYER_MAP,
    RANKS,
    directions_of,
    edit_weights,
    freeze_dimension,
    held_out_figures,
    make_pair,
    objective,
    ragged_batches,
    ridge_of,
    sine,
    states_of,
    targets_of,
)
from tests.ranks import run_ranks

PRE = {"positions": "last_k", "k": 6, "position_anchor": "predictor", "final_state": "pre_norm", "wire": "fp8"}
CAPPED = {"rows": 100}
FITS = [
    Fit("dp1 > dp1"),
    Fit("dp1 > dp1", distill=PRE),
    Fit("dp1 > dp1 | pack=40", bridge=CAPPED),
    Fit("dp1 > dp1 | spool=2800", bridge=CAPPED),
    Fit("tp2 > tp2"),
    Fit("tp2sp > tp2sp", bridge=CAPPED, run={"micro_batch_size": 4}),
    Fit("pp2 > pp2", distill=PRE),
    Fit("dp2 > dp2 | pack=40", bridge=CAPPED),
    Fit("cp2 > cp2", bridge=CAPPED),
    Fit("pp2 vpp2 [1,2,2,1] > pp2 vpp2"),
    Fit("tp2 > pp2", distill=PRE),
    Fit("dp1 @0-0 > dp1 @1-1", bridge=CAPPED, run={"micro_batch_size": 1}),
    Fit("tp2 pp2 > dp2 cp2", bridge=CAPPED),
]
IDS = [f"{number} {fit.layout}" for number, fit in enumerate(FITS)]

for_each = pytest.mark.parametrize("number", range(len(FITS)), ids=IDS)


class Results:
    """All fits, run once: the numpy side and what every rank has."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_pair(folder)
        self.ranks: dict[int, list[Fitted]] = {}
        for world in sorted({fit.world for fit in FITS}):
            numbers = [number for number, fit in enumerate(FITS) if fit.world == world]
            by_rank = run_ranks(world, fit_on_ranks, folder, [FITS[n] for n in numbers], timeout_seconds=300)
            for place, number in enumerate(numbers):
                self.ranks[number] = [found[place] for found in by_rank]

    @cache  # noqa: B019
    def states(self, number: int):  # type: ignore[no-untyped-def]
        """(training states, held-out states) of transformers at the drawn rows."""
        config = FITS[number].config(self.folder)
        rows = split_rows(ragged_batches(), config.bridge, config.distill, config.run.seed)
        return tuple(states_of(self.folder, part, config.distill) for part in (rows.train, rows.held_out))

    @cache  # noqa: B019
    def directions(self, number: int, layer: int):  # type: ignore[no-untyped-def]
        return directions_of(self.states(number)[0]["teacher", layer], RANKS[-1])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("fits"))


ANGLE = 1e-6
"""Sine of the largest principal angle. fp32 states differ by about 1e-6 of their size between layouts, which turns a direction
by that over its relative gap; 4e-7 is the most that was seen."""
ENTRY = 1e-6
"""Of unit directions and of means near 1, absolute."""
PROJECTION = 3e-6
"""Of the largest entry of P_S."""
FIGURE = 1e-6
"""Absolute, of shares and cosines."""


@for_each
def test_principal_directions_are_numpys(results: Results, number: int) -> None:
    """mu, the span of the first r directions for every r, and each direction with its sign, on every rank; variances (n - 1
    below) on the rank that owns a layer, and each layer has one owner."""
    owned: list[int] = []
    for rank in results.ranks[number]:
        for layer in sorted(set(LAYER_MAP.values())):
            expected, found = results.directions(number, layer), rank.bridge.teacher[layer].double().numpy()
            np.testing.assert_allclose(rank.bridge.means[layer].numpy(), expected.mean, rtol=0, atol=ENTRY)
            assert max(sine(expected.basis[:r], found[:r]) for r in RANKS) < ANGLE
            np.testing.assert_allclose(found, expected.basis, rtol=0, atol=ENTRY)
            assert (found[np.arange(RANKS[-1]), np.abs(found).argmax(1)] > 0).all()
        for layer, variances in rank.variances.items():
            np.testing.assert_allclose(variances, results.directions(number, layer).variances, rtol=3e-6)
            owned.append(layer)
    assert sorted(owned) == sorted(set(LAYER_MAP.values()))


@for_each
def test_the_projection_is_the_minimum(results: Results, number: int) -> None:
    """P_S is numpy's ridge solution on transformers' states, and the objective there is its least value to eleven digits (it
    is flat at the minimum)."""
    states, strength = results.states(number)[0], FITS[number].config(results.folder).bridge.ridge
    for student_layer, teacher_layer in LAYER_MAP.items():
        rows, wanted = states["student", student_layer], results.directions(number, teacher_layer)
        targets = targets_of(states["teacher", teacher_layer], wanted)
        best = ridge_of(rows, targets, strength)
        least = objective(best, rows, targets, strength)
        found = results.ranks[number][0].bridge.student[student_layer]["projection"].double().numpy()
        np.testing.assert_allclose(found, best, rtol=0, atol=PROJECTION * np.abs(best).max())
        assert abs(objective(found, rows, targets, strength) / least - 1) < 1e-11
        assert objective(found * 1.01, rows, targets, strength) > least * (1 + 1e-7)


@for_each
def test_held_out_figures_are_numpys(results: Results, number: int) -> None:
    """Cosine, explained variance and inside of every pair and rank, on rows that the fit did not see."""
    train, held_out = results.states(number)
    strength, figures = FITS[number].config(results.folder).bridge.ridge, results.ranks[number][0].figures
    assert figures.ranks == RANKS
    for pair, (student_layer, teacher_layer) in enumerate(LAYER_MAP.items()):
        wanted = results.directions(number, teacher_layer)
        best = ridge_of(train["student", student_layer], targets_of(train["teacher", teacher_layer], wanted), strength)
        for place, rank in enumerate(RANKS):
            expected = held_out_figures(
                held_out["teacher", teacher_layer], held_out["student", student_layer], wanted, best, rank
            )
            found = [side[place, pair] for side in (figures.cosine, figures.explained, figures.inside)]
            np.testing.assert_allclose(found, expected, rtol=0, atol=FIGURE)


@for_each
def test_every_rank_has_the_same_bits(results: Results, number: int) -> None:
    """Of the bridge and of the figures, on ranks of the teacher alone and of the student alone too."""
    first, *others = results.ranks[number]
    tensors = first.bridge.tensors()
    assert len(tensors) == 2 * len(set(LAYER_MAP.values())) + len(LAYER_MAP)
    for other in others:
        assert other.bridge.tensors().keys() == tensors.keys()
        for name, tensor in other.bridge.tensors().items():
            assert tensor.numpy().tobytes() == tensors[name].numpy().tobytes(), name
        for side in ("cosine", "explained", "inside"):
            assert getattr(other.figures, side).tobytes() == getattr(first.figures, side).tobytes()


@for_each
def test_every_row_is_used_once(results: Results, number: int) -> None:
    """Over all ranks each drawn row of a batch comes once for each layer, on ranks of the layer's stage alone, with the
    student's and the teacher's states of the same token."""
    fit = FITS[number]
    config, states = fit.config(results.folder), results.states(number)[0]
    rows = split_rows(ragged_batches(), config.bridge, config.distill, config.run.seed)
    if "rows" in fit.bridge:
        assert rows.num_train == fit.bridge["rows"]
    count = sum(len(sample.kept or ()) for sample in rows.train[0])
    for student_layer, teacher_layer in LAYER_MAP.items():
        parts = [rank.seen[student_layer] for rank in results.ranks[number] if student_layer in rank.seen]
        numbers, mine, theirs = (np.concatenate(part) for part in zip(*parts, strict=True))
        assert sorted(numbers.tolist()) == list(range(count))
        np.testing.assert_allclose(mine, states["student", student_layer][numbers], rtol=0, atol=2e-5)
        expected = targets_of(states["teacher", teacher_layer], results.directions(number, teacher_layer))
        np.testing.assert_allclose(theirs, expected[numbers], rtol=0, atol=2e-5)


def test_the_cases_have_what_they_should(results: Results) -> None:
    """Several chunks with a budget and on ranks of their own; a student layer that shares its teacher layer with one of
    another stage; every kind of layout."""
    chunks = {fit.layout: results.ranks[number][0].num_chunks for number, fit in enumerate(FITS)}
    assert chunks["dp1 > dp1 | spool=2800"] > 1 and chunks["dp1 @0-0 > dp1 @1-1"] > 1 and chunks["tp2 > tp2"] == 1
    stages = [set(rank.seen) for rank in results.ranks[IDS.index("10 tp2 > pp2")]]
    assert stages == [{1, 2}, {3, 4}] and LAYER_MAP[2] == LAYER_MAP[3]
    for kind in ("tp2", "sp", "pp2", "vpp2", "dp2", "cp2", "@", "pack"):
        assert any(kind in fit.layout for fit in FITS)
    assert DEPTHS["teacher"] > DEPTHS["student"]


def test_one_fit_gives_every_rank(tmp_path: Path) -> None:
    """The first r directions of a fit are the fit of r directions; without its head, a bridge has the others."""
    make_pair(tmp_path)
    whole, two = run_ranks(1, fit_of_each_rank, tmp_path)[0]
    part = whole.sliced(slice(2))
    assert part.rank == two.rank == 2
    assert part.tensors().keys() == two.tensors().keys()
    for name, tensor in part.tensors().items():
        np.testing.assert_allclose(tensor.numpy(), two.tensors()[name].numpy(), rtol=0, atol=1e-6)
    tail = whole.sliced(slice(2, 8))
    assert tail.rank == 6
    for layer, basis in tail.teacher.items():
        np.testing.assert_array_equal(basis.numpy(), whole.teacher[layer].numpy()[2:])


def fit_of_each_rank(folder: Path) -> tuple[Bridge, Bridge]:
    stage = build_stage(folder, Fit("dp1 > dp1"))
    rows = split_rows(ragged_batches(2), stage.config.bridge, stage.config.distill, 5)
    found = []
    for rank in (8, 2):
        bridge, _ = stage.directions(rows.train, rank)
        found.append(replace(bridge, student=stage.projections(rows.train, bridge)))
    return found[0], found[1]


@pytest.mark.parametrize("layout", ["dp1 > dp1", "dp1 @0-0 > dp1 @1-1"])
@pytest.mark.parametrize("model", ["teacher", "student"])
def test_the_sample_of_a_bad_state_is_named(tmp_path: Path, model: str, layout: str) -> None:
    """A model that makes NaN of one token is named on all ranks, with its first layer, the sample in the batch (not in its
    chunk), its prompt and the first of its states that is not finite. (Attention multiplies what it masks by 0, and 0 times
    NaN is NaN, so that is the first of the response.)"""
    make_pair(tmp_path)

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][BAD_TOKEN] = torch.nan

    edit_weights(tmp_path / model, spoil)
    fit = Fit(layout, distill={"layer_map": {2: 3}}, run={"micro_batch_size": 1})
    layer = {"teacher": 3, "student": 2}[model]
    messages = run_ranks(fit.world, message_of_bad_states, tmp_path, fit)
    assert set(messages) == {
        f"states are not finite: {model} layer {layer}, sample 6 of 8, position 3 from 0 (prompt 'why'); the model's "
        "weights or this text are broken"
    }


BAD_TOKEN = 280


def message_of_bad_states(folder: Path, fit: Fit) -> str:
    stage = build_stage(folder, fit)
    good = tuple(range(10, 16))
    samples = [Sample(good[:3], good) for _ in range(8)]
    why = tuple(load_tokenizer(folder / "student").encode("why"))
    samples[5] = Sample(why, (20, 21, BAD_TOKEN, 22))
    try:
        bridge, _ = stage.directions([samples], 2)
        stage.projections([samples], bridge)
    except DataError as error:
        return str(error)
    return ""


def test_a_constant_dimension_stops_all_ranks(tmp_path: Path) -> None:
    """Owners of several layers find something at the same time, and no rank waits for another; with allow_constant the
    direction of that dimension is not used."""
    make_pair(tmp_path)
    edit_weights(tmp_path / "teacher", freeze_dimension)
    refused, accepted = zip(*run_ranks(2, constant_dimension, tmp_path, timeout_seconds=60), strict=True)
    assert len(set(refused)) == 1
    assert refused[0].startswith(
        "teacher layer 2: dimension 7 of its states (1 in all, counted from 0) never changes over "
    )
    assert "bridge.allow_constant: true" in refused[0]
    for basis in accepted:
        assert np.abs(basis[:, 7]).max() < 1e-12


def constant_dimension(folder: Path) -> tuple[str, np.ndarray]:
    found: list = []
    for number, allowed in enumerate((False, True)):
        fresh_world(folder, str(number))
        stage = build_stage(folder, Fit("dp2 > dp2", bridge={"allow_constant": allowed}))
        try:
            found.append(stage.directions(ragged_batches(2), 2)[0].teacher[4].numpy())
        except DataError as error:
            found.append(str(error))
    return tuple(found)


def test_a_layout_deals_its_layers_out() -> None:
    """Owners are ranks of the layer's stage, each with as many layers as the others, at most one more."""
    layout = GridLayout(2, 2, 2, False, (5, 3), first_rank=4)
    owners = owners_of(layout, range(1, 9))
    for layer, owner in owners.items():
        assert layout.coords(owner).pp == layout.stage_of(layer)
    assert sorted(Counter(owners.values()).values()) == [1, 1, 1, 1, 1, 1, 2]
