"""Means with their spread, and paired differences, as text."""

import csv
import io
import math
import statistics
from collections.abc import Sequence

from experiments.data import is_lossy


def mean_spread(values: Sequence[float], *, scale: float = 1.0, digits: int = 2) -> str:
    """``"98.72 ± 0.10"``: mean and sample standard deviation; one value has no spread."""
    scaled = [scale * value for value in values]
    mean = statistics.fmean(scaled)
    if len(scaled) < 2:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(scaled):.{digits}f}"


def paired(values: dict[int, float], against: dict[int, float], *, scale: float = 1.0, digits: int = 2) -> str:
    """Mean and spread of the differences of equal seeds; "not measured" when there is none."""
    seeds = sorted(values.keys() & against.keys())
    if not seeds:
        return "not measured"
    differences = [scale * (values[seed] - against[seed]) for seed in seeds]
    mean = statistics.fmean(differences)
    spread = f" ± {statistics.stdev(differences):.{digits}f}" if len(differences) > 1 else ""
    # A difference that rounds to zero has no sign.
    sign = "+" if round(mean, digits) > 0 else ""
    mean = 0.0 if math.isclose(round(mean, digits), 0.0) else mean
    return f"{sign}{mean:.{digits}f}{spread}"


def coding(encoding: str) -> str:
    """How images were stored, for a table: ``"png"``, ``"jpeg, lossy"``."""
    return f"{encoding}, lossy" if is_lossy(encoding) else encoding


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too."""
    widths = [max(len(line[column]) for line in (header, *rows)) for column in range(len(header))]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(line, widths)) for line in (header, *rows)]
    rule = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in (lines[0], rule, *lines[1:])) + "\n"


def csv_text(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A CSV file's text."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()
