"""The noise of a teacher in fp8: what is measured, that layouts do not matter, which layers are named, a training's gate."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from transformers import AutoModelForCausalLM

from oprd_megatron.config import parse_config
from oprd_megatron.errors import ConfigError
from oprd_megatron.noise.compare import Noise
from oprd_megatron.noise.doctor import measure, table, unmeasured
from oprd_megatron.noise.gate import NoiseGate
from oprd_megatron.noise.measure import prompt_samples
from oprd_megatron.parallel.precision import kept_layers
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from tests.models.test_weight_only import rounded_directory, with_weight_only
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model
from tests.training.runs import changed, train_records, train_run, with_layout
from tests.training.test_bridge_run import with_bridge

Values = dict[str, Any]


@pytest.fixture
def wide(values: Values) -> Values:
    """The tiny run with models that two tensor-parallel ranks can split in whole blocks, and a teacher in fp8."""
    for name, layers, seed in (("teacher", 5, 1), ("student", 4, 2)):
        shape: dict[str, Any] = dict(hidden_size=64, heads=4, kv_heads=2, ffn=128, std=0.1)
        tiny_hf_model("llama", values[name]["path"], num_layers=layers, seed=seed, **shape)
    run = {key: section for key, section in values.items() if key != "eval"}
    return with_weight_only({**run, "distill": {"positions": "all"}})


def noise_of(values: Values) -> tuple[Noise, list[float], list[str]]:
    """On a rank: noise, the student's losses, and the doctor's table."""
    config = unmeasured(parse_config(values, "test"))
    checked = preflight(config, dist.get_world_size(), starts_run=False)
    noise, losses = measure(checked, select_platform("cpu"))
    return noise, losses, list(table(checked, noise, losses))


def test_against_transformers(tmp_path: Path, wide: Values) -> None:
    """Cosine, relative error and loss of every layer are those between transformers on the weights and on the rounded ones,
    over the supervised tokens; the student's loss is against the rounded ones."""
    ((noise, losses, _),) = run_ranks(1, noise_of, wide)
    rounded = rounded_directory(Path(wide["teacher"]["path"]), tmp_path / "rounded")
    paths = wide["teacher"]["path"], rounded, wide["student"]["path"]
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in paths]
    checked = preflight(parse_config(wide, "test"), 1, starts_run=False)
    rows: list[list[torch.Tensor]] = [[], [], []]
    for sample in prompt_samples(checked):
        _, positions = sample.positions(checked.config.distill)
        for found, model in zip(rows, models, strict=True):
            with torch.no_grad():
                states = model(torch.tensor([sample.ids]), output_hidden_states=True).hidden_states[1:]
            found.append(torch.stack(states)[:, 0, list(positions)])
    exact, moved, student = (torch.cat(found, dim=1) for found in rows)
    error = (moved - exact).norm(dim=-1) / exact.norm(dim=-1)
    cosine = torch.cosine_similarity(moved, exact, dim=-1)
    assert noise.error == pytest.approx(error.mean(1).tolist(), rel=1e-3)
    assert noise.cosine == pytest.approx(cosine.mean(1).tolist(), abs=1e-6)
    for number, pair in enumerate(noise.pairs):
        target = moved[pair.teacher_layer - 1]
        expected = [(other - target).square().mean(-1).mean() for other in (exact[pair.teacher_layer - 1],
                                                                           student[pair.student_layer - 1])]  # fmt: skip
        assert [noise.loss[number], losses[number]] == pytest.approx([float(value) for value in expected], rel=1e-3)


