"""The picture of the layer scores."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.image import imread

from oprd_megatron.bridge.layer_scores import LayerScores
from oprd_megatron.bridge.score_plot import draw_scores
from oprd_megatron.representation.layer_map import proportional_layer


def some_scores(num_student_layers: int, num_teacher_layers: int) -> LayerScores:
    cka, r2 = np.random.default_rng(0).random((2, num_student_layers, num_teacher_layers))
    student, teacher = (list(range(1, count + 1)) for count in (num_student_layers, num_teacher_layers))
    return LayerScores(student, teacher, cka, 2 * r2 - 1)


@pytest.mark.parametrize("shape", [(1, 1), (4, 6), (28, 80)])
def test_a_png_of_readable_size(tmp_path, shape):
    """From one pair to 28 x 80: a png, wide enough for 3 pixels a layer and within 4000 pixels."""
    scores = some_scores(*shape)
    straight = [proportional_layer(layer, *shape) for layer in scores.student_layers]
    draw_scores(scores, straight, straight, tmp_path / "scores.png")
    height, width = imread(tmp_path / "scores.png").shape[:2]
    assert 6 * shape[1] < width < 4000 and 3 * shape[0] < height < 4000


def test_draws_both_maps_on_both_panels_and_breaks_at_an_unsupervised_layer(tmp_path, monkeypatch):
    """The lines' points are the pairs, in positions of the matrix; None leaves a gap."""
    lines = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, **style: (lines.append((list(x), list(y), style)), plot(self, x, y, **style))[1],
    )
    scores = some_scores(3, 5)
    draw_scores(scores, [2, None, 4], [1, 3, 5], tmp_path / "scores.png")
    assert [style["label"] for _, _, style in lines] == ["proportional", "chosen"] * 2
    for (dotted, up, dotted_style), (chosen, _, _) in (lines[:2], lines[2:]):
        assert dotted == [0, 2, 4] and up == [0, 1, 2] and dotted_style["linestyle"] == ":"
        assert chosen[0] == 1 and np.isnan(chosen[1]) and chosen[2] == 3


def test_shows_cka_left_and_r2_right_with_true_layer_names(tmp_path, monkeypatch):
    """Panels in order; negative R2 is drawn as 0; ticks name the layers' ids, not positions."""
    images, ticks = [], []
    imshow = Axes.imshow
    monkeypatch.setattr(
        Axes, "imshow", lambda self, values, **more: (images.append((self, values)), imshow(self, values, **more))[1]
    )
    scores = some_scores(3, 5)
    scores = LayerScores([4, 5, 6], [2, 4, 6, 8, 10], scores.cka, scores.r2)
    draw_scores(scores, [2, 4, 6], [2, 6, 10], tmp_path / "scores.png")
    np.testing.assert_array_equal(images[0][1], scores.cka)
    np.testing.assert_array_equal(images[1][1], np.maximum(scores.r2, 0))
    for axis, _ in images:
        ticks.append([label.get_text() for label in axis.get_xticklabels()])
    assert [label.get_text() for label in images[0][0].get_yticklabels()] == ["4", "5", "6"]
    assert ticks == [["2", "4", "6", "8", "10"]] * 2
    assert ["CKA" in images[0][0].get_title(), "R2" in images[1][0].get_title()] == [True, True]


def test_importing_does_not_load_matplotlib():
    """A training rank that only scores must not pay for a plotting library."""
    code = "import sys, oprd_megatron.bridge.score_plot; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
