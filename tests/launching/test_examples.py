"""Every run in examples/ loads and plans, and its file says how to start it. One process for all."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints_conversion import read_architecture
from oprd_megatron.config import load_config
from oprd_megatron.errors import LayoutError
from oprd_megatron.launching.dry_run import dry_run
from tests.launching.twin import ROOT
from tests.qwen_configs import MODEL_CONFIGS
from tests.test_cli import assert_done, oprd

EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
ONE_SCREEN = 45


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in examples are from the project's folder."""
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_plans(path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With the published config.json of its models, on GPUs of 80 GB; nothing is written."""
    run_dir = load_config(path).run.dir
    before = run_dir.exists()
    dry_run(path, [])
    printed = capsys.readouterr().out
    assert printed.count("MEMORY OF A RANK") == printed.count("TIME OF A STEP") >= 1
    assert printed.rstrip().endswith("nothing was started") and run_dir.exists() == before


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_its_models_need_not_be_here(path: Path) -> None:
    """Every model's published config.json is there, and is one that the converters read."""
    config = load_config(path)
    for model in (config.teacher, *config.teachers, config.student):
        read_architecture(MODEL_CONFIGS / model.path.name)


def test_oprd_train_plans_too() -> None:
    """The same plan, by the command."""
    done = oprd("train", ROOT / "examples" / "laptop.yaml", "--dry-run")
    assert_done(done)
    assert "MEMORY OF A RANK" in done.stdout and done.stdout.rstrip().endswith("nothing was started")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it(path: Path) -> None:
    """One screen; the command is in the comment at the top and in the table of examples/README.md."""
    lines = path.read_text().splitlines()
    head = [line for line in lines[:12] if line.startswith("#")]
    assert len(lines) <= ONE_SCREEN and max(map(len, lines)) <= 140
    name = f"examples/{path.stem}"
    assert any(name in line for line in head), f"no command in the first lines of {path.name}"
    assert name in (ROOT / "examples" / "README.md").read_text()


def test_an_examples_own_mistake_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    """Several teachers that fit one by one, but not together, are refused."""
    path = ROOT / "examples" / "rl_experts.yaml"
    dry_run(path, ["rollout.vllm.gpu_memory_utilization=0.77"])
    assert "all teachers together, which stay on the device: at most 74." in capsys.readouterr().out
    with pytest.raises(LayoutError, match=r"2 teachers and the student need .*teaching.host_budget"):
        dry_run(path, ["rollout.vllm.gpu_memory_utilization=0.79"])
    dry_run(path, ["rollout.vllm.gpu_memory_utilization=0.79", "teaching.host_budget=10GiB"])


def test_no_two_examples_share_a_run_directory() -> None:
    """A run directory belongs to one run."""
    folders = [load_config(path).run.dir for path in EXAMPLES]
    assert len(set(folders)) == len(folders)
