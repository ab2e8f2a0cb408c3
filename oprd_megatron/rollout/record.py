"""Rollouts to a file, without training: one process, the embedded engine, weights from a Hugging Face directory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import trange

from checkpoints_conversion import Architecture, HFReader, check_model, mappings_for, read_architecture
from oprd_megatron.config import RunConfig
from oprd_megatron.models import DTYPES
from oprd_megatron.platform import select_platform
from oprd_megatron.rollout.engine import make_requests
from oprd_megatron.rollout.hf_engine import HFEngine
from oprd_megatron.rollout.on_policy import OnPolicy
from oprd_megatron.rollout.prompts import load_prompts
from oprd_megatron.rollout.tokenizer import check_tokenizer, load_tokenizer


def record_rollouts(config: RunConfig, hf_dir: Path, out: Path, steps: int) -> int:
    """Write the responses of the first `steps` training steps as jsonl. Returns how many.

    Each line holds prompt and response as text and as token ids, `finished`, `step` and `sample_index`.

    Raises:
        UserError: a broken model or prompt file.
    """
    architecture = check_model(hf_dir)
    tokenizer = load_tokenizer(hf_dir)
    check_tokenizer(tokenizer, architecture.vocab_size, hf_dir)
    section, teacher, vocab_size = config.rollout, None, architecture.vocab_size
    if config.distill.cross_tokenizer:
        teacher = load_tokenizer(config.teacher.path)  # prompts that are too long for it are left out
    else:
        teachers = [teacher.path for teacher in config.teachers] or [config.teacher.path]
        vocab_size = min(vocab_size, *(read_architecture(path).vocab_size for path in teachers))
    prompts = load_prompts(section.prompts, tokenizer, teacher)
    engine = HFEngine(
        hf_dir, DTYPES[config.student.dtype], select_platform(config.run.device).device, section.batch_size
    )
    engine.update_weights(0, _tensors(hf_dir, architecture))
    text = OnPolicy(config, prompts, engine, vocab_size)
    staging, count = out.with_name(out.name + ".tmp"), 0
    with staging.open("w") as file:
        for step in trange(steps, desc="rollouts", unit="step"):
            batch = text.source.batch(step, section.prompts_per_step)
            texts = {prompt.index: prompt.text for prompt in batch}
            for rollout in engine.generate(make_requests(batch, section.responses_per_prompt), text.params, step):
                line = {
                    "step": step,
                    "sample_index": rollout.sample_index,
                    "prompt": texts[rollout.prompt_index],
                    "response": tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True),
                    "finished": rollout.finished,
                    "prompt_ids": rollout.prompt_ids,
                    "response_ids": rollout.response_ids,
                }
                file.write(json.dumps(line) + "\n")
                count += 1
    staging.rename(out)
    return count


def _tensors(hf_dir: Path, architecture: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    with HFReader(hf_dir) as reader:
        for mapping in mappings_for(architecture).values():
            for name, shape in mapping.hf_shapes.items() if mapping.exported else ():
                yield name, reader.read(name, 0, shape[0])
