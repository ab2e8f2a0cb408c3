"""The typed description of a run. Imports no torch, so that a config can be checked anywhere, in milliseconds.

One YAML file holds one `RunConfig`. Unknown keys are errors. The text under each field is its documentation: it is what
`oprd config` prints. Checks that need only the config live here; checks against the models or the machine
live where those are opened. Terms: B rollouts, T response tokens, L layers, d width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt, model_validator

from oprd_megatron.config.base import DecayRate, Fraction, NonNegative, Strict
from oprd_megatron.config.benchmark import BenchmarkConfig
from oprd_megatron.config.checkpoint import CheckpointConfig, check_best
from oprd_megatron.config.distill import BridgeConfig, DistillConfig
from oprd_megatron.config.logging import LoggingConfig
from oprd_megatron.config.output import OutputConfig
from oprd_megatron.config.precision import PrecisionConfig, check_roles
from oprd_megatron.config.rollout import PromptsConfig, RolloutConfig
from oprd_megatron.config.schedule import is_ever_on
from oprd_megatron.config.teachers import Named, TeachingConfig, alone, check_teachers, settle


class ParallelConfig(Strict):
    """How one model is spread over its ranks: tp x cp x pp x dp must equal their number. Ranks run along tp first, then cp,
    dp, pp."""

    tp: PositiveInt = 1
    """Tensor-parallel size: every layer's matrices are split over this many ranks."""
    cp: PositiveInt = 1
    """Context-parallel size: every sequence is split over this many ranks."""
    pp: PositiveInt = 1
    """Pipeline-parallel size: the layers are split into this many stages."""
    vpp: PositiveInt = 1
    """Virtual pipeline stages on each rank (mcore's interleaved schedule). Needs pp > 1."""
    dp: PositiveInt | None = None
    """Data-parallel size; left out, it is what remains of the ranks."""
    sp: bool = False
    """Sequence parallelism: activations between the tensor-parallel regions are split along tokens. Needs tp > 1."""
    ranks: Annotated[str, Field(pattern=r"^\d+-\d+$")] | None = None
    """Ranks that the model lives on, first-last (0-7); left out, all. Both models on the same ranks, or on disjoint ones."""
    layers_per_stage: list[PositiveInt] | Literal["follow_student"] | None = None
    """Layers on each stage in the model's order (pp x vpp numbers); left out, as even as they go. follow_student (teacher
    only): each layer where the student layers that it teaches are, so that the least travels."""
    first_stage_layers: PositiveInt | None = None
    """Layers on the first stage only; the others share the rest. For stages that also hold the embedding."""
    last_stage_layers: PositiveInt | None = None
    """The same for the last stage, which also holds the head."""

    @property
    def first_rank(self) -> int:
        """Global rank of the first rank."""
        return int(self.ranks.split("-")[0]) if self.ranks else 0

    @property
    def num_ranks(self) -> int | None:
        """How many ranks `ranks` names, None without it."""
        if self.ranks is None:
            return None
        first, last = map(int, self.ranks.split("-"))
        return last - first + 1

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sp and self.tp == 1:
            raise ValueError("sp: true needs tp > 1 (sequence parallelism splits over the tensor-parallel ranks)")
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"vpp: {self.vpp} needs pp > 1 (virtual stages interleave pipeline stages); use vpp: 1")
        if self.num_ranks is not None and self.num_ranks < 1:
            raise ValueError(f"ranks: {self.ranks} ends before it starts; write first-last, for example 0-7")
        stages = self.pp * self.vpp
        if isinstance(self.layers_per_stage, list) and len(self.layers_per_stage) != stages:
            raise ValueError(
                f"layers_per_stage names {len(self.layers_per_stage)} stages, but pp {self.pp} x vpp {self.vpp} = {stages}"
            )
        ends = self.first_stage_layers or self.last_stage_layers
        if ends and self.layers_per_stage is not None:
            raise ValueError("layers_per_stage and first_stage_layers/last_stage_layers say the same; give one of them")
        if ends and stages == 1:
            raise ValueError("first_stage_layers and last_stage_layers need pp > 1")
        return self


class RecomputeConfig(Strict):
    """Activation recomputation: less memory for activations, more time in backward (mcore's terms)."""

    granularity: Literal["none", "full", "selective"] = "none"
    """none; full: whole layers are computed again in backward; selective: only the core attention."""
    method: Literal["uniform", "block"] = "uniform"
    """full only. uniform: all layers, in groups of num_layers; block: the first num_layers of each stage, the rest kept."""
    num_layers: PositiveInt = 1
    """full only: size of a group (uniform) or number of layers recomputed on each stage (block)."""


