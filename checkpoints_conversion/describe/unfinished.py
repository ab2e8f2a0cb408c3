"""A conversion that was interrupted: what is done, and the command that goes on."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from checkpoints_conversion.convert.jobs import JOURNAL
from checkpoints_conversion.convert.options import Options
from checkpoints_conversion.describe.description import Description, size
from checkpoints_conversion.files.regular_file import read_whole
from oprd_megatron.errors import CheckpointError

MAX_BYTES = 2**30
"""A line for every finished file, with a record for every tensor in it."""
_FLAG_DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}


def describe_unfinished(staging: Path) -> Description:
    """Describe OUT.incomplete.

    Raises:
        CheckpointError: there is no such directory.
    """
    if not staging.is_dir():
        raise CheckpointError(f"{staging}: no such directory; check the path")
    out = staging.with_name(staging.name.removesuffix(".incomplete"))
    entries = _journal(staging / JOURNAL)
    if not entries:
        problem = "what wrote it was interrupted, and left nothing to continue from; delete it or write it again"
        return Description(str(staging), "an unfinished checkpoint or conversion", problem)
    identity, done = entries[0], [entry["file"] for entry in entries[1:] if isinstance(entry.get("file"), str)]
    kind = identity.get("kind")
    found = Description(
        str(staging),
        f"an unfinished conversion (oprd convert {kind}) of {identity.get('source')}",
        f"continue with: {_command(identity, out)} --resume",
    )
    found.files = [(name, (staging / name).stat().st_size) for name in done if (staging / name).is_file()]
    total = sum(nbytes for _, nbytes in found.files)
    found.notes.append(f"finished: {len(found.files)} files, {size(total)}; {_source_size(identity)}")
    begun = sorted(path for path in staging.rglob("*.part"))
    if begun:
        found.notes.append(f"begun and written again: {', '.join(path.name for path in begun)}")
    return found


def _journal(path: Path) -> list[dict[str, Any]]:
    """Its whole lines; a torn last one is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in read_whole(path, MAX_BYTES).decode("utf-8", errors="replace").split("\n")[:-1]:
        try:
            entry = json.loads(line)
        except ValueError:
            raise CheckpointError(f"{path}: is no journal of a conversion; begin again with --overwrite") from None
        if not isinstance(entry, dict):
            raise CheckpointError(f"{path}: is no journal of a conversion; begin again with --overwrite")
        entries.append(entry)
    return entries


def _source_size(identity: dict[str, Any]) -> str:
    files = identity.get("files")
    sizes = (
        [entry[1] for entry in files if isinstance(entry, list) and len(entry) > 1] if isinstance(files, list) else []
    )
    return f"the source has {size(sum(each for each in sizes if isinstance(each, int)))}"


def _command(identity: dict[str, Any], out: Path) -> str:
    """The command that was interrupted, with the flags that decide its output."""
    words = ["oprd", "convert", str(identity.get("kind")), str(identity.get("source")), str(out)]
    defaults = Options()
    if identity.get("dtype") is not None:
        words += ["--dtype", _FLAG_DTYPES.get(identity["dtype"], str(identity["dtype"]))]
    if identity.get("max_shard_size", defaults.max_shard_bytes) != defaults.max_shard_bytes:
        words += ["--max-shard-size", str(identity["max_shard_size"])]
    if identity.get("vocabulary multiple", defaults.vocab_multiple) != defaults.vocab_multiple:
        words += ["--make-vocab-size-divisible-by", str(identity["vocabulary multiple"])]
    tp, pp = identity.get("layout") or (1, 1)
    words += (["--tp", str(tp)] if tp != 1 else []) + (["--pp", str(pp)] if pp != 1 else [])
    return shlex.join(words)
