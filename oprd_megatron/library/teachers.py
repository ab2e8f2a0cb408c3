"""Where teacher states come from: a teacher in this process, a service, or the batch itself.

A `Teacher` is asked once a step, before the student's schedule, on all ranks together; what it gives is already on the rank
that needs it, in the order of that rank's rows. Nothing of it is inside 1F1B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel

from checkpoints_conversion.weights import check_weights
from oprd_megatron.config.distill import DistillConfig
from oprd_megatron.config.precision import PrecisionConfig
from oprd_megatron.config.schema import ParallelConfig
from oprd_megatron.errors import DataError
from oprd_megatron.library.batches import Step, TokenBatch
from oprd_megatron.models import DTYPES, Model, build_model, no_output_loss, run_schedule
from oprd_megatron.models.spec import has_transformer_engine
from oprd_megatron.parallel import resolve_layout, tp_divisible
from oprd_megatron.parallel.grid import Grid, build_grid, init_mcore_globals
from oprd_megatron.parallel.precision import Machine, check_precision
from oprd_megatron.platform import Platform, compute_capability
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.feed import micro_batches
from oprd_megatron.representation.injection import Delivered
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.placement import arrange, place_tokens
from oprd_megatron.representation.route import plan_route
from oprd_megatron.representation.rows import block_rows
from oprd_megatron.representation.space import Identity
from oprd_megatron.representation.taps import attached_taps
from oprd_megatron.representation.wire import Wire, wire_name


@dataclass(frozen=True)
class Wanted:
    """What a student's ranks want of a step.

    Attributes:
        step: the batches.
        pairs: which teacher layer goes to the ranks of which student layer.
        grid: the student's.
        config: wire and final state.
        space: the teacher's side of it is applied before anything travels.
        platform: of this rank.
    """

    step: Step
    pairs: Sequence[LayerPair]
    grid: Grid
    config: DistillConfig
    space: Identity
    platform: Platform


class Teacher(Protocol):
    """Gives teacher states.

    Attributes:
        num_layers, width: of the teacher.
    """

    @property
    def num_layers(self) -> int: ...

    @property
    def width(self) -> int: ...

    def check(self, config: DistillConfig, pairs: Sequence[LayerPair]) -> None:
        """Refuse a method that this teacher cannot serve.

        Raises:
            UserError: one line.
        """
        ...

    def deliver(self, wanted: Wanted, batches: Sequence[TokenBatch]) -> tuple[Delivered, np.ndarray]:
        """(states for this rank, order of the step's tokens in which its rows are). Collective over the world; `batches` are
        this data-parallel rank's."""
        ...


@dataclass(frozen=True)
class InProcessTeacher:
    """A teacher on the same ranks, in a layout of its own; build it with `load`.

    Attributes:
        model: frozen.
        micro_batch_tokens: it reads at most so many tokens at once.
    """

    model: Model
    micro_batch_tokens: int = 8192

    @classmethod
    def load(
        cls,
        path: Path | str,
        parallel: ParallelConfig | None = None,
        *,
        platform: Platform,
        dtype: Literal["fp32", "bf16"] = "bf16",
        precision: PrecisionConfig | None = None,
        pad_heads: bool = False,
        micro_batch_tokens: int = 8192,
    ) -> InProcessTeacher:
        """Build a teacher from a Hugging Face directory beside whatever lives on these ranks. Collective over the world.

        Args:
            path: directory.
            parallel: its layout; left out, one copy on every rank (dp).
            platform: of this rank (`select_platform`).
            dtype: fp32 or bf16.
            precision: of its linear layers.
            pad_heads, micro_batch_tokens: as in `run` and `student`.

        Raises:
            CheckpointError, LayoutError: one line.
        """
        architecture = check_weights(Path(path))
        precision = precision or PrecisionConfig()
        layout = resolve_layout(
            parallel or ParallelConfig(), name="teacher", world_size=dist.get_world_size(),
            num_layers=architecture.num_layers, divisible=tp_divisible(architecture, pad_heads),
            token_multiple=precision.token_multiple,
        )  # fmt: skip
        machine = Machine(compute_capability("auto" if platform.is_cuda else "cpu"), has_transformer_engine())
        check_precision("teacher", precision, architecture, layout, layout, machine)
        with platform.scope():
            grid = build_grid(layout)
            if not tensor_parallel.get_cuda_rng_tracker().is_initialized():  # else it is the student's, and stays
                init_mcore_globals(0, grid.coords.tp if grid.is_member else 0)
        model = build_model(
            architecture, grid, platform, dtype=DTYPES[dtype], hf_dir=Path(path), frozen=True, precision=precision,
            head=False,
        )  # fmt: skip
        return cls(model, micro_batch_tokens)

    @property
    def num_layers(self) -> int:
        return self.model.architecture.num_layers

    @property
    def width(self) -> int:
        return self.model.architecture.hidden_size

    def check(self, config: DistillConfig, pairs: Sequence[LayerPair]) -> None:
        """Everything can be served."""

    def wire(self, config: DistillConfig, space: Identity) -> Wire:
        """Format of what travels."""
        return Wire(wire_name(config, "bf16" if self.model.config.bf16 else "fp32"), space.width)

    def deliver(self, wanted: Wanted, batches: Sequence[TokenBatch] = ()) -> tuple[Delivery, np.ndarray]:
        step, model, space = wanted.step, self.model, wanted.space
        check_vocabulary(step.sequences, model.architecture.vocab_size)
        arrangement = arrange([len(ids) for ids in step.sequences], model.grid.layout, 1, self.micro_batch_tokens)
        tokens = place_tokens([where.tolist() for where in step.positions], arrangement, model.grid.layout)
        route = plan_route(wanted.pairs, model.grid.layout, tokens, wanted.grid.layout, step.tokens)
        delivery = Delivery(
            route, tokens, dist.get_rank(), self.wire(wanted.config, space), wanted.platform.device,
            project=None if type(space) is Identity else space.of_teacher,
        )  # fmt: skip
        fed = micro_batches([ids.tolist() for ids in step.sequences], arrangement, model.grid)
        layers = {pair.teacher_layer for pair in wanted.pairs}
        with attached_taps(model, layers, wanted.config.final_state, delivery.put):
            run_schedule(model, wanted.platform, fed, forward_only=True, on_output=no_output_loss)
        delivery.post()
        delivery.wait()
        return delivery, route.order


@dataclass
class HeldRows:
    """Teacher states that are on this rank already, as `Delivered`.

    Attributes:
        wire: their format.
        targets: {(micro-batch, teacher layer): [N, C]}.
    """

    wire: Wire
    targets: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)

    def rows(self, micro_batch: int, teacher_layer: int) -> torch.Tensor | None:
        return self.targets.get((micro_batch, teacher_layer))

    def release(self, micro_batch: int, teacher_layer: int) -> None:
        self.targets.pop((micro_batch, teacher_layer), None)

    @classmethod
    def of(cls, wanted: Wanted, states: dict[int, torch.Tensor], first: int) -> tuple[HeldRows, np.ndarray]:
        """Pick this rank's rows out of the states of all supervised tokens of its data-parallel rank.

        Args:
            wanted: by the student.
            states: {teacher layer: [tokens of this data-parallel rank, C]}, in the step's order.
            first: number of the first of these tokens in the step.
        """
        order = np.arange(wanted.step.num_tokens)
        held = cls(Wire("fp32", wanted.space.width))
        for number, rows in block_rows(wanted.step.tokens, order, wanted.grid, torch.device("cpu")).items():
            mine = torch.from_numpy(rows.own_tokens - first)
            for layer, values in states.items():
                held.targets[number, layer] = values[mine].to(wanted.platform.device)
        return held, order


