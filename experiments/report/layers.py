"""Tables of `experiments.bench.layers`: the CPU's kernels on layers of real nets, beside dense ones."""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from experiments.report.statistics import markdown_table

# Times faster than the fastest dense form on two cores, by filters of a tile: forward where 5.6 times less is to be
# multiplied, and where it is 2.25 times less; each gradient at 5.6.
FORWARD_GOALS = {5.6: {64: 4.5, 32: 4.5, 16: 3.3, 1: 3.0}, 2.25: {64: 1.8, 1: 1.3}}
GRADIENT_GOALS = {5.6: {64: 3.0, 32: 3.0, 16: 3.0}}
PLAIN, PACKED = "cpu", "cpu packed"
_EXPLAINED = """Ratios say how many times faster the native kernels ({instructions}) are than the fastest dense form of
that row, which is named: the dense form of the same kernels, XLA's{engines}. {what}
Every way was checked against sums in float64 (outputs' memory filled with NaN before, NaN in the weights that are not
retained), then all of a row were timed in turns, each after {warm} of calls that are not counted; medians. {packing}
Masks are drawn: at 2.25x every kernel has a 2x2 corner, at 5.6x 60% of the tiles are removed as well. Float32. Load
average {load[0]:.1f} at the start, {load[1]:.1f} at the end; seed {seed}; {minutes:.0f} minutes.
"""

_ALONE = """Each is one call from Python, which takes some 30 us itself, and as long to wake a second thread."""
_CHAINED = """Each figure is one call's share of {chain} in one program, every call reading what the one before wrote:
the layer as it stands in a net, without the call from Python; PyTorch's are called eagerly. The weights stay in a
cache, in a net they do not."""
_PACKINGS = (
    "Forward on weights that are packed beforehand, as loaded nets have them, and in brackets with packing in every "
    "call, as in training.",
    "Weights are packed beforehand, as loaded nets have them.",
)

Mask = tuple[tuple[int, ...], float]


def layers_tables(record: dict[str, Any]) -> str:
    """Everything about one record: how it was measured, ratios by shape of tile for each direction, dense times."""
    engines = record["engines"]
    rows = record["results"]
    parts = [
        _EXPLAINED.format(
            instructions=record["instructions"],
            engines="".join(f", {name}" for name in engines) + (" (oneDNN)" if "torch" in str(engines) else ""),
            what=_ALONE if record.get("chain", 1) == 1 else _CHAINED.format(**record),
            packing=_PACKINGS[record.get("chain", 1) > 1],
            warm="20 ms",
            load=[load[0] for load in record["load_average"]],
            seed=record["seed"],
            minutes=record["seconds"] / 60,
        )
    ]
    if not engines:
        parts.append("Other libraries' convolutions: not measured.\n")
    parts += [f"- {name}: not measured, {reason}\n" for name, reason in record["unavailable"].items()]
    parts.append(f"### What it comes to\n\n{summary_table(rows)}")
    for direction, members in _by_direction(rows):
        parts.append(f"### {direction}\n\n{ratio_table(members)}")
    parts.append(f"### Dense forms\n\n{dense_table(rows)}")
    wrong = [
        f"- **wrong, not timed**: {row['layer']}, N = {row['batch']}, {row['direction']}, {name}: {reason}\n"
        for row in rows
        for name, reason in row["wrong"].items()
    ]
    return "\n".join([*parts, "".join(wrong)] if wrong else parts)


def goal_of(direction: str, mask: Mask) -> float | None:
    """How many times faster it shall be, by direction and mask; None where nothing is asked."""
    (filters, channels), reduction = mask
    goals = FORWARD_GOALS if direction.startswith("forward") else GRADIENT_GOALS
    return goals.get(reduction, {}).get(filters) if channels == 1 else None


def ratios(row: dict[str, Any]) -> dict[Mask, dict[str, float]]:
    """{mask: {"cpu": ratio, "cpu packed": ratio}} of a row, as far as they were measured."""
    found: dict[Mask, dict[str, float]] = {}
    for way in row["ways"]:
        if way["mask"] is not None and way["ratio"] is not None:
            kind = PACKED if way["name"].startswith(PACKED) else PLAIN
            found.setdefault(_key(way["mask"]), {})[kind] = way["ratio"]
    return found


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    """Geometric means over the layers, and the least, beside what was asked for."""
    lines = []
    for direction, members in _by_direction(rows):
        for batch in sorted({row["batch"] for row in members}):
            here = [row for row in members if row["batch"] == batch]
            found = [ratios(row) for row in here]
            for mask in _masks(here):
                values = [_counted(each[mask]) for each in found if mask in each]
                goal = goal_of(direction, mask)
                reached = "" if goal is None else sum(value >= goal for value in values)
                line = (direction, str(batch), _label(mask), str(len(values)))
                figures = (f"{statistics.geometric_mean(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}")
                words = "" if goal is None else f"{goal:g}: in {reached} of {len(values)}"
                lines.append((*line, *figures, words))
    header = ("direction", "N", "tile", "layers", "mean ratio", "least", "most", "goal: met")
    return markdown_table(header, lines)


