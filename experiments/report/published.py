"""The authors' recipes beside what was measured here: one table for each net and data set, rows not run among them."""

import re
import statistics
from collections.abc import Sequence
from typing import Any

from experiments import configs
from experiments.configs import TrainConfig
from experiments.configs import published as recipes
from experiments.data import is_lossy
from experiments.records import differences
from experiments.report import results
from experiments.report.comparison import NOT_RUN
from experiments.report.statistics import coding, csv_text, markdown_table, mean_spread, paired

GROUP = "published"
CSV = "published.csv"
_COLUMNS = (
    "run",
    "published (best epoch, their count)",
    "ours, best pruned epoch",
    "ours, final (n)",
    "drop",
    "conv, all convolutions",
    "without shortcuts (their way)",
    "model",
    "seconds",
    "images/s, of peak",
    "precision",
    "hardware",
    "date",
)
# What RESULTS.md shows of them.
_SHOWN = ("run", "published (best epoch, their count)", "ours, final (n)", "drop", "conv, all convolutions", "seconds")
_HEAD = f"""## Published recipes

The authors print the best test top-1 of all epochs, those before the hard prune among them, and count compression
without shortcut convolutions. Ours: final epoch, in percent, mean ± standard deviation (n seeds); "drop" is against
the dense run of the same seed, precision and hardware. Seconds are of training and compiling.
[{CSV}](experiments/results/{CSV}) has more: the best epoch after the prune (of all for dense runs), compression their
way and of the model, hardware, precision, date, images a second and the share of the card's peak (two operations a
multiply-add, as they were executed) of training alone. Rows that say "{NOT_RUN}" were not run at this size:
`python -m experiments table --budget gpu-30min` runs what is missing.
"""
# From the makers' data sheets.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
# What decides neither data nor method: a row each for what is measured with another precision.
_FREE = ("seed", "precision")


def is_run_of(record: dict[str, Any], config: TrainConfig) -> bool:
    """True when a record is of this recipe: seed, precision and the host's way of running it apart."""
    changed = (field for field, _, _ in differences(record["config"], config))
    return record["name"] == config.name and all(field in _FREE or field.startswith("loop.") for field in changed)


def groups() -> dict[tuple[str, str], list[TrainConfig]]:
    """The authors' recipes by (net, data set), the dense one first."""
    found: dict[tuple[str, str], list[TrainConfig]] = {}
    for config in recipes.configs():
        found.setdefault((config.net, config.data.name), []).append(config)
    return found


def published_top1(config: TrainConfig) -> float | None:
    """What the authors print for a recipe, in percent; None where they print nothing."""
    found = re.search(r"best test top-1 ([\d.]+) published", config.expected)
    return float(found[1]) if found else None


def generate(found: Sequence[dict[str, Any]]) -> str:
    """The tables in Markdown.

    Args:
        found: from `experiments.report.results.records`, of any group.

    Raises:
        ValueError: a record collected for these tables that no row shows; two runs of one seed in a row.
    """
    parts = [_HEAD]
    for (net, dataset), rows in _tables(found).items():
        encodings = sorted({record["encoding"] for row in rows for record in row["runs"]})
        mark = f"Images: {'; '.join(map(coding, encodings))}" if encodings else ""
        if any(map(is_lossy, encodings)):
            mark += ": absolute accuracies not comparable with published ones"
        mark += ".\n\n" if mark else ""
        parts.append(f"### {net} on {dataset}\n\n{mark}{markdown_table(_SHOWN, [_shown(row) for row in rows])}")
    return "\n".join(parts)


def to_csv(found: Sequence[dict[str, Any]]) -> str:
    """All tables in one CSV file."""
    tables = _tables(found).items()
    rows = [(net, dataset, _codings(row), *_cells(row)) for (net, dataset), rows in tables for row in rows]
    return csv_text(("net", "data set", "images", *_COLUMNS), rows)


def _codings(row: dict[str, Any]) -> str:
    return "; ".join(sorted({coding(record["encoding"]) for record in row["runs"]}))


