"""Saving and resuming a run: mcore's torch_dist format in Megatron's directory layout.

    <run.dir>/checkpoints/
        hf/                                    config.json and tokenizer of the student
        iter_0000010/                          written as iter_0000010.incomplete, renamed when complete (`saver.py`)
        latest_checkpointed_iteration.txt      replaced last

A crash at any moment leaves the previous checkpoint whole and named by the tracker file. Weights and optimizer state are
resharded on load by mcore, so a run may resume with another tp, cp, pp, vpp or dp and on other ranks; attention heads and
vocabulary that were padded for one tp are cut or padded for the other (padding is zero and stays zero).

mcore saves and loads on all ranks of the world together, and has global rank 0 write what is not a sharded tensor. A rank
without a student brings no tensors, and takes the rest from the student's first rank.

Megatron-LM (`--load <run.dir>/checkpoints`) and Megatron-Bridge find the student's settings in it (`interop_settings.py`), and
`teacher.path` and `student.path` of another run may name it.

A checkpoint holds the student, its optimizer and schedule, the step (which is also the data cursor, because the prompts of a
step are a function of seed and step), the weight version, the random states, the resolved config, and the bridge. Nothing in a
step draws from the global random states; they are there for what users may add.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import random
import re
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import CheckpointingException, ShardedTensor
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.utils import extract_nonpersistent, extract_sharded_base
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException

from oprd_megatron.averaging import AveragedTeacher
from oprd_megatron.config import RunConfig, dump_config
from oprd_megatron.config.checkpoint import CheckpointConfig
from oprd_megatron.errors import CheckpointError
from oprd_megatron.logging import write_atomically
from oprd_megatron.models import Model
from oprd_megatron.optimizer import StudentOptimizer
from oprd_megatron.parallel.agreement import together
from oprd_megatron.parallel.grid import as_parallel_state
from oprd_megatron.platform import Platform
from oprd_megatron.representation.bridge import Bridge
from oprd_megatron.saving.interop_settings import interop_settings
from oprd_megatron.saving.retention import FIGURES, INCOMPLETE, Figures, drop_others, remove, step_of

FOLDER = "checkpoints"
TRACKER = "latest_checkpointed_iteration.txt"
BRIDGE = "bridge.safetensors"
"""In a checkpoint: the bridge as it was, which a refit may have changed since the run began."""

UNREADABLE = (
    CheckpointException,
    CheckpointingException,
    RuntimeError,
    OSError,
    EOFError,
    KeyError,
    ValueError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)
"""What torch and mcore raise on torn or foreign files."""


@dataclass(frozen=True)
class Progress:
    """How far a run has come."""

    step: int
    """Finished optimizer steps; the next prompts are those of this step, counted from 0."""
    weight_version: int
    """Version of the weights that the rollout engine gets next."""


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, None if there is none.

    Raises:
        CheckpointError: the tracker file names a checkpoint that is not there.
    """
    folder = run_dir / FOLDER
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text(errors="replace").strip()[:64]
    newest = folder / (f"iter_{int(text):07d}" if text.isdecimal() else text)
    if not (newest / "metadata.json").is_file():
        raise CheckpointError(
            f"{tracker}: names {newest.name!r}, which is missing or incomplete; write the number of a complete "
            f"checkpoint into it, or delete it to start again"
        )
    return newest


def find_checkpoint(path: Path) -> Path | None:
    """`path` itself if it is a checkpoint, else the newest one of the run directory `path`, None if there is none."""
    return path if (path / "metadata.json").is_file() else latest_checkpoint(path)


def staging_of(final: Path) -> Path:
    """Where a checkpoint is written until it is complete."""
    return final.with_name(final.name + INCOMPLETE)


