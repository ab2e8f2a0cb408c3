"""Where a conversion goes: nothing is overwritten unasked, nothing unfinished is taken for complete."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from checkpoints_conversion.convert.jobs import MANIFEST, staging_of
from checkpoints_conversion.convert.options import Options
from oprd_megatron.errors import CheckpointError


def prepare_target(source: Path, out: Path, options: Options) -> Path:
    """The staging directory of a conversion, emptied if it begins again.

    Raises:
        CheckpointError: `out` is not empty, is a file, holds the source, or an unfinished conversion is there.
    """
    source, out = source.resolve(), out.absolute()
    staging = staging_of(out)
    if source.is_relative_to(out.resolve()):
        raise CheckpointError(f"{out}: the source {source} is in it; choose another output directory")
    for path in (out, staging):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path}: is not a directory; choose another output directory")
    if not out.parent.is_dir():
        raise CheckpointError(f"{out}: its directory does not exist; make it first")
    if out.is_dir() and any(out.iterdir()):
        if not options.overwrite:
            raise CheckpointError(
                f"{out}: exists and is not empty; choose another output directory, or add --overwrite"
            )
        if not is_model_directory(out):
            raise CheckpointError(
                f"{out}: holds something other than a model; not overwritten, choose another directory"
            )
    if staging.is_dir() and options.overwrite and not options.resume:
        shutil.rmtree(staging)
    if staging.is_dir() and not options.resume:
        raise CheckpointError(
            f"{staging}: an unfinished conversion; continue it with --resume, or begin again with --overwrite"
        )
    return staging


def is_model_directory(path: Path) -> bool:
    """Whether a directory is what these tools, transformers or Megatron write, and so may be replaced by another."""
    known = (MANIFEST, "config.json", "metadata.json", "latest_checkpointed_iteration.txt")
    return any((path / name).is_file() for name in known)


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a complete conversion; None where there is none.

    Raises:
        CheckpointError: it is not readable.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(manifest, dict) and isinstance(manifest["files"], dict):
            return manifest
    except (ValueError, KeyError, RecursionError):
        pass
    raise CheckpointError(f"{path}: is not the manifest of a conversion; delete it if the directory is whole")


def is_complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether `out` already is the complete result of this very conversion."""
    manifest = read_manifest(out) if out.is_dir() else None
    return manifest is not None and manifest.get("identity") == identity


def fingerprint(files: list[Path]) -> list[list[Any]]:
    """Name, size and time of change of files: equal fingerprints mean that nobody wrote them in between."""
    return [[path.name, stat.st_size, stat.st_mtime_ns] for path in files for stat in [path.stat()]]
