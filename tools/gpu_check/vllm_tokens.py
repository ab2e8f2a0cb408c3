"""A vLLM engine's greedy tokens: `python -m gpu_check.vllm_tokens REQUEST.json ANSWER.json`. Imports nothing of the project."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path


def main(request_file: Path, answer_file: Path) -> None:
    """Start the engine, write tokens, and leave."""
    import vllm

    request = json.loads(request_file.read_text())
    started = time.perf_counter()
    engine = vllm.LLM(
        model=request["model"], dtype=request["dtype"], enforce_eager=True, max_model_len=256,
        gpu_memory_utilization=0.3, disable_log_stats=True,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request["tokens"], ignore_eos=True)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], sampling, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    answer_file.write_text(json.dumps({"version": vllm.__version__, "seconds": seconds, "tokens": tokens}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
