"""The bridge's health: one warning for each layer that has fallen, with the figures of its fall."""

from __future__ import annotations

from typing import Any

from oprd_megatron.bridge.health import Health


def record(step: int, cosines: list[float | None], inside: list[float] | None = None) -> dict[str, Any]:
    layers: dict[str, Any] = {"student": [2, 5], "teacher": [3, 7], "cosine": cosines}
    return {"kind": "eval", "step": step, "layers": layers | ({} if inside is None else {"inside": inside})}


def test_no_warning_while_it_rises_or_falls_a_little() -> None:
    """Rising, standing still, and falling by no more than the drop."""
    health = Health(0.1)
    for step, cosine in enumerate((0.5, 0.6, 0.6, 0.9, 0.81, 0.85)):
        assert health.warnings(record(step, [cosine, 0.3])) == []


def test_a_fall_is_told_with_its_figures() -> None:
    """Step and layer, the cosine, the best one and its step, how much of the states the projection saw then and now, and what
    to do; only the layer that fell."""
    health = Health(0.1)
    health.warnings(record(10, [0.8, 0.5], [0.9, 0.7]))
    health.warnings(record(20, [0.9, 0.5], [0.8, 0.7]))
    (line,) = health.warnings(record(30, [0.75, 0.45], [0.6, 0.7]))
    for figure in (
        "step 30",
        "student layer 2:",
        "fell to 0.750 from 0.900 at step 20",
        "0.600 of its states",
        "0.900 at first",
        "bridge.refit_every",
    ):
        assert figure in line, line
    assert "\n" not in line


def test_without_a_linear_projection() -> None:
    """An MLP does not say what it sees."""
    health = Health(0.1)
    health.warnings(record(0, [0.8, 0.5]))
    (line,) = health.warnings(record(1, [0.6, 0.5]))
    assert "inside" not in line and "fell to 0.600 from 0.800 at step 0" in line


def test_once_for_each_fall() -> None:
    """A layer that stays down is not told again; one that has recovered and falls again is, and each layer by itself."""
    health = Health(0.1)
    told = [
        [line.partition(": held-out")[0] for line in health.warnings(record(step, list(cosines)))]
        for step, cosines in enumerate(
            [(0.9, 0.9), (0.7, 0.9), (0.6, 0.9), (0.65, 0.7), (0.85, 0.75), (0.5, 0.7), (0.4, 0.85), (0.4, 0.1)]
        )
    ]
    first, second = "step {}: student layer 2", "step {}: student layer 5"
    expected = [[], [first], [], [second], [], [first], [], [second]]
    assert told == [[text.format(step) for text in texts] for step, texts in enumerate(expected)]


def test_the_best_is_kept_through_a_fall() -> None:
    """A slow slide is measured from the top, and a return to the top's step is the earliest that reached it."""
    health, lines = Health(0.1), []
    for step in range(8):
        lines += health.warnings(record(step, [0.9 - 0.03 * step, 0.5]))
    assert len(lines) == 1 and "step 4" in lines[0] and "fell to 0.780 from 0.900 at step 0" in lines[0]


def test_resumed_from_records() -> None:
    """A run that goes on says what the uninterrupted one would have said: best and falls are in the records. Records of other
    kinds, and layers that were not measured, are passed over."""
    past = [record(0, [0.9, 0.5], [0.9, 0.9]), {"kind": "train", "step": 1}, record(2, [0.7, None], [0.8, 0.9])]
    rest = [record(4, [0.7, 0.39], [0.7, 0.5]), record(6, [0.85, 0.5], [0.7, 0.5]), record(8, [0.7, 0.3], [0.2, 0.2])]
    whole, resumed = Health(0.1), Health(0.1, past)
    before = [line for r in past if r["kind"] == "eval" for line in whole.warnings(r)]
    assert len(before) == 1
    after = [[line for r in rest for line in health.warnings(r)] for health in (whole, resumed)]
    assert after[0] == after[1] and len(after[0]) == 3
    assert "0.390 from 0.500 at step 0" in after[0][0] and "0.900 at first" in after[0][0]


def test_a_drop_of_nothing() -> None:
    """warn_drop 0: every fall counts, staying level does not."""
    health = Health(0.0)
    assert [len(health.warnings(record(step, [cosine, 0.5]))) for step, cosine in enumerate((0.5, 0.5, 0.49))] == [
        0,
        0,
        1,
    ]
