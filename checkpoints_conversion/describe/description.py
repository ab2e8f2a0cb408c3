"""What can be said about a directory, and as text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from checkpoints_conversion.architecture import Architecture, Experts

SHOWN_FILES = 12
SHOWN_TENSORS = 6


@dataclass(frozen=True)
class StoredTensorRow:
    """A tensor as it is stored: name, dtype, shape, bytes, and in how many pieces."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    chunks: int


@dataclass
class Description:
    """One model directory, file or unfinished conversion.

    Attributes:
        path: what was asked about.
        what: what it is, in words.
        problem: why it is not whole; None if it is.
        architecture: what its config says; None if there is none.
        settings: what a checkpoint without config says about its model itself.
        parameters: of the model, unpadded, a tied embedding once; None if unknown.
        active_parameters: of these, what one token uses; differs with experts.
        vocabulary_padded: rows of the stored embedding.
        nbytes: of stored tensors.
        dtypes: bytes by dtype.
        tensors: what is stored, largest first.
        files: (name, bytes) of those that hold weights.
        tokenizer: in one line.
        notes: what else a user should know, a line each.
    """

    path: str
    what: str
    problem: str | None = None
    architecture: Architecture | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    parameters: int | None = None
    active_parameters: int | None = None
    vocabulary_padded: int | None = None
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: list[StoredTensorRow] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)
    tokenizer: str = "none"
    notes: list[str] = field(default_factory=list)


def description_text(found: Description) -> str:
    """All of it, for a person."""
    lines = [f"{found.path}", f"  what        {found.what}"]
    lines.append(f"  complete    {'yes' if found.problem is None else 'no: ' + found.problem}")
    if found.architecture is not None:
        lines += _labelled("model", architecture_lines(found.architecture, found.vocabulary_padded))
    if found.settings:
        lines += _labelled("settings", [", ".join(f"{name} {value}" for name, value in found.settings.items())])
    if found.parameters is not None:
        active = found.active_parameters
        of_experts = f", {_count(active)} of them for one token" if active not in (None, found.parameters) else ""
        lines.append(f"  parameters  {_count(found.parameters)}{of_experts}")
    if found.tensors:
        by_dtype = ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in found.dtypes.items())
        lines.append(f"  weights     {len(found.tensors)} tensors, {size(found.nbytes)} ({by_dtype})")
    lines += _labelled("largest", [_row(tensor) for tensor in found.tensors[:SHOWN_TENSORS]])
    shown = [f"{size(nbytes):>10}  {name}" for name, nbytes in found.files[:SHOWN_FILES]]
    if len(found.files) > SHOWN_FILES:
        rest = found.files[SHOWN_FILES:]
        shown.append(f"{size(sum(nbytes for _, nbytes in rest)):>10}  in {len(rest)} more")
    lines += _labelled("files", shown)
    lines.append(f"  tokenizer   {found.tokenizer}")
    lines += _labelled("notes", found.notes)
    return "\n".join(lines)


def architecture_lines(arch: Architecture, padded: int | None) -> list[str]:
    """The architecture in a few lines; what is as in every Llama is left out."""
    vocabulary = f"vocabulary {arch.vocab_size}"
    if padded is not None and padded != arch.vocab_size:
        vocabulary += f" (padded to {padded})"
    lines = [
        f"{arch.family}: {arch.num_layers} layers, width {arch.hidden_size}, {arch.num_attention_heads} heads in "
        f"{arch.num_query_groups} groups of width {arch.head_dim}",
        f"{_mlp(arch)}, {vocabulary}, {'tied' if arch.tie_word_embeddings else 'own'} output layer",
        f"rope base {arch.rotary_base:g}, {_scaling(arch)}up to {arch.max_position_embeddings} positions, "
        f"norm epsilon {arch.norm_epsilon:g}",
    ]
    extras = [word for word, is_there in _EXTRAS if is_there(arch)]
    windows = {window for window in arch.attention_windows if window is not None}
    if windows:
        count = sum(window is not None for window in arch.attention_windows)
        extras.append(f"window of {', '.join(map(str, sorted(windows)))} in {count} layers")
    return lines + ([", ".join(extras)] if extras else [])


_EXTRAS = (
    ("biases of q, k, v", lambda arch: arch.qkv_bias),
    ("norms of q and k", lambda arch: arch.qk_norm),
    ("norms after attention and MLP", lambda arch: arch.sandwich_norm),
    ("rotates a part of each head", lambda arch: arch.rotary_fraction != 1.0),
    ("a second rope base in layers with a window", lambda arch: arch.local_rotary_base is not None),
)


def _mlp(arch: Architecture) -> str:
    experts: Experts | None = arch.experts
    if experts is None:
        return f"MLP {arch.ffn_hidden_size}"
    return f"{experts.num_experts} experts of {experts.ffn_hidden_size}, {experts.top_k} a token"


def _scaling(arch: Architecture) -> str:
    rope = arch.rope_scaling
    if rope is None:
        return ""
    name = type(rope).__name__.removesuffix("Rope").lower()
    given = [f"{each.name} {getattr(rope, each.name):g}" for each in fields(rope) if "factors" not in each.name]
    return f"{name} scaling ({', '.join(given)}), "


def _row(tensor: StoredTensorRow) -> str:
    pieces = f" in {tensor.chunks} chunks" if tensor.chunks > 1 else ""
    return f"{size(tensor.nbytes):>10}  {tensor.name} {tensor.dtype} {list(tensor.shape)}{pieces}"


def _labelled(label: str, lines: list[str]) -> list[str]:
    return [f"  {label if number == 0 else '':10}  {line}" for number, line in enumerate(lines)]


def _count(number: int | None) -> str:
    assert number is not None
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if number >= unit:
            return f"{number / unit:.3g}{name} ({number})"
    return str(number)


def size(nbytes: int) -> str:
    """Bytes for a person."""
    amount = float(nbytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
