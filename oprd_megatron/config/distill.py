"""What is aligned, and how a bridge between unlike models is found. OPRD's equation numbers; B rollouts, d width."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ByteSize, Field, PositiveInt, model_validator

from oprd_megatron.config.base import Fraction, NonNegative, Strict
from oprd_megatron.config.schedule import Schedule

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
    coefficient: Schedule = 1.0
    """Factor on the representation loss: a number, or [[progress, factor], ..] to move along; 0 only measures it."""
    mode: Literal["auto", "identity", "low_rank", "low_rank_residual", "linear", "none"] = "auto"
    """In which space states are compared. identity: as they are (equal widths). low_rank: both projected by the frozen bridge
    (Eq. 14). low_rank_residual: the same without its first bridge_head directions, which explain most. linear: the
    student's through a matrix [d_T, d_S] for each layer that is trained with it. none: not at all; output terms alone. auto:
    low_rank with a bridge, or identity."""
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
    def space(self) -> Literal["identity", "low_rank", "low_rank_residual", "linear", "none"]:
        """`mode`, resolved."""
        return self.mode if self.mode != "auto" else "low_rank" if self.bridge else "identity"

    @property
    def normalization(self) -> Literal["none", "l2"]:
        """`normalize`, resolved."""
        return self.normalize if self.normalize != "auto" else "l2" if self.space.startswith("low_rank") else "none"

    @model_validator(mode="after")
    def _check(self) -> DistillConfig:
        if self.mode in ("identity", "linear", "none") and self.bridge is not None:
            raise ValueError(f"mode: {self.mode} uses no bridge; leave distill.bridge out, or choose mode: low_rank")
        if (self.mode == "low_rank_residual") != bool(self.bridge_head):
            raise ValueError("mode: low_rank_residual and bridge_head: N (the directions it leaves out) go together")
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
