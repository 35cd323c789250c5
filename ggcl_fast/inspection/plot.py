"""Pictures of checkpoints: where the deltas are in one, and how the training went in several.

Colours are those that colour-blind readers tell apart: cividis, and the palette of Okabe and Ito.
"""

from __future__ import annotations

import importlib.util
import io
import math
import os
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ..errors import printable
from ..storage.files import OutputFile
from ..storage.outputs import Outputs
from ..storage.urls import StrPath

if TYPE_CHECKING:
    from .summary import PairSummary, Summary

__all__ = ["check", "draw"]

_WEIGHTS: Final = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_down", "ffn_up")
_NORMS: Final = ("attn_norm", "ffn_norm")
_OF_MODEL: Final = ("token_embd", "output", "output_norm")
_GROUPS: Final = (
    ("attention", ("attn_q", "attn_k", "attn_v", "attn_output"), "#0072B2", "o"),
    ("feed-forward", ("ffn_gate", "ffn_down", "ffn_up"), "#D55E00", "s"),
    ("embeddings, output", ("token_embd", "output"), "#009E73", "^"),
    ("norms", ("attn_norm", "ffn_norm", "output_norm"), "#CC79A7", "v"),
)
_ALL: Final = "black"
_MISSING: Final = "#D55E00"  # cells without a number; cividis has nothing like it
_MOST_LABELLED: Final = 16  # layers up to which each cell has its number written into it
_SEVERAL: Final = 2
_HIGHEST: Final = 60.0  # inches
_DPI: Final = 120


def check(path: StrPath, *, force: bool = False) -> None:
    """Hold that a picture can be drawn and can be put at `path`; raises as `draw` does, before any work is done."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ModuleNotFoundError("pictures need matplotlib: pip install matplotlib")
    OutputFile(path, force=force)


def draw(summaries: Sequence[Summary], path: StrPath, *, force: bool = False) -> None:
    """Draw one checkpoint's deltas, or the course of several, into a picture at `path`.

    Parameters
    ----------
    summaries
        At least one.
    path
        Its ending decides the format: png, svg or pdf.
    force
        Replace an existing file, in one step.

    Raises
    ------
    ImportError
        matplotlib is missing: it comes with the extra ``plot``.
    OSError
        The picture cannot be written.
    """
    check(path, force=force)
    from matplotlib.figure import Figure  # no pyplot: nothing global, no screen

    format_ = os.path.splitext(os.fspath(path))[1].lstrip(".").lower()
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names with letters that the font does not have
        figure = Figure(layout="constrained")
        if len(summaries) < _SEVERAL:
            _draw_deltas(figure, summaries[0])
        else:
            _draw_course(figure, summaries)
        figure.savefig(picture, format=format_, dpi=_DPI)
    target = OutputFile(path, force=force)
    with Outputs([target]):
        target.writev([picture.getbuffer()])


# --- one checkpoint: a map of its deltas ----------------------------------------------------------------------------


def _draw_deltas(figure: Any, one: Summary) -> None:
    """Draw weights by layer, the norms' changes beside them, and what belongs to no layer as bars."""
    layers = sorted({pair.layer for pair in one.pairs if pair.layer is not None}) or [0]
    height = min(max(4.2, 1.9 + 0.23 * len(layers)), _HIGHEST)
    figure.set_size_inches(12, height)
    by_place = {(pair.layer, pair.module): pair for pair in one.pairs}
    found = dict.fromkeys(pair.module for pair in one.pairs if pair.layer is not None)
    others = sorted(found.keys() - {*_WEIGHTS, *_NORMS})
    weights = [*(module for module in _WEIGHTS if module in found), *others]
    norms = [module for module in _NORMS if module in found or not found]
    of_model = [module for module in _OF_MODEL if (None, module) in by_place]
    maps: list[tuple[list[str], float, str, str, str]] = [
        (weights or list(_WEIGHTS), 7.0, "weights", "norm of the delta", "{:.3g}"),
        (norms, 2.3, "norms", "change of the norm, %", "{:.1f}"),
    ]
    maps = [one for one in maps if one[0]]  # an adapter that finetune did not write has no norms
    upper = min(0.99, 3.6 / height)  # bars stay as wide as in a short picture
    widths = [one[1] for one in maps] + [3.2] * bool(of_model)
    places = figure.add_gridspec(2, len(widths), width_ratios=widths, height_ratios=(upper, 1 - upper))
    panels = [figure.add_subplot(places[:, column]) for column in range(len(maps))]
    if of_model:
        _bars(figure.add_subplot(places[0, -1]), of_model, [by_place[None, module] for module in of_model])
    for axes, (modules, _, what, label, form) in zip(panels, maps):
        grid = _grid(by_place, layers, modules, lambda pair: pair.norm if pair.change is None else 100 * pair.change)
        is_there = np.array([[(layer, module) in by_place for module in modules] for layer in layers])
        _heat_map(figure, axes, grid, is_there, layers, modules, label, form)
        axes.set_title(f"{what} of the layers{' (orange: NaN)' if np.isnan(grid[is_there]).any() else ''}", fontsize=10)
    panels[0].set_ylabel("layer")
    title = f"{_name(one)}: {one.verdict}, {one.training.iterations:,} iterations"
    figure.suptitle(title if one.loss is None else f"{title}, loss {one.loss:.4g}", fontsize=12, parse_math=False)


