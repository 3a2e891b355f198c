"""Charts as inline SVG. They stretch to whatever width there is while their text keeps its size.

Places are percentages of the drawing; only curves, which need numbers, stand in an inner drawing that is stretched.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from experiments.report.page.markup import Html, el, figures, join

# Height of the strip with the names of the bands, in CSS pixels.
_STRIP = 21
# Of the width: a band's name fits from this share on, on a phone and on a wide screen.
_NAME_FITS, _NAME_FITS_WIDE = 0.24, 0.085


class Curve(NamedTuple):
    """A line through points (x, y); the first one of a chart is the one that matters."""

    name: str
    points: Sequence[tuple[float, float]]


class Band(NamedTuple):
    """A shaded stretch of the x axis; ``kind`` is its colour: dense, regularize or pruned."""

    name: str
    kind: str
    first: float
    end: float


class Event(NamedTuple):
    """A dotted upright line."""

    name: str
    at: float


class Segment(NamedTuple):
    """A part of a bar; ``kind`` is its colour."""

    name: str
    kind: str
    amount: float


def ticks(low: float, high: float, count: int = 6, least: float = 0.0) -> list[float]:
    """At most ``count`` round numbers within [low, high], evenly spaced by ``least`` or more; low < high."""
    least = max((high - low) / max(count - 1, 1), least)
    base = 10.0 ** math.floor(math.log10(least))
    step = next(factor * base for factor in (1, 2, 5, 10) if factor * base >= least * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def _place(value: float, low: float, high: float) -> str:
    return f"{100 * (value - low) / (high - low):.3f}%"


def _described(key: str, title: str, description: str) -> tuple[dict[str, str], Html]:
    """What makes a drawing readable without seeing it: its attributes, and its first children."""
    names = {"role": "img", "aria_labelledby": f"{key}-title {key}-desc"}
    return names, join([el("title", title, id=f"{key}-title"), el("desc", description, id=f"{key}-desc")])


def line_chart(
    key: str, title: str, description: str, curves: Sequence[Curve], *, bands: Sequence[Band], events: Sequence[Event],
    x_end: float, x_name: str, y_range: tuple[float, float], y_name: str, height: int, last_label: str = "",
    explained: bool = True,
) -> Html:
    """Curves over shaded bands, from 0 to ``x_end``.

    Args:
        key: of its ids, one a chart.
        title: what a person who cannot see it is told first.
        description: and then.
        curves: what lies outside of ``y_range`` is cut off.
        bands: behind the curves.
        events: upright lines.
        x_end: where the x axis ends.
        x_name: its name, with the unit.
        y_range: lowest and highest y.
        y_name: its name, with the unit.
        height: of the drawing, in CSS pixels.
        last_label: stands at the end of the first curve.
        explained: whether its legend tells what bands and events are.
    """
    names, words = _described(key, title, description)
    drawing = el(
        "svg",
        words,
        *(_band(index, band, x_end) for index, band in enumerate(bands, 1)),
        *_axes(x_end, x_name, y_range, y_name),
        *(_upright(event.at, x_end) for event in events),
        *(_curve(curve, index, x_end, y_range) for index, curve in reversed(list(enumerate(curves)))),
        _last(curves[0], last_label, x_end, y_range) if curves and curves[0].points else None,
        width="100%", height=height, **names,
    ) 
    shown = (bands, events) if explained else ((), ())
    return join([el("div", drawing, class_="plot"), _legend(curves, *shown)])


def _band(index: int, band: Band, x_end: float) -> Html:
    share = (band.end - band.first) / x_end
    name = f" {band.name}" if share >= _NAME_FITS else None
    if name is None and share >= _NAME_FITS_WIDE:
        name = el("tspan", f" {band.name}", class_="only-wide")
    first, width = _place(band.first, 0, x_end), _place(band.end - band.first, 0, x_end)
    middle = _place((band.first + band.end) / 2, 0, x_end)
    return join([
        el("rect", x=first, width=width, height="100%", class_=f"band-{band.kind}"),
        # Names stand above, where no curve runs through them.
        el("rect", x=first, y=-_STRIP, width=width, height=_STRIP, class_=f"band-{band.kind}"),
        el("text", str(index), name, x=middle, y="-7", text_anchor="middle", class_="band-name"),
    ])


def _axes(x_end: float, x_name: str, y_range: tuple[float, float], y_name: str) -> list[Html]:
    low, high = y_range
    across = ticks(0, x_end, 7, least=1)
    # Labels that are alike would lie: as many places as the step needs.
    upward = ticks(low, high, 6)
    step = upward[1] - upward[0] if len(upward) > 1 else high - low
    places = max(0, -math.floor(math.log10(step) + 1e-9))
    drawn = [el("text", y_name, x="0", y="0", dx="-42", dy="-28")]
    for value in upward:
        y = _place(high - value, 0, high - low)
        drawn.append(el("line", x1="0", x2="100%", y1=y, y2=y, class_="grid"))
        drawn.append(el("text", f"{value:.{places}f}", x="0", y=y, dx="-8", dy="4", text_anchor="end"))
    drawn.append(el("line", x1="0", x2="100%", y1="100%", y2="100%", class_="axis"))
    for value in across:
        x = _place(value, 0, x_end)
        drawn.append(el("text", f"{value:g}", x=x, y="100%", dy="18", text_anchor="middle"))
    drawn.append(el("text", x_name, x="50%", y="100%", dy="37", text_anchor="middle"))
    return drawn


def _upright(at: float, x_end: float) -> Html:
    x = _place(at, 0, x_end)
    return el("line", x1=x, x2=x, y1="0", y2="100%", class_="event")


def _curve(curve: Curve, index: int, x_end: float, y_range: tuple[float, float]) -> Html:
    low, high = y_range
    kind = "second" if index else None
    if len(curve.points) == 1:
        ((x, y),) = curve.points
        if not low <= y <= high:
            return Html("")
        place = {"cx": _place(x, 0, x_end), "cy": _place(high - y, 0, high - low)}
        return el("circle", r="3.5", class_=f"dot {kind or ''}".strip(), **place)
    points = " ".join(f"{1000 * x / x_end:.1f},{1000 * (high - y) / (high - low):.1f}" for x, y in curve.points)
    line = el("polyline", points=points, class_=f"curve {kind or ''}".strip())
    stretched = {"viewBox": "0 0 1000 1000", "preserveAspectRatio": "none"}
    return el("svg", line, width="100%", height="100%", **stretched)


def _last(curve: Curve, label: str, x_end: float, y_range: tuple[float, float]) -> Html:
    (x, y), (low, high) = curve.points[-1], y_range
    place = _place(x, 0, x_end), _place(high - min(max(y, low), high), 0, high - low)
    # Beside the drawing, where no curve runs through it.
    return join([
        el("circle", cx=place[0], cy=place[1], r="3.5", class_="dot"),
        el("text", label, x="100%", y=place[1], dx="7", dy="4", class_="value"),
    ])


def _legend(curves: Sequence[Curve], bands: Sequence[Band], events: Sequence[Event]) -> Html:
    entries = []
    for index, curve in enumerate(curves):
        line = el("line", x1="0", x2="24", y1="6", y2="6", class_="curve second" if index else "curve")
        entries.append((line, curve.name))
    for index, band in enumerate(bands, 1):
        first, last = int(band.first) + 1, math.ceil(band.end)
        epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
        mark = el("rect", width="24", height="12", class_=f"band-{band.kind}")
        entries.append((mark, f"{index} {band.name}: {epochs}"))
    for event in events:
        line = el("line", x1="12", x2="12", y1="0", y2="12", class_="event")
        entries.append((line, f"{event.name}, in epoch {int(event.at) + 1}"))
    return legend(entries)


def legend(entries: Sequence[tuple[Html, str]]) -> Html:
    """What each mark means.

    Args:
        entries: a mark, drawn on 24 x 12, and its words.
    """
    marks = (
        el("li", el("svg", mark, width="24", height="12", aria_hidden="true"), el("span", words))
        for mark, words in entries
    )
    return el("ul", *marks, class_="legend")


def bar(title: str, segments: Sequence[Segment], scale: float, *, whisker: tuple[float, float] | None = None) -> Html:
    """One bar of a chart, the parts one after the other.

    Args:
        title: what a person who cannot see it is told.
        segments: its parts.
        scale: the amount that fills the whole width.
        whisker: low and high end of a line over the bar.
    """
    drawn, start = [], 0.0
    for part in segments:
        shown = el("title", f"{part.name}: {figures(part.amount)}") if len(segments) > 1 else None
        place = {"x": _place(start, 0, scale), "width": _place(part.amount, 0, scale), "height": "100%"}
        drawn.append(el("rect", shown, class_=f"bar-{part.kind}", **place))
        start += part.amount
    if whisker is not None:
        low, high = (_place(end, 0, scale) for end in whisker)
        drawn.append(el("line", x1=low, x2=high, y1="50%", y2="50%", class_="whisker"))
        drawn += [el("line", x1=end, x2=end, y1="20%", y2="80%", class_="whisker") for end in (low, high)]
    return el("svg", el("title", title), *drawn, width="100%", height="18", role="img")


def mini_bar(parts: Sequence[tuple[float, str]]) -> Html:
    """Thin bars one below the other for a table's cell, whose text says the same; shares of its width with kinds."""
    drawn = [el("rect", width="100%", height=6 * len(parts) - 1, class_="track")]
    for index, (share, kind) in enumerate(parts):
        drawn.append(el("rect", y=6 * index, width=_place(min(share, 1), 0, 1), height="5", class_=f"bar-{kind}"))
    return el("svg", *drawn, class_="mini", width="84", height=6 * len(parts) - 1, aria_hidden="true")


