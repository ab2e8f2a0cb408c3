"""The typed description of a run. Imports no torch, so that a config can be checked anywhere, in milliseconds.

One YAML file holds one `RunConfig`. Unknown keys are errors. The text under each field is its documentation: it is what
`oprd config` prints. Checks that need only the config live here; checks against the models or the machine
live where those are opened. Terms: B rollouts, T response tokens, L layers, d width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


class Strict(BaseModel):
    """Base of every section: unknown keys are refused, values are frozen, docstrings become descriptions."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True, protected_namespaces=()
    )


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
    """Hugging Face directory (config.json, safetensors, tokenizer files)."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Compute and parameter dtype. A bf16 student trains with fp32 master weights."""
    parallel: ParallelConfig = ParallelConfig()
    """Parallel layout; teacher and student each have their own, on the same ranks or on disjoint ones."""
    pad_heads: bool = False
    """Let tp split a head count it does not divide by adding attention heads that are zero and stay zero."""


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


class PromptsConfig(Strict):
    """A file of prompts: .jsonl, .json (a list) or .parquet."""

    path: Path
    """The file."""
    field: str = "prompt"
    """Name of the field or column that holds the prompt: a string, or a list of chat messages (role, content)."""
    limit: PositiveInt | None = None
    """Use only the first so many prompts."""
    chat_template: bool = True
    """Wrap the prompt in the tokenizer's chat template; false feeds the raw text."""
    max_tokens: PositiveInt = 1024
    """Prompts longer than this many tokens are left out (the number left out is logged)."""


class RolloutConfig(Strict):
    """The student writes responses to prompts with its own current weights."""

    engine: Literal["hf"] = "hf"
    """hf: transformers' generate in this process, fed from memory after every update."""
    prompts: PromptsConfig
    """Training prompts."""
    prompts_per_step: PositiveInt = 8
    """Prompts in one training step."""
    responses_per_prompt: PositiveInt = 2
    """Responses sampled for each prompt."""
    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """Sampling temperature; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Nucleus sampling; 1 samples from the whole vocabulary."""
    max_response_tokens: PositiveInt = 1024
    """Responses are cut at this many tokens."""
    stop: list[str] = []
    """Extra stop strings, besides the model's end-of-sequence tokens."""
    num_engines: PositiveInt | None = None
    """Ranks that hold an engine (a copy of the student); left out, all of them on GPUs, on CPU one for each core."""
    batch_size: PositiveInt = 64
    """Sequences one engine decodes at a time."""
    probe_tolerance: Annotated[float, Field(gt=0.0)] | None = None
    """Largest log-probability difference (nats) allowed between engine and trainer on the probe after a weight sync;
    left out, 1e-3 for an fp32 student and 0.35 for bf16."""


LayerWeights = Literal["uniform", "depth", "score"] | list[NonNegative]


