"""tools/bench_update.py: its arms compute the same thing, and it counts what is there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from oprd_megatron.errors import UserError
from oprd_megatron.platform import Platform
from tools.update_bench.case import SHAPES, TERMS, read_rollouts, sweep
from tools.update_bench.meter import Meter
from tools.update_bench.report import BARS, SAME, disagreements, judge, notes, plot

TOOL = Path(__file__).parents[2] / "tools" / "bench_update.py"


def run_tool(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *options], capture_output=True, text=True)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All arms on a tiny slice, two rounds, on recorded rollouts of unequal length."""
    folder = tmp_path_factory.mktemp("bench")
    lines = [
        {"prompt_ids": list(range(3, 3 + prompt)), "response_ids": list(range(50, 50 + response))}
        for prompt, response in ((5, 40), (9, 12))
    ]
    (folder / "rollouts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--shape", "tiny", "--rounds", "2", "--device", "cpu", "--rollouts", str(folder / "rollouts.jsonl")]
    done = run_tool(*options, "--out", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "update.md").read_text() in done.stdout
    assert (folder / "out" / "update.png").stat().st_size > 10_000
    return json.loads((folder / "out" / "update.json").read_text())


def test_arms_that_compute_the_same_thing_agree(report: dict[str, Any]) -> None:
    """Loss and gradient norm of opd-x and dense-x, and of ours and the released OPRD: equal to fp32's rounding."""
    (case,) = report["cases"]
    arms = case["arms"]
    assert len(SAME) == 1 + len(TERMS)
    for arm, other in SAME:
        for key in ("loss", "grad_norm"):
            assert arms[arm][key] == pytest.approx(arms[other][key], rel=1e-4), (arm, key)
        assert arms[arm]["grad_norm"] > 0.01
    assert len({round(of["grad_norm"], 4) for of in arms.values()}) == 4  # and the four losses are not the same
    assert case["tokens"] == [40, 12]


def test_what_is_written(report: dict[str, Any]) -> None:
    """Every arm has its rounds, with time, memory and what it computed; a round does not change the next."""
    (case,) = report["cases"]
    assert {"name", "case", "machine", "resident_bytes", "tokens", "arms"} == case.keys()
    assert list(case["arms"]) == SHAPES["tiny"].arms
    assert case["resident_bytes"] == 3 * 4 * parameters_of_tiny()  # two models and one gradient buffer, fp32
    keys = {
        "loss",
        "grad_norm",
        "update_seconds",
        "teacher_seconds",
        "optimizer_seconds",
        "peak_bytes",
        "teacher_peak_bytes",
    }
    for arm, of in case["arms"].items():
        assert keys <= of.keys() and len(of["rounds"]) == 2, arm
        assert of["rounds"][0]["loss"] == of["rounds"][1]["loss"]
        assert of["update_seconds"] > 0 and of["peak_bytes"] > 0
        assert of["left_bytes"] < 10_000
    assert len(report["bars"]) == 4 and {"bar", "at_most", "ratios", "passed"} == report["bars"][0].keys()


def parameters_of_tiny() -> int:
    """Of the tiny shape, its vocabulary padded from 300 to 384 rows; norms and the biases of q, k and v too."""
    case = SHAPES["tiny"]
    norms_and_biases = case.layers * (2 * case.width + case.width + 2 * case.kv_width) + case.width
    return case.parameters + (384 - 300) * case.width + norms_and_biases


def test_the_meter_counts_forward_backward_and_what_a_kernel_makes() -> None:
    """The peak of log-softmax's backward is known: weights' gradient and three times [n, v]; what is freed does not count."""
    meter = Meter(Platform(torch.device("cpu"), "gloo"))
    states, weight = torch.randn(512, 64), torch.randn(2000, 64, requires_grad=True)
    with meter:
        with meter.phase("teacher"):
            kept = states @ weight.detach().T
            del kept
        with meter.phase("student"):
            (states @ weight.T).log_softmax(-1).square().sum().backward()
    whole = 4 * 512 * 2000
    assert meter.peak["teacher"] == whole
    assert 3 * whole <= meter.peak["update"] <= 4 * whole + 4 * 2000 * 64 + 4096
    assert meter.left == 4 * 2000 * 64


