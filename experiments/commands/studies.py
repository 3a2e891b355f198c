"""Commands about many runs: the ablation, the comparison, the importance study, and the tables."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.commands.arguments import name_argument, parse


def ablation(arguments: list[str]) -> int:
    """Run the ablation of the selection, and collect its records."""
    from experiments.configs.ablation import families
    from experiments.studies import ablation as harness

    known = {family.prefix: family for family in families()}

    @dataclasses.dataclass(frozen=True)
    class Ablation:
        """Run the ablation of the selection, by successive halving; a second call goes on."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path = Path("runs/ablation")
        """Run folders."""
        records: Path | None = None
        """Copy the records of finished runs into this folder."""
        family: Literal["ablation", "ablation-full"] = "ablation"
        """The slim net, or the full width for a GPU."""
        seeds: tuple[int, ...] = (0, 1, 2)
        minutes: float | None = None
        """Start no new run after so many."""
        workers: int = 1
        """Processes at a time; several get one core each."""

    asked = parse(Ablation, arguments, "ablation")
    result = harness.run(
        known[asked.family], asked.workdir, seeds=asked.seeds, minutes=asked.minutes, workers=asked.workers,
        data_dir=asked.data_dir,
    )
    if asked.records is not None:
        harness.collect(asked.workdir, asked.records)
    print(f"{result['finished']} runs finished, {result['missing']} to do")
    for run, error in result["failed"].items():
        print(f"{run} failed: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


def compare(arguments: list[str]) -> int:
    """Train the methods of a study, each tuned alike, and time their nets side by side."""
    from experiments.configs.compare import study
    from experiments.studies import comparison as harness

    name, rest = name_argument(arguments, "compare", "a STUDY")
    asked_study = study(name)

    @dataclasses.dataclass(frozen=True)
    class Compare:
        """Tune every method of a study, train every cell with every seed, time the nets; a second call goes on."""

        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path | None = None
        """Run folders; by default runs/compare-STUDY."""
        records: Path | None = None
        """Copy the records of finished runs into this folder, below compare-STUDY."""
        seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
        """Of the final runs."""
        tuning_seeds: tuple[int, ...] = (100, 101, 102)
        """Of the trials on validation data."""
        only: str = ""
        """Only cells whose name holds this regular expression, and the dense one."""
        minutes: float | None = None
        """Start no new run after so many."""
        workers: int = 1
        """Processes at a time; several get one core each."""
        timing: bool = True
        """Measure the latency of the first seed's nets."""

    asked = parse(Compare, rest, f"compare {name}")
    workdir = asked.workdir or Path("runs") / f"compare-{name}"
    options = {
        field: value for field, value in dataclasses.asdict(asked).items() if field not in ("workdir", "records")
    }
    result = harness.run(asked_study, workdir, **options)
    if asked.records is not None:
        harness.collect(asked_study, workdir, asked.records)
    print(f"{result['finished']} runs finished, {result['missing']} to do")
    for run, error in result["failed"].items():
        print(f"{run} failed: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


def importance(arguments: list[str]) -> int:
    """Measure how well each criterion predicts the true change of loss."""
    from experiments.report import importance as importance_table
    from experiments.studies import importance as importance_study

    @dataclasses.dataclass(frozen=True)
    class Importance:
        """Remove single kernels of a trained net, and compare the change of loss with each criterion."""

        out: Path
        """The record to write, a JSON file."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are."""
        workdir: Path | None = None
        """Parts already measured; by default runs/importance-NAME."""
        quick: bool = False
        """A small part on few images, to see that it works; the study's numbers are then its own."""
        study: importance_study.Study = importance_study.Study()

    asked = parse(Importance, arguments, "importance")
    record = importance_study.run(
        asked.data_dir, asked.out, workdir=asked.workdir, study=None if asked.quick else asked.study, quick=asked.quick
    )
    print(importance_table.generate(record))
    return 0


def table(arguments: list[str]) -> int:
    """Generate RESULTS.md, BENCHMARKS.md and the CSV files from records; first run what is missing, when asked to."""
    from experiments.report import documents, results
    from experiments.studies import gpu_plan

    @dataclasses.dataclass(frozen=True)
    class Table:
        """Tables from committed records."""

        write: bool = False
        """Write RESULTS.md, BENCHMARKS.md, their CSV files and pictures instead of printing the texts."""
        budget: str | None = None
        """Run what is missing of the plan for so long first, as gpu-30min or cpu-10min; a second call goes on."""
        data_dir: Annotated[str | None, tyro.conf.arg(name="data.dir")] = None
        """Where the images are, for a budget."""
        workdir: Path | None = None
        """Run folders of a budget; by default runs/plan-KIND."""

    asked = parse(Table, arguments, "table")
    failed = {}
    if asked.budget is not None:
        result = gpu_plan.run(asked.budget, asked.workdir, data_dir=asked.data_dir)
        failed = result["failed"]
        print(f"{result['finished']} runs finished, {result['missing']} to do; {result['collected']} records collected")
        if not asked.write:
            if result["collected"]:
                print("python -m experiments table --write puts them into the tables")
            return 1 if failed else 0
    elif asked.data_dir is not None or asked.workdir is not None:
        raise ValueError("--data.dir and --workdir are for --budget: without it nothing is run")
    if asked.write:
        documents.draw()
    for path, text in documents.generate().items():
        if asked.write:
            print(f"{path.name}: {'written' if results.write(text, path) else 'unchanged'}")
        elif path.suffix == ".md":
            print(text)
    return 1 if failed else 0
