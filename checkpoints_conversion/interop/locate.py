"""From what a person points at to the torch_dist directory that holds the tensors.

    OUT                          of `oprd convert import`, or a save directory of Megatron-LM or Megatron-Bridge: its tracker
                                 file names the newest, "release" or a number
    OUT/release, iter_0000010    the directory itself
    a run directory              of this project: RUN/checkpoints is such a save directory
    a NeMo 2 checkpoint          its tensors are in weights/

Other formats are refused by name: their files hold the same weights, but are read by the package that wrote them.
"""

from __future__ import annotations

import re
from pathlib import Path

from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import quoted, shown
from checkpoints_conversion.files.regular_file import read_whole
from checkpoints_conversion.interop.settings import TRACKER
from oprd_megatron.errors import CheckpointError

FORMAT_FILE = "metadata.json"
"""mcore writes it last; a directory with it is a whole checkpoint, and it names the format."""
NESTED = ("checkpoints", "weights")
"""Where a run of this project, and NeMo 2, keep what is looked for."""
MAX_TRACKER_BYTES = 4096
_HUGGING_FACE = ("config.json", "*.gguf", "*.safetensors", "*.bin")
_MEGATRON = (FORMAT_FILE, TRACKER, ".metadata", "release", "iter_*", "mp_rank_*", "*.distcp", *NESTED)


def is_megatron(path: Path) -> bool:
    """Whether a directory is, or holds, a Megatron checkpoint rather than a Hugging Face model."""
    if (path / FORMAT_FILE).is_file() and (path / ".metadata").is_file():  # a run's own may hold a bridge.safetensors
        return True
    if not path.is_dir() or any(any(path.glob(pattern)) for pattern in _HUGGING_FACE):
        return False
    return any(any(path.glob(pattern)) for pattern in _MEGATRON)


def find_checkpoint_dir(path: Path) -> Path:
    """The torch_dist directory that `path` is, or holds.

    Raises:
        CheckpointError: there is none, it is unfinished or in another format; says what to do.
    """
    if path.resolve().name.endswith(".incomplete"):
        raise CheckpointError(f"{path}: is unfinished; give a complete checkpoint, or continue what was writing it")
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; give a Megatron checkpoint")
    if (path / FORMAT_FILE).is_file():
        _check_format(path)
        return path
    if (path / TRACKER).is_file():
        return find_checkpoint_dir(_tracked(path))
    numbered = {int(child.name[5:]): child for child in path.iterdir() if re.fullmatch(r"iter_\d+", child.name)}
    inside = [path / "release"] if (path / "release").is_dir() else [numbered[max(numbered)]] if numbered else []
    inside += [path / name for name in NESTED if (path / name).is_dir()]
    if inside:
        return find_checkpoint_dir(inside[0])
    raise CheckpointError(f"{path}: {_why_not(path)}")


def _tracked(path: Path) -> Path:
    """The directory that a tracker file names."""
    tracker = path / TRACKER
    text = read_whole(tracker, MAX_TRACKER_BYTES).decode("utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,12}|release", text):
        raise CheckpointError(f"{tracker}: must hold a number or release, not {quoted(text)}; write the newest into it")
    named = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not named.is_dir():
        raise CheckpointError(
            f"{tracker}: names {named.name}, which is not there; write a complete checkpoint's into it"
        )
    return named


def _check_format(path: Path) -> None:
    found = read_json(path / FORMAT_FILE, MAX_TRACKER_BYTES)
    backend = found.get("sharded_backend") if isinstance(found, dict) else None
    if backend != "torch_dist":
        raise CheckpointError(
            f"{path / FORMAT_FILE}: the format is {quoted(backend)}; only torch_dist is read, "
            "save it with --ckpt-format torch_dist"
        )


def _why_not(path: Path) -> str:
    """What a directory without a torch_dist checkpoint seems to be, and what to do."""
    names = sorted(child.name for child in path.iterdir())
    if any(name.startswith("mp_rank_") for name in names):
        return (
            "is a checkpoint of Megatron-LM's old torch format (mp_rank_..); "
            "convert it there with --ckpt-convert-format torch_dist --ckpt-convert-save DIRECTORY"
        )
    if ".metadata" in names:
        return (
            f"has no {FORMAT_FILE}: an unfinished save, or fsdp_dtensor or torch_dcp; only torch_dist is read, "
            "save it with --ckpt-format torch_dist"
        )
    if "config.json" in names:
        return "is a Hugging Face directory, not a Megatron checkpoint; it is what import takes"
    unfinished = [name for name in names if name.endswith(".incomplete")]
    if unfinished:
        return f"holds only the unfinished {shown(unfinished[-1])}; give a complete checkpoint"
    return f"holds neither {FORMAT_FILE} nor {TRACKER}; give a Megatron checkpoint (torch_dist) or its save directory"
