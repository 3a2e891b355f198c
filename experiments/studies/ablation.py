"""The ablation's harness: one dense run a seed, cells forked from it, successive halving, a time budget.

A cell is an ordinary config and ends in an ordinary run folder below the work folder; giving the command again goes on
wherever it stopped. Forking (`experiments.train.forks`) changes no bit of the result.
"""

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.configs.ablation import QUESTIONS, Cell, Family
from experiments.configs.base import TrainConfig
from experiments.records import RunFolder, write_json
from experiments.studies import jobs

RULE = (
    "All cells run with the first seed. Of each question the better half of its cells by final validation top-1, "
    "rounded up, ties to the earlier in the list, runs with the other seeds too, and so does every cell marked a must."
)


def halve(cells: Sequence[Cell], top1: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Which cells go on after the first seed, by `RULE`.

    Args:
        cells: of a family, in its order.
        top1: final validation top-1 by cell name; cells without one have failed and drop out.

    Returns:
        ``{question: {"ranking": [[name, top1], ...], "kept": [name, ...]}}``, best first.
    """
    decided = {}
    for question in QUESTIONS:
        mine = [cell for cell in cells if cell.question == question and cell.name in top1]
        if not mine:
            continue
        ranked = sorted(mine, key=lambda cell: -top1[cell.name])  # stable: ties keep the list's order
        half = -(-len(ranked) // 2)
        kept = [cell.name for place, cell in enumerate(ranked) if cell.must or place < half]
        decided[question] = {"ranking": [[cell.name, top1[cell.name]] for cell in ranked], "kept": kept}
    return decided


def run(
    family: Family,
    workdir: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    minutes: float | None = None,
    workers: int = 1,
    data_dir: str | None = None,
    say: Callable[[str], None] = jobs.say_line,
) -> dict[str, Any]:
    """Run a family's cells by successive halving, or go on where an earlier call stopped.

    Args:
        family: from `experiments.configs.ablation`.
        workdir: run folders NAME-seedN, ``halving-PREFIX.json`` and a cache of compiled programs.
        seeds: the first one decides which cells run with the others.
        minutes: no new run is started after so many; None for no limit. Runs under way are finished.
        workers: processes that train at the same time. One has all cores; several have one core each, which gives
            more throughput with nets too small for two. 0 trains in this process. Equal bits need the same number
            of cores, so compare only runs that were made one way.
        data_dir: where the images are.
        say: is given a line about each run.

    Returns:
        ``{"finished": runs finished, "missing": runs left to do, "failed": {run: error}}``.

    Raises:
        ValueError: no seeds, or a negative number of workers or minutes.
        Interrupted: SIGINT or SIGTERM came; all that was trained is saved up to its last epoch.
        RuntimeError: a worker died.
    """
    deadline = jobs.deadline_of(seeds, workers, minutes)
    workdir.mkdir(parents=True, exist_ok=True)

    def job(config: TrainConfig, seed: int, forked: bool = True) -> jobs.Job:
        loop = config.loop if forked else dataclasses.replace(config.loop, keep_checkpoints=config.total_epochs)
        data = config.data if data_dir is None else dataclasses.replace(config.data, dir=data_dir)
        folder = workdir / f"{config.name}-seed{seed}"
        trunk = workdir / f"{family.dense.name}-seed{seed}" if forked else None
        if workers:  # their lines would mix
            loop = dataclasses.replace(loop, progress=False)
        return jobs.Job(dataclasses.replace(config, seed=seed, data=data, loop=loop), folder, trunk)

    first, *others = seeds
    trunks = [job(family.dense, seed, forked=False) for seed in seeds]
    stage1 = [job(cell.config, first) for cell in family.cells]
    failed: dict[str, str] = {}
    stage2: list[jobs.Job] = []
    with jobs.crew(workers, cache=workdir / "compiled") as crew:
        jobs.do_all([*trunks, *stage1], crew, deadline, failed, say)
        missing = [one for one in stage1 if not one.finished() and one.folder.name not in failed]
        if not missing:
            names = {one.folder.name: cell.name for one, cell in zip(stage1, family.cells)}
            top1 = {
                names[one.folder.name]: RunFolder(one.folder).summary()["final_top1"]
                for one in stage1
                if one.finished()
            }
            decided = halve(family.cells, top1)
            write_json(
                workdir / f"halving-{family.prefix}.json",
                {"rule": RULE, "seeds": list(seeds), "questions": decided, "failed": failed},
            )
            kept = {name for question in decided.values() for name in question["kept"]}
            # A seed at a time: if the time runs out, what there is is still paired.
            stage2 = [job(cell.config, seed) for seed in others for cell in family.cells if cell.name in kept]
            jobs.do_all(stage2, crew, deadline, failed, say)
            missing = [one for one in stage2 if not one.finished() and one.folder.name not in failed]
    finished = sum(one.finished() for one in (*trunks, *stage1, *stage2))
    return {"finished": finished, "missing": len(missing), "failed": failed}


def collect(workdir: Path, records: Path) -> int:
    """Copy what is kept of each finished run, and the halving's decisions; as `experiments.studies.jobs.collect`."""
    count = jobs.collect(workdir, records)
    for decisions in workdir.glob("halving-*.json"):
        shutil.copyfile(decisions, records / decisions.name)
    return count
