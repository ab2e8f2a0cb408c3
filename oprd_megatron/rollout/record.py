"""Rollouts to a file, without training: one process, weights from disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import trange

from checkpoints_conversion import Architecture, mappings_for, read_architecture
from checkpoints_conversion.reader import read_rows
from checkpoints_conversion.weights import check_weights, hf_dir_of, open_weights
from oprd_megatron.config import RunConfig
from oprd_megatron.errors import ConfigError
from oprd_megatron.models import DTYPES
from oprd_megatron.platform import init_distributed, select_platform
from oprd_megatron.rollout.engine import RolloutEngine, make_requests
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.rollout.on_policy import OnPolicy
from oprd_megatron.rollout.prompts import load_prompts
from oprd_megatron.rollout.recorded import RolloutWriter, check_suffix
from oprd_megatron.rollout.recorded_row import Recorded
from oprd_megatron.rollout.tokenizer import check_tokenizer, load_tokenizer
from oprd_megatron.rollout.vllm.build import (
    Student,
    make_colocated,
    make_server_engine,
    refuse_megatron,
    start_servers,
)


def record_rollouts(config: RunConfig, hf_dir: Path, out: Path, steps: int, engine: RolloutEngine | None = None) -> int:
    """Write the responses of the first `steps` training steps (`recorded` has the format). Returns how many.

    Args:
        config: the run.
        hf_dir: the student.
        out: a new file, .parquet or .jsonl.
        steps: of the run.
        engine: one that holds the student's weights; left out, the run's is made and given those of `hf_dir`.

    Raises:
        UserError: a broken model or prompt file, or an `out` that cannot be written.
    """
    check_suffix(out)
    architecture = check_weights(hf_dir)
    tokenizer = load_tokenizer(hf_dir)
    check_tokenizer(tokenizer, architecture.vocab_size, hf_dir)
    section, teacher, vocab_size = config.rollout, None, architecture.vocab_size
    if config.distill.cross_tokenizer:
        teacher = load_tokenizer(config.teacher.path)  # prompts that are too long for it are left out
    else:
        teachers = [teacher.path for teacher in config.teachers] or [config.teacher.path]
        vocab_size = min(vocab_size, *(read_architecture(hf_dir_of(path)).vocab_size for path in teachers))
    prompts = load_prompts(section.prompts, tokenizer, teacher)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    student = Student(config, hf_dir, architecture, tokenizer, longest + section.max_response_tokens)
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = make_engine(student)
            stack.callback(engine.close)
            engine.update_weights(0, tensors_of(hf_dir, architecture))
        return _write(student, OnPolicy(config, prompts, engine, vocab_size), engine, out, steps)


def make_engine(student: Student) -> RolloutEngine:
    """The run's engine in this process alone, without weights yet."""
    config, kind = student.config, student.config.rollout.engine
    if kind == "file":
        raise ConfigError(
            "rollout.engine: file holds text that was written already; choose the engine that is to write"
        )
    refuse_megatron(kind, student.path)
    platform = select_platform(config.run.device)
    if kind == "vllm_server":
        return make_server_engine(student, start_servers(student))
    if kind == "vllm":
        init_distributed(platform)
        return make_colocated(student)
    return HFEngine(student.path, DTYPES[config.student.dtype], platform.device, config.rollout.batch_size)


def _write(student: Student, text: OnPolicy, engine: RolloutEngine, out: Path, steps: int) -> int:
    section, tokenizer = student.config.rollout, student.tokenizer
    with RolloutWriter(out) as writer:
        for step in trange(steps, desc="rollouts", unit="step"):
            batch = text.source.batch(step, section.prompts_per_step)
            texts = {prompt.index: prompt.text for prompt in batch}
            for rollout in engine.generate(make_requests(batch, section.responses_per_prompt), text.params, step):
                response = tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)
                writer.write(Recorded.of(rollout, step, texts[rollout.prompt_index], str(response)))
    return writer.count


def tensors_of(hf_dir: Path, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    with contextlib.closing(open_weights(hf_dir, architecture)) as source:
        for mapping in mappings_for(architecture).values():
            for name, shape in mapping.hf_shapes.items() if mapping.exported else ():
                yield name, read_rows(source, name, 0, shape[0])
