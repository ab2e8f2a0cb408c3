"""What two configs say, field by field, and whether two tokenizers cut texts alike."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from checkpoints_conversion.architecture import Architecture
from checkpoints_conversion.tokenizer import PROBES

HARMLESS_FIELDS = ("family", "max_position_embeddings")
"""They decide names and limits, not what is computed: a difference is told and does not count."""
RELATIVE_TOLERANCE = 1e-6
"""GGUF keeps a config's numbers in fp32."""


@dataclass(frozen=True)
class FieldDifference:
    """A field of `Architecture` that is not the same."""

    name: str
    a: Any
    b: Any
    changes_maths: bool


def compare_architectures(a: Architecture, b: Architecture) -> list[FieldDifference]:
    """Every differing field, those that change the maths first."""
    found = []
    for field in fields(Architecture):
        mine, theirs = (_meaning(field.name, arch) for arch in (a, b))
        if not _equal(mine, theirs):
            shown = getattr(a, field.name), getattr(b, field.name)
            found.append(FieldDifference(field.name, *shown, field.name not in HARMLESS_FIELDS))
    return sorted(found, key=lambda difference: not difference.changes_maths)


def _meaning(name: str, arch: Architecture) -> Any:
    value = getattr(arch, name)
    if name == "attention_windows":
        return value if any(value) else ()
    if name == "attention_scale":
        return arch.head_dim**-0.5 if value is None else value
    if name == "local_rotary_base":
        return None if value == arch.rotary_base else value
    return value


def _equal(a: Any, b: Any) -> bool:
    if is_dataclass(a) and type(a) is type(b):
        return all(_equal(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=RELATIVE_TOLERANCE)
    return bool(a == b)


def load_tokenizer(folder: Path) -> Any:
    """transformers' tokenizer of a model directory; None if it has none, or one that needs code of its own."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception:  # parsers in other languages, which have no list of what they raise
        return None


def compare_tokenizers(a: Any, b: Any) -> tuple[str, list[str]]:
    """What was compared in one line, and the differences.

    Args:
        a, b: of `load_tokenizer`.
    """
    if a is None or b is None:
        without = "A and B have" if a is b is None else "A has" if a is None else "B has"
        return f"as far as is known: {without} none that transformers loads", []
    differences = []
    for probe in PROBES:
        mine, theirs = (tokenizer(probe)["input_ids"] for tokenizer in (a, b))
        if mine != theirs:
            differences.append(f"{probe!a} is cut into {_shown(mine)} by A's, {_shown(theirs)} by B's")
    if len(a) != len(b):
        differences.append(f"{len(a)} tokens in A's, {len(b)} in B's")
    if (a.chat_template or "") != (b.chat_template or ""):
        differences.append("the chat templates are not the same")
    return f"compared on {len(PROBES)} texts, their sizes and chat templates", differences


def _shown(ids: list[int]) -> str:
    return str(ids if len(ids) <= 6 else ids[:6])[:-1] + (", ..]" if len(ids) > 6 else "]")
