"""What tests of several packages share: a tiny run, and the demo teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.runs import tiny_run
from tools.make_demo_teacher import make_demo_teacher


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-seed", type=int, help="seed of the random part of the parity matrix")


@pytest.fixture
def values(tmp_path: Path) -> dict[str, Any]:
    """A tiny run (five-layer teacher, four-layer student, few prompts; seconds) as nested dicts, for a test to change."""
    return tiny_run(tmp_path)


@pytest.fixture(scope="session")
def demo_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as tools/make_demo_teacher.py writes it (540 MB, 20 s), made once."""
    folder = tmp_path_factory.mktemp("demo") / "teacher"
    assert make_demo_teacher(folder)
    return folder
