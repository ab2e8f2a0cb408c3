"""`oprd doctor`: a sound run passes every check, and a broken one is told what is wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from oprd_megatron import diagnosis, placing
from oprd_megatron.config import parse_config
from oprd_megatron.models import Model
from oprd_megatron.platform import select_platform
from oprd_megatron.preflight import preflight
from oprd_megatron.representation.exchange import Delivery
from tests.ranks import run_ranks
from tests.training.runs import with_layout


def check(values: dict[str, Any], breakage: str | None = None) -> list[tuple[str, str, str]]:
    """(check, verdict, detail) of each finding on this rank, with something broken."""
    if breakage == "gradient":
        build = placing.build_model

        def build_wrong(*args: Any, **kwargs: Any) -> Model:
            model = build(*args, **kwargs)
            if model.grid.layout.tp == 2 and not kwargs["frozen"]:
                model.chunks[0].decoder.layers[0].mlp.linear_fc2.weight.data.mul_(1.01)
            return model

        placing.build_model = build_wrong
    if breakage == "bytes":
        Delivery.post = lambda self, post=Delivery.post: (post(self), setattr(self, "sent_bytes", self.sent_bytes + 1))
    if breakage == "versions" and dist.get_rank() == 1:
        diagnosis._version = lambda package: "0.0"
    checked = preflight(parse_config(values, "test"), dist.get_world_size(), starts_run=False)
    return [(f.check, f.verdict, f.detail) for f in diagnosis.findings(checked, select_platform("cpu"))]


LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tp": 2}, {"tp": 2}),
    "pp2 to cp2": (2, {"pp": 2}, {"cp": 2}),
    "disjoint": (4, {"tp": 2, "ranks": "0-1"}, {"pp": 2, "ranks": "2-3"}),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_sound_run_passes(values: dict[str, Any], name: str) -> None:
    """Bytes, gradient and self-teaching pass in shared and disjoint layouts, and every rank says the same."""
    world, teacher, student = LAYOUTS[name]
    ranks = run_ranks(world, check, with_layout(values, teacher=teacher, student=student))
    assert all(found == ranks[0] for found in ranks)
    verdicts = {name: verdict for name, verdict, _ in ranks[0]}
    assert verdicts["bytes"] == verdicts["gradient"] == verdicts["student = teacher"] == verdicts["versions"] == "pass"
    assert "FAIL" not in verdicts.values()


def test_nothing_smaller_to_compare_with(values: dict[str, Any]) -> None:
    """One rank: the gradient check says why it did not run."""
    (found,) = run_ranks(1, check, values)
    assert {name: verdict for name, verdict, _ in found}["gradient"] == "skip"


@pytest.mark.parametrize("breakage", ["gradient", "bytes", "versions"])
def test_what_is_broken_fails(values: dict[str, Any], breakage: str) -> None:
    """A layout whose gradient differs, bytes that were not planned, and ranks with other versions are each named."""
    found = run_ranks(2, check, with_layout(values, tp=2), breakage)[0]
    failed = [name for name, verdict, _ in found if verdict == "FAIL"]
    assert failed == [breakage]
    assert all("\n" not in detail for _, _, detail in found)


def test_the_command(values: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One line a check, exit code 0."""
    import subprocess
    import sys

    import yaml

    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "oprd_megatron.cli", "doctor", os.fspath(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert all(line.split()[0] in ("pass", "skip") for line in lines) and len(lines) >= 5
