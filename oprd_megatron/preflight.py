"""Everything that can be known to be wrong before long work starts.

Needs no process group and reads no tensor data: configs, headers, tokenizers and prompts only. Every rank
runs it, because every rank needs what it returns; the same input gives the same answer or the same error on all.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from checkpoints_conversion import Architecture
from checkpoints_conversion.weights import check_weights
from oprd_megatron.bridge.artefact import Fingerprints, check_bridge, read_info
from oprd_megatron.bridge.fingerprint import model_fingerprint, tokenizer_fingerprint
from oprd_megatron.config import RunConfig
from oprd_megatron.config.schema import ModelConfig
from oprd_megatron.cross_tokenizer.end_of_turn import teacher_end_id as end_of_turn
from oprd_megatron.cross_tokenizer.retokenize import Retokenizer, check_shared_boundaries
from oprd_megatron.errors import ConfigError, UserError
from oprd_megatron.logging.build import check_trackers
from oprd_megatron.models.spec import has_transformer_engine, refuse_for_transformer_engine
from oprd_megatron.noise.gate import gate_from_file
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.parallel.precision import Machine, check_precisions
from oprd_megatron.platform import compute_capability
from oprd_megatron.preflight_teachers import check_together, deal_prompts
from oprd_megatron.representation.grids import check_budget, planner, resolve_grids
from oprd_megatron.representation.layer_map import LayerPair, resolve_layer_pairs
from oprd_megatron.representation.layer_weights import layer_weights
from oprd_megatron.representation.space import check_space
from oprd_megatron.rollout.file_engine import check_recorded
from oprd_megatron.rollout.hf_engine import eos_ids
from oprd_megatron.rollout.prompts import Prompt, Routes, load_prompts, refuse_overlap
from oprd_megatron.rollout.samples import SampleMaker
from oprd_megatron.rollout.tokenizer import check_same_tokenizer, check_tokenizer, load_tokenizer
from oprd_megatron.rollout.vllm.build import Student, refuse_megatron
from oprd_megatron.run_directory.checks import check_disk, check_run_dir

logger = logging.getLogger(__name__)

TEXTS_TO_ALIGN = 200
"""Prompts whose texts two tokenizers are compared on before a run."""


@dataclass(frozen=True)
class Checked:
    """A run that can start.

    Attributes:
        config: the run.
        teacher, student: architectures.
        teacher_layout, student_layout: grids.
        pairs: supervised layers.
        tokenizer: the student's.
        teacher_tokenizer: the teacher's, where it is another one; else None.
        prompts, held_out: as token ids; `held_out` is empty without an eval section.
        resume_from: checkpoint to continue from, None for a fresh start.
        views: of several teachers, {name: the run with that one alone and the prompts that it teaches}; what else is said here
            of the teacher is then the first one's. Empty in a run with one.
    """

    config: RunConfig
    teacher: Architecture
    student: Architecture
    teacher_layout: GridLayout
    student_layout: GridLayout
    pairs: list[LayerPair]
    tokenizer: PreTrainedTokenizerBase
    teacher_tokenizer: PreTrainedTokenizerBase | None
    prompts: list[Prompt]
    held_out: list[Prompt]
    resume_from: Path | None
    views: dict[str, Checked] = field(default_factory=dict)

    @property
    def lessons(self) -> dict[str, Checked]:
        """{name: the run as this teacher sees it}; one entry, called teacher, in a run with one."""
        return self.views or {"teacher": self}

    @property
    def padded_vocab_size(self) -> int:
        """Ids that all models' vocabularies are padded for alike; 0 where each is padded for itself."""
        if self.two_tokenizers:
            return 0
        return max(self.student.vocab_size, *(view.teacher.vocab_size for view in self.lessons.values()))

    @property
    def shared_vocab_size(self) -> int:
        """Ids that both models have: models of one family pad their vocabularies differently (151,936 and 152,064)."""
        return min(self.teacher.vocab_size, self.student.vocab_size)

    @property
    def two_tokenizers(self) -> bool:
        """Whether the teacher reads text in tokens of its own."""
        return self.teacher_tokenizer is not None

    @property
    def student_vocab_size(self) -> int:
        """Ids that the student may write: those that all teachers can read."""
        if self.two_tokenizers:
            return self.student.vocab_size
        return min(view.shared_vocab_size for view in self.lessons.values())

    @property
    def writer(self) -> Student:
        """The student as what writes the text."""
        longest = max((len(prompt.token_ids) for prompt in self.prompts), default=0)
        context = longest + self.config.rollout.max_response_tokens
        return Student(self.config, self.config.student.path, self.student, self.tokenizer, context)

    def sample_maker(self, prompts: list[Prompt]) -> SampleMaker:
        """Makes samples of the responses to these prompts."""
        if self.teacher_tokenizer is None:
            return SampleMaker(prompts, self.config.distill)
        mine, theirs = self.tokenizer, self.teacher_tokenizer
        ends = [eos_ids(section.path, tokenizer.eos_token_id)
                for section, tokenizer in ((self.config.student, mine), (self.config.teacher, theirs))]  # fmt: skip
        return SampleMaker(
            prompts,
            self.config.distill,
            to_teacher=Retokenizer(mine, theirs, ends[0], end_of_turn(theirs)),
            to_student=Retokenizer(theirs, mine, ends[1], end_of_turn(mine)),
            teacher_context=self.teacher.max_position_embeddings,
            student_context=self.student.max_position_embeddings,
        )


