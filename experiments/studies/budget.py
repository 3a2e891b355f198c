"""What is to be run in full, in order of worth, and running what is missing of it within a budget of minutes.

    python -m experiments table --budget gpu-30min [--data.dir DIR] [--workdir DIR]

A run that the budget cuts off is saved; the same command goes on with it. No piece is longer than ten minutes:
what a machine that goes away takes with it is an epoch.
"""

import contextlib
import dataclasses
import functools
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from experiments import configs
from experiments.configs import TrainConfig, compare
from experiments.configs.work import planned_multiply_adds
from experiments.data import load
from experiments.records import RUNS, RunFolder, keep, read_metrics, setting
from experiments.report import published, results
from experiments.report.pace import SHARE_OF_PEAK, estimate_seconds
from experiments.report.statistics import markdown_table
from experiments.train import loop
from experiments.train.step import Trainer

PIECE_S = 600.0
# To end an epoch, save and leave.
MARGIN_S = 20.0
_AGAIN_S = 1.0
# Saving every epoch of a quarter of a second would be most of the time; a stop saves the epoch it comes in.
_CHECKPOINT_EVERY = 10
_FORM = re.compile(r"(gpu|cpu)-(\d+(?:\.\d+)?)min")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One run of the plan.

    Attributes:
        config: with its seed and precision, and without the place of the images.
        group: folder below experiments/results that its record is collected in.
    """

    config: TrainConfig
    group: str

    @property
    def name(self) -> str:
        """Of its run folder."""
        return f"{self.config.name}-seed{self.config.seed}"


def parse(budget: str) -> tuple[str, float]:
    """``"gpu-30min"`` -> ``("gpu", 30.0)``.

    Raises:
        ValueError: another form, or no minutes at all.
    """
    found = _FORM.fullmatch(budget)
    if found is None or float(found[2]) <= 0:
        raise ValueError(f"--budget {budget!r}: expected KIND-Nmin with KIND gpu or cpu and N minutes, as in gpu-30min")
    return found[1], float(found[2])


def plan(kind: str) -> list[Entry]:
    """All runs of a kind of machine, the most worthwhile first.

    On a GPU, in bfloat16, 190 epochs each: VGG-13 dense and narrow, its three compressions and our own recipe, VGG-11,
    the other methods on VGG-13, VGG-16, the wide ResNet-32, ResNet-50, all on CIFAR-10; then two more seeds of VGG-13.
    On a CPU the quarter-width VGG-11's five seeds.

    Args:
        kind: "gpu" or "cpu".

    Raises:
        ValueError: another kind.
    """
    if kind == "cpu":
        slim = [configs.get(f"slim-vgg11-cifar10-{what}") for what in ("dense", "8.6x")]
        return [
            Entry(dataclasses.replace(config, seed=seed), "slim-vgg11-cifar10") for seed in range(5) for config in slim
        ]
    if kind != "gpu":
        raise ValueError(f"kind={kind!r}: expected 'gpu' or 'cpu'")
    vgg13 = ["vgg13-cifar10-dense", *_beside_vgg13("narrow"), *_recipes("vgg13", "4.0x", "6.2x", "9.0x")]
    first = [
        *vgg13,
        *_recipes("vgg13", "own-9.0x", "own-9.0x-64x1"),
        *_recipes("vgg11", "dense", "8.7x", "10.3x"),
        *_beside_vgg13("PAT"),
        *_beside_vgg13("PDT"),
        *_recipes("vgg16", "dense", "5.8x", "8.8x"),
        *_recipes("resnet32_wide", "dense", "8.1x", "12.5x"),
        *_recipes("resnet50_cifar", "dense", "4.5x", "5.2x"),
    ]
    return [_full(name, 0) for name in first] + [_full(name, seed) for seed in (1, 2) for name in vgg13]


def _recipes(net: str, *names: str) -> list[str]:
    return [f"{net}-cifar10-{name}" for name in names]


def _beside_vgg13(method: str) -> list[str]:
    """Configs of the comparison's study on VGG-13, whose dense run is the published recipe's."""
    return [cell.config.name for cell in compare.study("vgg13").cells if cell.method == method]


def _full(name: str, seed: int) -> Entry:
    config = configs.get(name)
    loop = dataclasses.replace(config.loop, checkpoint_every_epochs=_CHECKPOINT_EVERY)
    return Entry(dataclasses.replace(config, seed=seed, precision="bfloat16", loop=loop), published.GROUP)


@dataclasses.dataclass(frozen=True)
class Standing:
    """Where an entry stands: epochs done of all, seconds that are left by estimate, its summary when finished."""

    entry: Entry
    epochs_done: int
    seconds_left: float
    summary: dict[str, Any] | None

    @property
    def finished(self) -> bool:
        """Whether there is a whole run of it."""
        return self.summary is not None


def standings(
    kind: str, entries: Sequence[Entry], workdir: Path, found: Sequence[dict[str, Any]], where: dict[str, Any]
) -> list[Standing]:
    """Where each entry stands, from the committed records and the work folder.

    Args:
        kind: "gpu" or "cpu"; records of the other kind do not count.
        entries: of `plan`.
        workdir: run folders NAME-seedN.
        found: `experiments.report.results.records`.
        where: `experiments.records.setting` of this machine.
    """
    of_kind = [record for record in found if record["setting"]["device"]["platform"] == kind]
    here = results.machine({"setting": where})
    finished = [RunFolder(path.parent).summary() for path in sorted(workdir.glob("*/summary.json"))]
    # What shared its card says nothing of a run's own pace.
    alone = [record for record in of_kind if record["setting"].get("runs_at_once", 1) == 1]
    pace = [record for record in alone if results.machine(record) == here] + finished
    standing = []
    for entry in entries:
        config = entry.config
        folder = RunFolder(workdir / entry.name)
        recorded = (one for one in of_kind if one["seed"] == config.seed and published.is_run_of(one, config))
        summary = folder.summary() or next(recorded, None)
        done = config.total_epochs if summary is not None else len(read_metrics(folder.path))
        device, cores = where["device"]["kind"], where["cpu"]["cores"]
        left = 1 - done / config.total_epochs
        seconds = left * estimate_seconds(config, kind, device, pace, cores) if left else 0.0
        standing.append(Standing(entry, done, seconds, summary))
    return standing


def describe(standing: Sequence[Standing]) -> str:
    """The plan as a table: what is done and how, what is missing and how long it should take."""
    rows = []
    for place, one in enumerate(standing, 1):
        config, summary = one.entry.config, one.summary
        if summary is not None:
            rate = summary["train_examples"] * summary["epochs"] / summary["train_seconds"]
            state, seconds = f"done: top-1 {100 * summary['final_top1']:.2f}", f"took {summary['train_seconds']:.0f}"
            speed = f"{rate:,.0f}"
        else:
            state = f"{one.epochs_done} of {config.total_epochs} epochs" if one.epochs_done else "missing"
            seconds, speed = f"about {one.seconds_left:.0f}", ""
        work = f"{planned_multiply_adds(config) / 1e12:,.0f}"
        rows.append((str(place), config.name, str(config.seed), work, state, seconds, speed))
    missing = [one for one in standing if not one.finished]
    minutes = sum(one.seconds_left for one in missing) / 60
    words = (
        f"{len(standing) - len(missing)} of {len(standing)} runs done; about {minutes:.0f} minutes are missing "
        f"(before anything is measured: {100 * SHARE_OF_PEAK:g}% of a card's peak).\n"
    )
    header = ("", "run", "seed", "T multiply-adds", "state", "training s", "images/s")
    return f"{markdown_table(header, rows)}{words}"


def shown(budget: str, workdir: Path | None = None) -> str:
    """The plan of a budget as a table, on any machine; nothing is run.

    Raises:
        ValueError: a bad budget.
    """
    kind, minutes = parse(budget)
    entries, found = plan(kind), results.records()
    text = describe(standings(kind, entries, workdir or Path("runs") / f"plan-{kind}", found, setting()))
    other = "" if jax.default_backend() == kind else f" jax sees no {kind} here: times are of a usual one."
    return f"{text}{minutes:g} minutes would be spent from the top of what is missing.{other}"


def run(
    budget: str,
    workdir: Path | None = None,
    *,
    data_dir: str | None = None,
    records: Path = results.RECORDS,
    entries: Sequence[Entry] | None = None,
    train: Callable[..., Any] | None = None,
    piece_s: float = PIECE_S,
    margin_s: float = MARGIN_S,
    say: Callable[[str], None] = functools.partial(print, flush=True),  # noqa: B008
) -> dict[str, Any]:
    """Train what is missing, in order, until the budget ends; collect the records of finished runs.

    Args:
        budget: as `parse` takes it.
        workdir: run folders; by default runs/plan-KIND.
        data_dir: where the images are.
        records: finished runs are copied below it.
        entries: of `plan`; None for all of the kind.
        train: ``(config, folder) -> summary``, which it leaves in the folder; None for `experiments.train.loop.train`.
        piece_s: no call of it goes on for longer.
        margin_s: it is stopped so many seconds before the budget or the piece ends, as it ends its epoch first.
        say: is given lines about what is done.

    Returns:
        ``{"finished": runs, "missing": runs, "failed": {run: error}, "collected": runs copied}``.

    Raises:
        ValueError: a bad budget; a GPU's on a machine without one.
        Interrupted: somebody else's SIGINT or SIGTERM came; what was trained is saved.
    """
    kind, minutes = parse(budget)
    if kind == "gpu" and jax.default_backend() != "gpu":
        raise ValueError(
            f"--budget {budget}: jax sees no GPU on this machine, only {jax.devices()[0].platform}; run it where there "
            f"is one, or ask for cpu-{minutes:g}min"
        )
    end = time.monotonic() + 60 * minutes
    workdir = workdir or Path("runs") / f"plan-{kind}"
    entries = plan(kind) if entries is None else entries
    train = _in_the_loop() if train is None else train
    found, where = results.records(records), setting()
    say(describe(standings(kind, entries, workdir, found, where)))
    failed: dict[str, str] = {}
    for entry in entries:
        data = entry.config.data if data_dir is None else dataclasses.replace(entry.config.data, dir=data_dir)
        config = dataclasses.replace(entry.config, data=data)
        saved = -1
        while not standings(kind, [entry], workdir, found, where)[0].finished and entry.name not in failed:
            seconds = min(piece_s, end - time.monotonic()) - margin_s
            if seconds <= 0:
                break
            start, deadline = time.monotonic(), _Deadline()
            try:
                with deadline.after(seconds):
                    summary = train(config, workdir / entry.name)
                say(f"{entry.name}: top-1 {100 * summary['final_top1']:.2f}, {time.monotonic() - start:.0f} s")
            except loop.Interrupted as stop:
                if not deadline.passed or stop.signal_number != signal.SIGTERM:
                    raise
                say(f"{entry.name}: {stop.epochs_saved} of {config.total_epochs} epochs saved")
                if stop.epochs_saved <= saved:
                    # Trying again would use up the budget for nothing.
                    failed[entry.name] = f"no epoch of it fits into {seconds:.0f} s: give it more minutes"
                    say(f"{entry.name}: {failed[entry.name]}")
                saved = stop.epochs_saved
            # Too little memory for one net is no reason to leave the others.
            except (ValueError, loop.NonFiniteLoss, jax.errors.JaxRuntimeError) as error:
                failed[entry.name] = str(error)
                say(f"{entry.name}: failed: {error}")
    collected = 0
    for entry in entries:
        if RunFolder(workdir / entry.name).summary() is not None:
            collected += keep(records / entry.group / RUNS, [RunFolder(workdir / entry.name).record()])
    left = [one for one in standings(kind, entries, workdir, found, where) if not one.finished]
    missing = sum(one.entry.name not in failed for one in left)
    return {"finished": len(entries) - len(left), "missing": missing, "failed": failed, "collected": collected}


def _in_the_loop() -> Callable[[TrainConfig, Path], dict[str, Any]]:
    """Train with each data set loaded once. Programs are not shared: every run is to pay for its own compiling."""
    loaded = functools.cache(load)
    # On one device, as its estimates are.
    return lambda config, folder: loop.train(config, folder, trainer=Trainer(config, loaded(config.data)))


class _Deadline:
    """Sends this process SIGTERM when its time is over, which the training loop heeds by saving."""

    def __init__(self) -> None:
        self.passed = False

    @contextlib.contextmanager
    def after(self, seconds: float) -> Iterator[None]:
        """Let the body run for so long. Signals that are not of the deadline act as they did before."""
        over = threading.Event()
        before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL

        def handle(number: int, frame: Any) -> None:
            # The loop was not there to hear it, or heard an earlier one.
            if self.passed:
                return
            signal.signal(signal.SIGTERM, before)
            os.kill(os.getpid(), number)

        def watch() -> None:
            if over.wait(seconds):
                return
            self.passed = True
            # Again and again: while it loads and compiles nobody listens yet.
            while not over.is_set():
                os.kill(os.getpid(), signal.SIGTERM)
                over.wait(_AGAIN_S)

        signal.signal(signal.SIGTERM, handle)
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
            signal.signal(signal.SIGTERM, before)