def write_checkpoint(
    config: RunConfig,
    student: Model,
    optimizer: StudentOptimizer | None,
    progress: Progress,
    platform: Platform,
    average: AveragedTeacher | None = None,
    in_background: bool = False,
) -> tuple[Path, AsyncRequest | None]:
    """Write all that is sharded, and what mcore writes beside it, to a staging directory. Collective over the world;
    `optimizer` is None on ranks without a student, `average` where the run has none.

    Args:
        in_background: leave the writing of tensors to the caller.

    Returns:
        Where the checkpoint belongs (see `publish_checkpoint`), and what is left to be written.

    Raises:
        CheckpointError, UserError: the disk is full or read-only; the previous checkpoint is untouched.
    """
    final = config.run.dir / FOLDER / f"iter_{progress.step:07d}"
    staging = staging_of(final)
    with together(f"preparing {staging}"):
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    with platform.scope(), as_parallel_state(student.grid):
        state = _student_state(student, optimizer, is_loading=False)
        if average is not None:
            state |= average.sharded_state()
        _share_common(state, student)
        state.update(interop_settings(student).common)
        state.update(
            iteration=progress.step,
            checkpoint_version=3.0,
            oprd={"weight_version": progress.weight_version, "config": dump_config(config)},
            rng_state=_random_state(),
        )
        with writing(staging):
            return final, dist_checkpointing.save(state, str(staging), async_sharded_save=in_background)


@contextlib.contextmanager
def writing(staging: Path) -> Iterator[None]:
    """What torch and mcore raise when they cannot write becomes a CheckpointError."""
    try:
        yield
    except UNREADABLE as error:
        raise CheckpointError(
            f"{staging}: cannot write the checkpoint ({_first_line(error)}); free disk space"
        ) from None


def add_to_checkpoint(final: Path, student: Model, bridge: Bridge | None, figures: Figures) -> None:
    """Put the student's settings, the bridge and the latest figures beside the tensors. On rank 0."""
    staging = staging_of(final)
    interop_settings(student).write_files(staging, final.parent)
    if bridge is not None:
        _save_bridge(bridge, staging / BRIDGE)
    write_atomically(staging / FIGURES, json.dumps(figures, indent=1))


def publish_checkpoint(final: Path, section: CheckpointConfig) -> None:
    """Make a checkpoint that is written the newest one, and drop what is not kept. On rank 0."""
    if final.exists():
        remove(final)
    staging_of(final).rename(final)
    write_atomically(final.parent / TRACKER, str(step_of(final)))
    drop_others(final.parent, final, section.keep, section.keep_best)


def _save_bridge(bridge: Bridge, path: Path) -> None:
    try:
        save_file({name: part.cpu() for name, part in bridge.contiguous().items()}, path)
        path.chmod(0o644)  # safetensors lets the owner alone read
    except SafetensorError as error:
        raise CheckpointError(f"{path}: cannot write the bridge ({_first_line(error)}); free disk space") from None


def load_checkpoint(
    path: Path,
    student: Model,
    optimizer: StudentOptimizer | None,
    platform: Platform,
    average: AveragedTeacher | None = None,
) -> Progress:
    """Read a checkpoint into the student, its optimizer and its averaged teacher, if it has one, whatever layout wrote it.
    Collective over the world; `optimizer` is None on ranks without a student.

    Raises:
        CheckpointError: torn or foreign; names the directory.
    """
    with platform.scope(), as_parallel_state(student.grid):
        state = _student_state(student, optimizer, is_loading=True)
        if average is not None:
            state |= average.sharded_state()
        loaded = _read(path, state)
        _load_chunks(student, loaded)
        if average is not None:
            average.load(loaded)
        if optimizer is not None:
            optimizer.optimizer.load_state_dict(loaded["optimizer"])
            _separate_steps(optimizer)
            optimizer.scheduler.load_state_dict(loaded["opt_param_scheduler"])
        _restore_random_state(loaded["rng_state"])
    return Progress(step=int(loaded["iteration"]), weight_version=int(loaded["oprd"]["weight_version"]))


def load_weights(path: Path, student: Model, platform: Platform) -> None:
    """Read only the student's weights from a checkpoint, whatever layout wrote it. Collective over the world.

    Raises:
        CheckpointError: torn or foreign; names the directory.
    """
    with platform.scope(), as_parallel_state(student.grid):
        _load_chunks(student, _read(path, _sharded_chunks(student)))


