"""The ablation's harness: one dense run a seed, cells forked from it, successive halving, a time budget.

A cell is an ordinary config and ends in an ordinary run folder below the work folder; giving the command again goes on
wherever it stopped. Forking (`experiments.forks`) changes no bit of the result.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.configs.ablation import QUESTIONS, Cell, Family
from experiments.configs.base import TrainConfig, from_dict, to_dict
from experiments.forks import train_forked
from experiments.loop import Interrupted, NonFiniteLoss, train
from experiments.records import RunFolder, write_json

RULE = (
    "All cells run with the first seed. Of each question the better half of its cells by final validation top-1, "
    "rounded up, ties to the earlier in the list, runs with the other seeds too, and so does every cell marked a must."
)
_RECORD_FILES = ("config.json", "setting.json", "metrics.jsonl", "summary.json")


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


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to do: its config, its folder, and the folder of the dense run that it forks from and waits for."""

    config: TrainConfig
    folder: Path
    trunk: Path | None = None

    def to_line(self) -> str:
        """One line of JSON, for a worker."""
        trunk = None if self.trunk is None else str(self.trunk)
        return json.dumps({"config": to_dict(self.config), "folder": str(self.folder), "trunk": trunk}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Job":
        """The inverse of `to_line`."""
        data = json.loads(line)
        trunk = None if data["trunk"] is None else Path(data["trunk"])
        return cls(from_dict(data["config"]), Path(data["folder"]), trunk)

    def finished(self) -> bool:
        """Whether the folder holds a whole run."""
        return RunFolder(self.folder).summary() is not None


def do(job: Job) -> dict[str, Any]:
    """Do a job here; ``{}`` when it is done, ``{"error": text}`` when the run cannot be made or diverges."""
    try:
        if job.trunk is None:
            train(job.config, job.folder)
        else:
            train_forked(job.config, job.folder, job.trunk)
    except (ValueError, NonFiniteLoss) as error:
        return {"error": str(error)}
    return {}


def _say(line: str) -> None:
    print(line, flush=True)


def run(
    family: Family,
    workdir: Path,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    minutes: float | None = None,
    workers: int = 1,
    data_dir: str | None = None,
    say: Callable[[str], None] = _say,
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
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={tuple(seeds)}: expected at least one, all different")
    if workers < 0 or (minutes is not None and minutes < 0):
        raise ValueError(f"workers={workers}, minutes={minutes}: expected 0 or more")
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    workdir.mkdir(parents=True, exist_ok=True)

    def job(config: TrainConfig, seed: int, forked: bool = True) -> Job:
        loop = config.loop if forked else dataclasses.replace(config.loop, keep_checkpoints=config.epochs)
        data = config.data if data_dir is None else dataclasses.replace(config.data, dir=data_dir)
        folder = workdir / f"{config.name}-seed{seed}"
        trunk = workdir / f"{family.dense.name}-seed{seed}" if forked else None
        if workers:  # their lines would mix
            loop = dataclasses.replace(loop, progress=False)
        return Job(dataclasses.replace(config, seed=seed, data=data, loop=loop), folder, trunk)

    first, *others = seeds
    trunks = [job(family.dense, seed, forked=False) for seed in seeds]
    stage1 = [job(cell.config, first) for cell in family.cells]
    failed: dict[str, str] = {}
    stage2: list[Job] = []
    with _crew(workers, workdir / "compiled") as crew:
        _do_all([*trunks, *stage1], crew, deadline, failed, say)
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
            _do_all(stage2, crew, deadline, failed, say)
            missing = [one for one in stage2 if not one.finished() and one.folder.name not in failed]
    finished = sum(one.finished() for one in (*trunks, *stage1, *stage2))
    return {"finished": finished, "missing": len(missing), "failed": failed}


def collect(workdir: Path, records: Path) -> int:
    """Copy what is kept of each finished run, checkpoints left out, and the halving's decisions.

    Args:
        workdir: of `run`.
        records: a folder, made when missing; run folders of the same names in it are replaced.

    Returns:
        How many runs were copied.
    """
    records.mkdir(parents=True, exist_ok=True)
    runs = sorted(path.parent for path in workdir.glob("*-seed*/summary.json"))
    for run_folder in runs:
        target = records / run_folder.name
        target.mkdir(exist_ok=True)
        for name in _RECORD_FILES:
            shutil.copyfile(run_folder / name, target / name)
    for decisions in workdir.glob("halving-*.json"):
        shutil.copyfile(decisions, records / decisions.name)
    return len(runs)


def _do_all(
    jobs: Sequence[Job],
    crew: Sequence[Callable[[Job], dict[str, Any]]],
    deadline: float | None,
    failed: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Do the unfinished jobs, each worker taking the first that is ready; stop taking at the deadline."""
    pending = [job for job in jobs if not job.finished()]
    running: list[Job] = []
    errors: list[BaseException] = []
    changed = threading.Condition()

    def ready(job: Job) -> bool:
        return not any(job.trunk == other.folder for other in (*pending, *running))

    def take() -> Job | None:
        with changed:
            while pending and not errors and (deadline is None or time.monotonic() < deadline):
                job = next(filter(ready, pending), None)
                if job is not None:
                    pending.remove(job)
                    running.append(job)
                    return job
                changed.wait(1.0)
        return None

    def work(worker: Callable[[Job], dict[str, Any]]) -> None:
        while (job := take()) is not None:
            start = time.monotonic()
            try:
                result = worker(job)
            except BaseException as error:
                errors.append(error)
                result = {}
            with changed:
                running.remove(job)
                changed.notify_all()
            name, seconds = job.folder.name, time.monotonic() - start
            if "error" in result:
                failed[name] = result["error"]
                say(f"{name}: failed: {result['error']}")
            elif job.finished():
                say(f"{name}: top-1 {100 * RunFolder(job.folder).summary()['final_top1']:.2f}, {seconds:.0f} s")

    if len(crew) == 1:
        work(crew[0])  # in this thread, where signals arrive
    else:
        threads = [threading.Thread(target=work, args=(worker,)) for worker in crew]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class _Worker:
    """A process that does jobs, one line in and one line out; pinned to a core unless that is None."""

    def __init__(self, core: int | None, cache: Path) -> None:
        before = os.sched_getaffinity(0)
        if core is not None:
            # A new process inherits the cores of the thread that starts it: XLA finds one and makes one thread.
            os.sched_setaffinity(0, {core})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.ablation", str(cache)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
                cwd=Path(__file__).parents[1],
            )
        finally:
            os.sched_setaffinity(0, before)

    def __call__(self, job: Job) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(job.to_line())
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker died while it ran {job.folder.name}; give the command again to go on")
        result = json.loads(line)
        if "stopped_by" in result:
            raise Interrupted(result["stopped_by"], result["epochs_saved"])
        return result

    def close(self) -> None:
        """Let it end; it does so by itself too when this process dies."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()


@contextlib.contextmanager
def _crew(workers: int, cache: Path) -> Iterator[list[Callable[[Job], dict[str, Any]]]]:
    if workers == 0:
        yield [do]
        return
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ValueError(f"workers={workers}: this process may use {len(cores)} cores; ask for at most as many")
    crew = [_Worker(None if workers == 1 else cores[index], cache.resolve()) for index in range(workers)]

    stopped_by: list[int] = []

    def forward(number: int, _: Any) -> None:
        stopped_by.append(number)
        for worker in crew:
            worker.process.terminate()  # one that trains saves first, an idle one is gone at once

    previous = {}
    with contextlib.suppress(ValueError):  # not the main thread: signals are not ours to take
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, forward)
    try:
        yield crew
    except (RuntimeError, Interrupted):
        if stopped_by:
            raise Interrupted(stopped_by[0], 0) from None
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for worker in crew:
            worker.close()


def _serve(cache: str) -> None:
    """A worker's life: jobs from standard input, results to standard output, until that ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    # Cells differ in few of their programs: compile the others once.
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    for line in sys.stdin:
        try:
            result = do(Job.from_line(line))
        except Interrupted as stop:
            print(json.dumps({"stopped_by": stop.signal_number, "epochs_saved": stop.epochs_saved}), file=answers)
            return
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    _serve(sys.argv[1])
