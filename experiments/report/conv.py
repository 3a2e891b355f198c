"""Tables of `experiments.bench.conv`: layers by patterns against dense ones, and what they come to."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from experiments.report.statistics import markdown_table

ALL = "all three"
OPEN = "left open"
# On a GPU, forward and both gradients: times faster than the best dense form, by reduction of work, and the share
# of what the device could do; over the layers of both nets together.
GPU_GOALS = {"2.25x": 1.5, "8x": 3.0}
FLOOR_GOAL = 0.6
_GOAL_GROUPS = ("vgg16-n512", "resnet50-n128")
# Left open means never slower than dense; what is equal differs by so much from one run to the next.
_NOISE = 0.03
_EXPLAINED = """Each way was checked against the reference ({reference}) on fresh random inputs, its output's memory
filled with NaN before, then timed in turns with the others. Times are medians in ms (20th to 80th percentile); a ratio
is the fastest dense form's median over a way's own. Rates are those of the fastest way by patterns: of the retained
work, and as if the dense work had been done. The floor is the retained work at {matmul} or the memory traffic at
{copy}, whichever takes longer ({what}, in the same run); arrays that fit a cache can be moved faster than
that. "Packed": the weights are brought into the order of reading beforehand. Load average {load[0]:.1f} at the start,
{load[1]:.1f} at the end; seed {seed}.
"""


def conv_tables(record: dict[str, Any]) -> str:
    """Everything about one record: how it was measured, what it comes to, every layer."""
    ceilings, rows = record["ceilings"], record["results"]
    on_cpu = record["setting"]["device"]["platform"] == "cpu"
    parts = [
        _EXPLAINED.format(
            reference="in float64" if on_cpu else "in float32",
            matmul=_rate(ceilings["flops_per_s"]),
            copy=f"{ceilings['bytes_per_s'] / 1e9:,.1f} GB/s",
            what=ceilings["what"],
            load=[load[0] for load in record["load_average"]],
            seed=record["seed"],
        ),
        summary_table(rows),
    ]
    for direction in dict.fromkeys(row["direction"] for row in rows):
        parts.append(f"### {direction}\n\n" + layer_table([row for row in rows if row["direction"] == direction]))
    trouble = troubles(rows)
    return "\n".join([*parts, trouble] if trouble else parts)


def gpu_tables(record: dict[str, Any]) -> str:
    """The same of one of `experiments.bench.gpu_measures`: its ceilings, means of what runs by patterns, layers."""
    ceilings, rows = record["ceilings"], record["conv_rows"]
    floor = f"{_rate(ceilings['flops_per_s'])}, {ceilings['bytes_per_s'] / 1e9:,.1f} GB/s"
    parts = [f"Ceilings: {floor} ({ceilings['what']}, in the same run).\n"]
    if any(way["ours"] for row in rows for way in row["ways"]):
        parts.append(summary_table(rows))
        for direction in dict.fromkeys(row["direction"] for row in rows):
            members = [row for row in rows if row["direction"] == direction]
            parts.append(f"#### {direction}\n\n{layer_table(members)}")
    else:
        parts.append(dense_table(rows))
    trouble = troubles(rows)
    return "\n".join([*parts, trouble] if trouble else parts)


def dense_table(rows: Sequence[dict[str, Any]]) -> str:
    """Every dense form of every layer."""
    names = list(dict.fromkeys(way["name"] for row in rows for way in row["ways"]))
    lines = []
    for row in rows:
        ways = {way["name"]: way for way in row["ways"]}
        times = [_times(ways[name]) if name in ways else "" for name in names]
        rate = _rate(ways[row["dense"]]["dense_flops_per_s"]) if row["dense"] else ""
        lines.append((row["case"], row["direction"], *times, row["dense"] or "", rate))
    return markdown_table(("case", "direction", *(f"{name}, ms" for name in names), "fastest", "its rate"), lines)


def sweep_table(sweeps: Sequence[dict[str, Any]]) -> str:
    """Tiles of the Hopper kernel, the fastest first; what was wrong or did not compile is left to the record."""
    lines = [
        (
            row["case"],
            row["tiles"],
            f"{1e3 * row['median']:.3g}",
            _rate(row["flops_per_s"]),
            f"{row['read_bytes_per_s'] / 1e12:.2f} TB/s",
        )
        for row in sorted(sweeps, key=lambda row: (row["case"], row["median"] or math.inf))
        if row["median"]
    ]
    dropped = sum(1 for row in sweeps if not row["median"])
    table = markdown_table(("case", "tiles", "ms", "retained", "operands read"), lines)
    return table + (f"\n{dropped} more could not be used; the record says why.\n" if dropped else "")


def layer_table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each case of one direction."""
    names = list(dict.fromkeys(way["name"] for row in rows for way in row["ways"] if way["ours"]))
    goals = any(row["goal"] for row in rows)
    header = ["case", "work", "dense, ms", "form"]
    for name in names:
        header += [f"{name}, ratio"] if name == OPEN else [f"{name}, ms", "ratio"]
    header += ["retained", "as dense", "of floor", "error"] + ["goal"] * goals
    lines = []
    for row in rows:
        ways = {way["name"]: way for way in row["ways"]}
        line = [row["case"], f"1/{row['reduction']:.3g}"]
        line += [_times(ways[row["dense"]]), row["dense"]] if row["dense"] else ["", ""]
        for name in names:
            way = ways.get(name)
            if name == OPEN:
                line.append("" if way is None else f"{_ratio(way)} ({way['note']})")
            else:
                line += ["", ""] if way is None else [_times(way), _ratio(way)]
        ours = [way for way in row["ways"] if way["ours"] and way["name"] != OPEN]
        if ours:
            best = min(ours, key=lambda way: way["median"])
            line += [_rate(best["flops_per_s"]), _rate(best["dense_flops_per_s"]), f"{best['floor_share']:.0%}"]
            line.append(f"{max(way['error'] for way in ours):.0e}")
        else:
            line += [""] * 4
        lines.append(line + [_goal(row, ways)] * goals)
    return markdown_table(header, lines)