@dataclass(frozen=True)
class StatesInBatch:
    """A teacher whose states come with the batches (`TokenBatch.states`), as a data loader or an RL framework carries them:
    projected by the bridge already, if there is one.

    Attributes:
        num_layers, width: of the teacher.
    """

    num_layers: int
    width: int

    def check(self, config: DistillConfig, pairs: Sequence[LayerPair]) -> None:
        """What the batches hold is seen when they come."""

    def deliver(self, wanted: Wanted, batches: Sequence[TokenBatch]) -> tuple[HeldRows, np.ndarray]:
        tokens = np.flatnonzero(wanted.step.tokens.dp == wanted.grid.coords.dp)
        layers = sorted({pair.teacher_layer for pair in wanted.pairs})
        for number, batch in enumerate(batches):
            count = sum(map(len, batch.positions(wanted.config)))
            for layer in layers:
                found = None if batch.states is None else batch.states.get(layer)
                if found is None or list(found.shape) != [count, wanted.space.width]:
                    has = "nothing" if found is None else list(found.shape)
                    raise DataError(
                        f"micro-batch {number} holds {has} of teacher layer {layer}, but its {count} supervised tokens need "
                        f"{[count, wanted.space.width]}; give their states, projected by the bridge if there is one"
                    )
        states = {layer: torch.cat([batch.states[layer].float() for batch in batches]) for layer in layers}  # type: ignore[index]
        return HeldRows.of(wanted, states, int(tokens[0]) if len(tokens) else 0)


def check_vocabulary(sequences: Sequence[np.ndarray], vocab_size: int) -> None:
    """Raises:
    DataError: a token id that the teacher does not have.
    """
    highest = max((int(ids.max()) for ids in sequences if len(ids)), default=0)
    if highest >= vocab_size:
        raise DataError(
            f"token id {highest} is not one of the teacher's {vocab_size}: another tokenizer; give a teacher of the student's"
        )
