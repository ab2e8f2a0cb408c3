"""The parity matrix: every layout equals one process, in loss, every gradient element, and parameters after three steps.

A random tenth of the cases runs by default (the seed is printed when it fails; `--parity-seed N` repeats it); all of them by

    bash tools/test.sh -m matrix
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import torch

from oprd_megatron.config.output import FullTerm, SampledTerm, TopKTerm
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from tests.parity.cases import CASES, MODE_CASES, MODES, PAIRS, TEACHER_VOCAB, VOCAB, Case
from tests.parity.on_ranks import run_cases
from tests.parity.reference import reference, write_bridge
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

SAMPLE = 10
SECONDS_A_CASE = 40


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pairs of tiny models."""
    folder = tmp_path_factory.mktemp("parity")
    for pair, (family, tied, teacher, student) in PAIRS.items():
        for seed, (name, (layers, width)) in enumerate((("teacher", teacher), ("student", student)), 1):
            tiny_hf_model(
                family, folder / pair / name, num_layers=layers, hidden_size=width, heads=8, kv_heads=4, ffn=96,
                vocab_size=TEACHER_VOCAB.get(pair, VOCAB) if name == "teacher" else VOCAB, std=0.1, seed=seed, tied=tied,
            )  # fmt: skip
    return folder


def check(folder: Path, cases: list[Case]) -> None:
    problems: list[str] = []
    for world in sorted({case.world for case in cases}):
        prepared = [(case, *prepare(folder, case)) for case in cases if case.world == world]
        stores = Path(tempfile.mkdtemp(dir=folder))
        for found in run_ranks(
            world, run_cases, folder, stores, prepared, timeout_seconds=60 + SECONDS_A_CASE * len(prepared)
        ):
            problems += [problem for problem in found if problem not in problems]
    assert not problems, "\n".join(problems)


def prepare(folder: Path, case: Case) -> tuple[str, str | None]:
    """(name of the case's reference, bridge file), made if they are not there."""
    key, bridge = case.key, None
    directories = folder / case.pair / "teacher", folder / case.pair / "student"
    _, _, teacher, student = PAIRS[case.pair]
    if case.has_bridge:
        bridge = str(folder / f"{key}.safetensors")
        pairs = resolve_layer_pairs(case.distill_config(bridge), student[0], teacher[0])
        write_bridge(Path(bridge), pairs, teacher[1], student[1], is_mlp="mlp" in case.modes)
    if not (folder / f"{key}.pt").exists():
        torch.save(reference(*directories, case.distill_config(bridge), case.output_config), folder / f"{key}.pt")
    return key, bridge


def test_a_random_part_of_the_matrix(models: Path, request: pytest.FixtureRequest) -> None:
    """Ten cases, others each time: see `pytest --parity-seed`."""
    check(models, chance(request).sample(CASES, SAMPLE))


def test_a_case_of_every_mode(models: Path, request: pytest.FixtureRequest) -> None:
    """A random layout for every way of stage 2 (trained map, bridges, layer weights, output-space terms), others each time."""
    rng, chosen, left = chance(request), [], set(MODES)
    while left:  # of three cases of a mode the one with the most modes that are still missing: fewer cases do
        mode = rng.choice(sorted(left))
        some = rng.sample([case for case in MODE_CASES if mode in case.modes and case.world <= 2], 3)
        chosen.append(max(some, key=lambda case: len(left.intersection(case.modes))))
        left -= set(chosen[-1].modes)
    chosen.append(rng.choice([case for case in MODE_CASES if case.world == 4]))
    check(models, chosen)


def chance(request: pytest.FixtureRequest) -> random.Random:
    """What random cases are drawn from; its seed is printed."""
    seed = request.config.getoption("--parity-seed")
    seed = random.randrange(10**6) if seed is None else seed
    print(f"parity seed {seed}")
    return random.Random(seed)


@pytest.mark.matrix
@pytest.mark.parametrize("world", sorted({case.world for case in CASES}))
def test_the_whole_matrix(models: Path, world: int) -> None:
    """All cases of one number of ranks."""
    check(models, [case for case in CASES if case.world == world])


@pytest.mark.matrix
@pytest.mark.parametrize("mode", MODES)
def test_a_mode_in_every_layout(models: Path, mode: str) -> None:
    """All cases of one way of stage 2."""
    check(models, [case for case in MODE_CASES if mode in case.modes])


def test_every_mode_is_in_every_kind_of_layout() -> None:
    """Each mode on one rank, on every axis of a grid, on disjoint ranks, recomputed, packed, and each line once."""
    assert len({case.text for case in MODE_CASES}) == len(MODE_CASES)
    for mode in MODES:
        texts = [case.text for case in MODE_CASES if mode in case.modes]
        kinds = [
            "dp1 >",
            "tp2 >",
            "tp2sp >",
            "pp2 >",
            "dp2 >",
            "cp2 >",
            "vpp2 >",
            "distributed",
            "full",
            "pack",
            "tp2 > pp2",
            "@",
        ]
        for kind in kinds:
            assert any(kind in text for text in texts), (mode, kind)


def test_every_option_of_a_term_is_in_some_mode() -> None:
    """Each value that a choice of a kind of term can have, several temperatures and weights that move; every place of the
    teacher's head."""
    terms = [term for case in MODE_CASES for term in case.output_config.terms]
    for kind in (SampledTerm, TopKTerm, FullTerm):
        of_kind = [term for term in terms if isinstance(term, kind)]
        for name in {"estimator", "support", "rest", "divergence"} & kind.model_fields.keys():
            choices = get_args(kind.model_fields[name].annotation)
            assert {getattr(term, name) for term in of_kind} == set(choices), name
    assert {term.positions for term in terms} == {"all", "last", "last_k", "first_k"}
    assert {term.temperature for term in terms} == {0.5, 1.0, 2.0}
    assert any(isinstance(term.weight, list) for term in terms)
    assert {case.output_config.teacher_head for case in MODE_CASES} == {"auto", "student", "teacher"}


def test_the_matrix_has_what_it_should() -> None:
    """At least 60 layouts, up to 8 ranks, with every kind of layout in it, and each line once."""
    texts = [case.text for case in CASES]
    assert len(set(texts)) == len(texts) >= 60
    assert max(case.world for case in CASES) == 8
    for kind in (
        "@",
        "vpp2",
        "[",
        "first",
        "last",
        "follow",
        "sp ",
        "cp",
        "full",
        "selective",
        "pack",
        "distributed",
        "spool",
        "wide",
    ):
        assert sum(kind in text for text in texts) >= (1 if kind in ("first", "last") else 2), kind
    unequal = {((c.teacher.tp, c.teacher.pp), (c.student.tp, c.student.pp)) for c in CASES if c.world == 4}
    grids = {(tp, pp) for tp in (1, 2, 4) for pp in (1, 2, 4) if tp * pp <= 4}
    assert {(a, b) for a in grids for b in grids if a != b} <= unequal