class DistillConfig(Strict):
    """The representation loss (OPRD Eq. 6 and 14) and the layer map (Eq. 11)."""

    layers: Literal["all", "last", "even", "odd"] | list[PositiveInt] = "all"
    """Supervised student layers, 1-based: all, last, even (1, 3, 5, ..), odd (2, 4, 6, ..) or an explicit list.
    even and odd are named as in the authors' code, which counts from 0."""
    layer_map: Literal["proportional"] | dict[PositiveInt, PositiveInt] | Path = "proportional"
    """Teacher layer for each student layer: proportional (Eq. 11), explicit {student: teacher} pairs, or the json file of a
    measured map (`oprd bridge map`). With pairs or a file, `layers: all` means all student layers that they name."""
    monotone_map: bool = False
    """Refuse a map in which a deeper student layer learns from a shallower teacher layer."""
    layer_weights: LayerWeights = "uniform"
    """Weight of each supervised layer's loss, scaled to a mean of 1: uniform, depth (in proportion to the layer's number),
    score (as the measured map rated the pair), or a list, one number for each supervised layer."""
    final_layer_weights: LayerWeights | None = None
    """Weights at the last step: they move there in a straight line over the run. Left out, layer_weights throughout."""
    positions: Literal["all", "last", "last_k", "first_k"] = "last_k"
    """Supervised response positions of each rollout: all, the last one, or min(k, length) at the end or beginning."""
    k: PositiveInt = 2000
    """k of last_k and first_k."""
    position_anchor: Literal["token", "predictor"] = "token"
    """token: the state after reading y_t (the authors' choice). predictor: the state that predicts y_t, one earlier."""
    final_state: Literal["post_norm", "pre_norm"] = "post_norm"
    """State of the last layer: after the final norm (Hugging Face's hidden_states[-1]) or before it."""
    normalize: Literal["auto", "none", "l2"] = "auto"
    """none: raw mean squared error. l2: both vectors scaled to unit length first, which makes the loss about 1/width of its
    raw size. auto: l2 through a low-rank bridge (Eq. 14), none otherwise."""
    coefficient: NonNegative = 1.0
    """Factor on the representation loss; 0 only measures it."""
    opd_coefficient: NonNegative = 0.0
    """Factor on OPD, exact reverse KL over the vocabulary (Eq. 4), which is added (Eq. 7); 0 leaves it out. Needs both models
    on the same ranks and one tokenizer."""
    mode: Literal["auto", "identity", "low_rank", "low_rank_residual", "linear"] = "auto"
    """In which space states are compared. identity: as they are (equal widths). low_rank: both projected by the frozen bridge
    (Eq. 14). low_rank_residual: the same without its first bridge_head directions, which explain most. linear: the
    student's through a matrix [d_T, d_S] for each layer that is trained with it. auto: low_rank with a bridge, or
    identity."""
    bridge: Path | None = None
    """Bridge (safetensors, from `oprd bridge fit`): frozen projections of both models' states into a common low-rank space,
    for models of different widths and for less traffic: the teacher's states are projected before they travel."""
    bridge_head: Annotated[int, Field(ge=0)] = 0
    """low_rank_residual: leading directions of the bridge that are left out; states are compared in their complement."""
    cross_tokenizer: bool = False
    """Teacher and student have different tokenizers: the teacher reads the response's text in its own tokens, and only tokens
    that end at the same byte in both are supervised."""
    min_aligned: Fraction = 0.0
    """cross_tokenizer: least share of response tokens that must be aligned, over the prompts' texts before the run starts and
    over every batch."""
    wire: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """Number format in which teacher states are kept and sent. auto: the teacher's dtype. fp8: e4m3 with one fp32 scale per
    state; its rounding error is in the metrics."""
    spool_bytes: Annotated[ByteSize, Field(gt=0)] | None = None
    """Teacher states that a rank may hold at a time (512MiB, 2GiB, ..): a step is done in as many chunks as that takes, and
    a teacher on ranks of its own runs ahead of the student only so far. Left out, a whole step's."""
    spool: Literal["device", "host"] = "device"
    """Where the states wait: device memory, or pinned host memory (slower; they then travel over gloo)."""

    @property
    def space(self) -> Literal["identity", "low_rank", "low_rank_residual", "linear"]:
        """`mode`, resolved."""
        return self.mode if self.mode != "auto" else "low_rank" if self.bridge else "identity"

    @property
    def normalization(self) -> Literal["none", "l2"]:
        """`normalize`, resolved."""
        return self.normalize if self.normalize != "auto" else "l2" if self.space.startswith("low_rank") else "none"

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.mode in ("identity", "linear") and self.bridge is not None:
            raise ValueError(f"mode: {self.mode} uses no bridge; leave distill.bridge out, or choose mode: low_rank")
        if (self.mode == "low_rank_residual") != bool(self.bridge_head):
            raise ValueError("mode: low_rank_residual and bridge_head: N (the directions it leaves out) go together")
        if not self.coefficient and not self.opd_coefficient:
            raise ValueError("coefficient and opd_coefficient are both 0: there is nothing to train on")
        if self.opd_coefficient and self.cross_tokenizer:
            raise ValueError("opd_coefficient needs one vocabulary; leave it at 0 with cross_tokenizer: true")
        if self.min_aligned and not self.cross_tokenizer:
            raise ValueError("min_aligned is for models with different tokenizers; set cross_tokenizer: true")
        return self