def summary_table(rows: Sequence[dict[str, Any]]) -> str:
    """Geometric means of the ratios over the layers, by kind of case; forward and gradients together as well."""
    names = list(dict.fromkeys(way["name"] for row in rows for way in row["ways"] if way["ours"]))
    lines = []
    for group, members in _groups(rows).items():
        directions = list(dict.fromkeys(row["direction"] for row in members))
        for direction in [*directions, ALL] if len(directions) > 1 else directions:
            for name in names:
                mean = mean_ratio(members, name, direction)
                if mean is not None:
                    lines.append(_summary_line(group, direction, name, mean))
    header = ("cases", "direction", "way", "layers", "mean ratio", "least", "of floor", "goal")
    return markdown_table(header, lines)


def mean_ratio(rows: Sequence[dict[str, Any]], name: str, direction: str) -> dict[str, float] | None:
    """What one way gains over these layers.

    Args:
        rows: of one group.
        name: of the way.
        direction: one of the rows', or `ALL`: then a layer's ratio is of the sums of its three times, the dense ones
            each of the fastest form.

    Returns:
        ``mean``: the geometric mean, each layer as often as the net has it; ``least``; ``floor_share``: the sum of the
        floors over the sum of the times; ``layers`` that could be counted ``of`` how many. None if there is none.
    """
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if direction in (ALL, row["direction"]):
            cases.setdefault(row["case"], []).append(row)
    wanted = 3 if direction == ALL else 1
    ratios, weights, total, floor = [], [], 0.0, 0.0
    for members in cases.values():
        pairs = []
        for row in members:
            ways = {way["name"]: way for way in row["ways"]}
            if name in ways and row["dense"]:
                pairs.append((ways[row["dense"]]["median"], ways[name]["median"]))
        if len(pairs) < wanted:
            continue
        dense, ours = (sum(values) for values in zip(*pairs))
        layers = members[0]["layers"]
        ratios.append(dense / ours)
        weights.append(layers)
        total += layers * ours
        floor += layers * sum(row["floor_s"] for row in members)
    if not ratios:
        return None
    mean = math.exp(sum(weight * math.log(ratio) for weight, ratio in zip(weights, ratios)) / sum(weights))
    of = sum(members[0]["layers"] for members in cases.values())
    return {"mean": mean, "least": min(ratios), "floor_share": floor / total, "layers": sum(weights), "of": of}


