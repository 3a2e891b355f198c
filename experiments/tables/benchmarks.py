"""BENCHMARKS.md from the committed records below experiments/results/bench and experiments/results/gpu."""

from pathlib import Path
from typing import Any

from experiments.records import read_json
from experiments.tables.results import RECORDS, machine
from experiments.tables.statistics import markdown_table

BENCHMARKS_FILE = Path(__file__).parents[2] / "BENCHMARKS.md"
# What `experiments.gpu_checks` runs, named here so that a table can say what is missing without a GPU's imports.
GPU_CHECKS = {
    "masks": "masks of the reference, bit for bit",
    "loop-programs": "epoch loop against single updates; equal runs give equal bits",
    "resume": "a resumed run ends with equal bits",
    "update-costs": "updates of every phase against the plain optax step",
    "selection": "seconds of the selection with each option, whole VGG-16",
    "training": "images a second of whole VGG-13 epochs",
}
_HEADER = """# Benchmarks

Generated from records by `python -m experiments table --write`; no figure here is typed. Every ratio compares functions
that were called in turns in one process: the median of the ratios of neighbouring calls. Machines are shared and noisy;
a row that repeats the first one shows how much.
"""


def generate(folder: Path = RECORDS) -> str:
    """The text of BENCHMARKS.md."""
    parts = [_HEADER]
    for path in sorted((folder / "bench").glob("*.json")):
        parts.append(_section(read_json(path)))
    parts.append(_gpu(folder / "gpu"))
    return "\n".join(parts)


def bench_table(rows: list[dict[str, Any]]) -> str:
    """Rows of `experiments.bench`: medians with 20/80 percentiles, ratios to the first row."""
    header = ("what", "median s", "20%", "80%", "ratio", "goal")
    return markdown_table(header, [
        (
            row["name"],
            *(f"{row[key]:.3f}" for key in ("median", "p20", "p80")),
            "" if row["ratio"] is None else f"{row['ratio']:.3f}",
            row["goal"],
        )
        for row in rows
    ])


def _section(record: dict[str, Any]) -> str:
    where = record["setting"]
    return (
        f"## {record['what']}\n\n`{record['command']}`; {machine(record)}; jax {where['versions']['jax']}, Python "
        f"{where['python']}; {where['date'][:10]}\n\n{bench_table(record['results'])}"
    )


def _gpu(folder: Path) -> str:
    lines = ["## On a GPU\n", "`python -m experiments.gpu_checks --out experiments/results/gpu`\n"]
    rows, details = [], []
    for name, what in GPU_CHECKS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            rows.append((name, what, "not measured", "", ""))
            continue
        record = read_json(path)
        outcome = "passed" if record["ok"] else "FAILED"
        rows.append((name, what, outcome, machine(record), record["setting"]["date"][:10]))
        if record.get("rows"):
            details.append(f"\n### {name}\n\n{bench_table(record['rows'])}")
        if record.get("images_per_second"):
            rates = [(run, f"{rate:,.0f}") for run, rate in record["images_per_second"].items()]
            details.append(f"\n### {name}\n\n{markdown_table(('run', 'images a second'), rates)}")
    table = markdown_table(("check", "what", "outcome", "device", "date"), rows)
    return "\n".join(lines) + "\n" + table + "".join(details)
