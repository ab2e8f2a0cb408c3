"""`oprd bridge map` on its ranks: which teacher layer does each student layer's work?

Both models read the student's rollouts on their own grids, forward only. What each block adds to a token's state is projected
to `bridge.map_width` numbers where the block lives; the teacher's travel to every student stage. There, second moments of all
pairs of layers are added up batch by batch (`layer_scores.py`), so memory does not grow with the number of tokens. The best
monotone map of the scores (`assignment.py`) is what training gets.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from oprd_megatron.bridge.assignment import best_monotone_map
from oprd_megatron.bridge.fit import FiniteWatch
from oprd_megatron.bridge.layer_scores import LayerScores, PairMoments, join, projection, score_layers
from oprd_megatron.bridge.rows import FitRows, split_rows
from oprd_megatron.bridge.score_plot import draw_scores
from oprd_megatron.bridge.stage1 import answers, plot_file, watched, without_bridge
from oprd_megatron.config import RunConfig
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import CheckpointError
from oprd_megatron.logging import write_atomically
from oprd_megatron.models import Model
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import build_models
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, preflight
from oprd_megatron.representation.batch import BatchPlan, Chunk
from oprd_megatron.representation.exchange import Delivery
from oprd_megatron.representation.flow import Forward, Passes, StateFlow
from oprd_megatron.representation.layer_map import LayerPair, proportional_layer
from oprd_megatron.representation.listener import PairedRows
from oprd_megatron.representation.wire import Wire
from oprd_megatron.run_directory.checks import check_writable


def measure_map(config: RunConfig, out: Path) -> None:
    """Write the map of a run to `out`, with a heat map of the scores beside it. On every rank."""
    refuse_several(config, "oprd bridge map")
    for path in (out, plot_file(out)):
        if path.exists():
            raise CheckpointError(f"{path}: exists already; nothing is overwritten, give another --out")
    check_writable(out.parent, "--out")
    platform = select_platform(config.run.device)
    anything = without_bridge(config)
    anything = anything.model_copy(
        update={"distill": anything.distill.model_copy(update={"layer_map": "proportional"})}
    )
    checked = preflight(anything, int(os.environ.get("WORLD_SIZE", "1")), starts_run=False)
    init_distributed(platform)
    with heartbeat():
        teacher, student = build_models(checked, platform)
        rows = split_rows(answers(checked, student, platform), config.bridge, config.distill, config.run.seed)
        scores = score_pairs(checked.config, teacher, student, rows, platform)
        with together(f"writing {out}"):
            if dist.get_rank() == 0:
                assert scores is not None
                _write(out, scores, rows, checked)
        dist.destroy_process_group()


def score_pairs(
    config: RunConfig, teacher: Model, student: Model, rows: FitRows, platform: Platform
) -> LayerScores | None:
    """Scores of all pairs of layers, on rank 0; None elsewhere. Collective."""
    width, seed = config.bridge.map_width, config.run.seed
    maps = [projection(model.architecture.hidden_size, width, seed).to(platform.device, torch.float32)
            for model in (teacher, student)]  # fmt: skip
    depths = teacher.architecture.num_layers, student.architecture.num_layers
    every = [LayerPair(s, t) for s in range(1, depths[1] + 1) for t in range(1, depths[0] + 1)]
    flow = StateFlow(
        teacher, student, every, config.distill, platform, Wire("fp32", maps[0].size(1)),
        lambda layer, updates: updates.float() @ maps[0],
        config.run.micro_batch_size, config.run.micro_batch_tokens, tapped="update",
    )  # fmt: skip
    here = []
    if student.grid.is_member:
        here = list(student.grid.layout.layers_of(student.grid.coords.pp))
    parts = []
    for what, batches in (("layers", rows.train), ("held-out rows", rows.held_out)):
        moments = PairMoments(here or [1], range(1, depths[0] + 1), maps[1].size(1), maps[0].size(1), platform.device)
        watch = FiniteWatch("student", config)
        for samples in watched(batches, what, config):
            plan = flow.plan(samples)
            listener = _Listener(moments, here, maps, watch, plan, student, platform)
            flow.run(plan, listener.learn, Passes())
            watch.stop()
        if student.grid.is_member:
            for tensor in moments.tensors():
                dist.all_reduce(tensor, group=student.grid.groups.tp_dp_cp)
        parts.append(moments)
    mine = None
    with together("scoring layers"):
        if student.grid.is_member and student.grid.coords.dp == student.grid.coords.cp == student.grid.coords.tp == 0:
            mine = score_layers(*parts)
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, dst=0)
    return None if found is None else join([part for part in found if part is not None])


class _Listener:
    """The student's side of one batch: a micro-batch's rows are added once all of this rank's layers have run."""

    def __init__(
        self,
        moments: PairMoments,
        here: list[int],
        maps: list[torch.Tensor],
        watch: FiniteWatch,
        plan: BatchPlan,
        student: Model,
        platform: Platform,
    ) -> None:
        self.moments, self.here, self.maps = moments, here, maps
        self.watch, self.plan, self.student, self.platform = watch, plan, student, platform

    def learn(self, chunk: Chunk, delivery: Delivery, forward: Forward) -> None:
        """`flow.Learn`."""
        rows = PairedRows(delivery, chunk, self.student.grid, self.platform.device)
        open_now: dict[int, dict[int, torch.Tensor]] = defaultdict(dict)

        def on_state(layer: int, micro_batch: int, update: torch.Tensor) -> None:
            states, tokens = rows.of_student(micro_batch, update)
            self.watch.look(layer, states, tokens, self.plan, chunk)
            open_now[micro_batch][layer] = states @ self.maps[1]
            if len(open_now[micro_batch]) == len(self.here):
                width = self.maps[0].size(1)
                taught = {layer: rows.of_teacher(micro_batch, layer, width) for layer in self.moments.teacher_layers}
                self.moments.add(open_now.pop(micro_batch), taught)

        forward(self.here, on_state)


