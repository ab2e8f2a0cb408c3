"""`oprd bridge`: a place that cannot be written is one line, before models are loaded or a bank is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.bridge.imported import import_ps_bank
from oprd_megatron.bridge.measured_map import measure_map
from oprd_megatron.bridge.stage1 import fit
from oprd_megatron.config import parse_config
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import UserError
from oprd_megatron.run_directory import checks
from tests.test_cli import assert_refused, oprd, yaml_of
from tests.training.test_bad_input import files_below

COMMANDS: dict[str, Callable[[RunConfig, Path], Any]] = {
    "fit": lambda config, folder: fit(config, folder / "x.safetensors"),
    "map": lambda config, folder: measure_map(config, folder / "x.json"),
    "import": lambda config, folder: import_ps_bank(folder / "bank.pt", config, folder / "x.safetensors", 0),
}


def nowhere(folder: Path) -> RunConfig:
    """A run of models that are not there: whatever looks at them says so."""
    return parse_config(
        {
            "run": {"dir": str(folder / "run"), "device": "cpu"},
            "teacher": {"path": "/no/teacher"},
            "student": {"path": "/no/student"},
            "rollout": {"prompts": {"path": "/no/prompts.jsonl"}},
        },
        "test",
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_place_that_cannot_be_written(tmp_path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below a file, and in a folder without the right to write; one that is not there yet can be made, and is not."""
    config = nowhere(tmp_path)
    (tmp_path / "notes").write_text("mine")
    before = files_below(tmp_path)
    with pytest.raises(
        UserError, match=r"^--out: .*/notes is not a directory that can be written; choose another --out$"
    ):
        COMMANDS[command](config, tmp_path / "notes" / "bridges")
    with pytest.raises(UserError, match="/no/"):
        COMMANDS[command](config, tmp_path / "new" / "bridges")
    with monkeypatch.context() as patch:
        patch.setattr(checks.os, "access", lambda path, mode: not mode & os.W_OK)
        with pytest.raises(UserError, match=r"^--out: .* is not a directory that can be written"):
            COMMANDS[command](config, tmp_path / "new")
    assert files_below(tmp_path) == before


def test_the_command(tmp_path: Path) -> None:
    """Exit code 2 and one line."""
    (tmp_path / "notes").write_text("mine")
    config = yaml_of(nowhere(tmp_path).model_dump(mode="json", exclude_unset=True), tmp_path)
    result = oprd("bridge", "import", "bank.pt", config, "--out", tmp_path / "notes" / "x.safetensors")
    assert_refused(result, "--out", "notes is not a directory that can be written")
