"""The generated documents: which tables make up RESULTS.md and BENCHMARKS.md, and the pictures beside the records."""

from pathlib import Path
from typing import Any

from experiments.records import read_json
from experiments.tables import ablation, benchmarks, importance, pattern_sheet, results

_ROOT = results.RESULTS_FILE.parent


def generate(records: Path = results.RECORDS) -> dict[Path, str]:
    """The text of each document, by its path."""
    parts = [results.generate(records, without=(ablation.GROUP,))]
    for path in _importance_records(records):
        parts.append(importance.generate(read_json(path), _link(path.with_suffix(".png"))))
    found = ablation.records(records)
    if found:
        parts.append(f"{ablation.generate(found)}\n![Every cell's difference]({_link(ablation.PLOT)})\n")
        for record in _with_sheet(found):
            path = ablation.PLOT.with_name(_sheet_name(record))
            parts.append(f"![Patterns of {record['name']}, and where they are used]({_link(path)})\n")
    return {results.RESULTS_FILE: "\n".join(parts), benchmarks.BENCHMARKS_FILE: benchmarks.generate()}


def draw(records: Path = results.RECORDS) -> None:
    """Draw the pictures that the documents link to, beside their records."""
    for path in _importance_records(records):
        importance.plot(read_json(path), path.with_suffix(".png"))
    found = ablation.records(records)
    if found:
        folder = records / ablation.GROUP
        ablation.plot(found, folder / ablation.PLOT.name)
        for record in _with_sheet(found):
            pattern_sheet.draw(record, folder / _sheet_name(record))


def _with_sheet(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The run whose generated patterns are drawn as an example: the first seed of the cell with 8 of them."""
    runs = [record for record in found if record["name"].endswith("-cov8")]
    return sorted(runs, key=lambda record: record["seed"])[:1]


def _sheet_name(record: dict[str, Any]) -> str:
    return f"patterns-{record['name']}.png"


def _importance_records(records: Path) -> list[Path]:
    return sorted((records / "importance").glob("*.json"))


def _link(path: Path) -> str:
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
