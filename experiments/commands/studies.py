"""Commands about many runs: the ablation, the comparison, the importance study, and the tables."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from experiments.commands.arguments import PROGRAM, DataDir, call


def ablation(
    data_dir: DataDir = None,
    workdir: Path = Path("runs/ablation"),
    records: Path | None = None,
    family: Literal["ablation", "ablation-full"] = "ablation",
    seeds: tuple[int, ...] = (0, 1, 2),
    minutes: float | None = None,
    workers: int = 1,
) -> int:
    """Run the ablation of the selection, by successive halving; a second call goes on.

    Args:
        data_dir: where the images are.
        workdir: run folders.
        records: copy the records of finished runs into this folder.
        family: the slim net, or the full width for a GPU.
        seeds: of the runs.
        minutes: start no new run after so many.
        workers: processes at a time; several get one core each.
    """
    from experiments.configs.ablation import families
    from experiments.studies import ablation as harness

    known = {one.prefix: one for one in families()}
    result = harness.run(known[family], workdir, seeds=seeds, minutes=minutes, workers=workers, data_dir=data_dir)
    if records is not None:
        harness.collect(workdir, records)
    return _say(result)


def compare(
    study: Positional[Annotated[str, tyro.conf.arg(metavar="STUDY")]],
    data_dir: DataDir = None,
    workdir: Path | None = None,
    records: Path | None = None,
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4),
    tuning_seeds: tuple[int, ...] = (100, 101, 102),
    only: str = "",
    minutes: float | None = None,
    workers: int = 1,
    timing: bool = True,
) -> int:
    """Tune every method of a study, train every cell with every seed, time the nets; a second call goes on.

    Args:
        study: digits, slim or vgg13.
        data_dir: where the images are.
        workdir: run folders; by default runs/compare-STUDY.
        records: copy the records of each run into this folder as it finishes, below compare-STUDY.
        seeds: of the final runs.
        tuning_seeds: of the trials on validation data.
        only: only cells whose name holds this regular expression, and the dense one.
        minutes: start no new run after so many.
        workers: processes at a time; several get one core each.
        timing: measure the latency of the first seed's nets.
    """
    from experiments.configs import compare as comparisons
    from experiments.studies import comparison as harness

    asked = comparisons.study(study)
    workdir = workdir or Path("runs") / f"compare-{study}"
    result = harness.run(
        asked,
        workdir,
        data_dir=data_dir,
        seeds=seeds,
        tuning_seeds=tuning_seeds,
        only=only,
        minutes=minutes,
        workers=workers,
        timing=timing,
        records=records,
    )
    return _say(result)


def _say(result: Mapping[str, Any]) -> int:
    print(f"{result['finished']} runs finished, {result['missing']} to do")
    for run, error in result["failed"].items():
        print(f"{run} failed: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


def importance(arguments: list[str]) -> int:
    """How well each criterion predicts what removing a kernel does to the loss."""
    from experiments.report import importance as importance_table
    from experiments.studies import importance as importance_study

    def run(
        out: Path,
        data_dir: DataDir = None,
        workdir: Path | None = None,
        quick: bool = False,
        study: importance_study.Study = importance_study.Study(),  # noqa: B008  (frozen)
    ) -> int:
        """Remove single kernels of a trained net, and compare the change of loss with each criterion.

        Args:
            out: the record to write, a JSON file.
            data_dir: where the images are.
            workdir: parts already measured; by default runs/importance-NAME.
            quick: a small part on few images, to see that it works; the study's numbers are then its own.
            study: what is measured.
        """
        record = importance_study.run(data_dir, out, workdir=workdir, study=None if quick else study, quick=quick)
        print(importance_table.generate(record))
        return 0

    return call(run, arguments, "importance")


def table(
    write: bool = False,
    budget: str | None = None,
    dry_run: bool = False,
    data_dir: DataDir = None,
    workdir: Path | None = None,
) -> int:
    """Tables from committed records; first run what is missing of the published ones, when asked to.

    Args:
        write: write RESULTS.md, BENCHMARKS.md, their CSV files and pictures instead of printing the texts.
        budget: run what is missing of the plan for so long first, as gpu-30min or cpu-10min; a second call goes on.
        dry_run: of a budget only show the plan, on any machine: what is done, what is missing, how long it should take.
        data_dir: where the images are, for a budget.
        workdir: run folders of a budget; by default runs/plan-KIND.
    """
    from experiments.report import documents, results

    if budget is None and (data_dir, workdir, dry_run) != (None, None, False):
        raise ValueError("--data.dir, --workdir and --dry-run are for --budget: without it nothing is run")
    failed = {}
    if budget is not None:
        from experiments.studies import budget as budgets

        if dry_run:
            print(budgets.shown(budget, workdir))
            return 0
        result = budgets.run(budget, workdir, data_dir=data_dir)
        failed = result["failed"]
        print(f"{result['finished']} runs finished, {result['missing']} to do; {result['collected']} records collected")
        if not write:
            if result["collected"]:
                print(f"{PROGRAM} table --write puts them into the tables")
            return 1 if failed else 0
    if not results.RECORDS.is_dir():
        raise ValueError(
            f"there are no records in {results.RECORDS}: tables are made in a checkout of the repository, whose "
            "experiments/results holds them"
        )
    if write:
        documents.draw()
    for path, text in documents.generate().items():
        if write:
            print(f"{path.name}: {'written' if results.write(text, path) else 'unchanged'}")
        elif path.suffix == ".md":
            print(text)
    return 1 if failed else 0