def preflight(config: RunConfig, world_size: int, starts_run: bool = True) -> Checked:
    """Check a run against its models, files and number of ranks.

    Args:
        config: the run.
        world_size: ranks that there will be.
        starts_run: the run directory will be written; False only looks at models and data.

    Raises:
        UserError: one line: what, where, what to do.
    """
    resume_from = None
    if starts_run:
        check_trackers(config.logging)
        resume_from = check_run_dir(config)
    if not config.teachers:
        checked = check_models(config, world_size, starts_run, resume_from)
        other = checked.teacher_tokenizer
        prompts, held_out = read_prompts(config, checked.tokenizer, other)
        _check_context(config, checked.teacher, checked.student, prompts, held_out)
        _check_engine(checked, prompts)
        return replace(checked, prompts=prompts, held_out=held_out)
    views = {}
    for number, entry in enumerate(config.teachers):
        try:
            views[entry.name] = check_models(
                config.of_teacher(entry.name), world_size, starts_run, resume_from, alone=False
            )
        except UserError as error:
            raise type(error)(f"teachers[{number}] ({entry.name}): {error}") from None
    checked = replace(next(iter(views.values())), config=config, views=views)
    check_together(config, views, checked.padded_vocab_size, world_size)
    prompts, held_out = read_prompts(config, checked.tokenizer, None)
    for view in views.values():
        _check_context(config, view.teacher, view.student, prompts, held_out)
    _check_engine(checked, prompts)
    return replace(checked, prompts=prompts, held_out=held_out, views=deal_prompts(config, views, prompts, held_out))


def check_models(
    config: RunConfig, world_size: int, starts_run: bool, resume_from: Path | None, alone: bool = True
) -> Checked:
    """`preflight` of a run with one teacher up to its prompts. Unless `alone`, ranks may be other teachers'."""
    architectures = {name: check_weights(section.path) for name, section in _models(config).items()}
    teacher, student = architectures["teacher"], architectures["student"]
    if starts_run:
        check_disk(config, student)
    check_space(config.distill, teacher.hidden_size, student.hidden_size)
    pairs = resolve_layer_pairs(config.distill, student.num_layers, teacher.num_layers)
    layer_weights(config.distill, pairs)
    teacher_layout, student_layout = resolve_grids(config, teacher, student, world_size, alone=alone)
    if config.teacher.ema_decay is not None:
        _check_average(teacher, student, teacher_layout, student_layout)
    _check_terms(config, min(teacher.vocab_size, student.vocab_size))
    check_budget(planner(config, pairs, teacher, teacher_layout, student_layout), config)
    machine = Machine(compute_capability(config.run.device), has_transformer_engine())
    check_precisions(config, (teacher, student), (teacher_layout, student_layout), machine)
    for name, layout in (("teacher", teacher_layout), ("student", student_layout)):
        if _models(config)[name].precision.linear == "fp8":
            refuse_for_transformer_engine(architectures[name], layout.cp)
    tokenizer = load_tokenizer(config.student.path)
    check_tokenizer(tokenizer, student.vocab_size, config.student.path)
    theirs = load_tokenizer(config.teacher.path)
    check_tokenizer(theirs, teacher.vocab_size, config.teacher.path)
    if config.teacher.precision.noise_file is not None:
        gate_from_file(config, pairs)
    if config.distill.bridge is not None:
        _check_bridge(config, teacher, student, pairs, tokenizer, theirs, trained=not starts_run)
    other = theirs if config.distill.cross_tokenizer else None
    if other is None:
        check_same_tokenizer(tokenizer, theirs)
    return Checked(
        config,
        teacher,
        student,
        teacher_layout,
        student_layout,
        pairs,
        tokenizer,
        other,
        [],
        [],
        resume_from,
    )


