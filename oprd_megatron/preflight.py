"""Everything that can be known to be wrong before long work starts.

Needs no process group and reads no tensor data: configs, headers, tokenizers and prompts only. Every rank
runs it, because every rank needs what it returns; the same input gives the same answer or the same error on all.
"""

from __future__ import annotations

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from checkpoints_conversion import Architecture, check_model, mappings_for
from oprd_megatron.checkpoint import latest_checkpoint
from oprd_megatron.config import RunConfig, load_config
from oprd_megatron.config.schema import ModelConfig
from oprd_megatron.errors import CheckpointError, ConfigError, UserError
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.representation.grids import check_budget, planner, resolve_grids
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.space import check_space
from oprd_megatron.rollout.prompts import Prompt, load_prompts, refuse_overlap
from oprd_megatron.rollout.tokenizer import check_same_tokenizer, check_tokenizer, load_tokenizer

CONFIG_FILE = "config.yaml"
"""The resolved config, saved in the run directory."""

BYTES_ON_DISK_PER_PARAMETER = 16

IDENTITY = ("run.seed", "teacher.path", "student.path", "rollout.prompts", "distill")
"""What makes two configs the same run."""


@dataclass(frozen=True)
class Checked:
    """A run that can start.

    Attributes:
        config: the run.
        teacher, student: architectures.
        teacher_layout, student_layout: grids.
        pairs: supervised layers.
        tokenizer: the student's (the teacher's is the same).
        prompts, held_out: as token ids; `held_out` is empty without an eval section.
        resume_from: checkpoint to continue from, None for a fresh start.
    """

    config: RunConfig
    teacher: Architecture
    student: Architecture
    teacher_layout: GridLayout
    student_layout: GridLayout
    pairs: list[LayerPair]
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Prompt]
    held_out: list[Prompt]
    resume_from: Path | None

    @property
    def shared_vocab_size(self) -> int:
        """Ids that both models have: models of one family pad their vocabularies differently (151,936 and 152,064)."""
        return min(self.teacher.vocab_size, self.student.vocab_size)


def preflight(config: RunConfig, world_size: int, starts_run: bool = True) -> Checked:
    """Check a run against its models, files and number of ranks.

    Args:
        config: the run.
        world_size: ranks that there will be.
        starts_run: the run directory will be written; False only looks at models and data.

    Raises:
        UserError: one line: what, where, what to do.
    """
    resume_from = _check_run_dir(config) if starts_run else None
    architectures = {name: check_model(section.path) for name, section in _models(config).items()}
    teacher, student = architectures["teacher"], architectures["student"]
    if starts_run:
        _check_disk(config, student)
    check_space(config.distill, teacher.hidden_size, student.hidden_size)
    pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
    teacher_layout, student_layout = resolve_grids(config, teacher, student, world_size)
    check_budget(planner(config, pairs, teacher, teacher_layout, student_layout), config)
    tokenizer = load_tokenizer(config.student.path)
    check_tokenizer(tokenizer, student.vocab_size, config.student.path)
    check_same_tokenizer(tokenizer, load_tokenizer(config.teacher.path))
    check_tokenizer(tokenizer, teacher.vocab_size, config.teacher.path)
    prompts = load_prompts(config.rollout.prompts, tokenizer)
    held_out: list[Prompt] = []
    if config.eval is not None:
        held_out = load_prompts(config.eval.prompts, tokenizer)
        refuse_overlap(prompts, held_out, config.eval.prompts.path)
    _check_context(config, teacher, student, prompts, held_out)
    return Checked(
        config,
        teacher,
        student,
        teacher_layout,
        student_layout,
        pairs,
        tokenizer,
        prompts,
        held_out,
        resume_from,
    )


def _models(config: RunConfig) -> dict[str, ModelConfig]:
    return {"teacher": config.teacher, "student": config.student}


def _check_run_dir(config: RunConfig) -> Path | None:
    """The checkpoint to resume from; also refuses a run directory that cannot be written."""
    folder = config.run.dir
    existing = _existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"run.dir: {existing} is not a directory that can be written; choose another run.dir")
    _refuse_another_run(config)
    newest = latest_checkpoint(folder)
    if newest is not None and config.checkpoint.resume == "never":
        raise CheckpointError(
            f"run.dir: {folder} already holds {newest.name}; set checkpoint.resume: auto to continue, or use another run.dir"
        )
    return newest


def _check_disk(config: RunConfig, student: Architecture) -> None:
    """Room for one checkpoint and the export: weights, fp32 master weights and two Adam moments make 16 bytes a parameter,
    in fp32 (4 + 8 + 4) as in bf16 (2 + 4 + 8 + 2)."""
    parameters = sum(
        math.prod(shape)
        for mapping in mappings_for(student).values()
        for shape in (mapping.hf_shapes.values() if mapping.exported else ())
    )
    needed = BYTES_ON_DISK_PER_PARAMETER * parameters
    free = shutil.disk_usage(_existing_parent(config.run.dir)).free
    if free < needed:
        raise UserError(
            f"run.dir: {config.run.dir} has {free / 1e9:.1f} GB free, but a checkpoint and the exported student need "
            f"{needed / 1e9:.1f} GB; free some space or choose another run.dir"
        )


def _existing_parent(folder: Path) -> Path:
    """The folder itself, or the nearest folder above it that exists."""
    return next(parent for parent in (folder, *folder.parents, Path(".")) if parent.exists())


def _refuse_another_run(config: RunConfig) -> None:
    """A run directory belongs to one run: its models, data, loss and seed may not change. Layouts, the number of steps and
    what is logged may."""
    path = config.run.dir / CONFIG_FILE
    if not path.exists():
        return
    before = load_config(path)
    for key in IDENTITY:
        old, new = (_lookup(values.model_dump(), key) for values in (before, config))
        if old != new:
            raise ConfigError(
                f"run.dir: {config.run.dir} holds a run with another {key} ({old}, now {new}); use another run.dir"
            )


def _lookup(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def _check_context(
    config: RunConfig, teacher: Architecture, student: Architecture, prompts: list[Prompt], held_out: list[Prompt]
) -> None:
    context = min(teacher.max_position_embeddings, student.max_position_embeddings)
    wanted = [("rollout", max(len(p.token_ids) for p in prompts), config.rollout.max_response_tokens)]
    if config.eval is not None:
        wanted.append(("eval", max(len(p.token_ids) for p in held_out), config.eval.max_response_tokens))
    for section, prompt, response in wanted:
        if prompt + response > context:
            raise ConfigError(
                f"{section}: the longest prompt ({prompt} tokens) and max_response_tokens {response} do not fit the models' "
                f"context of {context}; lower {section}.max_response_tokens or {section}.prompts.max_tokens"
            )
