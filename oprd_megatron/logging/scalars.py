"""A record as named numbers, as trackers want it.

Numbers become tags under the record's kind: `train/loss`, `train/seconds/rollout`, `eval/kl`. Per-layer lists become one number
a layer, named by the student's layer: `train/cosine/layer_03`. Of a list with one number for each rank the highest is told:
`train/memory_mib/peak`. Text and samples are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

PER_RANK = ("memory_mib",)


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """{tag: value} of everything in a record that is a number."""
    kind = record["kind"]
    rest = {key: value for key, value in record.items() if key not in ("kind", "step", "layers", *PER_RANK)}
    found = dict(_numbers(kind, rest))
    found.update(_layers(kind, record.get("layers", {})))
    for teacher, of_teacher in record.get("teachers", {}).items():
        found.update(_layers(f"{kind}/teachers/{teacher}", of_teacher.get("layers", {})))
    for key in PER_RANK:
        found.update({f"{kind}/{key}/{name}": float(max(ranks)) for name, ranks in record.get(key, {}).items()})
    return found


def _layers(prefix: str, layers: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, values in layers.items():
        if name not in ("student", "teacher"):
            for student_layer, value in zip(layers["student"], values, strict=True):
                yield f"{prefix}/{name}/layer_{student_layer:02d}", float(value)


def _numbers(prefix: str, node: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _numbers(f"{prefix}/{key}", value)
        elif isinstance(value, (int, float)):
            yield f"{prefix}/{key}", float(value)
