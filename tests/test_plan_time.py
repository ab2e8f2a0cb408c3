"""What `oprd plan` says of the time of a step, and of ranks that do not fit into their GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_conversion import read_architecture
from oprd_megatron.config import load_config, parse_config
from oprd_megatron.errors import LayoutError
from oprd_megatron.planning import Cluster, RunPlan, check_room, plan_run, plan_text, step_times
from oprd_megatron.planning.rates import Rates, read_rates
from oprd_megatron.planning.room import check_device, ways_out
from oprd_megatron.planning.step_time import active_parameters
from tests.qwen_configs import MODEL_CONFIGS, QWEN_7B, QWEN_72B, write_config
from tests.test_cli import assert_done, assert_refused, oprd, yaml_of

ROOT = Path(__file__).parents[1]
GB = 10**9


def values_for(folder: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """72B on tp 8 teaches 7B on tp 2, two nodes, few and short rollouts."""
    values: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / "run")},
        "teacher": {"path": str(write_config(folder / "72b", QWEN_72B)), "parallel": {"tp": 8, "dp": 2}},
        "student": {"path": str(write_config(folder / "7b", QWEN_7B)), "parallel": {"tp": 2, "dp": 8, "sp": True}},
        "rollout": {
            "engine": "vllm", "prompts": {"path": "none.jsonl", "max_tokens": 100}, "prompts_per_step": 8,
            "responses_per_prompt": 2, "max_response_tokens": 400,
        },
        "optimizer": {"distributed": True},
    }  # fmt: skip
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    return values


def planned(folder: Path, gpu_memory: int = 80 * GB, **sections: dict[str, Any]) -> tuple[Any, RunPlan]:
    config = parse_config(values_for(folder, **sections), "test")
    return config, plan_run(config, 16, 8, 8, gpu_memory)


def test_parameters_that_work() -> None:
    """Published figures: 72.7 and 7.6 billion less the embedding; of 30.5 billion 3.3 are active, 3.0 without both ends."""
    found = lambda name, head: active_parameters(read_architecture(MODEL_CONFIGS / name), head)  # noqa: E731
    assert found("Qwen2.5-72B-Instruct", True) == 72_706_203_648 - 152064 * 8192
    assert found("Qwen2.5-7B", True) - found("Qwen2.5-7B", False) == 152064 * 3584
    assert found("Qwen3-4B", True) - found("Qwen3-4B", False) == 151936 * 2560  # tied: the embedding is the head
    assert found("Qwen3-30B-A3B", True) == pytest.approx(3.35e9 - 151936 * 2048, rel=0.02)


def test_time_of_the_longest_batch(tmp_path: Path) -> None:
    """Every phase from first principles, for responses that are all as long."""
    config, plan = planned(tmp_path)
    cluster = Cluster()
    time = step_times(config, plan, cluster).longest
    tokens, all_tokens = 16 * 400, 16 * 500
    sizes = [active_parameters(model.architecture, False) for model in (plan.teacher, plan.student)]
    assert time.tokens == tokens
    assert time.teacher == pytest.approx(2 * sizes[0] * all_tokens / 445e12 / 16)
    assert time.student == pytest.approx(6 * sizes[1] * all_tokens / 396e12 / 16)
    assert time.exchange == pytest.approx(plan.traffic.total_bytes / 40e9 / 16)
    kept = plan.student.memory[0]
    assert time.update == pytest.approx(0.5 + (kept.gradients + kept.weights) / 40e9)
    assert time.sync == pytest.approx(2.0 + 4.0 + 2 * sizes[1] / 40e9)
    read = (
        0.004 + 2 * sizes[1] / 2e12 + 2 * sizes[1] / 396e12
    )  # an engine writes one response; its cache is read besides
    cache = 2 * 28 * 4 * 128 * 2 / 2e12 * sum(100 + n for n in range(400))
    assert time.rollout == pytest.approx(400 * read + cache + 2 * sizes[1] * 100 / 396e12)
    parts = (time.rollout, time.teacher, time.exchange, time.student, time.update, time.sync)
    assert time.whole == pytest.approx(sum(parts))


def test_time_follows_the_config(tmp_path: Path) -> None:
    """Recomputation, fp8, a pipeline's bubble, ranks of their own, recorded text, and the cluster's rates."""
    plain = step_times(*planned(tmp_path), Cluster()).longest
    again = step_times(*planned(tmp_path, student={"recompute": {"granularity": "full"}}), Cluster()).longest
    assert again.student == pytest.approx(plain.student * 8 / 6)
    fp8 = step_times(*planned(tmp_path, teacher={"precision": {"linear": "fp8"}}), Cluster()).longest
    assert fp8.teacher == pytest.approx(plain.teacher * 445 / 690)
    piped = step_times(
        *planned(tmp_path, student={"parallel": {"tp": 2, "sp": True, "pp": 4, "dp": 2}}), Cluster()
    ).longest
    assert piped.student == pytest.approx(plain.student * (1 + 3 / 8))  # 8 micro-batches of one on 4 stages
    apart = {
        "teacher": {"parallel": {"tp": 8, "ranks": "0-7"}},
        "student": {"parallel": {"tp": 2, "sp": True, "ranks": "8-15"}},
    }
    alone = step_times(*planned(tmp_path, **apart, rollout={"engine": "file", "file": "r.parquet"}), Cluster()).longest
    assert (alone.rollout, alone.sync) == (0, 0)
    assert alone.whole == pytest.approx(alone.exchange + alone.teacher + alone.update) and alone.teacher > alone.student
    slow = step_times(*planned(tmp_path), Cluster(teacher_flops=44.5e12)).longest
    assert slow.teacher == pytest.approx(10 * plain.teacher)


def test_vllm_takes_turns(tmp_path: Path) -> None:
    """Its share counts beside what stays, not beside activations; asleep its weights are in host memory."""
    _, plan = planned(tmp_path, rollout={"vllm": {"gpu_memory_utilization": 0.5, "tp": 2}})
    rank = plan.fullest
    assert (rank.vllm, rank.engine, rank.vllm_on_host) == (40 * GB, 0, plan.student.engine_bytes // 2)
    assert rank.writing_bytes == rank.teacher + rank.student + 40 * GB
    assert rank.learning_bytes == rank.teacher + rank.student + rank.activations + rank.spool + rank.outputs
    assert rank.device_bytes == max(rank.writing_bytes, rank.learning_bytes)
    assert "vLLM" in plan_text(plan) and " engine  " not in plan_text(plan)


def vllm(share: float) -> dict[str, Any]:
    return {"vllm": {"gpu_memory_utilization": share}}


@pytest.mark.parametrize(
    ("gpu", "sections", "expected"),
    [
        (80, {"optimizer": {"distributed": False}, "rollout": vllm(0.1)}, "optimizer.distributed=true"),
        (60, {"rollout": vllm(0.5)}, "rollout.vllm.gpu_memory_utilization="),
        (48, {"rollout": {**vllm(0.06), "max_response_tokens": 8000}}, "student.recompute.granularity=full"),
    ],
    ids=["optimizer", "vllm", "activations"],
)  # fmt: skip
def test_ways_out(tmp_path: Path, gpu: int, sections: dict[str, Any], expected: str) -> None:
    """One line with what is missing and three settings; each, planned again as on the command line, holds what it says."""
    config, plan = planned(tmp_path, gpu * GB, **sections)
    with pytest.raises(LayoutError) as caught:
        check_room(config, plan, gpu * GB, 8)
    line = str(caught.value)
    assert "\n" not in line and "rank 0 needs" in line and "too much; ways out:" in line and expected in line
    ways = ways_out(config, plan, gpu * GB, 8)
    assert len(ways) == 3 and sum(way.device_bytes <= gpu * GB for way in ways) >= 1
    path = yaml_of(values_for(tmp_path, **sections), tmp_path)
    for way in ways:
        again = plan_run(load_config(path, way.settings), 16, 8, 8, gpu * GB)
        assert again.fullest.device_bytes == way.device_bytes < plan.fullest.device_bytes
    check_room(config, plan, plan.fullest.device_bytes, 8)


def test_a_run_that_starts_is_held_against_its_gpus(tmp_path: Path) -> None:
    """The same line; a colocated engine's share is one of the GPU that is there."""
    bridge = tmp_path / "b.safetensors"
    save_file({"teacher.1.projection": torch.zeros(8, 8192)}, bridge)
    config = parse_config(values_for(tmp_path, distill={"bridge": str(bridge)}, rollout=vllm(0.4)), "test")
    check_device(config, 16, 80 * GB, 8)
    with pytest.raises(LayoutError, match=r"vLLM 22.4 GiB.* of its GPU's 55.9 GiB: .* ways out: "):
        check_device(config, 16, 60 * GB, 8)


