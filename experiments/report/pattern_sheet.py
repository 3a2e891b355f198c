"""A picture of a run's pattern set, and of where its patterns are used."""

import collections
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clicktrain_jax import patterns
from experiments.report.plots import PRUNED_COLOUR, glyph

# Inches a cell; patterns that have a column each.
_CELL = 0.48
_MAX_COLUMNS = 40


class Usage(NamedTuple):
    """Which share of each layer's kept kernels has each pattern.

    Attributes:
        layers: names of the layers that have patterns, in the net's order.
        patterns: their texts, the most used first; of many, the last ones are put together as ``"N others"``.
        shares: float (layers, patterns), in [0, 1]; NaN where the pattern is not in the layer's set.
        totals: float (patterns,), the share of all these layers' kept kernels.
    """

    layers: list[str]
    patterns: list[str]
    shares: np.ndarray
    totals: np.ndarray


def usage(summary: dict[str, Any]) -> Usage:
    """Read a finished run's summary.

    Raises:
        ValueError: no layer of it has patterns.
    """
    counted = {layer["name"]: layer["pattern_counts"] for layer in summary["layers"] if layer["pattern_counts"]}
    if not counted:
        raise ValueError(f"{summary['name']}: no layer of this run has patterns, so there are none to draw")
    sums = collections.Counter()
    for counts in counted.values():
        sums.update(counts)
    # Equally used ones stay in the order of their set.
    order = sorted(sums, key=lambda text: -sums[text])
    table = np.array([[counts.get(text, np.nan) for text in order] for counts in counted.values()], float)
    if len(order) > _MAX_COLUMNS:
        shown = _MAX_COLUMNS - 1
        table = np.column_stack([table[:, :shown], np.nansum(table[:, shown:], axis=1)])
        order = [*order[:shown], f"{len(order) - shown} others"]
    kept = np.nansum(table, axis=1)
    return Usage(
        layers=[name.removesuffix("/kernel") for name in counted],
        patterns=order,
        shares=table / np.maximum(kept, 1)[:, None],
        totals=np.nansum(table, axis=0) / max(kept.sum(), 1),
    )


def draw(summary: dict[str, Any], path: Path) -> None:
    """Draw the patterns, the most used first, above a map of layers by patterns.

    Args:
        summary: of a finished run, as in its ``summary.json``.
        path: the PNG to write.

    Raises:
        ValueError: no layer of the run has patterns.
    """
    used = usage(summary)
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    rows, columns = used.shares.shape
    figure = Figure((_CELL * columns + 3.2, _CELL * (rows + 2.6) + 0.7), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.1, columns + 0.1), ylim=(rows + 0.1, -2.3), aspect="equal")
    colours = LinearSegmentedColormap.from_list("use", ["#eaf1f8", PRUNED_COLOUR])
    edges = np.arange(columns + 1), np.arange(rows + 1)
    top = max(float(np.nanmax(used.shares)), 0.01)
    mesh = axes.pcolormesh(*edges, 100 * used.shares, cmap=colours, vmin=0, vmax=100 * top, edgecolors="white")
    for (row, column), share in np.ndenumerate(used.shares):
        if not np.isnan(share):
            ink = "white" if share > 0.7 * top else "#222222"
            place = (column + 0.5, row + 0.5)
            axes.text(*place, f"{100 * share:.0f}", color=ink, ha="center", va="center", fontsize=9)
    for column, (text, total) in enumerate(zip(used.patterns, used.totals)):
        if "others" in text:
            axes.text(column + 0.5, -1.4, text.replace(" ", "\n"), ha="center", va="center", fontsize=7)
        else:
            pattern = patterns.parse(text)
            glyph(axes, pattern, column + 0.08, -1.75, 0.84 / max(pattern.shape))
        percent = f"{100 * total:.0f}%" if total >= 0.005 or total == 0 else "<1%"
        axes.text(column + 0.5, -0.45, percent, ha="center", fontsize=9)
    axes.set_yticks(np.arange(rows) + 0.5, used.layers, fontsize=9)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(
        f"{summary['name']}, seed {summary['seed']}\n"
        "patterns and their share of all kept kernels;\nbelow, of each layer's, %; blank: not in its set",
        fontsize=10,
        loc="left",
    )
    figure.colorbar(mesh, ax=axes, shrink=0.7, pad=0.02, aspect=25, label="% of the layer's kept kernels")
    # Cut to what is drawn: a title may be wider than the columns of a small set.
    figure.savefig(path, dpi=110, bbox_inches="tight")
