"""RESULTS.md from the committed records: the runs.jsonl of each folder below experiments/results."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs import TrainConfig
from experiments.records import RUNS, differences, identity, kept
from experiments.report.statistics import coding, markdown_table, mean_spread, paired

RECORDS = Path(__file__).parents[1] / "results"
RESULTS_FILE = Path(__file__).parents[2] / "RESULTS.md"
HEADER = """# Results

{claims}

Generated from the records in experiments/results by `python -m experiments table --write`; no figure here is typed.
The methods that ClickTrain is compared with come first, then the authors' recipes, then single studies. Accuracies are
top-1 in percent, mean ± standard deviation over the seeds; "drop" is against the dense run of the same seed.
Compression counts all convolutions, shortcuts too; wide tables are CSV files beside their records. Every section names
how its images were stored; accuracies on images that a lossy coding changed do not compare with published ones. Ratios
of speed are in BENCHMARKS.md.
"""
_COLUMNS = ("run", "n", "final", "drop", "conv", "machine, date")


def records(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """Every finished run below a folder: its summary, with ``setting``, ``config`` and ``group`` (its folder)."""
    found = []
    for file in sorted(folder.glob(f"*/{RUNS}")):
        for run in kept(file):
            if run["summary"] is not None:
                found.append(run["summary"] | {"setting": run["setting"], "config": run["config"]})
                found[-1]["group"] = file.parent.name
    return found


def is_record_of(record: dict[str, Any], config: TrainConfig) -> bool:
    """True when a record was made with this config, its seed and where its data lie apart, in one go."""
    others = (field for field, _, _ in differences(record["config"], config) if field != "seed")
    return "lengthened" not in record["setting"] and not any(others)


def machine(record: Mapping[str, Any]) -> str:
    """The device a record was made on; on a CPU its cores count too."""
    where = record["setting"]
    if where["device"]["platform"] != "cpu":
        return where["device"]["kind"]
    return f"{where['cpu']['model']}, {where['cpu']['cores']} cores"


def made(record: Mapping[str, Any]) -> str:
    """By which command a record of a benchmark was made, where, with what and when."""
    where = record["setting"]
    return (
        f"`{record['command']}`; {machine(record)}; jax {where['versions']['jax']}, Python {where['python']}; "
        f"{where['date'][:10]}"
    )


def generate(found: Sequence[dict[str, Any]], without: Collection[str] = ()) -> str:
    """The part of RESULTS.md on runs that stand by themselves, a section for each group; may be empty.

    Args:
        found: from `records`.
        without: groups that have tables of their own.

    Raises:
        ValueError: several dense runs of one seed in a group.
    """
    found = [record for record in found if record["group"] not in without]
    groups = sorted({record["group"] for record in found})
    return "\n".join(_section(group, [record for record in found if record["group"] == group]) for group in groups)


def write(text: str, path: Path = RESULTS_FILE) -> bool:
    """Write the file unless it is the same already; returns whether it changed."""
    if path.exists() and path.read_text() == text:
        return False
    path.write_text(text)
    return True


def _section(group: str, found: list[dict[str, Any]]) -> str:
    first = found[0]
    title = (
        f"## {group}\n\n{first['dataset']} ({coding(first['encoding'])}), {first['train_examples']:,} training images, "
        f"evaluated on the {first['eval_split']} set of {first['eval_examples']:,}; {first['net']} of width "
        f"{first['width']:g}, {first['epochs']} epochs.\n"
    )
    runs: dict[str, list[dict[str, Any]]] = {}
    for record in found:
        # One row for each config, its seed apart.
        runs.setdefault(identity(record["config"]), []).append(record)
    rows = []
    for members in sorted(runs.values(), key=lambda group: (_rate(group[0]), group[0]["method"] != "dense")):
        name = f"{members[0]['name']}, lr {_rate(members[0]):g}"
        rows.append(_row(name, members, _dense_beside(members[0], found)))
    return title + "\n" + markdown_table(_COLUMNS, rows)


def _rate(record: dict[str, Any]) -> float:
    return record["config"]["learning_rate"]


def _dense_beside(record: dict[str, Any], found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dense runs to pair with: of the same learning rate, or all when each method has its own tuned one.

    Raises:
        ValueError: two of them have one seed.
    """
    dense = [other for other in found if other["method"] == "dense"]
    chosen = [other for other in dense if _rate(other) == _rate(record)] or dense
    if len({other["seed"] for other in chosen}) < len(chosen):
        raise ValueError(f"group {record['group']!r}: several dense runs of one seed")
    return chosen


def _row(name: str, members: list[dict[str, Any]], dense: Iterable[dict[str, Any]]) -> tuple[str, ...]:
    def column(field: str) -> list[float]:
        return [record[field] for record in members]

    by_seed = [{record["seed"]: record["final_top1"] for record in group} for group in (members, dense)]
    return (
        name,
        str(len(members)),
        mean_spread(column("final_top1"), scale=100),
        "" if members[0]["method"] == "dense" else paired(*by_seed, scale=100),
        f"{members[0]['conv_compression']:.2f}x",
        f"{machine(members[0])}, {max(record['setting']['date'] for record in members)[:10]}",
    )