def _grid(by_place: dict[Any, PairSummary], layers: Sequence[int], modules: Sequence[str], of: Any) -> Any:
    """Return (len(layers), len(modules)) float64; NaN where there is no number."""
    grid = np.full((len(layers), len(modules)), np.nan)
    for row, layer in enumerate(layers):
        for column, module in enumerate(modules):
            pair = by_place.get((layer, module))
            value = of(pair) if pair is not None else None
            if value is not None:
                grid[row, column] = value
    return grid


def _heat_map(
    figure: Any,
    axes: Any,
    grid: Any,
    is_there: Any,
    layers: Sequence[int],
    modules: Sequence[str],
    label: str,
    form: str,
) -> None:
    """Draw `grid` with layers downward, and its colours' scale at the right; cells that are not there stay white."""
    import matplotlib

    colours = matplotlib.colormaps["cividis"].with_extremes(bad=_MISSING)
    high = float(np.nanmax(grid)) if np.isfinite(grid).any() else 1.0
    high = high or 1.0  # nothing trained: all cells at the scale's foot
    image = axes.imshow(grid, cmap=colours, vmin=0, vmax=high, aspect="auto", interpolation="nearest")
    absent = np.where(is_there, np.nan, 1.0)
    axes.imshow(absent, cmap="gray", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(modules)), modules, rotation=30, ha="right", rotation_mode="anchor", fontsize=9)
    step = 1 if len(layers) <= _MOST_LABELLED else 5 * -(-len(layers) // 100)
    axes.set_yticks(range(0, len(layers), step), layers[::step])
    axes.tick_params(length=0)
    axes.set_xticks(np.arange(0.5, len(modules) - 1), minor=True)
    axes.grid(which="minor", axis="x", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, aspect=figure.get_figheight() / 0.13)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)
    if len(layers) > _MOST_LABELLED:
        return
    for (row, column), value in np.ndenumerate(grid):
        if not is_there[row, column]:
            continue
        missing = not math.isfinite(value)
        dark = missing or value < 0.6 * high
        axes.text(
            column, row, "NaN" if missing else form.format(value),
            ha="center", va="center", fontsize=8, color="white" if dark else "black",
        )  # fmt: skip


