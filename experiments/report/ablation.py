"""The ablation's table and plot, from the records below experiments/results/ablation."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs.ablation import QUESTIONS, Cell, Family, families
from experiments.report import results
from experiments.report.plots import DENSE_COLOUR, PRUNED_COLOUR
from experiments.report.statistics import coding, markdown_table, mean_spread, paired

GROUP = "ablation"
PLOT = results.RECORDS / GROUP / "ablation.png"
_COLUMNS = ("cell", "n", "validation top-1", "against", "difference", "other seeds", "conv", "retained", "training s")
_NOTES = (
    "Final top-1 on validation data in percent, mean ± standard deviation; differences are in points, paired by seed, "
    "against the cell named. Which cells ran with more than the first seed was decided by that seed's accuracy: "
    '"other seeds" is the difference without it, free of that choice; where n is 1 a difference is but a hint. '
    '"retained": share of the importance that the masks keep. Seconds are of training alone, shared epochs included.'
    "\n"
)

# Summaries by cell name and seed.
Runs = Mapping[str, Mapping[int, dict[str, Any]]]


def records(folder: Path = results.RECORDS) -> list[dict[str, Any]]:
    """The ablation's records: see `experiments.report.results.records`."""
    return [record for record in results.records(folder) if record["group"] == GROUP]


def generate(found: Sequence[dict[str, Any]]) -> str:
    """The ablation as Markdown, a section for each family that has records.

    Args:
        found: from `records`.

    Raises:
        ValueError: a record was made with another config than its cell has now, or is of no cell.
    """
    parts = []
    for family, runs in _by_family(found):
        first = next(iter(next(iter(runs.values())).values()))
        machines = sorted({results.machine(record) for by_seed in runs.values() for record in by_seed.values()})
        parts.append(
            f"## {family.prefix}\n\n{first['dataset']} ({coding(first['encoding'])}), {first['train_examples']:,} "
            f"training images, {first['eval_split']} set of {first['eval_examples']:,}; {first['net']} of width "
            f"{first['width']:g}, {first['epochs']} epochs; {', '.join(machines)}; {_date(runs)}. Command: "
            f"`python -m experiments ablation --data.dir DIR --workdir DIR`.\n{_NOTES}"
        )
        for question, title in QUESTIONS.items():
            rows = [_row(cell, runs) for cell in family.cells if cell.question == question and cell.name in runs]
            if question == next(iter(QUESTIONS)) and "dense" in runs:
                dense = Cell("dense", question, "base", True, family.dense)
                rows.insert(0, _row(dense, runs))
            if rows:
                parts.append(f"### {title}\n\n{markdown_table(_COLUMNS, rows)}")
    return "\n".join(parts)


def plot(found: Sequence[dict[str, Any]], path: Path = PLOT) -> None:
    """Draw every cell's paired difference: its mean, the standard deviation, and each seed.

    Args:
        found: from `records`; of at least one family.
        path: the PNG to write.

    Raises:
        ValueError: as `generate`; or there is nothing to draw.
    """
    from matplotlib.figure import Figure

    measured = _by_family(found)
    if not measured:
        raise ValueError("there are no records of the ablation to draw: run `python -m experiments ablation` first")
    size = (8.5 * len(measured), 1.3 + 0.25 * max(_height(*one) for one in measured))
    figure = Figure(size, layout="constrained")
    columns = figure.subplots(1, len(measured), squeeze=False)
    for axes, (family, runs) in zip(columns[0], measured):
        _draw(axes, family, runs)
    figure.savefig(path, dpi=110)


def differences(cell: Cell, runs: Runs) -> dict[int, float]:
    """Top-1 of a cell less that of its reference, by seed, in points."""
    mine, reference = runs.get(cell.name, {}), runs.get(cell.reference, {})
    return {
        seed: 100 * (mine[seed]["final_top1"] - reference[seed]["final_top1"])
        for seed in sorted(mine.keys() & reference.keys())
    }


