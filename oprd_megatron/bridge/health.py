"""Is the frozen bridge still good for the student that it was fitted for?

The bridge was fitted on the student as it was. Training is to raise the cosine through it; if a layer's held-out cosine falls
instead, the student has drifted to where the projection no longer sees what it was fitted to see.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Health:
    """Follows the evaluations of a run through its bridge.

    Args:
        drop: how far a layer's cosine may fall below its best.
        past: the run's earlier records, when it is resumed.
    """

    def __init__(self, drop: float, past: Iterable[dict[str, Any]] = ()) -> None:
        self.drop = drop
        self._best: dict[int, tuple[float, int]] = {}
        self._first_inside: dict[int, float] = {}
        self._fallen: set[int] = set()
        for record in past:
            if record["kind"] == "eval":
                self.warnings(record)

    def warnings(self, record: dict[str, Any]) -> list[str]:
        """Take in an eval record; one line for every layer that has fallen since it was last above."""
        layers, found = record["layers"], []
        inside = layers.get("inside") or [None] * len(layers["student"])
        for layer, cosine, share in zip(layers["student"], layers["cosine"], inside, strict=True):
            if cosine is None:
                continue
            best, at = self._best.get(layer, (cosine, record["step"]))
            if share is not None:
                self._first_inside.setdefault(layer, share)
            if cosine >= best - self.drop:
                self._fallen.discard(layer)
            elif layer not in self._fallen:
                self._fallen.add(layer)
                drift = ""
                if share is not None:
                    drift = f"; {share:.3f} of its states is inside the projection, {self._first_inside[layer]:.3f} at first"
                found.append(
                    f"step {record['step']}: student layer {layer}: held-out cosine through the bridge fell to {cosine:.3f} "
                    f"from {best:.3f} at step {at}{drift}; lower optimizer.lr, or set bridge.refit_every"
                )
            self._best[layer] = max((best, at), (cosine, record["step"]), key=lambda pair: pair[0])
        return found