class BridgeConfig(Strict):
    """Stage 1, `oprd bridge fit` (OPRD Eq. 12-13), the measured layer map, `oprd bridge map`, and the bridge's health."""

    rank: PositiveInt | Literal["auto"] = 8
    """Directions that are kept. auto: the largest power of two whose held-out cosine is within 0.01 of the best."""
    max_rank: PositiveInt = 256
    """Ranks 1, 2, 4, .. up to this one are measured on held-out rows, all from one decomposition."""
    prompts: PositiveInt = 2000
    """Training prompts that the student answers for the fit (rollout.responses_per_prompt times each)."""
    rows: PositiveInt = 16384
    """At most so many response tokens are used, drawn evenly from all of them with run.seed."""
    held_out: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the prompts, and of the rows, that the fit does not see and its quality is measured on."""
    projector: Literal["linear", "mlp"] = "linear"
    """Student side: a matrix P_S, or two layers with a GELU between them (needs solver: sgd)."""
    solver: Literal["ridge", "sgd"] = "ridge"
    """ridge: the exact optimum of Eq. 13 in closed form. sgd: the paper's recipe, Adam over `epochs` passes."""
    ridge: NonNegative = 1e-4
    """Ridge strength, relative to the mean square of a state's numbers."""
    epochs: PositiveInt = 20
    """sgd only: passes over the rows."""
    lr: Annotated[float, Field(gt=0.0)] = 1e-3
    """sgd only: Adam's learning rate, with cosine decay to 0."""
    batch_rows: PositiveInt = 256
    """sgd only: rows of one update."""
    mlp_width: PositiveInt = 512
    """mlp only: numbers between the two layers."""
    allow_constant: bool = False
    """Accept a dimension of the teacher's states that never changes; it usually means a broken model."""
    map_width: PositiveInt = 256
    """Layer map only: numbers of each layer's update that are compared and travel."""
    map_ties: bool = False
    """Layer map only: student layers next to each other may share a teacher layer. They may in any case where the student is
    deeper than the teacher."""
    map_floor: float | None = None
    """Layer map only: student layers whose best score (in standard deviations, 0 is a pair like any other) is below this are
    not supervised."""
    warn_drop: Fraction = 0.1
    """Warn when a layer's held-out cosine has fallen this far below its best."""
    refit_every: Annotated[int, Field(ge=0)] = 0
    """Fit the student's projections again every so many steps, on that step's rollouts; 0 never. The teacher's stay."""

    @model_validator(mode="after")
    def _check(self) -> BridgeConfig:
        if self.projector == "mlp" and self.solver == "ridge":
            raise ValueError("projector: mlp has no closed form; set solver: sgd")
        if self.rank == "auto" and self.solver == "sgd":
            raise ValueError("rank: auto needs solver: ridge, which gives every rank from one decomposition")
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


class CheckpointConfig(Strict):
    """Checkpoints lie in <run.dir>/checkpoints in Megatron's layout (iter_0000010/, torch_dist)."""

    every: Annotated[int, Field(ge=0)] = 50
    """Save every so many steps and at the end; 0 saves only at the end."""
    keep: PositiveInt | None = None
    """Keep only the newest so many checkpoints; left out, all."""
    resume: Literal["auto", "never"] = "auto"
    """auto: continue from the newest complete checkpoint of the run directory, if there is one. never: refuse to start
    in a directory that holds one."""


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


class LoggingConfig(Strict):
    """metrics.jsonl is always written to the run directory."""

    tensorboard: bool = True
    """Also write TensorBoard event files to <run.dir>/tensorboard."""
    progress: bool = True
    """Progress bar on rank 0."""


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
    teacher: ModelConfig
    """The frozen model."""
    student: StudentConfig
    """The model that is trained."""
    rollout: RolloutConfig
    """How the student's text is made."""
    distill: DistillConfig = DistillConfig()
    """What is aligned."""
    bridge: BridgeConfig = BridgeConfig()
    """How a bridge is fitted, and watched."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How the student moves."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """What is kept."""
    eval: EvalConfig | None = None
    """Held-out evaluation; left out, there is none."""
    logging: LoggingConfig = LoggingConfig()
    """What is written down."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        rollouts = self.rollout.prompts_per_step * self.rollout.responses_per_prompt
        if self.run.micro_batch_tokens is None and rollouts % self.run.micro_batch_size:
            raise ValueError(
                f"rollout.prompts_per_step x responses_per_prompt = {rollouts} is not a multiple of "
                f"run.micro_batch_size {self.run.micro_batch_size}"
            )
        return self
