"""`oprd bridge fit`, and the training run that uses its bridge; and every mistake as one line that costs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from oprd_megatron.bridge import stage1
from oprd_megatron.bridge.artefact import read_info
from oprd_megatron.config import load_config, parse_config
from oprd_megatron.errors import UserError
from oprd_megatron.preflight import preflight
from oprd_megatron.rollout.prompts import PromptSource
from tests.bridge.stage1_commands import Outcome, run_module, written_config
from tests.bridge.stage1_reference import LAYER_MAP, RANKS, edit_weights, freeze_dimension, make_pair, pair_run
from tests.ranks import run_ranks
from tests.test_cli import assert_done, oprd
from tests.training.runs import changed, train_records, train_run, with_layout
from tests.training.test_bad_input import files_below, remake

Values = dict[str, Any]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder with the models, run.yaml and bridges/x.*, what the command printed)."""
    folder = tmp_path_factory.mktemp("fitted")
    make_pair(folder)
    config = written_config(folder, pair_run(folder))
    done = oprd("bridge", "fit", config, "--rank", "auto", "--out", folder / "bridges" / "x.safetensors")
    assert_done(done)
    return folder, done.stdout


def bridge_of(folder: Path) -> Path:
    return folder / "bridges" / "x.safetensors"


def test_the_command_writes_a_bridge_its_description_and_a_plot(fitted: tuple[Path, str]) -> None:
    """Three files and no other; the description has every rank's figures, those of the rank that was kept for each pair, and
    what it was fitted from; the rank that `auto` keeps is the recommended one; the table says the same."""
    folder, printed = fitted
    assert {path.name for path in (folder / "bridges").iterdir()} == {"x.safetensors", "x.json", "x.png"}
    info = read_info(bridge_of(folder))
    assert info.layer_map == list(LAYER_MAP.items()) and list(info.ranks) == RANKS
    cosine = {rank: score.cosine for rank, score in info.ranks.items()}
    best = max(cosine.values())
    assert info.rank == max(rank for rank, value in cosine.items() if value >= best - 0.01)
    assert info.fit["recommended_rank"] == info.rank and info.fit["seed"] == 5 and info.fit["prompts"] == 12
    assert info.fit["rows"] > 100 and info.fit["held_out_rows"] > 20
    for values, mean in (
        (info.held_out.cosine, info.ranks[info.rank].cosine),
        (info.held_out.explained_variance, info.ranks[info.rank].explained_variance),
    ):
        assert len(values) == len(LAYER_MAP) and np.mean(values) == pytest.approx(mean, abs=1e-12)
    assert all(0 < value <= 1 for value in info.held_out.inside)
    tensors = load_file(bridge_of(folder))
    assert tensors["teacher.4.projection"].shape == (info.rank, 64)
    assert tensors["student.2.projection"].shape == (info.rank, 32)
    assert f"rank {info.rank} kept, rank {info.rank} recommended" in printed
    assert f"{cosine[4]:.4f}" in printed and str(bridge_of(folder)) in printed
    assert (folder / "bridges" / "x.png").read_bytes().startswith(b"\x89PNG")


def test_training_through_the_bridge(fitted: tuple[Path, str], tmp_path: Path) -> None:
    """Widths differ, and the run trains all the same, on a layout of its own: losses are finite and the cosine through the
    bridge rises (over pairs of steps, each on other text)."""
    values = pair_run(
        fitted[0],
        run={"dir": str(tmp_path / "run"), "steps": 10},
        rollout={"prompts_per_step": 6},
        distill={"bridge": str(bridge_of(fitted[0]))},
    )
    records = train_records(train_run(with_layout(values, teacher={"pp": 2}, student={"tp": 2})))
    assert len(records) == 10 and all(math.isfinite(record["loss"]) for record in records)
    cosine = [record["cosine"] for record in records]
    assert sum(cosine[-2:]) / 2 > sum(cosine[:2]) / 2 + 0.01, cosine
    assert 0 < records[0]["inside"] < 1


def test_any_layout_writes_the_same_bridge(fitted: tuple[Path, str]) -> None:
    """Rollouts, rows and projections: on other grids the file has the same tensors but for fp32 rounding (1e-5 of 1: the
    rollouts are the same token for token), and the description the same counts."""
    folder, _ = fitted
    values = with_layout(pair_run(folder, bridge={"rank": "auto"}), teacher={"pp": 2}, student={"dp": 2})
    out = folder / "other" / "y.safetensors"
    run_ranks(2, fit_on_rank, values, out)
    mine, theirs = load_file(bridge_of(folder)), load_file(out)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        np.testing.assert_allclose(theirs[name], tensor, rtol=0, atol=1e-5 * float(tensor.abs().max()), err_msg=name)
    infos = [read_info(path) for path in (bridge_of(folder), out)]
    assert infos[0].fit == infos[1].fit and infos[0].fingerprints == infos[1].fingerprints