class ModelConfig(Strict):
    """One of the two models."""

    path: Path
    """Hugging Face directory (config.json, safetensors, tokenizer files), or a Megatron checkpoint (torch_dist: a save
    directory, one of its iter_.. or release directories, or a run) with config and tokenizer in hf/ in or beside it."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute and parameter dtype. A bf16 student trains with fp32 master weights."""
    precision: PrecisionConfig = PrecisionConfig()
    """What of the linear layers is in fp8."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout; teacher and student each have their own, on the same ranks or on disjoint ones."""
    pad_heads: bool = False
    """Let tp split a head count it does not divide by adding attention heads that are zero and stay zero."""

    @model_validator(mode="after")
    def _check_precision(self) -> ModelConfig:
        check_roles(self.precision, self.dtype, trained=isinstance(self, StudentConfig))
        return self


class TeacherConfig(ModelConfig):
    """The teacher: a model that is not trained."""

    ema_decay: DecayRate | None = None
    """Self-distillation: after each step the teacher becomes ema_decay of itself and 1 - ema_decay of the student. Both need
    one architecture and one layout. Left out, the teacher stays as it is."""

    @model_validator(mode="after")
    def _check_average(self) -> TeacherConfig:
        if self.ema_decay is not None and self.precision.is_quantised:
            raise ValueError(
                "ema_decay: an average of weights in fp8 would stand still; use precision.linear: dtype, or leave ema_decay out"
            )
        return self


class NamedTeacher(Named, ModelConfig):
    """One of several teachers."""


class StudentConfig(ModelConfig):
    """The student: a model that is trained."""

    recompute: RecomputeConfig = RecomputeConfig()
    """Activation recomputation."""

    @model_validator(mode="after")
    def _check(self) -> StudentConfig:
        if self.parallel.layers_per_stage == "follow_student":
            raise ValueError(
                "parallel.layers_per_stage: follow_student is for the teacher; the student cannot follow itself"
            )
        return self


