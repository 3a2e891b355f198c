"""One sheet for a comparison: accuracy against compression, end-to-end training seconds and latency."""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.report.comparison_records import Cell, Study, mean
from experiments.report.plots import DENSE_COLOUR, PRUNED_COLOUR

# One colour a method, told apart in grey and by the colour-blind with the markers' help.
COLOURS = {
    "dense": DENSE_COLOUR,
    "ClickTrain": PRUNED_COLOUR,
    "PAT": "#d55e00",
    "PDT": "#009e73",
    "narrow": "#9467bd",
    "one-shot": "#c9a227",
    "random": "#999999",
}
_SHIFT, _SAME_PLACE = 0.03, 1.1
_FLOORS = ("one-shot", "random")
_MARKERS = "sD^vPX<>ph8"
_STYLES = ("-", "--", ":", "-.")


def draw(study: Study, path: Path) -> None:
    """Draw a comparison's sheet.

    Args:
        study: from `experiments.report.comparison_records.read`; with at least one run.
        path: the PNG to write.

    Raises:
        ValueError: there is nothing to draw.
    """
    if study.some_run() is None:
        raise ValueError(f"{study.folder} holds no finished run: there is nothing to draw")
    from matplotlib.figure import Figure

    panels: tuple[tuple[str, Callable[[Cell], float | None]], ...] = (
        ("compression of the convolutions, times", lambda cell: mean(study.compression(cell))),
        (f"training, {study.clock} over dense's", lambda cell: mean(study.time(cell))),
        ("latency of one image, ms", lambda cell: None if cell.latency_s(1) is None else 1e3 * cell.latency_s(1)),
    )
    figure = Figure((15, 6.4), layout="constrained")
    columns = figure.subplots(1, 3, sharey=True)
    families = _families(study)
    for axes, (title, place) in zip(columns, panels):
        drawn = _panel(axes, study, families, place)
        axes.set_xlabel(title)
        axes.set_xscale("log")
        axes.grid(alpha=0.25, which="both", linewidth=0.5)
        _plain_ticks(axes)
        if not drawn:
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")
    columns[0].set_ylabel("final top-1, %: mean and standard deviation over seeds")
    _limits(columns[0], study)
    # From the first panel that has it: there it has its line.
    handles: dict[str, Any] = {}
    for axes in columns:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            handles.setdefault(label, handle)
    ordered = [name for name in ("dense", *families) if name in handles]
    figure.legend(
        [handles[name] for name in ordered],
        ordered,
        loc="outside lower center",
        ncols=min(len(ordered), 5),
        fontsize=9,
        frameon=False,
    )
    figure.suptitle(f"{study.facts['title']} (points are shifted sideways by up to {100 * _SHIFT:g}%)", fontsize=11)
    figure.savefig(path, dpi=110)


def _families(study: Study) -> dict[str, tuple[list[Cell], dict[str, Any]]]:
    """Cells with runs by family, dense apart, and how each is drawn."""
    found: dict[str, tuple[list[Cell], dict[str, Any]]] = {}
    count: dict[str, int] = {}
    for cell in study.cells:
        if not cell.runs or cell.name == study.dense.name:
            continue
        name = cell.family if cell.family.startswith(cell.method) else f"{cell.method}: {cell.family}"
        if name not in found:
            number = count.get(cell.method, 0)
            count[cell.method] = number + 1
            found[name] = (
                [],
                {
                    "color": COLOURS[cell.method],
                    "marker": _MARKERS[len(found) % len(_MARKERS)],
                    "linestyle": _STYLES[number % len(_STYLES)],
                    # ClickTrain lies on top of what it is compared with.
                    "zorder": 5 if cell.method == "ClickTrain" else 3,
                    "markersize": 8 if cell.method == "ClickTrain" else 6.5,
                },
            )
        found[name][0].append(cell)
    return found


def _panel(
    axes: Any,
    study: Study,
    families: dict[str, tuple[list[Cell], dict[str, Any]]],
    place: Callable[[Cell], float | None],
) -> bool:
    """Draw one panel; returns whether anything of a family is in it."""
    _dense_band(axes, study.dense, place)
    drawn = False
    for number, (name, (cells, style)) in enumerate(families.items()):
        # Sideways by a little, the same in every panel: many points share one compression or latency.
        shift = 1 + _SHIFT * (2 * number / max(len(families) - 1, 1) - 1)
        points = [(x, cell) for cell in cells if (x := place(cell)) is not None]
        points.sort(key=lambda one: one[0])
        if not points:
            continue
        drawn = True
        # A line through points of one place would be a scribble.
        is_line = points[-1][0] > _SAME_PLACE * points[0][0]
        axes.errorbar(
            [x * shift for x, _ in points],
            [mean(cell.top1()) for _, cell in points],
            [_std(cell) for _, cell in points],
            label=name,
            capsize=2,
            linewidth=1.4,
            elinewidth=0.8,
            markeredgecolor="white",
            markeredgewidth=0.5,
            **(style if is_line else style | {"linestyle": "none"}),
        )
    return drawn


def _dense_band(axes: Any, dense: Cell, place: Callable[[Cell], float | None]) -> None:
    if not dense.runs:
        return
    middle, half = mean(dense.top1()), _std(dense)
    axes.axhspan(middle - half, middle + half, color=DENSE_COLOUR, alpha=0.12, linewidth=0, zorder=0)
    axes.axhline(middle, color=DENSE_COLOUR, linewidth=1, zorder=1)
    x = place(dense)
    if x is not None:
        axes.plot([x], [middle], marker="o", color=DENSE_COLOUR, linestyle="-", linewidth=1, label="dense", zorder=4)


def _std(cell: Cell) -> float:
    return statistics.stdev(cell.top1().values()) if len(cell.runs) > 1 else 0.0


def _limits(axes: Any, study: Study) -> None:
    """What is far below (random masks, nets not retrained) must not squeeze all else into the top: it is named."""
    cells = [cell for cell in study.cells if cell.runs]
    top = max(mean(cell.top1()) + _std(cell) for cell in cells)
    lows = {cell.name: mean(cell.top1()) - _std(cell) for cell in cells}
    near = [lows[cell.name] for cell in cells if cell.method not in _FLOORS and lows[cell.name] > top - 25]
    low = min(near, default=min(lows.values()))
    margin = max(0.05 * (top - low), 0.1)
    hidden = [cell for cell in cells if mean(cell.top1()) < low - margin]
    # Room for their names.
    axes.set_ylim(low - (1 + 0.9 * min(len(hidden), 6)) * margin, top + margin)
    if hidden:
        text = "below:\n" + "\n".join(f"{cell.label}: {mean(cell.top1()):.1f}" for cell in hidden[:6])
        axes.text(0.02, 0.015, text, transform=axes.transAxes, fontsize=8, color="#666666", va="bottom")


def _plain_ticks(axes: Any) -> None:
    """Numbers as they are said, 1.5 and not 1.5 x 10^0, at more places a decade the less of one is shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_xlim()
    finest, finer, coarse = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9), (1, 1.5, 2, 3, 4, 6, 8), (1, 2, 5)
    places = finest if high < 5 * low else finer if high < 60 * low else coarse
    # Of so short an axis a logarithmic locator may find one place, or none.
    axes.xaxis.set_major_locator(MaxNLocator(7) if high < 2 * low else LogLocator(subs=places, numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
