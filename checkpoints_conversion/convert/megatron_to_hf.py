"""From a Megatron checkpoint (torch_dist, any layout) to a Hugging Face directory, without ever holding the model."""

from __future__ import annotations

import functools
from pathlib import Path

from checkpoints_conversion.convert.hf_files import (
    HFFilesJob,
    PlannedTensor,
    plan_hf_files,
    write_companions,
    write_index,
)
from checkpoints_conversion.convert.hf_to_megatron import COMPANIONS
from checkpoints_conversion.convert.jobs import publish, run_job
from checkpoints_conversion.convert.megatron_source import MegatronSource
from checkpoints_conversion.convert.options import Options, Summary
from checkpoints_conversion.convert.progress import Progress
from checkpoints_conversion.convert.targets import fingerprint, is_complete, prepare_target
from checkpoints_conversion.families import mappings_for, read_architecture
from checkpoints_conversion.interop import check_same_model, find_checkpoint_dir, read_run_config
from checkpoints_conversion.reader import check_model
from checkpoints_conversion.torch_dist import read_common
from oprd_megatron.errors import CheckpointError


def export_megatron(
    megatron_dir: Path, out: Path, options: Options, progress: Progress, like: Path | None = None
) -> Summary:
    """Convert a Megatron checkpoint to a Hugging Face directory.

    Args:
        megatron_dir: a torch_dist directory, or one that holds it (see `find_checkpoint_dir`).
        like: the Hugging Face directory that gives config, tokenizer and chat template; None: the companions that
            `import_hf` left beside the checkpoint.

    Raises:
        CheckpointError: the checkpoint is torn or of another model, the output is in the way, the disk is full.
    """
    directory = find_checkpoint_dir(megatron_dir)
    like = like or companions_of(directory)
    arch = read_architecture(like)
    notes = check_same_model(arch, read_common(directory), read_run_config(directory), directory)
    source = MegatronSource(directory, arch)
    order = [name for mapping in mappings_for(arch).values() if mapping.exported for name in mapping.hf_names]
    tensors = [PlannedTensor(name, options.dtype or source.dtype(name), source.shape(name)) for name in order]
    files = plan_hf_files(tensors, options.max_shard_bytes)
    identity = {
        "kind": "export",
        "source": str(directory.resolve()),
        "files": fingerprint(source.files),
        "dtype": options.dtype,
        "max_shard_size": options.max_shard_bytes,
    }
    job = HFFilesJob(files, functools.partial(MegatronSource, directory, arch), identity)
    if options.resume and is_complete(out, identity):
        return Summary(str(out), 0, 0, 0, 0.0, ("complete already",))
    staging = prepare_target(directory, out, options)
    records = run_job(job, staging, options.workers, progress)
    seconds, written = progress.seconds, progress.bytes
    if fingerprint(source.files) != identity["files"]:
        raise CheckpointError(f"{directory}: was changed while it was converted; convert it again with --overwrite")
    write_index(staging, records)
    write_companions(like, staging, {tensor.dtype for tensor in tensors})
    check_model(staging)
    publish(staging, out, {"identity": identity, "files": records})
    return Summary(str(out), len(tensors), sum(file.nbytes for file in files), written, seconds, tuple(notes))


def companions_of(directory: Path) -> Path:
    """The Hugging Face companions of a torch_dist directory, in it or beside it.

    Raises:
        CheckpointError: there are none.
    """
    for place in (directory / COMPANIONS, directory.parent / COMPANIONS):
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"{directory}: no config.json and tokenizer with it; give a Hugging Face directory of this model with --like"
    )