def troubles(rows: Sequence[dict[str, Any]]) -> str:
    """What was wrong, and what a way cannot do; "" if there is nothing to say."""
    wrong = [
        f"- **wrong, not timed**: {row['case']}, {row['direction']}, {name}: {reason}"
        for row in rows
        for name, reason in row["wrong"].items()
    ]
    refused = Counter((name, reason) for row in rows for name, reason in row["refused"].items())
    lines = wrong + [f"- {name}, not measured in {count} rows: {reason}" for (name, reason), count in refused.items()]
    return "\n".join(lines) + "\n" if lines else ""


def _groups(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """By kind and batch, on a GPU by net, batch and reduction; there also both nets that the goals are for."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        kind = re.match(r"\w+-n\d+", row["case"])
        suffix = re.search(r"-([\d.]+x)$", row["case"])
        name = kind.group() if kind else row["case"]
        groups.setdefault(f"{name}, {suffix.group(1)}" if suffix else name, []).append(row)
    for reduction in GPU_GOALS:
        parts = [groups.get(f"{name}, {reduction}", []) for name in _GOAL_GROUPS]
        if all(parts):
            groups[f"{' and '.join(_GOAL_GROUPS)}, {reduction}"] = sum(parts, [])
    return groups


def _summary_line(group: str, direction: str, name: str, mean: dict[str, float]) -> tuple[str, ...]:
    goal = ""
    wanted = GPU_GOALS.get(group.rpartition(", ")[2])
    if " and " in group and direction == ALL and name == "mosaic_gpu" and wanted:
        floor = _met(mean["floor_share"] >= FLOOR_GOAL)
        goal = f"{wanted:g}: {_met(mean['mean'] >= wanted)}; {FLOOR_GOAL:.0%} of floor: {floor}"
        if mean["layers"] < mean["of"]:
            goal = "not measured as a whole"
    elif name == OPEN:
        goal = f"never slower: {_met(mean['least'] >= 1 - _NOISE)}"
    layers = f"{mean['layers']:g}" if mean["layers"] == mean["of"] else f"{mean['layers']:g} of {mean['of']:g}"
    numbers = (f"{mean['mean']:.2f}", f"{mean['least']:.2f}", f"{mean['floor_share']:.0%}")
    return group, direction, name, layers, *numbers, goal


def _goal(row: dict[str, Any], ways: dict[str, dict[str, Any]]) -> str:
    """The portable form's goal; with weights packed before is said apart."""
    if not row["goal"]:
        return ""
    gains = [ways[name]["ratio"] if name in ways else 0 for name in ("xla", "xla packed")]
    reached = [gain >= row["goal"] for gain in gains]
    return f"{row['goal']:g}: {'met' if reached[0] else 'met by packed' if reached[1] else 'not met'}"


def _met(reached: bool) -> str:
    return "met" if reached else "not met"


def _ratio(way: dict[str, Any]) -> str:
    return "" if way["ratio"] is None else f"{way['ratio']:.2f}"


def _times(way: dict[str, Any]) -> str:
    return f"{1e3 * way['median']:.3g} ({1e3 * way['p20']:.3g} to {1e3 * way['p80']:.3g})"


def _rate(flops_per_s: float) -> str:
    if flops_per_s < 1e12:
        return f"{flops_per_s / 1e9:,.0f} GFLOP/s"
    return f"{flops_per_s / 1e12:,.1f} TFLOP/s"
