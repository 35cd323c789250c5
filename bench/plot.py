"""The results as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .comparisons import COMPARISONS

_MET, _MISSED, _OPEN = "#0072B2", "#D55E00", "#999999"  # told apart by colour-blind readers too
_MEANING = ((_MET, "met"), (_MISSED, "missed"), (_OPEN, "no target"))


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw every ratio as a bar on a logarithmic axis, its target as a tick across it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import lines, patches, pyplot

    shown = [one for one in COMPARISONS if one.name in found and one.unit == "x"][::-1]
    figure, axes = pyplot.subplots(figsize=(10, 0.55 * len(shown) + 1.4), layout="constrained")
    for row, one in enumerate(shown):
        ratio = found[one.name]["result"]
        colour = _OPEN if one.target is None else _MET if ratio <= one.target else _MISSED
        axes.barh(row, ratio, color=colour, height=0.6)
        is_near = one.target is not None and ratio <= one.target < 2.5 * ratio  # where the number would stand
        end = one.target if is_near and one.target is not None else ratio
        axes.annotate(f"{ratio:.3g}", (end, row), (5, 0), textcoords="offset points", va="center", fontsize=9)
        if one.target is not None:
            axes.plot([one.target] * 2, [row - 0.42, row + 0.42], color="black", linewidth=2)
    ratios = [found[one.name]["result"] for one in shown]
    targets = [one.target for one in shown if one.target is not None]
    axes.set_xscale("log")
    axes.set_xlim(min(ratios + targets) / 2, max(ratios + targets) * 2)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    handles: list[Any] = [patches.Patch(color=colour, label=label) for colour, label in _MEANING]
    handles.append(lines.Line2D([], [], color="black", linewidth=2, label="target"))
    handles.append(lines.Line2D([], [], color="grey", linewidth=0.8, linestyle=":", label="as fast as the other"))
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(handles), frameon=False)
    axes.axvline(1, color="grey", linewidth=0.8, linestyle=":")
    axes.set_yticks(
        range(len(shown)), [f"{one.ours}\nagainst {one.theirs}".replace("`", "") for one in shown], fontsize=9
    )
    axes.set_xlabel("time of ggcl_fast, as a multiple of the other's (smaller is better)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