class OptimizerConfig(Strict):
    """AdamW with linear warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0.0)] = 1e-5
    """Peak learning rate."""
    min_lr: NonNegative = 0.0
    """Learning rate at the last step."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps that warm up linearly."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Adam's decay rates."""
    eps: Annotated[float, Field(gt=0.0)] = 1e-8
    """Adam's epsilon."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    clip_grad: NonNegative = 1.0
    """Global gradient-norm clip; 0 turns it off."""
    distributed: bool = False
    """Shard optimizer state over data-parallel ranks (mcore's distributed optimizer)."""

    @model_validator(mode="after")
    def _check(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        return self


class EvalConfig(Strict):
    """Held-out evaluation: the teacher answers the prompts once; KL(teacher || student), cross-entropy per token and
    cosine per layer are then measured on those answers."""

    prompts: PromptsConfig
    """Held-out prompts; a prompt that is also a training prompt is refused."""
    every: Annotated[int, Field(ge=0)] = 10
    """Evaluate every so many steps, besides before the first and after the last; 0 turns the ones between off."""
    max_response_tokens: PositiveInt = 64
    """Answers are cut at this many tokens."""
    temperature: NonNegative = 1.0
    """The teacher's answers are sampled at this temperature, with a fixed seed; 0 is greedy."""
    micro_batch_size: PositiveInt = 4
    """Sequences scored at a time."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Student answers (greedy) shown before and after."""


class RunSection(Strict):
    """What every run has."""

    dir: Path
    """Run directory: config, metrics, checkpoints, exported student, report."""
    seed: int = 1234
    """Seed of prompt order and sampling. In fp32 the rollouts do not depend on the layout."""
    steps: PositiveInt = 500
    """Training steps in all, also when resumed."""
    stop_at: PositiveInt | None = None
    """Stop with a checkpoint after this step; the learning-rate schedule still spans `steps`. For jobs in parts."""
    time_limit_minutes: Annotated[float, Field(gt=0.0)] | None = None
    """Stop with a checkpoint and exit code 75 before so much time has passed since the start; the end of a SLURM job counts
    without it."""
    time_margin_minutes: NonNegative = 1.0
    """For the checkpoint, besides the time of two steps."""
    hang_minutes: NonNegative = 30.0
    """End all ranks, with a report of who is where, when nothing moves on any of them for so long: no token written, no
    micro-batch gone forward, no phase entered or left. 0 never."""
    micro_batch_size: PositiveInt = 1
    """Rollouts in one forward and backward pass; they are packed without padding."""
    micro_batch_tokens: PositiveInt | None = None
    """Dynamic batching instead of micro_batch_size: rollouts are packed into micro-batches of at most this many tokens (a
    longer one goes alone), balanced over data-parallel ranks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where a GPU answers, else cpu with gloo."""
    export: bool = True
    """Write the student as a Hugging Face directory to <run.dir>/student_hf at the end."""


class RunConfig(Strict):
    """One run, whole."""

    run: RunSection
    """Directory, seed, steps."""
    teachers: list[NamedTeacher] = []  # noqa: RUF012 (pydantic copies it)
    """Several teachers, instead of `teacher`."""
    teaching: TeachingConfig | None = None
    """Which of several teachers teaches which prompt."""
    teacher: TeacherConfig
    """The frozen model; of several teachers, the first."""
    student: StudentConfig
    """The model that is trained."""
    rollout: RolloutConfig
    """How the student's text is made."""
    distill: DistillConfig = DistillConfig()
    """What is aligned."""
    output: OutputConfig = OutputConfig()
    """Terms in output space."""
    bridge: BridgeConfig = BridgeConfig()
    """How a bridge is fitted, and watched."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the student moves."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    eval: EvalConfig | None = None
    """Held-out evaluation; left out, there is none."""
    benchmark: BenchmarkConfig | None = None
    """Problems with known answers, asked while training; left out, there are none. Needs oprd-megatron[eval]."""
    logging: LoggingConfig = LoggingConfig()
    """What is written down."""

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, values: Any) -> Any:
        return settle(values)

    def of_teacher(self, name: str) -> RunConfig:
        """The run with this one of its teachers alone."""
        return self.model_copy(update=alone(self.teachers, name, TeacherConfig))

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        check_teachers(self)
        check_best(self)
        rollouts = self.rollout.prompts_per_step * self.rollout.responses_per_prompt
        if self.run.micro_batch_tokens is None and rollouts % self.run.micro_batch_size:
            raise ValueError(
                f"rollout.prompts_per_step x responses_per_prompt = {rollouts} is not a multiple of "
                f"run.micro_batch_size {self.run.micro_batch_size}"
            )
        aligned = self.distill.space != "none" and is_ever_on(self.distill.coefficient)
        if not aligned and not self.output.terms:
            raise ValueError(
                "there is nothing to train on: distill aligns no states and output.terms is empty; set one of them"
            )
        if self.output.terms and self.distill.cross_tokenizer:
            raise ValueError(
                f"output.terms: {self.output.terms[0].label} needs one vocabulary, but distill.cross_tokenizer is true; leave "
                "the terms out"
            )
        if self.benchmark is not None and self.rollout.engine == "file":
            raise ValueError(
                "benchmark: recorded text has no answers to its problems; leave it out, or use another rollout.engine"
            )
        if self.rollout.schedule == "overlap":
            self._check_overlap()
        drawn = [term for term in self.output.terms if term.kind == "sampled"]
        sampled = next((term for term in drawn if term.temperature != self.rollout.temperature), None)
        if sampled:
            raise ValueError(
                f"output.terms: {sampled.label} is measured on tokens drawn at rollout.temperature "
                f"{self.rollout.temperature:g}, but its own temperature is {sampled.temperature:g}; make them equal, or use "
                "another kind"
            )
        return self

    def _check_overlap(self) -> None:
        """A step that is learned in groups has one denominator, known at its end."""
        longest = self.rollout.max_response_tokens
        counted = [(term.label, term.positions, term.first_or_last) for term in self.output.terms]
        if self.distill.space != "none":
            counted.append(("distill", self.distill.positions, self.distill.k))
        chosen = [
            (which if which == "last" else "all", 0) if which in ("all", "last") or k >= longest else (which, k)
            for _, which, k in counted
        ]
        other = next((name for (name, *_), which in zip(counted, chosen, strict=True) if which != chosen[0]), None)
        if other is not None:
            raise ValueError(
                f"rollout.schedule: overlap needs one choice of tokens, but {counted[0][0]} and {other} have other positions; "
                "make positions and k equal, or use schedule: sync"
            )
        for key, value in (
            ("bridge.refit_every", self.bridge.refit_every),
            ("logging.gradient_norms_every", self.logging.gradient_norms_every),
        ):
            if value:
                raise ValueError(
                    f"{key}: looks at a whole step at once, which rollout.schedule overlap never has; set it to 0"
                )


def needs_teacher_head(config: RunConfig) -> bool:
    """Whether anything looks at what the teacher predicts: output terms, or the KL of an evaluation."""
    return bool(config.output.terms) or config.eval is not None
