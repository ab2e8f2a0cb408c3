"""`run`, `grade` and `compare` from a command line, with real engines; and the benchmark inside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import Result
from typer.testing import CliRunner

from oprd_megatron.benchmarks.in_loop import InLoop
from oprd_megatron.commands.evaluate import _settings, app
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.errors import ConfigError, DataError, UserError
from oprd_megatron.rollout.hf_engine import HFEngine
from tests.ranks import run_ranks
from tests.tiny_models import tiny_hf_model

pytest.importorskip("math_verify")

MODEL = Path(__file__).parents[2] / "models" / "smollm2-135m-instruct"
ROWS = [{"problem": f"What is {n} + {n}?", "answer": str(2 * n), "id": n} for n in (1, 20, 300)]


def problems(folder: Path) -> Path:
    path = folder / "sums.json"
    path.write_text(json.dumps(ROWS))
    return path


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def config_file(folder: Path, values: dict[str, Any]) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_run_grade_compare(tmp_path: Path, values: dict[str, Any]) -> None:
    """A tiny model by the run's own engine: twice the same figures, again the same from the recorded text, no difference; other
    weights are refused in the first's folder."""
    config, path = config_file(tmp_path, values), problems(tmp_path)
    asked = ["run", config, "--file", path, "-k", 2, "--max-tokens", 6]
    shown = run(*asked, "--out", tmp_path / "a").output
    assert "Avg@k" in shown and "pass@2" in shown
    run(*asked, "--out", tmp_path / "b", "rollout.batch_size=1")
    lines = (tmp_path / "a" / "responses.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted((tmp_path / "b" / "responses.jsonl").read_text().splitlines())
    run("grade", tmp_path / "a" / "responses.jsonl", "--file", path, "--out", tmp_path / "c")
    for other in "bc":
        compared = run("compare", tmp_path / "a", tmp_path / other, "--out", tmp_path / f"a{other}").output
        assert "no problem differs" in compared
    with pytest.raises(ConfigError, match="made with weights"):
        run(*asked, "--out", tmp_path / "a", "--weights", values["teacher"]["path"])
    with pytest.raises(UserError, match="exists already"):
        run("grade", tmp_path / "a" / "responses.jsonl", "--file", path, "--out", tmp_path / "c")


def test_mistakes_on_the_command_line(tmp_path: Path, values: dict[str, Any]) -> None:
    """Before a model is loaded: no such file, an answer that cannot be read, settings that do not go together."""
    config, out = config_file(tmp_path, values), tmp_path / "out"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([*ROWS, {"problem": "?", "answer": "&&", "id": 9}]))
    with pytest.raises(DataError, match=r"missing.json: no such file"):
        run("run", config, "--file", tmp_path / "missing.json", "--out", out)
    with pytest.raises(DataError, match=r"bad.json: item 4: the right answer '&&' cannot be read"):
        run("run", config, "--file", bad, "--out", out)
    with pytest.raises(ConfigError, match="samples: 16 greedy answers would all be the same"):
        run("run", config, "--file", bad, "--out", out, "--temperature", 0)
    with pytest.raises(ConfigError, match="--file: there is no benchmark"):
        run("run", config, "--out", out)
    with pytest.raises(ConfigError, match="top_p: "):
        run("run", config, "--file", bad, "--out", out, "--top-p", 2)
    assert not out.exists()
    run("run", config, "--file", bad, "--out", out, "--skip-unparsable", "-k", 1, "--max-tokens", 2)
    assert json.loads((out / "summary.json").read_text())["benchmarks"]["bad"]["problems"] == 3


def test_the_command_line_goes_before_the_section() -> None:
    """What is not said on the command line is as the run's section has it."""
    section = BenchmarkConfig(files=[Path("a.json")], samples=4, boxed_only=True, temperature=0.2)
    both = _settings(section, samples=2, boxed_only=None, files=None)
    assert (both.samples, both.boxed_only, both.temperature, both.files) == (2, True, 0.2, [Path("a.json")])


def in_loop(folder: str, path: str) -> dict[str, Any]:
    """One record on this rank; rank 0 of two holds the engine, both do where there are more."""
    engine = HFEngine(folder, torch.float32, "cpu", batch_size=4)
    engine.update_weights(0, ((name, weight.clone()) for name, weight in engine._weights.items()))
    for weight in engine._weights.values():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(weight.numel()))
    settings = BenchmarkConfig(files=[Path(path)], samples=2, every=5)
    benchmark = InLoop(settings, engine.tokenizer, 200, 260)  # long enough for lengths to differ
    assert [step for step in range(1, 13) if benchmark.due(step, 12)] == [5, 10, 12]
    return benchmark.record(3, engine)


def test_in_loop_is_the_same_on_every_layout(tmp_path: Path) -> None:
    """Engines share the work; every rank has the record, and it is that of one rank."""
    tiny_hf_model("llama", tmp_path / "model", std=0.1)
    alone = run_ranks(1, in_loop, str(tmp_path / "model"), str(problems(tmp_path)))[0]
    both = run_ranks(2, in_loop, str(tmp_path / "model"), str(tmp_path / "sums.json"))
    assert alone["kind"] == "benchmark" and alone["step"] == 3 and alone["benchmarks"]["sums"]["problems"] == 3
    assert both[0]["benchmarks"] == both[1]["benchmarks"] == alone["benchmarks"]


@pytest.mark.skipif(not MODEL.is_dir(), reason="needs models/smollm2-135m-instruct")
def test_a_real_model(tmp_path: Path, values: dict[str, Any]) -> None:
    """SmolLM2-135M-Instruct, greedy on sums of one digit: the whole path with a real tokenizer, and some right answer."""
    values["student"]["path"] = values["teacher"]["path"] = str(MODEL)
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {n} + 1?", "answer": n + 1}) + "\n" for n in (1, 2, 3)))
    asked = [
        "run",
        config_file(tmp_path, values),
        "--file",
        path,
        "-k",
        2,
        "--max-tokens",
        24,
        "--out",
        tmp_path / "out",
    ]
    run(*asked, "--temperature", 0.1, "--template", "{problem} Answer with a number.")
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["benchmarks"]["sums"]
    assert found["problems"] == 3 and found["samples"] == 2 and found["best"]["value"] > 0
