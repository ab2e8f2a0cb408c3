"""Both models' grids from a config: each on its own, together, and the teacher's stages that follow the student's."""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_conversion.architecture import Architecture
from oprd_megatron.config import RunConfig, parse_config
from oprd_megatron.config.schema import DistillConfig
from oprd_megatron.errors import ConfigError, LayoutError, UserError
from oprd_megatron.parallel import GridLayout
from oprd_megatron.representation.batch import Planner, Sample
from oprd_megatron.representation.grids import check_budget, follow_student, longest_samples, planner, resolve_grids
from oprd_megatron.representation.layer_map import resolve_layer_pairs
from tests.grids import grid, random_layout

TEACHER = Architecture("llama", 12, 64, 96, 8, 4, 8, 100, 128, 1e-5, 1e4, None, True, False, False)
STUDENT = replace(TEACHER, num_layers=8)


def config(teacher: dict[str, Any] | None = None, student: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """A run with these parallel sections: 4 prompts x 2 responses a step."""
    values = {
        "run": {"dir": "runs/a"},
        "teacher": {"path": "t", "parallel": teacher or {}},
        "student": {"path": "s", "parallel": student or {}},
        "rollout": {
            "prompts": {"path": "p.jsonl", "max_tokens": 3},
            "prompts_per_step": 4,
            "responses_per_prompt": 2,
            "max_response_tokens": 5,
        },
        **sections,
    }
    return parse_config(values, "test")


def message(config: RunConfig, world_size: int, error: type[UserError] = LayoutError) -> str:
    """The one line that grids cost that cannot work."""
    with pytest.raises(error) as caught:
        resolve_grids(config, TEACHER, STUDENT, world_size)
    assert "\n" not in str(caught.value), str(caught.value)
    return str(caught.value)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as a sum of `parts` positive numbers, in order."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *cuts, total)))


def bytes_moved(planner: Planner, stages: tuple[int, ...], samples: list[Sample]) -> int:
    """Of a batch, with these layers on the teacher's stages."""
    other = replace(planner, teacher=replace(planner.teacher, layers_per_stage=stages))
    return sum(chunk.route.total_bytes(planner.state_bytes) for chunk in other.plan(samples).chunks)


def small_planner(number: int) -> tuple[Planner, list[Sample]]:
    """Random grids on the same ranks or anywhere, few layers, equally long rollouts."""
    rng = random.Random(f"follow {number}")
    teacher = random_layout(rng, 8, [0])
    while teacher.pp == 1:
        teacher = random_layout(rng, 8, [0])
    student = random_layout(rng, 8, [0, 0, 0, 2])
    if rng.random() < 0.4:
        stages = tuple(rng.randint(1, 2) for _ in teacher.layers_per_stage)
        student = replace(teacher, layers_per_stage=stages, first_rank=student.first_rank)
    layer_map: Any = {rng.randint(1, student.num_layers): rng.randint(1, teacher.num_layers) for _ in range(5)}
    distill = DistillConfig(layer_map=rng.choice(["proportional", layer_map]))
    pairs = resolve_layer_pairs(distill, student.num_layers, teacher.num_layers)
    samples = [Sample((0,) * 3, (0,) * 5)] * 6 * rng.randint(1, 2)
    return Planner(pairs, teacher, student, distill, 8, 1, rng.choice([None, 20])), samples


def test_following_the_student_is_optimal() -> None:
    """Against every other way to put the teacher's layers on its stages, on small grids: nothing moves fewer bytes, and nothing
    that moves as few is more even."""
    better = 0
    for number in range(60):
        planner, samples = small_planner(number)
        chunks, depth = len(planner.teacher.layers_per_stage), planner.teacher.num_layers
        one_chunk = len(planner.plan(samples).chunks) == 1
        stages = follow_student(planner, samples)
        assert len(stages) == chunks and sum(stages) == depth and min(stages) >= 1
        if not one_chunk:  # disjoint ranks: everything moves wherever it is
            assert stages in compositions(depth, chunks)
            continue
        every = {
            found: (bytes_moved(planner, found, samples), sum(size**2 for size in found))
            for found in compositions(depth, chunks)
        }
        assert every[stages] == min(every.values()), f"small_planner({number}): {planner}"
        better += every[stages][0] < max(moved for moved, _ in every.values())
    assert better > 15


@pytest.mark.parametrize(
    ("student", "depth"),
    [
        (grid(1, 2, 1, (4, 4)), 12),
        (grid(1, 4, 1, (2, 2, 2, 2)), 12),
        (grid(1, 4, 1, (1, 3, 3, 1)), 13),
        (grid(2, 2, 2, (5, 3)), 8),
        (grid(2, 2, 1, (5, 3), sp=True, cp=2), 11),
        (grid(1, 2, 1, (2, 2, 2, 2), vpp=2), 12),
        (grid(1, 2, 2, (1, 3, 2, 1), vpp=2), 15),
        (grid(1, 4, 1, (1,) * 8, vpp=2), 17),
    ],
    ids=str,
)
def test_equal_grids_move_nothing(student: GridLayout, depth: int) -> None:
    """With the same axes on the same ranks every taught teacher layer lies on the stage of the layer that it teaches, and not a
    byte travels, also where even stages would move some."""
    distill = DistillConfig()
    pairs = resolve_layer_pairs(distill, student.num_layers, depth)
    even = replace(student, layers_per_stage=tuple(
        depth // len(student.layers_per_stage) + (n < depth % len(student.layers_per_stage))
        for n in range(len(student.layers_per_stage))))  # fmt: skip
    samples = [Sample((0,) * 3, (0,) * 5)] * 4
    planner = Planner(pairs, even, student, distill, 8, 1)
    stages = follow_student(planner, samples)
    teacher = replace(even, layers_per_stage=stages)
    for pair in pairs:
        assert teacher.stage_of(pair.teacher_layer) == student.stage_of(pair.student_layer), f"{stages}: {pair}"
    assert bytes_moved(planner, stages, samples) == 0


def test_a_run_that_follows_the_student(caplog: pytest.LogCaptureFixture) -> None:
    """From the config: the teacher's stages move nothing where even ones (6 + 6) would, and the log says what was saved."""
    run = config(
        {"pp": 2, "layers_per_stage": "follow_student"},
        {"pp": 2, "layers_per_stage": [2, 6]},
        distill={"layers": "all"},
    )
    with caplog.at_level(logging.INFO):
        teacher, student = resolve_grids(run, TEACHER, STUDENT, 2)
    assert teacher.layers_per_stage == (3, 9) and student.layers_per_stage == (2, 6)
    assert "puts [3, 9] layers on its stages; 0.0 MB a step travel, 100% less" in caplog.text


def test_grids_of_a_run() -> None:
    """Each section is resolved with its own model's depth, and what is left open is filled in."""
    teacher, student = resolve_grids(config({"tp": 2, "pp": 2}, {"tp": 4, "sp": True}), TEACHER, STUDENT, 4)
    assert (str(teacher), teacher.layers_per_stage) == ("tp 2 x pp 2 x dp 1", (6, 6))
    assert (str(student), student.layers_per_stage) == ("tp 4 x dp 1 with sp", (8,))
    teacher, student = resolve_grids(config({"ranks": "0-3", "tp": 2}, {"ranks": "4-5"}), TEACHER, STUDENT, 6)
    assert (teacher.ranks, teacher.dp, student.ranks, student.dp) == (range(4), 2, range(4, 6), 2)


@pytest.mark.parametrize(
    ("teacher", "student", "world_size", "says"),
    [
        (
            {"tp": 3},
            {},
            3,
            "teacher.parallel: tp 3 does not divide 8 attention heads (pad_heads: true would allow it);",
        ),
        (
            {},
            {"tp": 8},
            8,
            "student.parallel: tp 8 does not divide 4 key/value heads (pad_heads: true would allow it);",
        ),
        ({"pp": 9}, {"pp": 9}, 9, "student.parallel: pp 9 is more than the model's 8 layers;"),
        (
            {"pp": 2, "layers_per_stage": [4, 4]},
            {},
            2,
            "teacher.parallel.layers_per_stage: 4 + 4 = 8, but the model has 12",
        ),
        (
            {"ranks": "0-1"},
            {"ranks": "1-2"},
            3,
            "teacher.parallel.ranks 0-1 and student.parallel.ranks 1-2 overlap in part",
        ),
        ({"ranks": "0-1"}, {}, 4, "teacher.parallel.ranks 0-1 and student.parallel.ranks 0-3 overlap in part"),
        ({"ranks": "0-1"}, {"ranks": "0-1"}, 4, "2 of 4 ranks have no model (the first is 2"),
        ({}, {"ranks": "2-7"}, 4, "student.parallel.ranks: 2-7 needs 8 ranks, but there are 4"),
    ],
)
def test_grids_that_cannot_work(teacher: dict, student: dict, world_size: int, says: str) -> None:
    """What is wrong with one of them names its section; what is wrong with both together names both."""
    text = message(config(teacher, student), world_size)
    assert says in text, text


def test_rollouts_that_cannot_be_dealt() -> None:
    """8 rollouts on dp 3: the product, and the two ways out; with micro-batches by tokens any number will do."""
    text = message(config({}, {"ranks": "0-2"}), 3, ConfigError)
    assert "= 8 is not a multiple of run.micro_batch_size 1 x dp 3 = 3" in text and "run.micro_batch_tokens" in text
    resolve_grids(config(run={"dir": "a", "micro_batch_tokens": 100}), TEACHER, STUDENT, 3)


def test_the_longest_batch() -> None:
    """As many rollouts as a step has, each as long as prompts and responses may be."""
    samples = longest_samples(config())
    assert len(samples) == 8
    assert {(len(sample.prompt_ids), len(sample.response_ids)) for sample in samples} == {(3, 5)}


def test_state_bytes_follow_wire_and_bridge(tmp_path: Path) -> None:
    """The planner counts what travels: the teacher's width in the wire's format, or the bridge's rank."""
    layout, pairs = grid(1, 1, 1, (12,)), resolve_layer_pairs(DistillConfig(), 8, 12)

    def state_bytes(**distill: Any) -> int:
        return planner(config(distill=distill), pairs, TEACHER, layout, layout).state_bytes

    save_file({"teacher.1.projection": torch.zeros(16, 64)}, tmp_path / "bridge.safetensors")
    bridge = str(tmp_path / "bridge.safetensors")
    assert state_bytes() == 64 * 2 and state_bytes(wire="fp32") == 64 * 4 and state_bytes(wire="fp8") == 64 + 4
    assert state_bytes(bridge=bridge) == 16 * 2 and state_bytes(bridge=bridge, wire="fp8") == 16 + 4


@pytest.mark.parametrize("same", [True, False])
def test_a_budget_is_refused_before_the_run_starts(same: bool) -> None:
    """The error names the least budget that the longest batch needs (5 tokens x 8 layers of a rollout), and that works."""
    teacher, student = ({}, {}) if same else ({"ranks": "0-0"}, {"ranks": "1-1"})
    world = 1 if same else 2
    least = 5 * 8 * 64 * 2

    def checked(budget: str) -> None:
        run = config(teacher, student, distill={"spool_bytes": budget})
        layouts = resolve_grids(run, TEACHER, STUDENT, world)
        check_budget(planner(run, resolve_layer_pairs(run.distill, 8, 12), TEACHER, *layouts), run)

    for budget in ("1B", f"{least - 1}B"):
        with pytest.raises(
            ConfigError, match=rf"distill\.spool_bytes: {budget[:-1]} may be below .* use at least {least}$"
        ):
            checked(budget)
    checked(f"{least}B")
    checked("1GiB")