def _write(out: Path, scores: LayerScores, rows: FitRows, checked: Checked) -> None:
    config, combined = checked.config, scores.combined
    depths = checked.student.num_layers, checked.teacher.num_layers
    strict = not config.bridge.map_ties and depths[0] <= depths[1]
    found = best_monotone_map(combined, strict=strict, floor=config.bridge.map_floor)
    proportional: list[int | None] = [proportional_layer(layer, *depths) for layer in scores.student_layers]
    pairs = [
        {"student_layer": layer, "teacher_layer": taught, "score": round(float(combined[layer - 1, taught - 1]), 6)}
        for layer, taught in zip(scores.student_layers, found, strict=True)
        if taught is not None
    ]
    lists: dict[str, np.ndarray] = {"cka": scores.cka, "r2": scores.r2, "combined": combined}
    values = {
        "format": 1,
        "pairs": pairs,
        "teacher": str(config.teacher.path),
        "student": str(config.student.path),
        "rows": rows.num_train,
        "held_out_rows": rows.num_held_out,
        "seed": config.run.seed,
        "scores": {name: np.round(matrix, 6).tolist() for name, matrix in lists.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(values, indent=1, allow_nan=False) + "\n")
    draw_scores(scores, found, proportional, plot_file(out))
    print(f"{'student layer':>13}{'teacher layer':>15}{'score':>9}{'proportional':>14}")
    for layer, taught, equation_11 in zip(scores.student_layers, found, proportional, strict=True):
        score = "" if taught is None else f"{combined[layer - 1, taught - 1]:.2f}"
        print(f"{layer:>13}{taught if taught is not None else '-':>15}{score:>9}{equation_11:>14}")
    print(f"map  {out}")
    print(f"plot {plot_file(out)}")
