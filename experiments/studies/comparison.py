"""The comparison's harness: tune every method alike on validation data, then train every cell with every seed.

Cells that begin as the dense run does are forked from it (`experiments.train.forks`); no bit of the result differs, and
the seconds of the shared epochs are those that the dense run took. Each process compiles a config once; the seconds of
compiling are those of its first run there.
"""

import dataclasses
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from experiments.configs.base import TrainConfig, to_dict
from experiments.configs.compare import Cell, Study, Tuning
from experiments.records import RUNS, RunFolder, identity, plain, read_json, write_json
from experiments.studies import jobs, latency
from experiments.train.forks import dense_of
from pallas_kernels.tuning import cache_folder
from pallas_kernels.tuning.cache import ENVIRONMENT

_DENSE_GROUP = "dense"
# What is kept of a study beside its runs.
_BESIDE = "study.json", "latency.json"
# What is kept of the runs that tuned it.
TRIALS = "trials.jsonl"


def run(
    study: Study,
    workdir: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    tuning_seeds: Sequence[int] = (100, 101, 102),
    minutes: float | None = None,
    workers: int = 1,
    data_dir: str | None = None,
    only: str = "",
    timing: bool = True,
    records: Path | None = None,
    say: Callable[[str], None] = jobs.say_line,
) -> dict[str, Any]:
    """Run a study, or go on where an earlier call stopped.

    Args:
        study: of `experiments.configs.compare`.
        workdir: run folders NAME-seedN, ``tuning/``, ``study.json`` and ``latency.json``.
        seeds: of the final runs, which are read on the test set; in this order, so that what there is stays paired.
        tuning_seeds: of the trials, on validation data.
        minutes: no new run is started after so many; None for no limit.
        workers: processes that train at the same time, as for `experiments.studies.jobs.crew`.
        data_dir: where the images are.
        only: a regular expression; cells that it is not found in are left out, the dense one apart.
        timing: measure the nets of the first seed side by side.
        records: a folder; what is kept of a run is copied into its ``compare-NAME`` as soon as the run is finished,
            and a run that it has already, of the same config and seed, is not trained again.
        say: is given a line about each run.

    Returns:
        ``{"finished": runs finished, "missing": runs left to do, "failed": {run: error}}``.

    Raises:
        ValueError: no seeds, negative numbers, or no cell left.
        Interrupted, RuntimeError: as `experiments.studies.ablation.run`.
    """
    deadline = jobs.deadline_of(seeds, workers, minutes)
    cells = [cell for cell in study.cells if cell is study.dense or re.search(only, cell.name)]
    if len(cells) < 2:
        raise ValueError(f"only={only!r} leaves no cell; the cells are {', '.join(c.name for c in study.cells)}")
    workdir.mkdir(parents=True, exist_ok=True)
    stored = None if records is None else records / f"compare-{study.name}"
    maker = _Maker(data_dir, quiet=workers > 0)
    failed: dict[str, str] = {}
    # Trials differ in few of their programs, and nobody asks how long they took to compile.
    with jobs.crew(workers, cache=workdir / "tuning" / "compiled") as crew:

        def do(wanted: list[jobs.Job]) -> list[jobs.Job]:
            if stored is not None:
                jobs.restore(wanted, stored / TRIALS)
            jobs.do_all(wanted, crew, deadline, failed, say)
            return _unfinished(wanted, failed)

        chosen, missing = _tune(study, cells, workdir / "tuning", tuning_seeds, maker, do)
    wanted: list[jobs.Job] = []
    if not missing:
        tuned = {cell.name: cell.config for cell in cells}
        for cell in cells if chosen else ():
            tuned[cell.name] = with_field(cell.config, *chosen.get(cell.group, chosen[_DENSE_GROUP]))
            if cell.config.retrain is not None:  # pruned after training: the dense run's rate, whatever is tuned
                tuned[cell.name] = with_field(tuned[cell.name], *chosen[_DENSE_GROUP])
        ordered = sorted(
            ((cell, seed) for seed in seeds for cell in cells),
            key=lambda one: bool(study.first) and one[0].name not in study.first,
        )
        wanted = maker.jobs([(tuned[cell.name], seed) for cell, seed in ordered], workdir)
        if stored is not None:
            jobs.restore(wanted, stored / RUNS)
            for name in _BESIDE:
                if (stored / name).exists() and not (workdir / name).exists():
                    write_json(workdir / name, read_json(stored / name))

        turn = threading.Lock()

        def keep() -> None:
            with turn:
                write_json(workdir / "study.json", _describe(study, workdir, tuning_seeds, chosen))
                if records is not None:
                    collect(study, workdir, records)

        def told(line: str) -> None:
            keep()
            say(line)

        # Each process measures for itself how the pruned phase runs: what earlier runs found would hide its cost.
        with tempfile.TemporaryDirectory() as empty, jobs.crew(workers, environment={ENVIRONMENT: empty}) as crew:
            jobs.do_all(wanted, crew, deadline, failed, told)
        keep()
    unfinished = _unfinished(wanted, failed)
    if timing and wanted:
        _time(study, workdir, seeds[0], data_dir, say)
        if records is not None:
            collect(study, workdir, records)
    finished = sum(job.finished() for job in wanted)
    return {"finished": finished, "missing": len(missing) + len(unfinished), "failed": failed}