def fit_on_rank(values: Values, out: Path) -> None:
    stage1.fit(parse_config(values, "test"), out)


def refused_bridge(folder: Path, values: Values) -> str:
    """The one line with which training refuses a bridge; nothing may change."""
    config = written_config(folder, values)
    before = files_below(folder)
    line = one_line(run_module(folder, "oprd_megatron.train", config))
    assert files_below(folder) == before
    return line


def one_line(outcome: Outcome) -> str:
    """Of a command that refuses: exit code 2 and one line."""
    lines = outcome.err.strip().splitlines()
    assert outcome.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), outcome
    return lines[0]


def test_a_bridge_of_another_student_is_refused(fitted: tuple[Path, str], tmp_path: Path) -> None:
    """Same family, same shape, other weights."""
    values = pair_run(fitted[0], run={"dir": str(tmp_path / "run")}, distill={"bridge": str(bridge_of(fitted[0]))})
    values["student"]["path"] = str(tmp_path / "student")
    remake(values, "student", family="qwen2", heads=8, kv_heads=4, ffn=96, vocab_size=300, seed=77, tied=False)
    line = refused_bridge(tmp_path, values)
    assert "distill.bridge" in line and "was fitted for student" in line and "weights" in line


@pytest.mark.parametrize(
    ("layer_map", "fragment"),
    [
        ({1: 2, 2: 3, 3: 4, 4: 6}, "maps student layer 2 to teacher layer 4, this run to 3"),
        ("proportional", "maps student layer 1 to teacher layer 2, this run to 1"),
    ],
)
def test_a_bridge_of_another_map_is_refused(
    fitted: tuple[Path, str], tmp_path: Path, layer_map: Any, fragment: str
) -> None:
    """The first pair that differs is named."""
    distill = {"bridge": str(bridge_of(fitted[0])), "layer_map": layer_map}
    values = pair_run(fitted[0], run={"dir": str(tmp_path / "run")}, distill=distill)
    assert fragment in refused_bridge(tmp_path, values)


def few_prompts(values: Values, count: int) -> Values:
    path = Path(values["rollout"]["prompts"]["path"])
    path.write_text("\n".join(path.read_text().splitlines()[:count]) + "\n")
    return values


def with_file(values: Values, suffix: str) -> Values:
    out = Path(values["run"]["dir"]).parent / "x.safetensors"
    out.with_suffix(suffix).write_text("mine")
    return values


