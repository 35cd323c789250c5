"""Pictures: what is drawn, at every size and with every kind of number."""

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggcl_fast import Summary, open_checkpoint, summarise
from ggcl_fast.inspection import plot
from ggcl_fast.testing import RANKS, Shape, checkpoint_bytes

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure

from ..hostile import ADAM, LBFGS, ODD


def summary(data: bytes = ADAM, name: str = "a.ggcl") -> Summary:
    with open_checkpoint(data, name=name) as checkpoint:
        return summarise(checkpoint)


def tall(n_layer: int) -> Summary:
    ranks = dict.fromkeys(RANKS, 1)
    return summary(checkpoint_bytes(Shape(n_layer=n_layer, n_embd=4, n_vocab=5, n_mult=1, ranks=ranks)))


@pytest.mark.parametrize("n_layer", [0, 1, 2, 16, 17, 40, 120])
def test_every_layer_is_a_row(n_layer: int) -> None:
    one = tall(n_layer)
    figure: Any = Figure(layout="constrained")
    plot._draw_deltas(figure, one)
    weights, norms, bars, *_ = figure.axes
    drawn = weights.images[0].get_array()
    assert drawn.shape == (max(1, n_layer), 7)
    assert norms.images[0].get_array().shape == (max(1, n_layer), 2)
    assert [label.get_text() for label in weights.get_xticklabels()] == list(plot._WEIGHTS)
    assert len(weights.get_yticklabels()) <= 25
    by_place = {(pair.layer, pair.module): pair for pair in one.pairs}
    for layer in range(n_layer):
        expected = [by_place[layer, module].norm for module in plot._WEIGHTS]
        np.testing.assert_allclose(np.asarray(drawn)[layer], np.array(expected, float))
    assert [bar.get_width() for bar in bars.patches] == [by_place[None, m].norm for m in plot._OF_MODEL]


def test_no_text_overlaps_another() -> None:
    for n_layer in (2, 40):
        figure: Any = Figure(layout="constrained")
        plot._draw_deltas(figure, tall(n_layer))
        figure.canvas.draw()
        boxes = [
            text.get_window_extent()
            for axes in figure.axes[:2]
            for text in [*axes.texts, *axes.get_yticklabels(), axes.title, axes.yaxis.label]
            if text.get_text()
        ]
        for i, box in enumerate(boxes):
            assert not any(box.overlaps(other) for other in boxes[:i])


def test_layers_far_apart_cost_no_memory(tmp_path: Path) -> None:
    one = summary()
    far = one._replace(pairs=tuple(p._replace(layer=p.layer and 999_999_999) for p in one.pairs))
    plot.draw([far], tmp_path / "out.png")
    assert (tmp_path / "out.png").stat().st_size > 0


@pytest.mark.parametrize(
    "one",
    [
        summary(ODD),
        summary(LBFGS),
        summary(name="$x^$_{\x1b[31m\udcff漢.ggcl"),
        summary()._replace(optimizer=None, pairs=()),
        summary()._replace(pairs=tuple(p._replace(norm=0.0) for p in summary().pairs)),
        summary()._replace(pairs=tuple(p._replace(norm=None, change=None) for p in summary().pairs)),
        summary()._replace(pairs=tuple(p._replace(norm=math.nan, change=math.nan) for p in summary().pairs)),
    ],
    ids=["not finite", "L-BFGS", "odd name", "nothing", "zero", "unknown", "NaN"],
)
def test_all_kinds_of_checkpoints_are_drawn(one: Summary, tmp_path: Path) -> None:
    for ones in ([one], [one, summary()], [one, one]):
        plot.draw(ones, tmp_path / "out.png", force=True)
        data = (tmp_path / "out.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        width, height = struct.unpack(">2I", data[16:24])
        assert 400 < height <= width


def test_the_course_is_drawn_by_iterations() -> None:
    one = summary()
    late, early = (one._replace(training=one.training._replace(iterations=n)) for n in (30, 10))
    ill = one._replace(training=one.training._replace(iterations=20), verdict="diverged")
    figure: Any = Figure()
    plot._draw_course(figure, [late, ill, early])
    upper, lower = figure.axes
    last, best, *marks = upper.lines
    assert list(last.get_xdata()) == [10, 20, 30]
    assert list(last.get_ydata()) == [one.loss] * 3
    assert best.get_label() == "best"
    assert [list(line.get_xdata()) for line in marks] == [[20, 20]]
    assert (upper.get_ylabel(), lower.get_xlabel(), lower.get_ylabel()) == ("loss", "iterations", "norm of the deltas")
    groups = {line.get_label(): line.get_ydata()[0] for line in lower.lines}
    assert groups["all"] == one.delta_norm
    parts = (groups[name] for name in ("attention", "feed-forward", "embeddings, output", "norms"))
    assert math.hypot(*parts) == pytest.approx(one.delta_norm)