def read_prompts(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None
) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts; `other` is the teacher's tokenizer, where it is not the student's."""
    routes = Routes.of(config)
    prompts = load_prompts(config.rollout.prompts, tokenizer, other, routes)
    if other is not None:
        texts = [prompt.text for prompt in prompts[:TEXTS_TO_ALIGN]]
        aligned = check_shared_boundaries(tokenizer, other, texts, config.distill.min_aligned)
        logger.info("distill.cross_tokenizer: %.1f %% of the student's tokens end where one of the teacher's does, over %d "
                    "prompts", 100 * aligned, len(texts))  # fmt: skip
    held_out: list[Prompt] = []
    if config.eval is not None:
        held_out = load_prompts(config.eval.prompts, tokenizer, other, routes)
        refuse_overlap(prompts, held_out, config.eval.prompts.path)
    return prompts, held_out


def _check_average(
    teacher: Architecture, student: Architecture, teacher_layout: GridLayout, student_layout: GridLayout
) -> None:
    if teacher != student:
        raise ConfigError(
            "teacher.ema_decay: the teacher is to be an average of the student, but their architectures differ; give both the "
            "same path, or leave ema_decay out"
        )
    if teacher_layout != student_layout:
        raise ConfigError(
            "teacher.ema_decay: teacher and student need the same layout, so that each rank averages its own share; make "
            "teacher.parallel and student.parallel equal"
        )


def _check_terms(config: RunConfig, vocab_size: int) -> None:
    """`vocab_size`: ids that both models have."""
    for term in config.output.terms:
        if term.kind == "topk" and term.k > vocab_size:
            raise ConfigError(
                f"output.terms: {term.label} wants the top {term.k} of {vocab_size} ids that both models have; lower k"
            )
        if term.kind == "sampled" and config.rollout.top_p < 1:
            logger.warning("output.terms: %s is not an unbiased estimate with rollout.top_p %g below 1", term.label,
                           config.rollout.top_p)  # fmt: skip


def _check_bridge(
    config: RunConfig,
    teacher: Architecture,
    student: Architecture,
    pairs: list[LayerPair],
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
    trained: bool,
) -> None:
    """The bridge is whole, and was fitted for these models, tokenizers and layers. `trained`: the student may have been trained
    through it since (its weights are only looked at)."""
    assert config.distill.bridge is not None
    info = read_info(config.distill.bridge)
    found = fingerprints(config, (teacher, student), (teacher_tokenizer, tokenizer))
    if trained:
        weights = info.fingerprints.student.weights
        found = found.model_copy(update={"student": found.student.model_copy(update={"weights": weights})})
    check_bridge(config.distill.bridge, info, pairs, found)


def fingerprints(
    config: RunConfig,
    architectures: tuple[Architecture, Architecture],
    tokenizers: tuple[PreTrainedTokenizerBase, PreTrainedTokenizerBase],
) -> Fingerprints:
    """What a bridge of this run belongs to. Both tuples: the teacher's, the student's."""
    return Fingerprints(
        teacher=model_fingerprint(config.teacher.path, architectures[0]),
        student=model_fingerprint(config.student.path, architectures[1]),
        teacher_tokenizer=tokenizer_fingerprint(tokenizers[0]),
        student_tokenizer=tokenizer_fingerprint(tokenizers[1]),
    )


def _check_engine(checked: Checked, prompts: list[Prompt]) -> None:
    """What a run's engine can be asked before models are loaded."""
    section = checked.config.rollout
    refuse_megatron(section.engine, checked.config.student.path)
    if section.file is not None:
        check_recorded(checked.config, section.file, checked.student_vocab_size, prompts)


def _models(config: RunConfig) -> dict[str, ModelConfig]:
    return {"teacher": config.teacher, "student": config.student}


def _check_context(
    config: RunConfig, teacher: Architecture, student: Architecture, prompts: list[Prompt], held_out: list[Prompt]
) -> None:
    context = min(teacher.max_position_embeddings, student.max_position_embeddings)
    longest = lambda prompts: max(max(len(p.token_ids), len(p.teacher_ids)) for p in prompts)  # noqa: E731
    wanted = [("rollout", longest(prompts), config.rollout.max_response_tokens)]
    if config.eval is not None:
        wanted.append(("eval", longest(held_out), config.eval.max_response_tokens))
    for section, prompt, response in wanted:
        if prompt + response > context:
            raise ConfigError(
                f"{section}: the longest prompt ({prompt} tokens) and max_response_tokens {response} do not fit the models' "
                f"context of {context}; lower {section}.max_response_tokens or {section}.prompts.max_tokens"
            )