def hatches() -> Html:
    """Fillings that differ in more than colour, once a page."""
    kinds = (("index", "M0 0l6 6", "var(--index)"), ("rest", "M0 6l6-6", "var(--rest)"))
    found = [
        el(
            "pattern",
            el("rect", width="6", height="6", fill=colour),
            el("path", d=path, stroke="var(--paper)", stroke_width="1.2"),
            id=f"hatch-{kind}", width="6", height="6", patternUnits="userSpaceOnUse",
        )
        for kind, path, colour in kinds
    ] 
    return el("svg", el("defs", *found), width="0", height="0", aria_hidden="true")


def glyph(text: str, side: int) -> Html | None:
    """A pattern as a grid of taps, the kept ones filled; None if the text is no pattern.

    Args:
        text: rows of 0 and 1 parted by "/".
        side: of the drawing, in CSS pixels.
    """
    rows = text.split("/")
    if not rows[0] or any(len(row) != len(rows[0]) or set(row) - {"0", "1"} for row in rows):
        return None
    kept, gone = [], []
    for y, row in enumerate(rows):
        for x, digit in enumerate(row):
            (kept if digit == "1" else gone).append(f"M{10 * x + 1} {10 * y + 1}h8v8h-8z")
    names = f"pattern {text}, {len(kept)} of {len(kept) + len(gone)} taps kept"
    return el(
        "svg", el("title", names),
        el("path", d="".join(gone), class_="gone") if gone else None,
        el("path", d="".join(kept), class_="kept") if kept else None,
        viewBox=f"0 0 {10 * len(rows[0])} {10 * len(rows)}", width=side, height=side, role="img",
    ) 