def test_the_command(tmp_path: Path) -> None:
    """Time in the text and in the json, from a cluster's file; too small a GPU is exit code 2 after the plan."""
    values = values_for(tmp_path)
    values["rollout"] |= vllm(0.4)
    config, out = yaml_of(values, tmp_path), tmp_path / "plan.json"
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text("teacher_flops: 44.5e12\ngpus_per_node: 4\n")
    options = ("plan", config, "--bridge-rank", "8")
    done = oprd(*options, "--cluster", cluster, "--json", out)
    assert_done(done)
    assert "TIME OF A STEP" in done.stdout and "4 nodes of 4" in done.stdout and " 44 TFLOP/s" in done.stdout
    assert json.loads(out.read_text())["times"]["longest"]["teacher"] > 0
    small = oprd(*options, "--gpu-memory", "40GB")
    assert "TIME OF A STEP" in small.stdout
    assert_refused(small, "rank 0 needs", "of its GPU's 37.3 GiB", "ways out: ")
    cluster.write_text("teacher_flop: 1\n")
    assert_refused(oprd(*options, "--cluster", cluster), "teacher_flop")
    assert_refused(oprd(*options, "--gpu-memory", "many"), "--gpu-memory")


def test_the_tool_has_the_plans_formulas() -> None:
    """tools/simulate_schedule.py reads its file into the plan's rates, and still prints its table."""
    path = ROOT / "tools" / "clusters" / "qwen72b_to_7b.yaml"
    rates = read_rates(Rates, path)
    assert rates.teacher_seconds == pytest.approx(2 * 72.7e9 / 445e12)
    small = ["--nodes", "1", "--steps", "1", "--prompts-per-node", "4"]
    command = [sys.executable, ROOT / "tools" / "simulate_schedule.py", path, *small]
    assert read_rates(Cluster, path) == Cluster()  # its machines are the default ones
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert "| 1 | colocated | 8 in turn |" in done.stdout
