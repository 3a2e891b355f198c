"""HTML and SVG from nested calls, escaped by construction, and how the page writes numbers.

A number and its unit are held together by a space that does not break.
"""

import html
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_VOID = {"meta", "link", "br"}
# More than any number that means something, and few enough digits to be written.
_MOST = 1e18
# Text of a JSON file may hold what no HTML document may: control characters, half of a surrogate pair.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class Html(str):
    """Markup that is put into the page as it is; every other text is escaped."""


def escape(value: Any) -> Html:
    """Text, safe as content and inside of an attribute."""
    return value if isinstance(value, Html) else Html(html.escape(_FORBIDDEN.sub("\ufffd", str(value))))


def join(parts: Iterable[Any], between: str = "") -> Html:
    """Parts one after the other; None is left out."""
    return Html(escape(between).join(escape(part) for part in parts if part is not None))


def el(name: str, /, *children: Any, **attributes: Any) -> Html:
    """An element.

    Args:
        name: its tag.
        children: text, which is escaped, or `Html`; None is left out.
        attributes: ``class_`` stands for class and ``stroke_width`` for stroke-width; None leaves one out.
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(value)}"')
    start = f"<{' '.join(words)}>"
    return Html(start) if name in _VOID else Html(f"{start}{join(children)}</{name}>")


def pick(data: Any, *keys: str) -> Any:
    """``data[key][key]...``, None as soon as something is missing."""
    for key in keys:
        if not isinstance(data, Mapping):
            return None
        data = data.get(key)
    return data


def items(data: Any) -> dict[str, Any]:
    """A mapping's entries; none if it is no mapping."""
    return dict(data) if isinstance(data, Mapping) else {}


def records(data: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; none if it is no list."""
    return [entry for entry in data if isinstance(entry, Mapping)] if isinstance(data, list | tuple) else []


def number(value: Any) -> float | None:
    """A finite number, 0 or more, as are all that the page shows; None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and 0 <= value < _MOST else None


def ratio(above: Any, below: Any) -> float | None:
    """A quotient of two positive numbers, or None."""
    above, below = number(above), number(below)
    return above / below if above and below else None


def figures(value: float, digits: int = 3) -> str:
    """A number with so many significant digits, never in powers of ten: ``1,230``, ``12.3``, ``0.00123``."""
    if value == 0:
        return "0"
    places = digits - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, places)
    places = digits - 1 - math.floor(math.log10(abs(rounded)))
    return f"{rounded:,.{max(places, 0)}f}"


def percent(fraction: float, places: int = 2) -> str:
    """A fraction as ``98.83 %``; what is not zero does not look like it."""
    least = 10.0**-places
    if 0 < 100 * fraction < least / 2:
        return f"<\u00a0{least:.{places}f}\u00a0%"
    return f"{100 * fraction:.{places}f}\u00a0%"


def times(value: float) -> str:
    """A ratio: ``7.92×``, ``11.5×``, ``0.93×``."""
    return f"{value:.2f}×" if 0.1 <= value < 9.995 else f"{figures(value, 3 if value > 1 else 2)}×"


def size(count: float) -> str:
    """Bytes: ``640 bytes``, ``12.3 kB``, ``37.7 MB`` (1 kB is 1,000 bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # 999,600 bytes are 1.00 MB: three figures are shown.
        if count >= 0.9995 * factor:
            return f"{figures(count / factor)}\u00a0{unit}"
    return f"{count:,.0f}\u00a0bytes"


def milliseconds(seconds: float) -> str:
    """Seconds, in ms."""
    return f"{figures(1e3 * seconds)}\u00a0ms"


def count_of(number_of: int, thing: str) -> str:
    """``1 layer``, ``12 layers``."""
    return f"{number_of:,} {thing}{'' if number_of == 1 else 's'}"
