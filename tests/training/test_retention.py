"""Which checkpoints stay: the newest and the best; and how the best is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from oprd_megatron.benchmarks.results import MEASURES
from oprd_megatron.config import parse_config
from oprd_megatron.config.checkpoint import GRADED, BestConfig
from oprd_megatron.errors import CheckpointError, ConfigError
from oprd_megatron.evaluation.several import Evaluation
from oprd_megatron.saving.export import best_checkpoint
from oprd_megatron.saving.retention import complete_checkpoints, drop_others, figures_of, ranked, read_figures
from tests.ranks import run_ranks
from tests.training.runs import changed, train_on_rank

KL = BestConfig(measure="eval/kl", mode="min")
SCRIPT = {0: 9.0, 2: 1.0, 4: 5.0, 6: 6.0}
"""Held-out KL after some steps."""


def scripted_run(values: dict[str, Any]) -> None:
    """A real run whose held-out figures are those of `SCRIPT`."""
    record = Evaluation.record
    Evaluation.record = lambda self, step, *others, **more: {  # type: ignore[method-assign]
        **record(self, step, *others, **more), "kl": SCRIPT[step],
    }  # fmt: skip
    train_on_rank(values)


def kept(folder: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(folder / "checkpoints")]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_the_newest_and_the_best_stay_over_a_resume(tmp_path: Path, values: dict[str, Any], asynchronous: bool) -> None:
    """Best after step 2; the run is stopped after 4, its metrics are lost, and it goes on: 2 is still known to be the best, and
    what was measured after 4 is the figure of 5."""
    values = changed(values, run={"steps": 6, "stop_at": 4}, eval={"every": 2})
    best = {"measure": "eval/kl", "mode": "min"}
    values["checkpoint"] = {"every": 1, "keep": 2, "keep_best": best, "asynchronous": asynchronous}
    run_ranks(1, scripted_run, values)
    run_dir = Path(values["run"]["dir"])
    assert kept(run_dir) == [2, 3, 4]
    assert read_figures(run_dir / "checkpoints" / "iter_0000003")["eval/kl"] == {"step": 2, "value": 1.0}
    (run_dir / "metrics.jsonl").unlink()
    run_ranks(1, scripted_run, changed(values, run={"stop_at": None}))
    assert kept(run_dir) == [2, 5, 6]
    assert read_figures(run_dir / "checkpoints" / "iter_0000005")["eval/kl"] == {"step": 4, "value": 5.0}
    assert best_checkpoint(run_dir).name == "iter_0000002"


def checkpoints(folder: Path, figures: dict[int, Any]) -> Path:
    """Complete checkpoints with these figures, {step: (where measured, value)}; None for none."""
    for step, figure in figures.items():
        path = folder / f"iter_{step:07d}"
        path.mkdir(parents=True)
        (path / "metadata.json").write_text("{}")
        if figure is not None:
            (path / "figures.json").write_text(
                json.dumps({"eval/kl": dict(zip(("step", "value"), figure, strict=True))})
            )
    return folder


def test_ranking(tmp_path: Path) -> None:
    """By value; of those that share a measurement the one that was measured; the unmeasured never."""
    folder = checkpoints(tmp_path, {1: None, 2: (2, 0.5), 3: (2, 0.5), 4: (4, 0.7), 10000000: (9, 0.1)})
    (folder / "iter_0000005.incomplete").mkdir()
    (folder / "iter_0000006").mkdir()  # no metadata.json
    steps = lambda best: [int(path.name[5:]) for path in ranked(folder, best)]  # noqa: E731
    assert steps(KL) == [10000000, 2, 3, 4]
    assert steps(KL.model_copy(update={"mode": "max"})) == [4, 2, 3, 10000000]


def test_dropping(tmp_path: Path) -> None:
    """The newest is never dropped, nor what is of later steps; what was left half done is."""
    folder = checkpoints(tmp_path / "a", {1: (1, 0.1), 2: (2, 0.9), 3: (3, 0.5), 9: (9, 0.2)})
    for name in ("iter_0000007.incomplete", "iter_0000001.dropped"):
        (folder / name).mkdir()
    drop_others(folder, folder / "iter_0000003", keep=1, best=KL)
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000001", "iter_0000003", "iter_0000009"]
    drop_others(folder, folder / "iter_0000003", keep=None, best=None)
    assert len(list(folder.iterdir())) == 3
    drop_others(folder, folder / "iter_0000003", keep=1, best=None)
    assert sorted(path.name for path in folder.iterdir()) == ["iter_0000003", "iter_0000009"]


def test_names_of_figures() -> None:
    """Nested ones by their path; what is no finite number is left out."""
    record = {
        "kind": "eval",
        "step": 4,
        "kl": 0.1,
        "cosine": None,
        "terms": {"oprd": 2, "topk": float("nan")},
        "layers": {"a": 1},
    }
    assert figures_of(record) == {"eval/kl": {"step": 4, "value": 0.1}, "eval/terms/oprd": {"step": 4, "value": 2.0}}
    record = {"kind": "benchmark", "step": 2, "seconds": 1.0, "benchmarks": {"aime": {"accuracy": 0.5}}}
    assert figures_of(record) == {"benchmark/aime/accuracy": {"step": 2, "value": 0.5}}
    assert set(GRADED) == set(MEASURES)


@pytest.mark.parametrize(
    ("measure", "sections", "said"),
    [
        ("eval/kl", {"eval": None}, "eval/kl is never measured: there is no eval section; add one"),
        ("benchmark/aime/accuracy", {}, "there is no benchmark section; add one"),
        ("eval/kk", {}, "eval/kk is not measured in this run; there are eval/cosine, eval/cross_entropy, eval/kl"),
        ("train/loss", {}, "checkpoint.keep_best.measure"),
    ],
)
def test_what_is_never_measured_is_refused(values: dict[str, Any], measure: str, sections: Any, said: str) -> None:
    """In one line, with the config."""
    values = {**values, "checkpoint": {"keep_best": {"measure": measure, "mode": "min"}}, **sections}
    with pytest.raises(ConfigError) as caught:
        parse_config(values, "test")
    assert said in str(caught.value) and "\n" not in str(caught.value)
    values = changed({**values, "eval": {"prompts": {"path": "p"}}}, eval={"every": 0})
    values["checkpoint"]["keep_best"]["measure"] = "eval/kl"
    with pytest.raises(
        ConfigError, match=r"not measured between the first and the last step \(eval.every: 0\); set eval.ev"
    ):
        parse_config(values, "test")


def test_a_run_without_a_best(tmp_path: Path, values: dict[str, Any]) -> None:
    """`oprd export RUN OUT --best` says why in one line."""
    with pytest.raises(CheckpointError, match=r"--best needs a run directory whose config has checkpoint.keep_best"):
        best_checkpoint(tmp_path)
    (checkpoints(tmp_path / "c", {1: None}) / "iter_0000001" / "figures.json").write_text("{torn")
    with pytest.raises(CheckpointError, match=r"figures.json: not readable; delete it"):
        ranked(tmp_path / "c", KL)
