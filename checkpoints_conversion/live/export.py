"""Collective export of a live model to a Hugging Face directory."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from checkpoints_conversion.architecture import Architecture, Sharding
from checkpoints_conversion.live.weights import stream_hf_weights
from checkpoints_conversion.live.writer import write_hf_directory


def export_hf(
    model_chunks: Sequence[nn.Module],
    arch: Architecture,
    sharding: Sharding,
    tp_group: dist.ProcessGroup | None,
    pp_group: dist.ProcessGroup | None,
    source_hf_dir: str | Path,
    out_dir: str | Path,
    is_writer: bool,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    ep_group: dist.ProcessGroup | None = None,
    expert_tp_group: dist.ProcessGroup | None = None,
) -> None:
    """Write a live model as a Hugging Face directory from one rank.

    COLLECTIVE over one tensor x expert x pipeline grid; there is no barrier at the end, so other ranks may return before the
    directory is in place. If writing fails the writer keeps taking its part in the collectives and raises at the end:
    no rank hangs, and the caller tells the others.

    Args:
        model_chunks: unwrapped GPTModels of this rank.
        arch: the model.
        sharding: this rank's slice of it.
        tp_group: tensor-parallel group; None for a group of one.
        pp_group: pipeline group; None for a group of one.
        source_hf_dir: see `write_hf_directory`; so for the arguments after `is_writer`.
        out_dir: the directory to make.
        is_writer: True on exactly one rank.
        max_shard_bytes: largest file.
        dtype: cast to this while writing.
        overwrite: replace `out_dir`.
        ep_group: expert-parallel group; None for a group of one.
        expert_tp_group: tensor-parallel group of the experts; None: they are cut like everything else.

    Raises:
        CheckpointError: on the writer, what `write_hf_directory` refuses.
        LayoutError: the sharding does not fit the architecture.
    """
    stream = stream_hf_weights(model_chunks, arch, sharding, tp_group, pp_group, ep_group, expert_tp_group)
    try:
        if is_writer:
            write_hf_directory(stream, source_hf_dir, out_dir, max_shard_bytes, dtype, overwrite)
    finally:
        for _ in stream:
            pass
