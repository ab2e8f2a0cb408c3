"""tools/gpu_check.sh: what it prints, how it ends, and that its stages on a CPU find what they should."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks
from tools.gpu_check import __main__ as command
from tools.gpu_check import bench, stages
from tools.gpu_check.findings import COLUMNS, Finding, at_least, at_most, read_findings, table, write_finding
from tools.gpu_check.ranks import through_host
from tools.gpu_check.settings import Settings, missing, project_requirements, version
from tools.gpu_check.stage import run_checks
from tools.gpu_check.stages import Stage, all_stages, run_stage
from tools.gpu_check.train import read_run
from tools.update_bench.case import SHAPES

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"


def run_script(*options: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", str(SCRIPT), *options], capture_output=True, text=True, cwd=cwd, env=environment)


def rows(text: str) -> list[list[str]]:
    """The cells of every line of a printed table, without its head."""
    cells = [[cell.strip() for cell in line.split(" |")] for line in text.splitlines() if line.count(" |") == 4]
    assert tuple(cells[0]) == COLUMNS
    return [[cell.removeprefix("| ") for cell in row] for row in cells[1:]]


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.chdir(ROOT)
    return Settings("cpu", tmp_path)


def test_the_table_is_read_back() -> None:
    """One line a finding with five cells, whatever a figure contains."""
    found = [Finding("a | b", "pass", "1.5 GiB\nmore", "<= 2"), Finding("c", "skip")]
    assert rows(table([("env", finding) for finding in found])) == [
        ["env", "a / b", "pass", "1.5 GiB more", "<= 2"],
        ["env", "c", "skip", "", ""],
    ]


def test_findings_outlive_a_cut(tmp_path: Path) -> None:
    """What was written comes back; a half-written line at the end does not."""
    path = tmp_path / "x.jsonl"
    found = [at_most("a", 1.0, 2.0, "s"), at_least("b", 1.0, 2.0)]
    for finding in found:
        write_finding(path, finding)
    path.write_text(path.read_text() + '{"check": "c", "ver')
    assert read_findings(path) == found == [
        Finding("a", "pass", "1 s", "<= 2"),
        Finding("b", "FAIL", "1", ">= 2"),
    ]  # fmt: skip
    assert at_most("a", math.nan, 1.0).verdict == at_least("a", math.nan, 1.0).verdict == "FAIL"


def test_env_on_a_cpu(tmp_path: Path) -> None:
    """From another directory, which has modules of the same names: code 0, and results.json says what the table says."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise SystemExit(7)")
    done = run_script("--device", "cpu", "--stage", "env", "--out", "found", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    printed = rows(done.stdout)
    result = json.loads((tmp_path / "found" / "results.json").read_text())
    assert result["device"] == "cpu" and list(result["stages"]) == ["env"]
    assert [[row[1], row[2]] for row in printed] == [
        [finding["check"], finding["verdict"]] for finding in result["stages"]["env"]["findings"]
    ]
    assert {"versions", "bf16 GEMM", "copy", "transformer-engine"} <= {row[1] for row in printed}
    assert "Finding(check='versions'" in (tmp_path / "found" / "env.log").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--stage", "nope"], ["nope", "env", "bench"]),
        (["--stage", "env", "--student", "x"], ["--student", "--teacher"]),
        (["--student", "x", "--teacher", "x"], ["x is no Hugging Face directory"]),
        (["--limit", "0"], ["--limit 0"]),
    ],
)
def test_a_users_mistake_is_one_line(
    options: list[str], words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And code 2, before anything runs."""
    with pytest.raises(SystemExit) as ended:
        command.main([*options, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and all(word in said for word in words)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(tmp_path: Path) -> None:
    """One line that says what torch sees, and code 2."""
    done = run_script("--device", "cuda", "--out", str(tmp_path / "out"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "sees no GPU" in done.stderr


def test_a_stage_is_cut(settings: Settings) -> None:
    """Its process is ended and the table says so."""
    (found,) = run_stage(Stage("parity"), settings, limit_seconds=0.2)
    assert found.verdict == "FAIL" and found.figure.startswith("cut after 0.2 s; see ")


def test_absent_packages(settings: Settings) -> None:
    """What is needed fails in one line, what is wanted is a skip; nothing is started."""
    (needed,) = run_stage(Stage("parity", ("torch>=2.6", "no-such-package[all]>=1,<2")), settings, 5.0)
    assert needed.verdict == "FAIL" and needed.figure.startswith("missing: no-such-package;")
    (wanted,) = run_stage(Stage("vllm", wants=("no-such-package",)), settings, 5.0)
    assert wanted == Finding("vllm", "skip", "no-such-package is not installed")
    assert not list(settings.out.iterdir())
    assert missing(project_requirements()) == [] and version("no-such-package") is None


def test_exit_codes(settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A skip is no failure, a missing package is; chosen stages run, in their own order."""
    fakes = [Stage("env", wants=("no-such-package",)), Stage("parity", ("no-such-package",)), Stage("train")]
    monkeypatch.setattr(command, "all_stages", lambda: fakes)
    out = ["--device", "cpu", "--out", str(settings.out / "out")]
    assert command.main(["--stage", "env", *out]) == 0
    assert command.main(["--stage", "parity", "--stage", "env", *out]) == 1
    assert [row[0] for row in rows(capsys.readouterr().out.split("\n\n")[-2])] == ["env", "parity"]


def test_a_check_that_breaks_leaves_the_others(settings: Settings) -> None:
    """It becomes a failure that names the error; of another process's traceback, the last line."""

    def first(settings: Settings) -> Iterator[Finding]:
        yield Finding("before", "pass")
        raise RuntimeError("rank 0 failed:\nTraceback\nValueError: no")

    def second(settings: Settings) -> Iterator[Finding]:
        yield Finding("after", "pass")

    found = list(run_checks([first, second], settings))
    assert found == [
        Finding("before", "pass"),
        Finding("first", "FAIL", "RuntimeError: ValueError: no"),
        Finding("after", "pass"),
    ]


def test_stages_that_there_are() -> None:
    """Those that the documentation names; their limit is nine minutes."""
    assert {stage.name for stage in all_stages()} == {"env", "parity", "bench", "fp8", "vllm", "train"}
    assert stages.LIMIT_SECONDS == 540
    told = (ROOT / "docs" / "gpu.md").read_text()
    assert all(f"| `{stage.name}` |" in told for stage in all_stages())


def test_what_a_run_says() -> None:
    """A loss that does not fall fails; phases, probe and memory are told."""
    records: list[dict[str, Any]] = [
        {
            "kind": "train",
            "loss": 1.0 + 0.1 * (step > 6),
            "probe_difference": 1e-6,
            "seconds": {"student": 2.0, "rollout": 1.0},
        }
        for step in range(10)
    ]
    found = {f.check: f for f in read_run([*records, {"kind": "summary", "peak_memory_bytes": 2**30}], 0.95)}
    assert found["steps"].verdict == "pass" and found["loss, last 3 over first 3"].verdict == "FAIL"
    assert found["step"].figure == "3.00 s, of which student 2.00, rollout 1.00"
    assert found["peak memory"].figure == "1.00 GiB"


def result_of(**arms: dict[str, float]) -> dict[str, Any]:
    case = SHAPES["paper"]
    of = {arm: {**values, "rounds": [values]} if "peak_bytes" in values else values for arm, values in arms.items()}
    shape = {"layers": case.layers, "width": case.width, "prompt": case.prompt}
    return {"case": shape, "tokens": [case.response] * case.responses, "arms": of}


def test_useful_work_and_bars() -> None:
    """Matrices are the model's without its embeddings; ratios and the share of the ceiling are held against the bars."""
    case = SHAPES["paper"]
    figures = {
        "oprd": {"peak_bytes": 30, "update_seconds": 4.0},
        "opd_topk": {"peak_bytes": 40, "update_seconds": 4.2},
    }
    result = result_of(oprd=figures["oprd"], release={"failed": "out of memory"})  # type: ignore[dict-item]
    result["arms"]["opd-topk"] = {**figures["opd_topk"], "rounds": [figures["opd_topk"]]}
    length = case.prompt + case.response
    matrices = case.parameters - 2 * case.vocab * case.width
    expected = case.responses * 3 * (2 * length * matrices + 2 * case.layers * length**2 * case.width)
    assert bench.update_flops(result) == expected
    found = {f.check: f.verdict for f in bench.bars(result, ceiling=expected / 4 / 0.5)}
    assert found == {
        "peak, oprd / release": "skip",
        "peak, oprd / opd-topk": "pass",
        "update time, oprd / opd-topk": "FAIL",
        "oprd update, of the ceiling": "pass",
    }
    assert bench.arm_finding("release", {"failed": "out of memory"}, 1.0, 1.0).verdict == "skip"
    assert bench.arm_finding("oprd", {"failed": "out of memory"}, 1.0, 1.0).verdict == "FAIL"


def swapped() -> torch.Tensor:
    other = 1 - dist.get_rank()
    mine, theirs = torch.full((3,), float(dist.get_rank())), torch.empty(3)
    sent = [dist.P2POp(dist.isend, mine, other), dist.P2POp(dist.irecv, theirs, other)]
    for message in through_host(sent):
        message.wait()
    return theirs


def test_messages_through_the_host() -> None:
    """They arrive in the tensor that was given, as with torch's own call."""
    assert [found.tolist() for found in run_ranks(2, swapped)] == [[1.0] * 3, [0.0] * 3]


@pytest.mark.slow
def test_parity_and_training_on_a_cpu(tmp_path: Path) -> None:
    """All families, kernels and layouts are within their tolerances, and the loss of a short run falls."""
    done = run_script("--device", "cpu", "--stage", "parity", "--stage", "train", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout
    checks = {row[1]: row[2] for row in rows(done.stdout)}
    assert checks.pop("TE spec") == "skip" and set(checks.values()) == {"pass"}
    for check in (
        "llama fp32",
        "qwen3 bf16",
        "packed attention fp32",
        "tp2 fp32",
        "pp2 fp32",
    ):
        assert check in checks