LAYOUTS: dict[str, tuple[int, Values, Values]] = {
    "tp2": (2, {"tp": 2}, {"tp": 2}),
    "tp2sp, pp2": (2, {"tp": 2, "sp": True}, {"pp": 2}),
    "pp2, cp2": (2, {"pp": 2}, {"cp": 2}),
    "cp2, dp2": (2, {"cp": 2}, {"dp": 2}),
    "disjoint": (3, {"pp": 2, "ranks": "0-1"}, {"ranks": "2-2"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_do_not_matter(wide: Values, name: str) -> None:
    """Every rank of every layout finds what one rank finds."""
    ((expected, losses, _),) = run_ranks(1, noise_of, wide)
    world, teacher, student = LAYOUTS[name]
    for noise, others, _ in run_ranks(world, noise_of, with_layout(wide, teacher=teacher, student=student)):
        for key in ("cosine", "error", "own", "loss"):
            assert getattr(noise, key) == pytest.approx(getattr(expected, key), rel=2e-3, abs=1e-7), key
        assert others == pytest.approx(losses, rel=1e-4)


def test_own_noise(wide: Values) -> None:
    """A layer that stays in dtype adds nothing of its own, bit for bit, but passes on what came before; the first layer's noise
    is all its own; the worst are in order and hold no kept layer."""
    kept = changed(wide, teacher={"precision": {"linear": "weight_only", "keep_layers": [3]}})
    ((noise, _, _),) = run_ranks(1, noise_of, kept)
    assert noise.own[2] == 0 < noise.error[2]
    assert noise.own[0] == pytest.approx(noise.error[0], rel=1e-6)
    assert sorted(noise.worst) == [1, 2, 4, 5]
    assert [noise.own[layer - 1] for layer in noise.worst] == sorted(noise.own, reverse=True)[:4]


def test_through_the_bridge(tmp_path: Path, values: Values) -> None:
    """With a bridge, noise and distance are measured behind it, on unit vectors."""
    run = with_weight_only(with_bridge({key: section for key, section in values.items() if key != "eval"}, tmp_path))
    ((noise, losses, lines),) = run_ranks(1, noise_of, run)
    assert "through the bridge" in lines[1]
    width = 2 * noise.loss[0] / (2 - 2 * noise.space_cosine[0]) if noise.loss[0] else 0
    assert width > 0 and all(0 < value < loss for value, loss in zip(noise.loss, losses, strict=True))
    assert noise.space_cosine != pytest.approx([noise.cosine[pair.teacher_layer - 1] for pair in noise.pairs], rel=1e-9)


def test_a_teacher_of_itself(wide: Values) -> None:
    """A student that is the teacher in dtype is as far away as the noise: its share is 1 at every layer, and all are named."""
    ((noise, losses, lines),) = run_ranks(1, noise_of, changed(wide, student={"path": wide["teacher"]["path"]}))
    assert noise.loss == pytest.approx(losses, rel=1e-4)
    assert sum("above a tenth" in line for line in lines) == 5 and lines[-1].startswith("warn")


def test_gate() -> None:
    """A layer is named once, when the root of the ratio of losses passes a tenth; a student without distance counts."""
    gate = NoiseGate({1: 0.01, 2: 0.01}, {1: 1, 2: 3})
    assert gate.warnings({"student": [1, 2], "loss": [1.01, 1.01]}, step=1) == []
    (line,) = gate.warnings({"student": [1, 2], "loss": [1.01, 0.99]}, step=2)
    assert line.startswith("step 2: student layer 2: rounding of teacher layer 3 is 0.10 of") and "keep_worst" in line
    (line,) = gate.warnings({"student": [1, 2], "loss": [0.0, 0.5]}, step=3)
    assert "student layer 1" in line


def doctored(values: Values, folder: Path, name: str) -> Path:
    """What `oprd doctor --precision --out` writes."""
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(values))
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "oprd_megatron.cli", "doctor", os.fspath(config), "--precision", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].split()[:2] in (["pass", "precision"], ["warn", "precision"])
    return out


def test_the_doctors_file(tmp_path: Path, wide: Values) -> None:
    """The file decides which layers stay, is refused for another measurement, and a run with it starts."""
    out = doctored(wide, tmp_path, "noise")
    found = json.loads(out.read_text())
    precision = {"linear": "weight_only", "noise": str(out), "keep_worst": 2}
    run = changed(wide, teacher={"precision": precision})
    config = parse_config(run, "test")
    assert kept_layers(config.teacher.precision, 5) == set(found["worst"][:2])
    for other in (
        {**run, "distill": {"positions": "all", "layers": [1, 2]}},
        {**run, "distill": {"positions": "all", "normalize": "l2"}},
        changed(run, teacher={"path": wide["student"]["path"], "precision": {**precision, "keep_worst": 0}}),
    ):
        with pytest.raises(ConfigError, match="was measured with another"):
            preflight(parse_config(other, "test"), 1, starts_run=False)
    with pytest.raises(ConfigError, match="cannot be read"):
        missing = {**precision, "noise": str(tmp_path / "none.json")}
        preflight(parse_config(changed(wide, teacher={"precision": missing}), "test"), 1, starts_run=False)
    assert len(train_records(train_run(changed(run, run={"steps": 1})))) == 1


def warned(values: Values) -> list[str]:
    """On a rank: what a training says."""
    from oprd_megatron.loop import train

    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("oprd_megatron.watch").addHandler(handler)
    train(parse_config(values, "test"))
    return said


def test_training_warns(wide: Values) -> None:
    """With `noise: measure`, of a student that starts as the teacher every layer is named at the first step, on every rank; of
    a distant one none."""
    precision = {"linear": "weight_only", "noise": "measure"}
    run = changed(wide, teacher={"precision": precision}, run={"steps": 2})
    near = changed(run, student={"path": wide["teacher"]["path"]}, optimizer={"lr": 1e-9})
    for said in run_ranks(2, warned, with_layout(near, pp=2)):
        assert [line.split(":")[1].split()[-1] for line in said] == ["1", "2", "3", "4", "5"]
        assert all(line.startswith("step 1: ") for line in said)
    far = changed(run, run={"dir": str(Path(run["run"]["dir"]).parent / "far")})
    assert run_ranks(1, warned, far) == [[]]
