"""A benchmark without training: one process, weights from a Hugging Face directory or a checkpoint, the run's engine."""

from __future__ import annotations

import contextlib
import json
import zlib
from pathlib import Path
from typing import Any

from checkpoints_conversion.weights import check_weights
from oprd_megatron.benchmarks.grading import Grader
from oprd_megatron.benchmarks.run import load_benchmark, make_prompts, run_benchmark, sampling
from oprd_megatron.config import RunConfig
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.rollout.engine import RolloutEngine
from oprd_megatron.rollout.record import make_engine, tensors_of
from oprd_megatron.rollout.tokenizer import check_tokenizer, load_tokenizer
from oprd_megatron.rollout.vllm.build import Student
from oprd_megatron.saving.export import readable


def benchmark_student(
    config: RunConfig, settings: BenchmarkConfig, weights: Path, out: Path, engine: RolloutEngine | None = None
) -> dict[str, Any]:
    """Grade a student, and write `out`. Returns the summary.

    Args:
        config: the run; its engine writes.
        settings: the benchmark.
        weights: Hugging Face directory, checkpoint, or run directory.
        out: folder; one that is not complete is gone on with.
        engine: one that holds the student's weights; left out, the run's is made and given these weights.

    Raises:
        UserError: a broken model or problem file, math-verify is not installed, or `out` is not this benchmark's.
    """
    with contextlib.ExitStack() as stack:
        grader = stack.enter_context(Grader(settings.answer_seconds))
        problems = load_benchmark(settings, grader)
        hf_dir = stack.enter_context(readable(weights, config))
        architecture = check_weights(hf_dir)
        tokenizer = load_tokenizer(hf_dir)
        check_tokenizer(tokenizer, architecture.vocab_size, hf_dir)
        params = sampling(settings, config.rollout.max_response_tokens, len(tokenizer))
        longest = max(len(prompt.token_ids) for prompt in make_prompts(problems, tokenizer, settings))
        if engine is None:
            rollout = config.rollout.model_copy(update={"max_response_tokens": params.max_response_tokens})
            context = longest + params.max_response_tokens
            student = Student(config.model_copy(update={"rollout": rollout}), hf_dir, architecture, tokenizer, context)
            engine = make_engine(student)
            stack.callback(engine.close)
            engine.update_weights(0, tensors_of(hf_dir, architecture))
        return run_benchmark(engine, tokenizer, problems, settings, params, out, weights_name(engine, weights), grader)


def weights_name(engine: RolloutEngine, directory: Path) -> str:
    """What an engine's weights are called in a folder of responses: a checksum of all of them, or the directory that they came
    from if the engine cannot say."""
    copies = list(engine.checksums().values())
    if not copies or not copies[0]:
        return str(directory.resolve())
    return f"crc32 {zlib.crc32(json.dumps(sorted(copies[0].items())).encode()):08x}"
