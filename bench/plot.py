"""The results as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparisons import COMPARISONS

_MET, _MISSED, _OPEN = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw every ratio as a bar on a logarithmic axis, its target as a tick across it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [one for one in COMPARISONS if one.name in found and one.unit == "x"][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 0.55 * len(shown) + 1.4), layout="constrained")
    for row, one in enumerate(shown):
        ratio = found[one.name]["result"]
        colour = _OPEN if one.target is None else _MET if ratio <= one.target else _MISSED
        axes.barh(row, ratio, color=colour, height=0.6)
        axes.annotate(
            f"{ratio:.3g}",
            (max(ratio, one.target or 0), row),
            (6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
        if one.target is not None:
            axes.plot([one.target] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(shown)), [f"{one.ours}\nagainst {one.theirs}".replace("`", "") for one in shown], fontsize=9
    )
    axes.set_xlabel("time of ggcl_fast, as a multiple of the other's (smaller is better; black: the target)")
    axes.margins(x=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
