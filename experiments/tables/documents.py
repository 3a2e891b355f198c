"""The generated documents: which tables make up RESULTS.md and BENCHMARKS.md, and the pictures beside the records."""

from pathlib import Path

from experiments.records import read_json
from experiments.tables import ablation, benchmarks, importance, results

_ROOT = results.RESULTS_FILE.parent


def generate(records: Path = results.RECORDS) -> dict[Path, str]:
    """The text of each document, by its path."""
    parts = [results.generate(records, without=(ablation.GROUP,))]
    for path in _importance_records(records):
        parts.append(importance.generate(read_json(path), _link(path.with_suffix(".png"))))
    found = ablation.records(records)
    if found:
        parts.append(f"{ablation.generate(found)}\n![Every cell's difference]({_link(ablation.PLOT)})\n")
    return {results.RESULTS_FILE: "\n".join(parts), benchmarks.BENCHMARKS_FILE: benchmarks.generate()}


def draw(records: Path = results.RECORDS) -> None:
    """Draw the pictures that the documents link to, beside their records."""
    for path in _importance_records(records):
        importance.plot(read_json(path), path.with_suffix(".png"))
    found = ablation.records(records)
    if found:
        ablation.plot(found, records / ablation.GROUP / ablation.PLOT.name)


def _importance_records(records: Path) -> list[Path]:
    return sorted((records / "importance").glob("*.json"))


def _link(path: Path) -> str:
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else path.name