def _tables(found: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Rows by (net, data set).

    Raises:
        ValueError: a record in the group `GROUP` that no row shows; two runs of one seed in a row.
    """
    tables, shown = {}, set()
    for key, members in groups().items():
        dense = [record for record in found if is_run_of(record, members[0])]
        rows = []
        for config in (*members, *_others(found, key, members)):
            rows += _rows(config, found, dense, is_dense=config is members[0], is_recipe=config in members)
        shown |= {id(record) for row in rows for record in row["runs"]}
        tables[key] = rows
    for record in found:
        if record["group"] == GROUP and id(record) not in shown:
            raise ValueError(
                f"the record of {record['name']}, seed {record['seed']}, in {GROUP} is of no config that stands beside "
                "the published recipes now: remove it, or measure again"
            )
    return tables


def _others(found: Sequence[dict[str, Any]], key: tuple[str, str], members: Sequence[TrainConfig]) -> list[TrainConfig]:
    """Named configs of other methods on the same net and data set, whose runs were collected beside these."""
    names = {record["name"] for record in found if record["group"] == GROUP} - {config.name for config in members}
    known = configs.all_configs().values()
    return [config for config in known if config.name in names and (config.net, config.data.name) == key]


def _rows(
    config: TrainConfig,
    found: Sequence[dict[str, Any]],
    dense: Sequence[dict[str, Any]],
    *,
    is_dense: bool,
    is_recipe: bool,
) -> list[dict[str, Any]]:
    """A row for each precision and machine that a config was run with, or the one that says it was not run."""
    by_setting: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in found:
        if is_run_of(record, config):
            by_setting.setdefault(_setting(record), []).append(record)
    top1 = published_top1(config)
    row = {
        "config": config,
        "published": "not published" if top1 is None else f"{top1:.2f}",
        "runs": [],
        "dense": [],
        "is_dense": is_dense,
        "is_recipe": is_recipe,
    }
    rows = []
    for setting, runs in sorted(by_setting.items()):
        seeds = sorted(record["seed"] for record in runs)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"{config.name}, {' on '.join(setting)}: two runs of one seed among {seeds}: remove one")
        rows.append(row | {"runs": runs, "dense": [record for record in dense if _setting(record) == setting]})
    return rows or [row]


def _setting(record: dict[str, Any]) -> tuple[str, str]:
    return record["config"]["precision"], results.machine(record)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    config, runs = row["config"], row["runs"]
    if not runs:
        return (config.name, row["published"], NOT_RUN, NOT_RUN, *[""] * (len(_COLUMNS) - 4))
    best, final = ([record[field] for record in runs] for field in ("best_pruned_top1", "final_top1"))
    mine, dense = ({record["seed"]: record["final_top1"] for record in row[which]} for which in ("runs", "dense"))
    precision, machine = _setting(runs[0])
    return (
        config.name,
        row["published"],
        mean_spread(best, scale=100),
        f"{mean_spread(final, scale=100)} (n={len(runs)})",
        "" if row["is_dense"] else paired(mine, dense, scale=100),
        *_compressions(row),
        mean_spread([record["train_and_compile_seconds"] for record in runs], digits=0),
        _speed(runs),
        precision,
        machine,
        max(record["setting"]["date"] for record in runs)[:10],
    )


def _shown(row: dict[str, Any]) -> list[str]:
    cells = dict(zip(_COLUMNS, _cells(row)))
    return [cells[name] for name in _SHOWN]


def _speed(runs: Sequence[dict[str, Any]]) -> str:
    rates, shares = [], []
    for record in runs:
        rates.append(record["train_examples"] * record["epochs"] / record["train_seconds"])
        shares.append(share_of_peak(record))
    text = f"{statistics.fmean(rates):,.0f}"
    return text if None in shares else f"{text}, {100 * statistics.fmean(shares):.1f}%"


def peak_flops(kind: str) -> float | None:
    """Operations a second of a card by jax's name for it, dense, 16 bits with sums of 32; None for one not listed."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def share_of_peak(record: dict[str, Any]) -> float | None:
    """Of a run's training, compiling and evaluation apart; None where the card's peak or the work is not known."""
    peak = peak_flops(record["setting"]["device"]["kind"])
    work = record.get("training_multiply_adds")
    if peak is None or not work or record["config"]["precision"] != "bfloat16":
        return None
    return 2 * work / record["train_seconds"] / peak


def _compressions(row: dict[str, Any]) -> tuple[str, str, str]:
    """Of all convolutions, without shortcuts, of the model; nets of other methods may be narrower than the dense."""
    run = row["runs"][0]
    if row["is_recipe"]:
        fields = ("conv_compression", "conv_compression_without_shortcuts", "model_compression")
        return tuple(f"{run[field]:.2f}x" for field in fields)
    found = []
    for of in ("conv", "model"):
        dense = next((record.get(f"{of}_weights") for record in row["dense"]), None)
        retained = run.get(f"{of}_retained")
        found.append(f"{dense / retained:.2f}x" if dense and retained else "not measured")
    return found[0], "", found[1]
