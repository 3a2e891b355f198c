"""The generated documents: RESULTS.md, BENCHMARKS.md, README's table, CSV files; and which pictures are drawn."""

from pathlib import Path
from typing import Any

from experiments.configs import price
from experiments.records import read_json
from experiments.report import (
    ablation,
    benchmarks,
    comparison,
    comparison_plots,
    comparison_records,
    gpu,
    importance,
    pattern_sheet,
    published,
    readme,
    results,
)

_ROOT = results.RESULTS_FILE.parent


def generate(records: Path = results.RECORDS) -> dict[Path, str]:
    """The text of each document, by its path.

    Raises:
        ValueError: records that contradict each other, or are of no config there is now.
    """
    found = results.records(records)
    compared = [comparison_records.read(folder) for folder in comparison_records.folders(records)]
    of_studies = (folder.name for folder in records.glob(f"{comparison_records.PREFIX}*"))
    own_tables = (ablation.GROUP, published.GROUP, price.GROUP, *of_studies)
    parts = [
        results.HEADER.format(claims=comparison.verdicts(compared)),
        comparison.section([(study, _link(study.folder / comparison.PLOT)) for study in compared]),
        published.generate(found),
        gpu.price_section(records / price.GROUP),
        results.generate(found, without=own_tables),
    ]
    for path in _importance_records(records):
        parts.append(importance.generate(read_json(path), _link(path.with_suffix(".png"))))
    if not _importance_records(records):
        parts.append("## Importance\n\n`python -m experiments importance --data.dir DIR --out FILE`: not measured.\n")
    of_ablation = ablation.records(records)
    if not of_ablation:
        parts.append("## ablation\n\n`python -m experiments ablation --data.dir DIR --workdir DIR`: not measured.\n")
    else:
        parts.append(f"{ablation.generate(of_ablation)}\n![Every cell's difference]({_link(ablation.PLOT)})\n")
        for record in _with_sheet(of_ablation):
            path = ablation.PLOT.with_name(_sheet_name(record))
            parts.append(f"![Patterns of {record['name']}, and where they are used]({_link(path)})\n")
    price_csv = records / price.GROUP / gpu.PRICE_CSV
    return {
        results.RESULTS_FILE: "\n".join(part for part in parts if part),
        benchmarks.BENCHMARKS_FILE: benchmarks.generate(),
        readme.README: readme.generate(readme.README.read_text(), records),
        records / published.CSV: published.to_csv(found),
        **({price_csv: gpu.price_csv(price_csv.parent)} if price_csv.parent.exists() else {}),
        **{study.folder / name: text for study in compared for name, text in comparison.files(study).items()},
    }


def draw(records: Path = results.RECORDS) -> None:
    """Draw the pictures that the documents link to, beside their records, and README's."""
    readme.draw(records=records)
    for folder in comparison_records.folders(records):
        study = comparison_records.read(folder)
        if study.some_run() is not None:
            comparison_plots.draw(study, folder / comparison.PLOT)
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