def test_bars_and_disagreements() -> None:
    """Ratios are of the same round, a bar needs all of its figures, and arms that differ are named."""

    def arm(peak: int, seconds: float, loss: float = 1.0) -> dict[str, Any]:
        of = {"peak_bytes": peak, "update_seconds": seconds, "teacher_seconds": 1.0, "loss": loss, "grad_norm": 1.0}
        return {**of, "rounds": [of, {**of, "update_seconds": 2 * seconds}]}

    arms = {"oprd": arm(40, 1.0), "opd-topk": arm(50, 2.0), "dense-topk": arm(120, 4.0, 1.1), "release": arm(70, 1.0)}
    result = {"case": {"dtype": "fp32"}, "arms": arms}
    release, ours, time, dense = judge(result)
    assert [of["passed"] for of in (release, ours, time, dense)] == [False, True, True, True]
    assert time["ratios"][0] == [0.5, 0.5, 0.5] and time["ratios"][1] == pytest.approx(
        [(2 / 3 + 3 / 5) / 2, 3 / 5, 2 / 3]
    )
    assert disagreements(result) == ["opd-topk and dense-topk differ in loss: 1, 1.1"]
    arms["release"] = {"rounds": [], "failed": "out of memory"}
    assert len(judge(result)) == 3


def test_bars_are_told_for_the_slice_only(report: dict[str, Any]) -> None:
    """Another shape has its figures, and one line that says which shape the bars are for."""
    results = report["cases"]
    told = notes(results, "slice").splitlines()
    assert [line.startswith(("- pass: ", "- MISS: ")) for line in told[: len(BARS) + 1]] == [True] * len(BARS) + [False]
    assert notes(results, "tiny").splitlines() == [
        "- the bars are for `--shape slice`; they do not judge `tiny`",
        *told[len(BARS) :],
    ]


def test_a_sweep_is_plotted_without_what_did_not_fit(report: dict[str, Any], tmp_path: Path) -> None:
    """An arm that ran out of memory in one case of a sweep lacks that point, and there is a picture all the same."""
    (case,) = report["cases"]
    cases = [
        {**case, "case": {**case["case"], "varies": varies, "response": response}}
        for varies, response in (("headline", 48), ("terms", 48), ("length", 24), ("length", 96))
    ]
    cases[3]["arms"] = {**case["arms"], "release": {"rounds": [], "failed": "out of memory"}}
    plot(cases, tmp_path / "update.png")
    assert (tmp_path / "update.png").stat().st_size > 10_000


@pytest.mark.parametrize("shape", ["slice", "paper"])
def test_sweeps_vary_one_thing_at_a_time(shape: str) -> None:
    """Around a middle case that has all terms; every case has a name of its own."""
    cases = sweep(shape, SHAPES[shape])
    middle = cases[0]
    assert middle.terms == TERMS and len({str(case) for case in cases}) == len(cases)
    for case in cases[1:]:
        changed = [
            name for name in ("response", "width", "vocab", "layers") if getattr(case, name) != getattr(middle, name)
        ]
        assert changed == [{"length": "response", "vocabulary": "vocab"}.get(case.varies, case.varies)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}\n", "line 1: not json with prompt_ids"),
        ('{"prompt_ids": [1], "response_ids": [2]}\n{"prompt_ids": [1], "response_ids": [300]}\n', "line 2: a token id"),
        ('{"prompt_ids": [1], "response_ids": []}\n', "line 1: prompt or response is empty"),
        ("", "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recorded_rollout(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        read_rollouts(tmp_path / "r.jsonl", 300)


def test_a_mistake_is_one_line() -> None:
    done = run_tool("--shape", "tiny", "--rollouts", "nowhere.jsonl")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: --rollouts: there is no file nowhere.jsonl; `oprd rollout CONFIG --out FILE` writes one"
    ]
