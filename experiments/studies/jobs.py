"""Runs as jobs: a crew of processes does them, each on a core of its own, in an order, until a deadline.

A job is an ordinary config and ends in an ordinary run folder, so whatever was stopped goes on when it is given again.
"""

import contextlib
import dataclasses
import functools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments.configs.base import TrainConfig, from_dict, to_dict
from experiments.data import Dataset, load
from experiments.records import RUNS, RunFolder, differences, identity, keep, kept, plain
from experiments.train.forks import train_forked
from experiments.train.loop import Interrupted, NonFiniteLoss, train
from experiments.train.signals import heeded
from experiments.train.step import Trainer


@dataclasses.dataclass(frozen=True)
class Job:
    """One run to do: its config, its folder, and the folder of the dense run that it forks from and waits for."""

    config: TrainConfig
    folder: Path
    trunk: Path | None = None

    def to_line(self) -> str:
        """One line of JSON, for a worker."""
        # Absolute: a worker runs in another folder.
        trunk = None if self.trunk is None else str(self.trunk.resolve())
        data = to_dict(self.config)
        if data["data"]["dir"] is not None:
            data["data"]["dir"] = str(Path(data["data"]["dir"]).expanduser().resolve())
        return json.dumps({"config": data, "folder": str(self.folder.resolve()), "trunk": trunk}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> "Job":
        """The inverse of `to_line`."""
        data = json.loads(line)
        trunk = None if data["trunk"] is None else Path(data["trunk"])
        return cls(from_dict(data["config"]), Path(data["folder"]), trunk)

    def finished(self) -> bool:
        """Whether the folder holds a whole run."""
        return RunFolder(self.folder).summary() is not None


class Trainers:
    """Keeps each config's programs and each data set from run to run, so that a config is compiled once."""

    def __init__(self) -> None:
        self._trainers: dict[str, Trainer] = {}
        self._datasets: dict[str, Dataset] = {}

    def get(self, config: TrainConfig) -> Trainer:
        """The trainer of a config, its seed apart."""
        data = str(config.data)
        if data not in self._datasets:
            self._datasets[data] = load(config.data)
        key = identity(plain(to_dict(config)))
        if key not in self._trainers:
            self._trainers[key] = Trainer(config, self._datasets[data])
        return self._trainers[key]


def do(job: Job, trainers: Trainers | None = None) -> dict[str, Any]:
    """Do a job here; ``{}`` when it is done, ``{"error": text}`` when the run cannot be made or diverges."""
    try:
        # On one device, as a fork is, whatever jax sees: several of a crew may share a machine.
        trainer = trainers.get(job.config) if trainers is not None else None
        if job.trunk is None:
            trainer = trainer or Trainer(job.config, load(job.config.data))
            train(job.config, job.folder, trainer=trainer)
        else:
            train_forked(job.config, job.folder, job.trunk, trainer=trainer)
    except (ValueError, NonFiniteLoss) as error:
        return {"error": str(error)}
    return {}


# Takes a line.
say_line: Callable[[str], None] = functools.partial(print, flush=True)


def deadline_of(seeds: Sequence[int], workers: int, minutes: float | None) -> float | None:
    """When no new run is started any more, by `time.monotonic`; None for no limit.

    Raises:
        ValueError: no seeds, or two alike; a negative number of workers or minutes.
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={tuple(seeds)}: expected at least one, all different")
    if workers < 0 or (minutes is not None and minutes < 0):
        raise ValueError(f"workers={workers}, minutes={minutes}: expected 0 or more")
    return None if minutes is None else time.monotonic() + 60 * minutes


def collect(workdir: Path, records: Path, name: str = RUNS) -> int:
    """Keep the records of all finished runs; checkpoints and where their images lay are left out.

    Args:
        workdir: holds run folders NAME-seedN.
        records: a folder, made when missing: records of the same runs in its file are replaced.
        name: of that file.

    Returns:
        How many runs there are.
    """
    records.mkdir(parents=True, exist_ok=True)
    finished = sorted(path.parent for path in workdir.glob("*-seed*/summary.json"))
    return keep(records / name, (RunFolder(folder).record() for folder in finished))


def restore(jobs: Sequence[Job], file: Path) -> None:
    """Make the folders, without checkpoints, of those jobs that a file of `collect` has finished records of.

    A queue so goes on where another clone of the records, or another machine, stopped. A folder that is there, and a
    record of other mathematics or data under the same name, are left alone.
    """
    records = {(record["name"], record["seed"]): record for record in kept(file)}
    for job in jobs:
        record = records.get((job.config.name, job.config.seed))
        if job.folder.exists() or record is None or record["summary"] is None:
            continue
        if not differences(record["config"], job.config):
            RunFolder(job.folder).restore(record)


def do_all(
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

    def __init__(self, core: int | None, cache: Path | None, environment: Mapping[str, str]) -> None:
        before = os.sched_getaffinity(0)
        if core is not None:
            # A new process inherits the cores of the thread that starts it: XLA finds one and makes one thread.
            os.sched_setaffinity(0, {core})
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "experiments.studies.jobs", *([] if cache is None else [str(cache)])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                start_new_session=True,
                env={**os.environ, **environment},
                cwd=Path(__file__).parents[2],
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
def crew(
    workers: int, *, cache: Path | None = None, environment: Mapping[str, str] | None = None
) -> Iterator[list[Callable[[Job], dict[str, Any]]]]:
    """Who does the jobs.

    Args:
        workers: processes. One has all cores, several have one each; 0 is this process.
        cache: a folder of compiled programs, for configs that share most of theirs. Without one every process keeps
            the programs that it compiles, so that compiling is timed once for each config.
        environment: variables of the processes.

    Raises:
        ValueError: more workers than cores.
    """
    if workers == 0:
        yield [do if cache is not None else functools.partial(do, trainers=Trainers())]
        return
    cores = sorted(os.sched_getaffinity(0))
    if workers > len(cores):
        raise ValueError(f"workers={workers}: this process may use {len(cores)} cores; ask for at most as many")
    cache = None if cache is None else cache.resolve()
    found = [_Worker(None if workers == 1 else cores[index], cache, environment or {}) for index in range(workers)]

    def forward(number: int) -> None:
        for worker in found:
            worker.process.terminate()  # one that trains saves first, an idle one is gone at once

    with heeded(forward) as stop:
        try:
            yield found
        except (RuntimeError, Interrupted):
            stop.check(0)
            raise
        finally:
            for worker in found:
                worker.close()


def _serve(cache: str | None = None) -> None:
    """A worker's life: jobs from standard input, results to standard output, until that ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    sys.stdout = sys.stderr
    trainers = None
    if cache is None:
        trainers = Trainers()
    else:
        # Configs differ in few of their programs: compile the others once.
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    for line in sys.stdin:
        try:
            result = do(Job.from_line(line), trainers)
        except Interrupted as stop:
            print(json.dumps({"stopped_by": stop.signal_number, "epochs_saved": stop.epochs_saved}), file=answers)
            return
        print(json.dumps(result), file=answers)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