def _unfinished(wanted: Sequence[jobs.Job], failed: dict[str, str]) -> list[jobs.Job]:
    return [job for job in wanted if not job.finished() and job.folder.name not in failed]


def collect(study: Study, workdir: Path, records: Path) -> int:
    """Copy what is kept of a study into ``records/compare-NAME``; returns how many runs were copied."""
    folder = records / f"compare-{study.name}"
    count = jobs.collect(workdir, folder)
    jobs.collect(workdir / "tuning", folder, TRIALS)
    for name in _BESIDE:
        if (workdir / name).exists():
            write_json(folder / name, read_json(workdir / name))
    return count


def with_field(config: TrainConfig, field: str, value: Any) -> TrainConfig:
    """A config with one field changed; a dot leads into a part of it, and what is no field is one of its method's."""
    head, _, rest = field.partition(".")
    if not any(head == own.name for own in dataclasses.fields(config)):
        head, rest = "method", field
    if rest:
        value = with_field(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


class _Maker:
    """Makes jobs of configs: where the images are, which run each forks from."""

    def __init__(self, data_dir: str | None, quiet: bool) -> None:
        self.data_dir, self.quiet = data_dir, quiet

    def jobs(self, runs: Sequence[tuple[TrainConfig, int]], folder: Path) -> list[jobs.Job]:
        """One job for each ``(config, seed)``; those that begin like a dense one among them fork from it."""
        configs = [self._placed(config, seed) for config, seed in runs]
        folders = [folder / f"{config.name}-seed{config.seed}" for config in configs]
        trunks = {_key(config): path for config, path in zip(configs, folders) if config == dense_of(config)}
        made = []
        for config, path in zip(configs, folders):
            trunk = trunks.get(_key(dense_of(config)))
            if trunk == path:
                # Others begin at any of its epochs.
                loop = dataclasses.replace(config.loop, keep_checkpoints=config.total_epochs, checkpoint_every_epochs=1)
                config, trunk = dataclasses.replace(config, loop=loop), None
            made.append(jobs.Job(config, path, trunk))
        return made

    def _placed(self, config: TrainConfig, seed: int) -> TrainConfig:
        data = dataclasses.replace(
            config.data,
            dir=config.data.dir if self.data_dir is None else self.data_dir,
            # Decoded images stay where they are, whatever a process is told of the cache.
            cache_dir=config.data.cache_dir or str(cache_folder()),
        )
        loop = dataclasses.replace(config.loop, progress=False) if self.quiet else config.loop
        return dataclasses.replace(config, seed=seed, data=data, loop=loop)


def _key(config: TrainConfig) -> tuple[str, int]:
    return identity(plain(to_dict(dataclasses.replace(config, name="", expected="")))), config.seed


def _tune(
    study: Study,
    cells: Sequence[Cell],
    folder: Path,
    seeds: Sequence[int],
    maker: _Maker,
    do: Callable[[list[jobs.Job]], list[jobs.Job]],
) -> tuple[dict[str, tuple[str, Any]], list[jobs.Job]]:
    """``({group: (field, best value)}, trials left to do)``; first the dense run, whose rate others are tried with."""
    groups = {cell.group for cell in cells} | {_DENSE_GROUP}
    tunings = [tuning for tuning in study.tunings if tuning.group in groups]
    chosen: dict[str, tuple[str, Any]] = {}
    for first in (True, False):
        mine = [tuning for tuning in tunings if (tuning.group == _DENSE_GROUP) == first]
        # Dense trials once more: others fork from them.
        runs = [
            (_trial(study, tuning, value, chosen), seed)
            for seed in seeds
            for tuning in tunings
            if tuning in mine or tuning.group == _DENSE_GROUP
            for value in tuning.values
        ]
        missing = do(maker.jobs(runs, folder))
        if missing:
            return {}, missing
        for tuning in mine:
            trials = [one for one in _scores(study, tuning, folder, seeds, chosen) if one["top1"] is not None]
            if not trials:
                raise ValueError(f"every trial of {tuning.group} failed; see {folder}")
            # Of equal ones the first.
            chosen[tuning.group] = (tuning.field, max(trials, key=lambda trial: trial["top1"])["value"])
    return chosen, []


def _trial(study: Study, tuning: Tuning, value: Any, chosen: dict[str, tuple[str, Any]]) -> TrainConfig:
    config = study.cell(tuning.cell).config
    if _DENSE_GROUP in chosen:
        config = with_field(config, *chosen[_DENSE_GROUP])
    config = with_field(config, tuning.field, value)
    if tuning.epochs is not None:
        config = dataclasses.replace(config, epochs=tuning.epochs)
    data = dataclasses.replace(config.data, eval_split="validation")
    return dataclasses.replace(config, name=f"{config.name}-{tuning.field}-{value:g}", data=data)


def _scores(
    study: Study, tuning: Tuning, folder: Path, seeds: Sequence[int], chosen: dict[str, tuple[str, Any]]
) -> list[dict[str, Any]]:
    """Mean validation top-1 of each trial, None where a run failed, and its end-to-end seconds with all seeds."""
    trials = []
    for value in tuning.values:
        name = _trial(study, tuning, value, chosen).name
        summaries = [RunFolder(folder / f"{name}-seed{seed}").summary() for seed in seeds]
        done = [summary for summary in summaries if summary is not None]
        top1 = statistics.fmean(run["final_top1"] for run in done) if len(done) == len(seeds) else None
        seconds = sum(run["train_and_compile_seconds"] for run in done)
        trials.append({"value": value, "top1": top1, "seconds": seconds})
    return trials


def _runs(study: Study, workdir: Path, seed: str = "*") -> dict[str, list[Path]]:
    """Finished run folders by cell."""
    found = {
        cell.name: sorted(path.parent for path in workdir.glob(f"{cell.config.name}-seed{seed}/summary.json"))
        for cell in study.cells
    }
    return {name: paths for name, paths in found.items() if paths}


def _describe(study: Study, workdir: Path, seeds: Sequence[int], chosen: dict[str, tuple[str, Any]]) -> dict[str, Any]:
    """study.json: every cell that has runs, and how its group was tuned, now or by an earlier call."""
    path, folder = workdir / "study.json", workdir / "tuning"
    earlier = {each["group"]: each for each in read_json(path)["tuning"]} if path.exists() else {}
    runs = _runs(study, workdir)
    # The dense one always: tables compare with it, finished or not.
    cells = [cell for cell in study.cells if cell is study.dense or cell.name in runs]
    tuned = earlier | {
        tuning.group: {
            "cell": study.cell(tuning.cell).config.name,
            "group": tuning.group,
            "field": tuning.field,
            **({} if tuning.epochs is None else {"epochs": tuning.epochs}),
            "trials": _scores(study, tuning, folder, seeds, chosen),
            "chosen": chosen[tuning.group][1],
        }
        for tuning in study.tunings
        if tuning.group in chosen
    }
    return {
        "name": study.name,
        "title": study.title,
        "command": f"python -m experiments compare {study.name}",
        "dense": study.dense.config.name,
        "epochs": study.dense.config.epochs,
        "tuning_seeds": list(seeds),
        "cells": [
            {
                "name": cell.config.name,
                "method": cell.method,
                "label": cell.label,
                "family": cell.family,
                "tuned_by": _tuned_by(cell, tuned),
            }
            for cell in cells
        ],
        "tuning": list(tuned.values()),
    }


def _tuned_by(cell: Cell, tuned: Collection[str]) -> list[str]:
    """The groups whose trials decided a cell's settings."""
    groups = [cell.group if cell.group in tuned else _DENSE_GROUP]
    # What is pruned after training is the dense run as tuned, whatever else is tuned.
    return list(dict.fromkeys([_DENSE_GROUP, *groups] if cell.config.retrain is not None else groups))


def _time(study: Study, workdir: Path, seed: int, data_dir: str | None, say: Callable[[str], None]) -> None:
    """Latencies of all finished nets of one seed, side by side, unless these very nets were timed before.

    Nets that only their records are left of are not here to be timed.
    """
    finished = {study.cell(name).config.name: paths[0] for name, paths in _runs(study, workdir, str(seed)).items()}
    path = workdir / "latency.json"
    shas = {name: RunFolder(folder).summary()["params_sha256"] for name, folder in finished.items()}
    if path.exists():
        earlier = read_json(path)
        if {name: net["params_sha256"] for name, net in earlier["nets"].items()} == shas:
            return
    here = {name: folder for name, folder in finished.items() if RunFolder(folder).checkpoints.exists()}
    say(
        f"timing {len(here)} nets"
        + (f", {len(finished) - len(here)} are left out" if len(here) < len(finished) else "")
    )
    if here:
        write_json(path, latency.measure(here, data_dir=data_dir))