EARLY: dict[str, tuple[Callable[[Values], Values], list[str]]] = {
    "rank above the width": (
        lambda v: changed(v, bridge={"rank": 40}),
        ["bridge.rank", "40 is above the width 32", "use at most 32"],
    ),
    "no more rows than directions": (
        lambda v: changed(v, bridge={"rank": 8, "rows": 8}),
        ["bridge.rank: 8 directions need more than bridge.rows' 8", "raise bridge.rows"],
    ),
    "one step's prompts asked for": (
        lambda v: changed(v, bridge={"prompts": 2}),
        ["bridge.prompts: 2 prompts at 2 a step leave none to hold out", "twice rollout.prompts_per_step"],
    ),
    "one step's prompts there": (
        lambda v: few_prompts(v, 3),
        ["bridge.prompts: 3 prompts at 2 a step leave none to hold out"],
    ),
    "bridge there": (lambda v: with_file(v, ".safetensors"), ["x.safetensors: exists already", "another --out"]),
    "json there": (lambda v: with_file(v, ".json"), ["x.json: exists already", "another --out"]),
    "plot there": (lambda v: with_file(v, ".png"), ["x.png: exists already", "another --out"]),
    "auto with sgd": (
        lambda v: changed(v, bridge={"rank": "auto", "solver": "sgd"}),
        ["bridge", "rank: auto needs solver: ridge"],
    ),
    "mlp with ridge": (
        lambda v: changed(v, bridge={"projector": "mlp"}),
        ["bridge", "projector: mlp has no closed form; set solver: sgd"],
    ),
    "no directory": (
        lambda v: changed(v, teacher={"path": "/no/such/model"}),
        ["/no/such/model", "no such model directory"],
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make_pair(folder)
    return folder


@pytest.fixture
def values(models: Path, tmp_path: Path) -> Values:
    """The pair's run with files of its own."""
    (tmp_path / "train.jsonl").write_text((models / "train.jsonl").read_text())
    values = pair_run(models, run={"dir": str(tmp_path / "run")})
    return changed(values, rollout={"prompts": {"path": str(tmp_path / "train.jsonl")}})


@pytest.mark.parametrize("mistake", EARLY)
def test_mistakes_that_are_seen_before_models_are_loaded(
    tmp_path: Path, values: Values, mistake: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that names the key and the way out; nothing is written, no process group or model made."""

    def too_late(*_: Any) -> None:
        raise AssertionError("too late")

    for name in ("init_distributed", "build_models"):
        monkeypatch.setattr(stage1, name, too_late)
    make, fragments = EARLY[mistake]
    config = written_config(tmp_path, make(values))
    before = files_below(tmp_path)
    with pytest.raises(UserError) as caught:
        stage1.fit(load_config(config), tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value) and files_below(tmp_path) == before
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_the_control_of_the_mistakes(tmp_path: Path, values: Values, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mistake, and at the limits (rank 32 of 32, 9 rows for 8 directions, two steps' prompts), models are built."""

    class Built(Exception):
        pass

    def build(*_: Any) -> None:
        raise Built

    monkeypatch.setattr(stage1, "init_distributed", build)
    for section in ({}, {"rank": 32}, {"rows": 9}, {"prompts": 3}):
        with pytest.raises(Built):
            stage1.fit(parse_config(changed(values, bridge=section), "test"), tmp_path / "x.safetensors")


def copied(values: Values, folder: Path, name: str) -> Path:
    """A copy of one of the models, for this test to spoil."""
    source, copy = Path(values[name]["path"]), folder / name
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    values[name]["path"] = str(copy)
    return copy


def not_a_number(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.3.mlp.down_proj.weight"][5, 5] = torch.nan


def spoil_teacher(values: Values, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Values:
    edit_weights(copied(values, folder, "teacher"), change)
    return values


LATE: dict[str, tuple[Callable[[Values, Path], Values], list[str]]] = {
    "states are not finite": (
        lambda v, folder: spoil_teacher(v, folder, not_a_number),
        ["states are not finite: teacher layer 4, sample 1 of 4, position ", "(prompt 'user\\nsay ", "weights"],
    ),
    "a dimension never changes": (
        lambda v, folder: spoil_teacher(v, folder, freeze_dimension),
        ["teacher layer 2: dimension 7 of its states (1 in all", "check teacher.path", "bridge.allow_constant: true"],
    ),
    "answers too short for the rank": (
        lambda v, _: changed(v, rollout={"max_response_tokens": 1}, bridge={"prompts": 4}),
        ["bridge.rank: 8 directions need more than 4 rows", "raise bridge.prompts"],
    ),
}


@pytest.mark.parametrize("mistake", LATE)
def test_mistakes_that_states_show(tmp_path: Path, values: Values, mistake: str) -> None:
    """Exit code 2 and one line; neither the bridge nor its folder is made."""
    make, fragments = LATE[mistake]
    config = written_config(tmp_path, make(values, tmp_path))
    before = files_below(tmp_path)
    line = one_line(run_module(tmp_path, "oprd_megatron.bridge", "fit", config, tmp_path / "new" / "x.safetensors"))
    assert files_below(tmp_path) == before
    for fragment in fragments:
        assert fragment in line


def test_a_constant_dimension_can_be_accepted(tmp_path: Path, values: Values) -> None:
    """With bridge.allow_constant the bridge is written, and its directions leave that dimension alone."""
    config = written_config(tmp_path, spoil_teacher(values, tmp_path, freeze_dimension))
    out = tmp_path / "x.safetensors"
    done = run_module(tmp_path, "oprd_megatron.bridge", "fit", config, out, "bridge.allow_constant=true")
    assert done.code == 0, done
    for name, tensor in load_file(out).items():
        if name.startswith("teacher") and name.endswith("projection"):
            assert tensor[:, 7].abs().max() < 1e-6


def test_no_prompt_is_on_both_sides(values: Values) -> None:
    """Answers are of whole steps within one epoch of the prompts: where a step crosses into the next epoch, a prompt of the
    fit would come again among those that are held out."""
    for count, each, asked in ((12, 5, 2000), (12, 5, 12), (12, 2, 7), (12, 6, 2000), (12, 4, 5)):
        config = parse_config(changed(values, bridge={"prompts": asked}, rollout={"prompts_per_step": each}), "test")
        checked = preflight(stage1.without_bridge(config), 1, starts_run=False)
        source = PromptSource(checked.prompts, config.run.seed)
        steps = stage1.num_steps(config, count)
        read = [prompt.index for step in range(steps) for prompt in source.batch(step, each)]
        assert len(set(read)) == len(read) >= min(asked, count - each + 1)