def _bars(axes: Any, modules: Sequence[str], pairs: Sequence[PairSummary]) -> None:
    """Draw the deltas of the model's own weights."""
    norms = [math.nan if pair.norm is None else pair.norm for pair in pairs]
    drawn = [norm if math.isfinite(norm) else 0.0 for norm in norms]
    axes.barh(range(len(norms)), drawn, color=_GROUPS[0][2], height=0.55)
    for row, (norm, pair) in enumerate(zip(norms, pairs)):
        words = "NaN" if math.isnan(norm) else f"{norm:.3g}"
        if pair.change is not None and math.isfinite(pair.change):
            words += f"\n({100 * pair.change:.1f} %)"
        axes.annotate(words, (drawn[row], row), (4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(range(len(norms)), modules, fontsize=9)
    axes.set_ylim(len(norms) - 0.4, -0.6)
    axes.set_xlim(0, 1.35 * (max(drawn) or 1.0))
    axes.set_xlabel("norm of the delta", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("weights of the model", fontsize=10)


# --- several checkpoints: the course of a training ------------------------------------------------------------------


def _draw_course(figure: Any, summaries: Sequence[Summary]) -> None:
    """Draw losses and norms of the deltas over the iterations."""
    figure.set_size_inches(9, 7)
    ordered = sorted(summaries, key=lambda one: one.training.iterations)
    trainings: dict[object, list[Summary]] = {}
    for one in ordered:
        trainings.setdefault((os.path.dirname(one.source), one.parameters, tuple(one.ranks.items())), []).append(one)
    if len(trainings) > 1:
        _draw_trainings(figure, list(trainings.values()))
        return
    iterations = [one.training.iterations for one in ordered]
    upper, lower = figure.subplots(2, 1, sharex=True)
    last = [_or_nan(one.loss) for one in ordered]
    best = [_or_nan(one.optimizer.best_loss if one.optimizer else None) for one in ordered]
    upper.plot(iterations, last, color=_GROUPS[0][2], marker="o", markersize=4, label="last")
    upper.plot(iterations, best, color=_GROUPS[1][2], marker="s", markersize=4, linestyle="--", label="best")
    upper.set_ylabel("loss")
    for label, modules, colour, marker in _GROUPS:
        norms = [_norm(one, modules) for one in ordered]
        lower.plot(iterations, norms, color=colour, marker=marker, markersize=4, label=label)
    lower.plot(iterations, [_or_nan(one.delta_norm) for one in ordered], color=_ALL, linewidth=2, label="all")
    lower.set_ylabel("norm of the deltas")
    ill = [one.training.iterations for one in ordered if one.verdict == "diverged"]
    for axes in (upper, lower):
        for i, iteration in enumerate(ill):
            axes.axvline(iteration, color="grey", linewidth=1, linestyle=":", label=None if i else "diverged")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    _over_iterations(upper, lower)
    figure.suptitle(f"{len(ordered)} checkpoints, {_name(ordered[0])} to {_name(ordered[-1])}", parse_math=False)


def _draw_trainings(figure: Any, trainings: Sequence[Sequence[Summary]]) -> None:
    """Draw a line for each training: checkpoints in one folder, of one shape."""
    upper, lower = figure.subplots(2, 1, sharex=True)
    for number, training in enumerate(trainings):
        iterations = [one.training.iterations for one in training]
        name = _name(training[0]) if len(training) == 1 else f"{_name(training[0])} to {_name(training[-1])}"
        style = {"marker": "os^vDP*X"[number % 8], "markersize": 4, "label": name}
        upper.plot(iterations, [_or_nan(one.loss) for one in training], **style)
        lower.plot(iterations, [_or_nan(one.delta_norm) for one in training], **style)
    upper.set_ylabel("last loss")
    lower.set_ylabel("norm of all deltas")
    upper.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    _over_iterations(upper, lower)
    figure.suptitle(f"{sum(map(len, trainings))} checkpoints of {len(trainings)} trainings", parse_math=False)


def _over_iterations(upper: Any, lower: Any) -> None:
    """Style two panels of lines that share their iterations; norms begin at zero in the lower one."""
    for axes in (upper, lower):
        axes.grid(color="#DDDDDD", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    lower.set_xlabel("iterations")
    lower.set_ylim(bottom=0)
    lower.xaxis.get_major_locator().set_params(integer=True)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _norm(one: Summary, modules: Sequence[str]) -> float:
    """Return the norm of the deltas of `modules` together, NaN where it is not known."""
    return math.hypot(*(_or_nan(pair.norm) for pair in one.pairs if pair.module in modules))


def _name(one: Summary) -> str:
    return printable(os.path.basename(os.fsdecode(one.source)), longest=40)
