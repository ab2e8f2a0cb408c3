"""Writing a Hugging Face directory: all or nothing.

Everything goes into `<out_dir>.tmp` beside the target, is checked as `check_model` would check a download, and only
then renamed. A crash leaves the `.tmp` directory, which the next attempt removes, and never a half
model under the final name.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_conversion.convert.hf_files import write_companions
from checkpoints_conversion.convert.jobs import put_in_place
from checkpoints_conversion.files.dtypes import SAFETENSORS_NAMES
from checkpoints_conversion.reader import INDEX_FILE, SINGLE_FILE, check_model
from oprd_megatron.errors import CheckpointError


def write_hf_directory(
    tensors: Iterable[tuple[str, Tensor]],
    source_hf_dir: str | Path,
    out_dir: str | Path,
    max_shard_bytes: int = 5 * 2**30,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory that transformers and vLLM load.

    Args:
        tensors: (hf_name, full tensor), each name once; taken one at a time, at most one shard is held on the CPU.
        source_hf_dir: the model that was trained; gives config.json, tokenizer files and chat template.
        out_dir: the directory to make.
        max_shard_bytes: a new file is begun when the next tensor would exceed this.
        dtype: cast to this; None keeps each tensor's dtype. config.json is made to say what was written.
        overwrite: replace `out_dir` if it exists and is not empty.

    Raises:
        CheckpointError: `out_dir` is not empty, it cannot be written, or `tensors` was not the whole model.
    """
    source, out = Path(source_hf_dir).resolve(), Path(out_dir).resolve()
    _refuse_target(source, out, overwrite)
    staging = out.with_name(out.name + ".tmp")
    try:
        if staging.exists():
            shutil.rmtree(staging)
        staging.mkdir(parents=True)
        dtypes = _write_weights(tensors, staging, max_shard_bytes, dtype)
        write_companions(source, staging, {SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")] for dtype in dtypes})
        check_model(staging)
        put_in_place(staging, out)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{out}: cannot write the model ({reason}); nothing was left there") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _refuse_target(source: Path, out: Path, overwrite: bool) -> None:
    if source.is_relative_to(out):
        raise CheckpointError(f"{out}: the source model {source} is in it; choose another output directory")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; choose another output directory")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise CheckpointError(f"{out}: exists and is not empty; choose another output directory or ask to overwrite it")


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]], staging: Path, max_shard_bytes: int, dtype: torch.dtype | None
) -> set[torch.dtype]:
    """Write shards and index; return the dtypes that were written."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    dtypes = set()

    def flush() -> None:
        save_file(pending, staging / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        # A copy of its own: a streamed tensor may be a view of the model or of a buffer that is used again.
        owned = tensor.detach().to("cpu", dtype or tensor.dtype, copy=True).contiguous()
        if pending and pending_bytes + owned.nbytes > max_shard_bytes:
            flush()
            pending_bytes = 0
        assert name not in pending, f"{name} came twice"
        pending[name] = owned
        pending_bytes += owned.nbytes
        total_bytes += owned.nbytes
        dtypes.add(owned.dtype)
    flush()
    _name_shards(staging, shards, total_bytes)
    return dtypes


def _name_shards(staging: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the shards their final names, now that their number is known, and write the index if there are several."""
    if len(shards) == 1:
        (staging / "shard-0").rename(staging / SINGLE_FILE)
        return
    weight_map = {}
    for position, names in enumerate(shards):
        file_name = f"model-{position + 1:05d}-of-{len(shards):05d}.safetensors"
        (staging / f"shard-{position}").rename(staging / file_name)
        weight_map.update(dict.fromkeys(names, file_name))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (staging / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
