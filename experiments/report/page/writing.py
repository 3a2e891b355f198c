"""How the page writes numbers. A number and its unit are held together by a space that does not break."""

import math


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


def ms(seconds: float) -> str:
    """Seconds, in ms without the unit."""
    return figures(1e3 * seconds)


def milliseconds(seconds: float) -> str:
    """Seconds, in ms."""
    return f"{ms(seconds)}\u00a0ms"


def count_of(number_of: int, thing: str) -> str:
    """``1 layer``, ``12 layers``."""
    return f"{number_of:,} {thing}{'' if number_of == 1 else 's'}"
