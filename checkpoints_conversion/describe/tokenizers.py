"""What the tokenizer files of a model directory say, read as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints_conversion.files.json_file import read_json
from checkpoints_conversion.files.messages import shown
from oprd_megatron.errors import CheckpointError


def tokenizer_line(folder: Path) -> tuple[str, list[str]]:
    """The tokenizer in one line, and notes."""
    notes: list[str] = []
    main = _read(folder / "tokenizer.json", notes)
    config = _read(folder / "tokenizer_config.json", notes)
    parts = []
    if main:
        model = main.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        added = main.get("added_tokens")
        count = len(vocabulary) if isinstance(vocabulary, dict | list) else 0
        known = vocabulary if isinstance(vocabulary, dict) else {}
        more = (
            [t for t in added if isinstance(t, dict) and t.get("content") not in known]
            if isinstance(added, list)
            else []
        )
        parts.append(f"{shown(kind or 'unknown kind')} of {count + len(more)} tokens")
    parts += [path.name for path in sorted(folder.glob("*.model"))]
    if not parts:
        return "none", notes
    parts += [f"{name} {shown(token)}" for name in ("bos", "eos", "pad") if (token := _token(config, name))]
    has_template = "chat_template" in config or any(folder.glob("chat_template*"))
    parts.append("chat template" if has_template else "no chat template")
    return ", ".join(parts), notes


def _token(config: dict[str, Any], name: str) -> Any:
    value = config.get(f"{name}_token")
    return value.get("content") if isinstance(value, dict) else value


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = read_json(path)
    except CheckpointError as error:
        notes.append(str(error))
        return {}
    return found if isinstance(found, dict) else {}
