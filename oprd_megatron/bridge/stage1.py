"""`oprd bridge fit` on its ranks: rollouts, the three passes, the file, the table and the plot."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

from oprd_megatron.bridge.artefact import BridgeInfo, HeldOut, RankScore, info_file, write_bridge
from oprd_megatron.bridge.fit import Stage1
from oprd_megatron.bridge.measure import HeldOutFigures, curve_table, measure, ranks_to_measure
from oprd_megatron.bridge.rank_plot import draw_rank_curve
from oprd_megatron.bridge.rows import FitRows, split_rows
from oprd_megatron.config import RunConfig
from oprd_megatron.config.teachers import refuse_several
from oprd_megatron.errors import CheckpointError, ConfigError
from oprd_megatron.models import Model
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.heartbeat import heartbeat
from oprd_megatron.placing import build_models
from oprd_megatron.platform import Platform, init_distributed, select_platform
from oprd_megatron.preflight import Checked, fingerprints, preflight
from oprd_megatron.representation.batch import Sample
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.rollout.build import prepare_engine
from oprd_megatron.rollout.on_policy import OnPolicy
from oprd_megatron.rollout.tokenizer import load_tokenizer
from oprd_megatron.rollout.weight_sync import sync_weights
from oprd_megatron.run_directory.checks import check_writable

T = TypeVar("T")


def without_bridge(config: RunConfig) -> RunConfig:
    """The run before it has a bridge: nothing of stage 2 is needed, and states may have any widths."""
    update = {"mode": "linear", "bridge": None, "bridge_head": 0, "spool_bytes": None}
    return config.model_copy(update={"distill": config.distill.model_copy(update=update)})


def fit(config: RunConfig, out: Path, stays: bool = False) -> None:
    """Fit a bridge and write it to `out`, with its json and a plot of all ranks beside it. On every rank, which `stays` in its
    process group for what comes next."""
    refuse_several(config, "oprd bridge fit")
    for path in (out, info_file(out), plot_file(out)):
        if path.exists():
            raise CheckpointError(f"{path}: exists already; nothing is overwritten, give another --out")
    check_writable(out.parent, "--out")
    platform = select_platform(config.run.device)
    checked = preflight(without_bridge(config), int(os.environ.get("WORLD_SIZE", "1")), starts_run=False)
    check_fit(config, checked)
    init_distributed(platform)
    with heartbeat():
        teacher, student = build_models(checked, platform)
        rows = split_rows(answers(checked, student, platform), config.bridge, config.distill, config.run.seed)
        stage = Stage1(teacher, student, checked.pairs, checked.config, platform)
        bridge, figures = fit_bridge(stage, rows)
        with together(f"writing {out}"):
            if dist.get_rank() == 0:
                _write(out, bridge, figures, rows, checked)
        if not stays:
            dist.destroy_process_group()


def check_fit(config: RunConfig, checked: Checked) -> None:
    """What can be known to be wrong before models are loaded and responses written.

    Raises:
        ConfigError: more directions than a state has or than rows can give, or no prompts to hold out.
    """
    width, rank = min(checked.teacher.hidden_size, checked.student.hidden_size), config.bridge.rank
    if rank != "auto" and rank > width:
        raise ConfigError(
            f"bridge.rank: {rank} is above the width {width} of the narrower model's states; use at most {width}"
        )
    if rank != "auto" and rank >= config.bridge.rows:
        raise ConfigError(
            f"bridge.rank: {rank} directions need more than bridge.rows' {config.bridge.rows}; raise bridge.rows, or lower "
            "bridge.rank"
        )
    if num_steps(config, len(checked.prompts)) < 2:
        raise ConfigError(
            f"bridge.prompts: {min(config.bridge.prompts, len(checked.prompts))} prompts at {config.rollout.prompts_per_step} "
            "a step leave none to hold out; use at least twice rollout.prompts_per_step"
        )


def num_steps(config: RunConfig, num_prompts: int) -> int:
    """Steps whose prompts are answered: `bridge.prompts`, in whole steps, and none twice. (What is held out from the fit may
    not come again in the next epoch's order.)"""
    each = config.rollout.prompts_per_step
    return min(-(-config.bridge.prompts // each), num_prompts // each)


def answers(checked: Checked, student: Model, platform: Platform) -> list[list[Sample]]:
    """The student's responses to `bridge.prompts` training prompts, step by step as training would see them. Collective."""
    config = checked.config
    engine = prepare_engine(checked.writer, student.grid.layout, platform)()
    sync_weights(engine, student, version=0)
    text = OnPolicy(config, checked.prompts, engine, checked.student_vocab_size)
    maker = checked.sample_maker(checked.prompts)
    steps = num_steps(config, len(checked.prompts))
    batches = [maker.of_student(text.rollouts(step)) for step in watched(range(steps), "rollouts", config)]
    if engine is not None:
        engine.close()
    return batches


def fit_bridge(stage: Stage1, rows: FitRows) -> tuple[Bridge, HeldOutFigures]:
    """The three passes: a bridge of the configured (or recommended) rank, and what every rank reached. Collective."""
    config = stage.config
    section = config.bridge
    wanted = section.rank if section.rank != "auto" else None
    widths = stage.teacher.architecture.hidden_size, stage.student.architecture.hidden_size
    ranks = ranks_to_measure(max(1, min(section.max_rank, *widths, rows.num_train - 1)), wanted)
    if section.solver == "sgd":
        assert wanted is not None
        ranks = [wanted]
    whole, _ = stage.directions(watched(rows.train, "teacher's directions", config), ranks[-1])
    projections = stage.projections(watched(rows.train, "student's projections", config), whole)
    whole = replace(whole, student=projections)
    figures = measure(stage, watched(rows.held_out, "held-out rows", config), whole, ranks)
    return whole.sliced(slice(wanted or figures.recommended())), figures


def watched(items: Sequence[T], what: str, config: RunConfig) -> Iterable[T]:
    """The items, with a progress bar on rank 0."""
    return tqdm(items, desc=what, unit="batch", disable=dist.get_rank() != 0 or not config.logging.progress)


def plot_file(out: Path) -> Path:
    """The picture beside a bridge."""
    return out.with_suffix(".png")


def _write(out: Path, bridge: Bridge, figures: HeldOutFigures, rows: FitRows, checked: Checked) -> None:
    config, pairs = checked.config, checked.pairs
    section, at = config.bridge, figures.ranks.index(bridge.rank)
    tokenizers = checked.teacher_tokenizer or load_tokenizer(config.teacher.path), checked.tokenizer
    info = BridgeInfo(
        projector=section.projector,
        rank=bridge.rank,
        layer_map=[(pair.student_layer, pair.teacher_layer) for pair in pairs],
        fit={
            "solver": section.solver,
            **({"ridge": section.ridge} if section.solver == "ridge" else {"epochs": section.epochs, "lr": section.lr}),
            "rows": rows.num_train,
            "held_out_rows": rows.num_held_out,
            "prompts": num_steps(config, len(checked.prompts)) * config.rollout.prompts_per_step,
            "seed": config.run.seed,
            "positions": config.distill.positions,
            "position_anchor": config.distill.position_anchor,
            "final_state": config.distill.final_state,
            "recommended_rank": figures.recommended(),
        },
        held_out=HeldOut(
            cosine=_finite(figures.cosine[at]),
            explained_variance=_finite(figures.explained[at]),
            inside=_finite(figures.inside[at]),
        ),
        ranks={
            rank: RankScore(cosine=float(figures.cosine[number].mean()), explained_variance=float(explained.mean()))
            for number, (rank, explained) in enumerate(zip(figures.ranks, figures.explained, strict=True))
        },
        fingerprints=fingerprints(config, (checked.teacher, checked.student), tokenizers),
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    write_bridge(out, bridge, info)
    draw_rank_curve(figures, bridge.rank, plot_file(out))
    print(f"held out: {rows.num_held_out} rows, {len(pairs)} pairs of layers; the fit saw {rows.num_train} rows")
    print(curve_table(figures, pairs))
    print(
        f"rank {bridge.rank} kept, rank {figures.recommended()} recommended (the largest within 0.01 of the best cosine)"
    )
    print(f"bridge {out}")
    print(f"plot   {plot_file(out)}")


def _finite(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
