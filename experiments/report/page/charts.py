"""Accuracy and loss by epoch, drawn by matplotlib as SVG that stands in the page, wide for desks and narrow for phones.

All text in a drawing is this file's own: names that come from the data stand in the page's legend.
"""

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from experiments.report.page.facts import Epoch
from experiments.report.page.writing import count_of, figures
from experiments.report.plots import accuracy_range

STYLE = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
# The page's colours, as of its light theme: in the drawing each becomes the variable that follows the theme.
_COLOURS = dict(re.findall(r"--([\w-]+): (#\w{6});", STYLE.partition("}")[0]))
_NAMES = {colour: name for name, colour in _COLOURS.items()}
# In units of the drawing; the page stretches it. Text is 12 of them high.
_WIDTHS = {"wide": 900, "narrow": 390}
_LEFT, _RIGHT, _TOP, _BOTTOM, _STRIP = 46, 66, 44, 44, 20
_KINDS = {"regularize": "regularize", "prune": "pruned", "pruned": "pruned"}
_EVENTS = {"select": "select: masks chosen", "prune": "prune: masked weights set to zero"}


class Curve(NamedTuple):
    """A line through points (x, y); the first one of a chart is the one that matters."""

    name: str
    points: list[tuple[float, float]]


class Band(NamedTuple):
    """A stretch of epochs that end in the same phase; ``kind`` is its colour: dense, regularize or pruned."""

    name: str
    kind: str
    first: float
    end: float

    @property
    def epochs(self) -> str:
        """Which ones, from 1."""
        first, last = int(self.first) + 1, math.ceil(self.end)
        return f"epoch {first}" if first == last else f"epochs {first} to {last}"


class Event(NamedTuple):
    """What happens in one update: the choice of the masks (perhaps twice), and the pruning."""

    name: str
    at: float


class Chart(NamedTuple):
    """Curves, what they show in words, and their drawings as SVG."""

    key: str
    title: str
    words: str
    curves: Sequence[Curve]
    drawings: list[str]


def bands(epochs: Sequence[Epoch]) -> list[Band]:
    """The phases, one after the other."""
    found: list[Band] = []
    for line in epochs:
        name = line.phases[-1] if line.phases else "phase not recorded"
        first = found.pop().first if found and found[-1].name == name else line.epoch
        found.append(Band(name, _KINDS.get(name, "dense"), first, line.epoch + 1))
    return found


def events(epochs: Sequence[Epoch]) -> list[Event]:
    """What happened when."""
    return [Event(_EVENTS[phase], line.epoch) for line in epochs for phase in line.phases if phase in _EVENTS]


def charts(epochs: Sequence[Epoch]) -> list[Chart]:
    """Accuracy and loss, as far as they are known."""
    found = []
    tested, trained = (_points(epochs, key, 100) for key in ("eval_top1", "train_top1"))
    if shown := [y for _, y in tested or trained]:
        low, high = accuracy_range([shown])
        below = sum(y < low for y in shown)
        cut = f" The axis begins at {low:g} %: {count_of(below, 'epoch')} below it, see the table." if below else ""
        words = f"Top-1 after each epoch, in %. Last {shown[-1]:.2f}, best {max(shown):.2f}.{cut}"
        curves = _known(
            [
                Curve("top-1 of the evaluation set", tested),
                Curve("top-1 in training (with augmentation and dropout, where used)", trained),
            ]
        )
        drawings = _drawings("accuracy", epochs, curves, (low, high), "top-1, %", 300, f"{shown[-1]:.2f} %")
        found.append(Chart("accuracy", "Accuracy by epoch", words, curves, drawings))
    losses = {"loss of the evaluation set": "eval_loss", "loss in training": "train_loss"}
    if curves := _known([Curve(name, _points(epochs, key)) for name, key in losses.items()]):
        values = sorted(y for curve in curves for _, y in curve.points)
        # One bad epoch would flatten all others.
        top = max(values[min(len(values) - 1, round(0.95 * len(values)))], 1e-6)
        high = figures(1.1 * top, 2)
        above = sum(value > float(high.replace(",", "")) for value in values)
        cut = f" The axis ends at {high}: {count_of(above, 'value')} above it, see the table." if above else ""
        last = figures(curves[0].points[-1][1])
        y_range = (0.0, float(high.replace(",", "")))
        drawings = _drawings("loss", epochs, curves, y_range, "loss, nats", 200, last)
        words = f"Cross-entropy after each epoch. Last {last}.{cut}"
        found.append(Chart("loss", "Loss by epoch", words, curves, drawings))
    return found


def _known(curves: list[Curve]) -> list[Curve]:
    return [curve for curve in curves if curve.points]