def ratio_table(rows: Sequence[dict[str, Any]]) -> str:
    """Each layer of one direction: the fastest dense form, and how many times faster each shape of tile is."""
    masks = _masks(rows)
    lines = []
    for row in rows:
        found, dense = ratios(row), _dense(row)
        best = f"{1e3 * dense[row['dense']]:.3g}" if row["dense"] else ""
        lines.append((row["layer"], str(row["batch"]), best, row["dense"] or "", *(_cell(found.get(m)) for m in masks)))
    goals = [goal_of(rows[0]["direction"], mask) for mask in masks]
    if any(goals):
        lines.append(("goal", "", "", "", *("" if goal is None else f"{goal:g}" for goal in goals)))
    header = ("layer", "N", "dense, ms", "fastest dense form", *map(_label, masks))
    return markdown_table(header, lines)


def dense_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every dense form of every layer, in ms, and the rate of the fastest."""
    names = list(dict.fromkeys(name for row in rows for name in _dense(row)))
    # XLA has a form of its own for each direction.
    columns = [name for name in names if not name.startswith("XLA")]
    lines = []
    for row in rows:
        dense = _dense(row)
        xla = next((name for name in dense if name.startswith("XLA")), None)
        cells = [f"{1e3 * dense[name]:.3g}" if name in dense else "" for name in columns]
        rate = f"{row['dense_flops'] / dense[row['dense']] / 1e9:,.0f}" if row["dense"] else ""
        head = (row["layer"], str(row["batch"]), row["direction"])
        lines.append((*head, f"{1e3 * dense[xla]:.3g}" if xla else "", *cells, rate))
    header = ("layer", "N", "direction", "XLA, ms", *(f"{name}, ms" for name in columns), "fastest, GFLOP/s")
    return markdown_table(header, lines)


def _by_direction(rows: Sequence[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    for direction in dict.fromkeys(row["direction"] for row in rows):
        yield direction, [row for row in rows if row["direction"] == direction]


def _dense(row: dict[str, Any]) -> dict[str, float]:
    return {way["name"]: way["median"] for way in row["ways"] if way["mask"] is None}


def _masks(rows: Sequence[dict[str, Any]]) -> list[Mask]:
    return list(dict.fromkeys(mask for row in rows for mask in ratios(row)))


def _key(mask: dict[str, Any]) -> Mask:
    # What is removed is a whole number of tiles: layers differ a little.
    reduction = next((each for each in FORWARD_GOALS if abs(mask["reduction"] / each - 1) < 0.1), mask["reduction"])
    return tuple(mask["tile"]), reduction


def _counted(found: dict[str, float]) -> float:
    return found.get(PACKED, found.get(PLAIN, 0.0))


def _cell(found: dict[str, float] | None) -> str:
    if found is None:
        return ""
    return f"{_counted(found):.2f}" + (f" ({found[PLAIN]:.2f})" if found.keys() == {PLAIN, PACKED} else "")


def _label(mask: Mask) -> str:
    (filters, channels), reduction = mask
    return f"({filters}, {channels}) {reduction:.3g}x"


def latency_table(record: dict[str, Any]) -> str:
    """Rows of `experiments.bench.latency_target`: what was asked, and what the whole net reached."""
    rows = []
    for row in record["results"]:
        net = row["net"] if row["width"] == 1 else f"{row['net']} x{row['width']:g}"
        start = (net, str(row["batch"]), f"{row['asked']:g}x")
        if "refused" in row:
            rows.append((*start, row["refused"], "", ""))
            continue
        off = 100 * (row["reached"] / row["asked"] - 1)
        rows.append(
            (*start, f"{row['reached']:.2f}x ({off:+.0f}%)", f"{row['conv_compression']:.2f}x", str(row["left_dense"]))
        )
    table = markdown_table(("net", "N", "asked", "reached", "conv", "layers left dense"), rows)
    loads = " and ".join(f"{load[0]:.1f}" for load in record["load_average"])
    return (
        "Dense seconds over the net's, both tuned, ratio of the 20th percentiles; masks of random scores in tiles of "
        f"{'x'.join(map(str, record['tile']))}. Load average before and after: {loads}.\n\n{table}"
    )
