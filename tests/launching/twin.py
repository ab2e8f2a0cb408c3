"""A scaled-down twin of examples/oprd_qwen72b_to_7b.sh: the same script and YAML, with overrides and tiny random models.

Depths are 20 : 7 as 80 : 28, widths 128 : 56 as 8192 : 3584. CPU ranks: no fp8, no vLLM, fp32.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.tiny_models import tiny_hf_model

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "oprd_qwen72b_to_7b.sh"
BIN = Path(sys.executable).parent


def make_twin(folder: Path) -> list[str]:
    """Models and prompts in `folder`, and the overrides that make the script's run one of two ranks with them."""
    tiny_hf_model(
        "qwen2", folder / "72b", num_layers=20, hidden_size=128, heads=16, kv_heads=2, ffn=232, std=0.05, tied=False
    )
    tiny_hf_model(
        "qwen2", folder / "7b", num_layers=7, hidden_size=56, heads=14, kv_heads=2, ffn=148, seed=1, tied=False
    )
    lines = [json.dumps({"prompt": f"say {number}"}) for number in range(24)]
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return [
        f"run.dir={folder}/run", "run.steps=8", "run.micro_batch_tokens=128", "run.device=cpu", "run.time_margin_minutes=0",
        f"teacher.path={folder}/72b", "teacher.dtype=fp32", "teacher.precision.linear=dtype", "teacher.parallel={tp: 2, dp: 1}",
        f"student.path={folder}/7b", "student.dtype=fp32", "student.parallel={tp: 1, dp: 2}",
        "rollout.engine=hf", f"rollout.prompts.path={folder}/prompts.jsonl", "rollout.prompts_per_step=4",
        "rollout.max_response_tokens=8", f"distill.bridge={folder}/bridge.safetensors", "bridge.rank=4", "bridge.max_rank=8",
        "bridge.prompts=8", "checkpoint.every=2", "optimizer.lr=1e-3", "optimizer.eps=1e-6",
        "logging={progress: false, tensorboard: false}",
    ]  # fmt: skip


def environment(**more: str) -> dict[str, str]:
    """This one, without a SLURM job's or a launcher's own variables, and with this Python's torchrun first on the path."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "MASTER_", "TORCHELASTIC"))}
    path = f"{BIN}{os.pathsep}{kept['PATH']}"
    return {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def script(*arguments: str, program: str = "bash", **variables: str) -> subprocess.CompletedProcess[str]:
    """The script, to its end."""
    return subprocess.run(
        [program, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=150, check=False, cwd=ROOT,
        env=environment(**variables),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