def _points(epochs: Sequence[Epoch], key: str, factor: float = 1) -> list[tuple[float, float]]:
    """An epoch's line tells what holds when the epoch is over."""
    values = ((line.epoch + 1, getattr(line, key)) for line in epochs)
    return [(epoch, factor * value) for epoch, value in values if value is not None]


def _drawings(key: str, epochs: Sequence[Epoch], *content: Any) -> list[str]:
    from matplotlib import rc_context, style

    # What the user's own matplotlibrc says would change the page.
    with style.context("default"), rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "font.size": 12}):
        return [_draw(f"{key}-{size}", size, epochs, *content) for size in _WIDTHS]


def _draw(
    key: str,
    size: str,
    epochs: Sequence[Epoch],
    curves: Sequence[Curve],
    y_range: tuple[float, float],
    y_name: str,
    height: int,
    last: str,
) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    width, x_end = _WIDTHS[size], epochs[-1].epoch + 1
    inner = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    figure = Figure(figsize=(width / 72, height / 72), dpi=72)
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inner[0] / width, inner[1] / height))
    axes.set(xlim=(0, x_end), ylim=y_range)
    above = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "color": _COLOURS["ink"]}
    for index, band in enumerate(bands(epochs), 1):
        # Names stand above, where no curve runs through them.
        axes.axvspan(
            band.first,
            band.end,
            ymax=1 + _STRIP / inner[1],
            color=_COLOURS[f"band-{band.kind}"],
            linewidth=0,
            clip_on=False,
            zorder=0,
            gid=f"band-{index}",
        )
        room = inner[0] * (band.end - band.first) / x_end
        words = (f"{index} {band.name}", str(index)) if band.name in ("dense", *_KINDS) else (str(index),)
        if fits := [text for text in words if room > 8 * len(text) + 6]:
            axes.annotate(fits[0], ((band.first + band.end) / 2, 1), (0, 6), ha="center", **above)
    for event in events(epochs):
        axes.axvline(event.at, color=_COLOURS["ink"], linewidth=1, linestyle=(0, (2, 3)))
    # The one that matters is drawn last, on top.
    for index, curve in reversed(list(enumerate(curves))):
        look = (
            {"color": _COLOURS["dense"], "linewidth": 1.6, "linestyle": (0, (5, 4))}
            if index
            else {"color": _COLOURS["net"], "linewidth": 2.2}
        )
        mark = "o" if len(curve.points) == 1 else None
        axes.plot(*zip(*curve.points), marker=mark, markersize=6, gid=f"curve-{index}", **look)
    x, y = curves[0].points[-1][0], min(max(curves[0].points[-1][1], y_range[0]), y_range[1])
    axes.plot(x, y, "o", color=_COLOURS["net"], markersize=6, clip_on=False)
    # Beside the drawing, where no curve runs through it.
    axes.annotate(
        last,
        (1, y),
        (7, 0),
        xycoords=axes.get_yaxis_transform(),
        textcoords="offset points",
        va="center",
        weight="bold",
        color=_COLOURS["ink"],
    )
    axes.annotate(y_name, (0, 1), (4 - _LEFT, 28), **{**above, "color": _COLOURS["soft"]})
    axes.set_xlabel("epochs trained", color=_COLOURS["soft"], labelpad=6)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.ticklabel_format(useOffset=False, style="plain")
    axes.tick_params(length=0, pad=7, labelcolor=_COLOURS["soft"])
    axes.grid(axis="y", color=_COLOURS["grid"], linewidth=1)
    axes.set_axisbelow(True)
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.spines["bottom"].set_color(_COLOURS["soft"])
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _inline(file.getvalue(), f"{key}-", f"drawing {size}")


def _inline(svg: bytes, prefix: str, css_class: str) -> str:
    """A file's drawing as a part of a page: ids of its own, the page's colours, as large as there is room."""
    root = ElementTree.fromstring(svg)
    for node in list(root.iter()):
        for child in list(node):
            if child.tag.endswith(("}metadata", "}style")):
                node.remove(child)
        node.tag = node.tag.rpartition("}")[2]
        node.attrib = {name.rpartition("}")[2]: value for name, value in node.attrib.items()}
        for name, value in node.attrib.items():
            if name == "id":
                node.set(name, prefix + value)
            elif name in ("href", "clip-path"):
                node.set(name, value.replace("#", f"#{prefix}"))
            elif name == "style":
                node.set(name, re.sub("#[0-9a-f]{6}", lambda found: f"var(--{_NAMES[found[0]]})", value))
    root.attrib = {"viewBox": root.attrib["viewBox"], "class": css_class, "aria-hidden": "true"}
    return ElementTree.tostring(root, encoding="unicode")
