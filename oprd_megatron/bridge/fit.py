"""Stage 1 of OPRD-Bridge: from the student's rollouts to frozen projections, on the grids that training runs on.

    1  teacher forward         covariance of its states, layer by layer  ->  mu, P_T       (Eq. 12)
    2  teacher and student     P_T (h_T - mu) travels to h_S             ->  P_S           (Eq. 13)
    3  the same, held out      cosine and explained variance for every rank 1, 2, 4, ..

Nothing but moments is kept (the SGD solver also keeps its rows, bridge.rows at most), so memory does not grow with the number
of rollouts. The moments of a layer are added up on one rank, its owner; owners are spread over the ranks that hold the
layer. The owner decomposes in float64 and tells all ranks, which so have the same bits.

One decomposition gives every rank: directions are sorted, and P_S has a regression of its own for each.

Legend: N rows of a call, R directions, D_T and D_S widths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.bridge.moments import Moments, Regression
from oprd_megatron.bridge.projector import part_shapes, train_projector
from oprd_megatron.bridge.solve import Directions, principal_directions, ridge
from oprd_megatron.config.schema import RunConfig
from oprd_megatron.errors import DataError
from oprd_megatron.models import Model
from oprd_megatron.parallel import GridLayout
from oprd_megatron.parallel.agreement import together
from oprd_megatron.platform import Platform
from oprd_megatron.representation.batch import BatchPlan, Chunk, Sample
from oprd_megatron.representation.bridge import LINEAR, Bridge
from oprd_megatron.representation.exchange import Delivery, Project
from oprd_megatron.representation.flow import Forward, Passes, StateFlow
from oprd_megatron.representation.layer_map import LayerPair
from oprd_megatron.representation.listener import PairedRows
from oprd_megatron.representation.wire import Wire
from oprd_megatron.rollout.tokenizer import load_tokenizer

Batches = Iterable[list[Sample]]


class Stage1:
    """What the passes of a fit share. Every method is collective over the world.

    Args:
        teacher, student: the models.
        pairs: the layer map.
        config: the run.
        platform: of this rank.
    """

    def __init__(
        self, teacher: Model, student: Model, pairs: Sequence[LayerPair], config: RunConfig, platform: Platform
    ) -> None:
        self.teacher, self.student, self.pairs = teacher, student, pairs
        self.config, self.platform = config, platform
        self.rank = dist.get_rank()

    def directions(self, batches: Batches, num_directions: int) -> tuple[Bridge, dict[int, Directions]]:
        """Pass 1: (the teacher's half of a bridge, this rank's own layers' directions).

        Raises:
            DataError: a state is not finite, a dimension never changes, or states vary in fewer directions than asked for.
        """
        width, device = self.teacher.architecture.hidden_size, self.platform.device
        layers = sorted({pair.teacher_layer for pair in self.pairs})
        moments: dict[int, Moments] = {}
        watch = FiniteWatch("teacher", self.config)
        flow = self._flow(num_directions, None)
        for samples in batches:
            plan = flow.plan(samples)
            for chunk in plan.chunks:

                def on_rows(layer: int, rows: torch.Tensor, tokens: np.ndarray, plan=plan, chunk=chunk) -> None:  # type: ignore[no-untyped-def]
                    watch.look(layer, rows, tokens, plan, chunk)
                    if layer not in moments:
                        moments[layer] = Moments.zeros(width, device)
                    moments[layer].add(rows)

                flow.teach(replace(plan, chunks=[chunk]), on_rows)
            watch.stop()
        owners = owners_of(self.teacher.grid.layout, layers)
        mine: dict[int, Moments] = {}
        for layer in self._here(self.teacher, layers):
            reduced = moments.pop(layer, None) or Moments.zeros(width, device)
            reduced.reduce(owners[layer], self.teacher.grid.groups.tp_dp_cp)
            if owners[layer] == self.rank:
                mine[layer] = reduced
        found: dict[int, Directions] = {}
        with together("finding the teacher's directions"):
            for layer in list(mine):
                self._check(layer, mine[layer], num_directions)
                found[layer] = principal_directions(mine.pop(layer), num_directions)
        means = self._tell(owners, {layer: part.mean for layer, part in found.items()}, (width,))
        bases = self._tell(owners, {layer: part.basis for layer, part in found.items()}, (num_directions, width))
        return Bridge(num_directions, means, bases, student={}), found

    def projections(self, batches: Batches, bridge: Bridge) -> dict[int, dict[str, torch.Tensor]]:
        """Pass 2: the student's projectors for the teacher's half of a bridge.

        Raises:
            DataError: a state is not finite.
        """
        if self.config.bridge.solver == "sgd":
            return self._by_descent(batches, bridge)
        width, device = self.student.architecture.hidden_size, self.platform.device
        layers = [pair.student_layer for pair in self.pairs]
        sums: dict[int, Regression] = {}

        def on_rows(layer: int, states: torch.Tensor, targets: torch.Tensor, tokens: np.ndarray) -> None:
            if layer not in sums:
                sums[layer] = Regression.zeros(width, bridge.rank, device)
            sums[layer].add(states, targets)

        self.run(batches, bridge, bridge.project_teacher, on_rows)
        owners, found = owners_of(self.student.grid.layout, layers), {}
        for layer in self._here(self.student, layers):
            mine = sums.pop(layer, None) or Regression.zeros(width, bridge.rank, device)
            mine.reduce(owners[layer], self.student.grid.groups.tp_dp_cp)
            if owners[layer] == self.rank:
                found[layer] = ridge(mine, self.config.bridge.ridge)
        told = self._tell(owners, found, (bridge.rank, width))
        return {layer: {LINEAR: told[layer]} for layer in layers}

    def run(
        self,
        batches: Batches,
        bridge: Bridge,
        project: Project,
        on_rows: Callable[[int, torch.Tensor, torch.Tensor, np.ndarray], None],
    ) -> None:
        """Both models over the batches; `on_rows` gets (student layer, states [N, D_S] fp32, what `project` made of the
        teacher's states [N, R] fp32, numbers of the rows) on the ranks that hold the layer, every row once in the world."""
        flow, before = self._flow(bridge.rank, project), 0
        teacher_layer = {pair.student_layer: pair.teacher_layer for pair in self.pairs}
        watches = FiniteWatch("teacher", self.config), FiniteWatch("student", self.config)
        for samples in batches:
            plan = flow.plan(samples)
            first = np.cumsum([0, *(flow.planner.num_tokens(chunk.samples) for chunk in plan.chunks)])
            offsets = {id(chunk): before + int(start) for chunk, start in zip(plan.chunks, first, strict=False)}

            def learn(chunk: Chunk, delivery: Delivery, forward: Forward, plan=plan, offsets=offsets) -> None:  # type: ignore[no-untyped-def]
                rows = PairedRows(delivery, chunk, self.student.grid, self.platform.device)

                def on_state(layer: int, micro_batch: int, hidden: torch.Tensor) -> None:
                    states, tokens = rows.of_student(micro_batch, hidden)
                    targets = rows.of_teacher(micro_batch, teacher_layer[layer], bridge.rank)
                    watches[0].look(teacher_layer[layer], targets, tokens, plan, chunk)
                    watches[1].look(layer, states, tokens, plan, chunk)
                    on_rows(layer, states, targets, tokens + offsets[id(chunk)])

                forward(teacher_layer, on_state)

            flow.run(plan, learn, Passes())
            for watch in watches:
                watch.stop()
            before += plan.num_tokens

    def _by_descent(self, batches: Batches, bridge: Bridge) -> dict[int, dict[str, torch.Tensor]]:
        """Pass 2 with the rows of each layer brought together on its owner."""
        config, width = self.config.bridge, self.student.architecture.hidden_size
        layers = [pair.student_layer for pair in self.pairs]
        kept: dict[int, list[tuple[np.ndarray, torch.Tensor, torch.Tensor]]] = defaultdict(list)

        def on_rows(layer: int, states: torch.Tensor, targets: torch.Tensor, tokens: np.ndarray) -> None:
            kept[layer].append((tokens, states.cpu(), targets.cpu()))

        self.run(batches, bridge, bridge.project_teacher, on_rows)
        owners, found = owners_of(self.student.grid.layout, layers), {}
        for layer in self._here(self.student, layers):
            group = self.student.grid.groups.tp_dp_cp
            parts: list[Any] | None = [None] * group.size() if owners[layer] == self.rank else None
            dist.gather_object(kept.pop(layer, []), parts, dst=owners[layer], group=group)
            if parts is not None:
                tokens, states, targets = zip(*(row for part in parts for row in part), strict=True)
                order = torch.from_numpy(np.argsort(np.concatenate(tokens)))
                inputs, wanted = (torch.cat(side)[order].to(self.platform.device) for side in (states, targets))
                found[layer] = train_projector(inputs, wanted, config, self.config.run.seed + layer)
        told: dict[int, dict[str, torch.Tensor]] = {layer: {} for layer in layers}
        for name, shape in part_shapes(config, width, bridge.rank).items():
            for layer, part in self._tell(
                owners, {layer: parts[name] for layer, parts in found.items()}, shape
            ).items():
                told[layer][name] = part
        return told

    def _flow(self, width: int, project: Project | None) -> StateFlow:
        """Ways for states of `width` fp32 numbers: a fit is small, and the wire's rounding would be in the projections."""
        run = self.config.run
        return StateFlow(
            self.teacher, self.student, self.pairs, self.config.distill, self.platform, Wire("fp32", width), project,
            run.micro_batch_size, run.micro_batch_tokens,
        )  # fmt: skip

    def _here(self, model: Model, layers: Sequence[int]) -> list[int]:
        grid = model.grid
        return [layer for layer in layers if grid.is_member and grid.layout.stage_of(layer) == grid.coords.pp]

    def _check(self, layer: int, moments: Moments, num_directions: int) -> None:
        rows, constant = int(moments.count), moments.constant
        if rows <= num_directions:
            raise DataError(
                f"bridge.rank: {num_directions} directions need more than {rows} rows; raise bridge.prompts or bridge.rows, or "
                "lower bridge.rank"
            )
        if constant and not self.config.bridge.allow_constant:
            raise DataError(
                f"teacher layer {layer}: dimension {constant[0]} of its states ({len(constant)} in all, counted from 0) never "
                f"changes over {rows} rows; check teacher.path, or accept it with bridge.allow_constant: true"
            )

    def _tell(
        self, owners: dict[int, int], found: dict[int, torch.Tensor], shape: tuple[int, ...]
    ) -> dict[int, torch.Tensor]:
        """{layer: tensor} in fp32 on every rank, from the owners' values: a broadcast for each layer."""
        told = {}
        for layer, owner in owners.items():
            tensor = torch.empty(shape, device=self.platform.device)
            if owner == self.rank:
                tensor.copy_(found[layer])
            dist.broadcast(tensor, owner)
            told[layer] = tensor
        return told


class FiniteWatch:
    """Stops a pass, on all ranks, at states that are not finite.

    Args:
        model: whose states: teacher or student.
        config: of the run, to say which prompt it was.
    """

    def __init__(self, model: str, config: RunConfig) -> None:
        self.model, self.config, self.found = model, config, ""

    def look(
        self, layer: int, states: torch.Tensor, tokens: np.ndarray, plan: BatchPlan, chunk: Chunk | None = None
    ) -> None:
        """Remember the first bad one among states [N, D] of these tokens (of the chunk, or of the plan's only one)."""
        bad = ~states.isfinite().all(-1)
        if self.found or not bad.any():
            return
        token = int(tokens[int(bad.nonzero()[0])])
        self.found = f"{self.model} layer {layer}, {self._place(token, plan, chunk or plan.chunks[0])}"

    def _place(self, token: int, plan: BatchPlan, chunk: Chunk) -> str:
        positions = [sample.positions(self.config.distill)[self.model != "teacher"] for sample in chunk.samples]
        starts = np.cumsum([0, *map(len, positions)])
        number = int(np.searchsorted(starts, token, side="right")) - 1
        before = sum(len(other.samples) for other in takewhile(lambda other: other is not chunk, plan.chunks))
        tokenizer = load_tokenizer(self.config.student.path)
        text = str(tokenizer.decode(list(chunk.samples[number].prompt_ids), skip_special_tokens=True))
        shown = text if len(text) <= 60 else text[:57] + "..."
        position = positions[number][token - starts[number]]
        return f"sample {before + number + 1} of {len(plan.samples)}, position {position} from 0 (prompt {shown!r})"

    def stop(self) -> None:
        """Raise what any rank found. Collective."""
        with together("looking at states"):
            if self.found:
                raise DataError(f"states are not finite: {self.found}; the model's weights or this text are broken")


def owners_of(layout: GridLayout, layers: Iterable[int]) -> dict[int, int]:
    """{layer: the rank that solves for it}, dealt over the ranks of the layer's stage."""
    by_stage: dict[int, list[int]] = defaultdict(list)
    for rank in layout.ranks:
        by_stage[layout.coords(rank).pp].append(rank)
    dealt: dict[int, int] = defaultdict(int)
    owners = {}
    for layer in layers:
        stage = layout.stage_of(layer)
        owners[layer] = by_stage[stage][dealt[stage] % len(by_stage[stage])]
        dealt[stage] += 1
    return owners