def _read(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path), strict=StrictHandling.ASSUME_OK_UNEXPECTED)
    except UNREADABLE as error:
        raise CheckpointError(
            f"{path}: cannot read the checkpoint ({_first_line(error)}); write the number of an older one into {TRACKER} "
            "beside it, or start in a fresh run directory"
        ) from None


def _metadata(student: Model) -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
        "singleton_local_shards": False,
        "dp_cp_group": student.grid.groups.dp_cp,
    }


def _sharded_chunks(student: Model) -> dict[str, Any]:
    """mcore's sharded tensors of this rank's chunks (model0, model1 ..; none without a student); those whose heads are
    padded may be loaded with another padding. A tensor's key in the file says its layer, not its chunk."""
    state = {}
    for number, chunk in enumerate(student.chunks):
        tensors = chunk.sharded_state_dict(metadata=_metadata(student))
        for name, value in tensors.items():
            if re.search(r"self_attention\.linear_(qkv|proj)\.", name) and isinstance(value, ShardedTensor):
                value.allow_shape_mismatch = True
        state[f"model{number}"] = tensors
    return state


def _load_chunks(student: Model, loaded: dict[str, Any]) -> None:
    for number, chunk in enumerate(student.chunks):
        chunk.load_state_dict(loaded[f"model{number}"])


def _student_state(student: Model, optimizer: StudentOptimizer | None, is_loading: bool) -> dict[str, Any]:
    """What a checkpoint holds of the student: sharded tensors, and what all its ranks have alike. Empty without a student."""
    if optimizer is None:
        return {}
    chunks, metadata = _sharded_chunks(student), _metadata(student)
    if is_loading:
        _give_adam_a_step(optimizer)
    return {
        **chunks,
        "optimizer": optimizer.optimizer.sharded_state_dict(chunks, is_loading=is_loading, metadata=metadata),
        "opt_param_scheduler": optimizer.scheduler.state_dict(),
    }


def _share_common(state: dict[str, Any], student: Model) -> None:
    """Add to the empty state of a rank without a student what all the student's ranks have alike: all but the tensors.
    Collective: one broadcast from the student's first rank."""
    _, persistent = extract_nonpersistent(state)
    _, common = extract_sharded_base(persistent)
    shared = [common]
    dist.broadcast_object_list(shared, src=student.grid.layout.first_rank)
    if not student.grid.is_member:
        state.update(shared[0])


def _torch_adams(optimizer: StudentOptimizer) -> list[DistributedOptimizer]:
    """mcore's distributed optimizers that run on torch's AdamW: where neither TE nor apex is installed."""
    parts = optimizer.optimizer.chained_optimizers
    return [p for p in parts if isinstance(p, DistributedOptimizer) and isinstance(p.optimizer, torch.optim.AdamW)]


def _give_adam_a_step(optimizer: StudentOptimizer) -> None:
    """Make mcore's distributed optimizer loadable on torch's AdamW.

    mcore describes what it is about to load by the optimizer state that there is, and initialises all of it but torch's
    `step`; when it then fills the state it looks for a loaded `step` tensor, which its format keeps in the parameter groups.
    """
    for part in _torch_adams(optimizer):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state[parameter]
                state.setdefault("step", torch.zeros(()))
                state.setdefault("exp_avg", torch.zeros_like(parameter))
                state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
        part._set_main_param_and_optimizer_states = functools.partial(_fill_all_but_step, part)


def _separate_steps(optimizer: StudentOptimizer) -> None:
    """Give each parameter a `step` of its own: mcore loads one tensor for all, and AdamW would count it up once for each."""
    for part in _torch_adams(optimizer):
        for state in part.optimizer.state.values():
            state["step"] = state["step"].clone()


def _fill_all_but_step(part: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Any]) -> None:
    """mcore's method of that name, with the step that is there already standing in for the one it looks for."""
    step = part._get_main_param_and_optimizer_states(model_param)["step"]
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**tensors, "step": step})


def _random_state() -> dict[str, Any]:
    """Rank 0's random states, the same on all ranks as the common part of a checkpoint must be."""
    state = [{"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    dist.broadcast_object_list(state, src=0)
    return state[0]


def _restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:160]
