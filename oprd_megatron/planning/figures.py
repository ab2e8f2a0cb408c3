"""The figures of a planned run, as data: grids, layer map, traffic and memory. `collect.py` fills them in.

Ranks are global; layers are 1-based; a stage is a pipeline rank; everything in bytes is for one step on a batch as long as
the config allows.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from checkpoints_conversion import Architecture
from oprd_megatron.parallel.layout import GridLayout
from oprd_megatron.parallel.memory import StageMemory
from oprd_megatron.representation.layer_map import LayerPair

GPU_MEMORY = 80 * 10**9
"""Bytes of a GPU that a plan may fill, where nobody says. An H100 has 85e9; the rest is for CUDA and NCCL."""


@dataclass(frozen=True)
class ModelPlan:
    """One model: its architecture, its grid, and what a rank of each stage holds.

    Attributes:
        path, dtype: as in the config. linear: `precision.linear`.
        has_head: False where nothing looks at its predictions.
        architecture: from config.json.
        layout: the grid.
        layers_per_stage: how the config says it: a list, follow_student, or None (even).
        memory: by stage, without teacher states and rollout engine.
        num_micro_batches: of a chunk of the batch on one data-parallel rank, the most of all chunks.
        pack_tokens: longest pack.
        engine_bytes: a copy of the model in a rollout engine.
    """

    path: str
    dtype: str
    linear: str
    has_head: bool
    architecture: Architecture
    layout: GridLayout
    layers_per_stage: list[int] | str | None
    memory: list[StageMemory]
    num_micro_batches: int
    pack_tokens: int
    engine_bytes: int


@dataclass(frozen=True)
class Batch:
    """The batch that is planned for.

    Attributes:
        num_samples, prompt_tokens, response_tokens: rollouts, and the length of each.
        num_tokens: supervised tokens of the whole batch, if any states are compared.
        predicted_tokens: tokens whose predictions are compared; 0 without output terms.
        num_chunks: that it is done in.
        spool_bytes: the budget, None without one.
        spool: device or host.
    """

    num_samples: int
    prompt_tokens: int
    response_tokens: int
    num_tokens: int
    predicted_tokens: int
    num_chunks: int
    spool_bytes: int | None
    spool: str


@dataclass(frozen=True)
class StageTraffic:
    """What goes from a teacher stage to a student stage in a step.

    Attributes:
        layers: teacher layers.
        states: token and layer pairs, on however many ranks.
        moved_bytes: between ranks.
        stays: share of the states that are already on the rank that needs them.
    """

    teacher_stage: int
    student_stage: int
    layers: tuple[int, ...]
    states: int
    moved_bytes: int
    stays: float


@dataclass(frozen=True)
class OutputTraffic:
    """What goes from the teacher's last stage to the student's last in a step, for output terms.

    Attributes:
        head: which side applies the teacher's head. student: final states travel; teacher: the numbers that the terms read.
        wire, width, token_bytes: number format, numbers and bytes of a token.
        teacher_stage, student_stage: the last ones.
        tokens: whose predictions are compared.
        moved_bytes: between ranks.
        stays: share of the tokens whose numbers are already on the rank that needs them.
    """

    head: Literal["student", "teacher"]
    wire: str
    width: int
    token_bytes: int
    teacher_stage: int
    student_stage: int
    tokens: int
    moved_bytes: int
    stays: float


@dataclass(frozen=True)
class Traffic:
    """What the exchange moves in a step: states, and what output terms need. Figures below `outputs` are of both.

    Attributes:
        wire: number format. width: numbers in a state. state_bytes: bytes of one.
        stages: states by pair of stages; none where no states are compared.
        outputs: None without output terms.
        same_rank_bytes: what is where it is needed; it does not travel.
        same_node_bytes, between_nodes_bytes: what travels.
        num_messages: between ranks, all chunks.
        links: [source, destination, bytes] of every pair of ranks, busiest first.
        most_sent, most_received: (rank, bytes) of the busiest ranks; None where nothing moves.
    """

    wire: str
    width: int
    state_bytes: int
    stages: list[StageTraffic]
    outputs: OutputTraffic | None
    same_rank_bytes: int
    same_node_bytes: int
    between_nodes_bytes: int
    num_messages: int
    links: list[tuple[int, int, int]]
    most_sent: tuple[int, int] | None
    most_received: tuple[int, int] | None

    @property
    def total_bytes(self) -> int:
        """Bytes that move between ranks."""
        return self.same_node_bytes + self.between_nodes_bytes


@dataclass(frozen=True)
class RankMemory:
    """What the ranks with the same stages hold; the most of them.

    Attributes:
        teacher_stage, student_stage: None where they have no part of that model.
        first_rank, num_ranks: which ranks.
        teacher, student: weights, gradients and optimizer.
        activations: of the model that has more: they take turns.
        spool: teacher states and outputs.
        outputs: the teacher's head for output terms, logits of a few tokens, and the gradient of the student's head.
        engine: the embedded rollout engine's copy of the student.
        vllm: a colocated vLLM's share of the GPU, while it writes; then it sleeps, and gives all of it back.
        vllm_on_host: its sleeping weights, in host memory.
        spool_on_host: the spool is not device memory.
    """

    teacher_stage: int | None
    student_stage: int | None
    first_rank: int
    num_ranks: int
    teacher: int
    student: int
    activations: int
    spool: int
    outputs: int
    engine: int
    vllm: int
    vllm_on_host: int
    spool_on_host: bool

    @property
    def learning_bytes(self) -> int:
        """Of device memory, while teacher and student work."""
        spool = 0 if self.spool_on_host else self.spool
        return self.teacher + self.student + self.activations + spool + self.outputs + self.engine

    @property
    def writing_bytes(self) -> int:
        """Of device memory, while responses are written."""
        return self.teacher + self.student + self.engine + self.vllm

    @property
    def device_bytes(self) -> int:
        """The most device memory."""
        return max(self.learning_bytes, self.writing_bytes)


@dataclass(frozen=True)
class FollowStudent:
    """The teacher's stages after `layers_per_stage: follow_student`, against `other`: the config's, or even ones.

    Attributes:
        stages: layers of each chunk. moved_bytes: in a step.
        other: layers of each chunk. other_bytes: in a step.
        is_configured: the config says follow_student.
    """

    stages: tuple[int, ...]
    moved_bytes: int
    other: tuple[int, ...]
    other_bytes: int
    is_configured: bool

    @property
    def saving(self) -> float:
        """Share of the other's bytes that need not travel."""
        return 1 - self.moved_bytes / self.other_bytes if self.other_bytes else 0.0


@dataclass(frozen=True)
class RunPlan:
    """All of it. `held_out_engine_bytes`: the teacher's copy that answers held-out prompts once, before the first step."""

    world_size: int
    gpus_per_node: int
    teacher: ModelPlan
    student: ModelPlan
    pairs: list[LayerPair]
    batch: Batch
    traffic: Traffic
    ranks: list[RankMemory]
    follow: FollowStudent | None
    held_out_engine_bytes: int

    @property
    def fullest(self) -> RankMemory:
        """The ranks that need the most device memory."""
        return max(self.ranks, key=lambda rank: rank.device_bytes)

    @property
    def shares_ranks(self) -> bool:
        """Both models are on the same ranks."""
        return self.teacher.layout.ranks == self.student.layout.ranks

    def as_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        values = asdict(self)
        values["traffic"]["total_bytes"] = self.traffic.total_bytes
        for row, rank in zip(values["ranks"], self.ranks, strict=True):
            row["device_bytes"] = rank.device_bytes
        return values