def _by_family(found: Sequence[dict[str, Any]]) -> list[tuple[Family, Runs]]:
    """Families that have records, with those by cell and seed."""
    names: dict[str, tuple[Family, str, Any]] = {}
    for family in families():
        names[family.dense.name] = (family, "dense", family.dense)
        names |= {cell.config.name: (family, cell.name, cell.config) for cell in family.cells}
    grouped: dict[str, tuple[Family, dict[str, dict[int, dict[str, Any]]]]] = {}
    for record in found:
        if record["name"] not in names:
            raise ValueError(f"the record {record['name']!r} is of no cell of the ablation: remove it")
        family, cell, config = names[record["name"]]
        if not results.is_record_of(record, config):
            raise ValueError(
                f"the record of {record['name']}, seed {record['seed']}, was made with another config than the cell "
                "has now: remove it, or measure again"
            )
        grouped.setdefault(family.prefix, (family, {}))[1].setdefault(cell, {})[record["seed"]] = record
    return [grouped[family.prefix] for family in families() if family.prefix in grouped]


def _date(runs: Runs) -> str:
    return max(record["setting"]["date"] for by_seed in runs.values() for record in by_seed.values())[:10]


def _row(cell: Cell, runs: Runs) -> tuple[str, ...]:
    mine = runs[cell.name]
    column = {field: [record[field] for record in mine.values()] for field in ("final_top1", "train_seconds")}
    by_seed, reference = (
        {seed: record["final_top1"] for seed, record in runs.get(name, {}).items()}
        for name in (cell.name, cell.reference)
    )
    is_reference = cell.name == cell.reference
    first_seed = min(seed for one in runs.values() for seed in one)
    others = {seed: top1 for seed, top1 in by_seed.items() if seed != first_seed}
    retained = [record["retained_importance"] for record in mine.values() if record.get("retained_importance")]
    return (
        cell.name,
        str(len(mine)),
        mean_spread(column["final_top1"], scale=100),
        "" if is_reference else cell.reference,
        "" if is_reference else paired(by_seed, reference, scale=100),
        "" if is_reference or not others else paired(others, reference, scale=100),
        f"{statistics.fmean(record['conv_compression'] for record in mine.values()):.2f}x",
        mean_spread(retained) if retained else "",
        mean_spread(column["train_seconds"], digits=0),
    )


def _height(family: Family, runs: Runs) -> int:
    drawn = [cell for cell in family.cells if cell.name != cell.reference and differences(cell, runs)]
    return len(drawn) + len({cell.question for cell in drawn})


def _draw(axes: Any, family: Family, runs: Runs) -> None:
    labels: list[tuple[float, str]] = []
    row = 0
    for question, title in QUESTIONS.items():
        measured = [
            (cell, list(differences(cell, runs).values()))
            for cell in family.cells
            if cell.question == question and cell.name != cell.reference and differences(cell, runs)
        ]
        if not measured:
            continue
        axes.text(0.005, row, title, transform=axes.get_yaxis_transform(), va="center", fontsize=9, fontweight="bold")
        axes.axhspan(row - 0.5, row + 0.5, color="#eeeeee", zorder=0)
        for cell, values in measured:
            row += 1
            mean, several = statistics.fmean(values), len(values) > 1
            axes.errorbar(
                mean,
                row,
                xerr=statistics.stdev(values) if several else None,
                fmt="o",
                color=PRUNED_COLOUR,
                markerfacecolor=PRUNED_COLOUR if several else "white",
                capsize=0,
                markersize=6,
                zorder=3,
            )
            if several:
                axes.plot(values, [row] * len(values), "|", color=DENSE_COLOUR, markersize=9, zorder=2)
            labels.append((row, f"{cell.name}  − {cell.reference}"))
        row += 1
    axes.axvline(0, color=DENSE_COLOUR, linewidth=1, zorder=1)
    axes.set_yticks([place for place, _ in labels], [text for _, text in labels], fontsize=8.5)
    axes.set_ylim(row - 0.4, -0.6)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_xlabel("difference of final validation top-1, points (paired by seed)")
    axes.set_title(f"{family.prefix}: filled: mean ± standard deviation, ticks: seeds; hollow: one seed", fontsize=10)
