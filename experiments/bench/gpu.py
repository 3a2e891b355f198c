"""What is still to be measured on a GPU, the most worthwhile first, within so many seconds.

    python -m experiments bench gpu --out DIR [--data.dir PACKED] [--seconds N] [--only REGEX] [--at-once N] [--smoke]

Needs jax, flax, optax, orbax and Pillow, and safetensors for one of them. PACKED is made by `python -m experiments
pack-data`; without it there are no runs. Each item has a process of its own and leaves its record as it goes, below DIR
and in one archive, DIR/records.tar.gz. The same command goes on where it stopped: what has a record is done, runs are
resumed. Steps compile beside one another and are timed alone; runs share the device where --at-once says so, which
their settings tell, and the rest runs alone. In order: whole steps of VGG-13, the price of a shape
(`experiments.configs.price`), runs of 190 epochs, single convolutions, `experiments.bench.gpu_measures`.
"""

import argparse
import dataclasses
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.bench import gpu_items, gpu_measures
from experiments.configs import price
from experiments.records import RUNS, RunFolder, keep, read_json, setting, write_json
from experiments.train.loop import Interrupted

ARCHIVE = "records.tar.gz"
# Whole steps: (images of an update, tile at 8x, ways).
_STEPS = (
    (512, (64, 64), ("pattern_hwnc", "dense")),
    (128, (64, 64), ("pattern_hwnc", "dense")),
    (512, (64, 16), ("pattern_hwnc",)),
)
_LONG = ("vgg13-cifar10-dense", "vgg13-cifar10-9.0x", "vgg13-cifar10-own-9.0x")
# What an item may take at most, in seconds, and what it has to save and leave when the time is over; less than
# that to compile is not worth a start.
_LIMITS_S = {"steps": 240, "runs": 900, "convolutions": 120}
_GRACE_S, _LEAST_S = 15.0, 40.0
_POLL_S = 0.2


@dataclasses.dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        name: of its record.
        kind: "steps", "runs", "convolutions" or "measures"; kinds never run beside one another.
        limit_s: its process is stopped after this.
        after: an item that must be done before.
    """

    name: str
    kind: str
    limit_s: float
    after: str = ""


def items(seed: int = 0) -> list[Item]:
    """Everything, in order of worth; runs are of this seed."""
    named = [Item(_steps_name(batch, tile), "steps", _LIMITS_S["steps"]) for batch, tile, _ in _STEPS]
    equal = f"{price.GROUP}-vgg13-narrow-multiply-adds"
    runs = [*(config.name for config in price.configs()), equal, *_LONG]
    for run in runs:
        after = f"{gpu_items.equal_work()}-seed{seed}" if run == equal else ""
        named.append(Item(f"{run}-seed{seed}", "runs", _LIMITS_S["runs"], after))
    named.append(Item("conv-device-time", "convolutions", _LIMITS_S["convolutions"]))
    for name, (limit_s, _) in gpu_measures.MEASURES.items():
        named.append(Item(name, "measures", limit_s))
    return named


def _steps_name(batch: int, tile: tuple[int, int]) -> str:
    return f"steps-{batch}-{tile[0]}x{tile[1]}"


def is_done(item: Item, out: Path) -> bool:
    """Whether its record is there and says that it went well."""
    record = out / f"{item.name}.json"
    return record.exists() and bool(read_json(record).get("ok"))


def do(item: Item, asked: argparse.Namespace) -> bool:
    """Measure one item in this process and write its record as it grows; returns whether it went well."""
    out, start = asked.out, time.perf_counter()
    facts = {"item": item.name, "smoke": asked.smoke, "setting": setting()}
    found: dict[str, Any] = {}

    def write(**outcome: Any) -> None:
        write_json(out / f"{item.name}.json", facts | {"seconds": time.perf_counter() - start, **outcome, **found})

    unfinished = {"ok": False, "error": "it was stopped before its end"}
    write(**unfinished)
    try:
        for part in _measure(item, asked):
            found = part
            write(**unfinished)
        write(ok=True)
    except Interrupted:
        raise
    except Exception:  # a record of what went wrong is the point
        write(ok=False, error=traceback.format_exc())
        print(traceback.format_exc(), flush=True)
        return False
    return True


def _measure(item: Item, asked: argparse.Namespace) -> Any:
    if item.kind == "measures":
        return gpu_measures.measure(item.name, asked.smoke, asked.packed)
    if item.kind == "steps":
        batch, tile, ways = next(one for one in _STEPS if _steps_name(*one[:2]) == item.name)
        return gpu_items.steps(batch, tile, ways, asked.out, asked.smoke)
    if item.kind == "convolutions":
        return gpu_items.convolutions(asked.smoke, item.limit_s - 2 * _GRACE_S)
    name, _, seed = item.name.rpartition("-seed")
    return iter([gpu_items.train(name, int(seed), asked.out, asked.packed, asked.at_once, asked.smoke)])


class _Running:
    """An item's process."""

    def __init__(self, item: Item, asked: argparse.Namespace, end: float) -> None:
        self.item, self.begun = item, time.monotonic()
        self.stop_at = min(end, self.begun + item.limit_s)
        self.stopped = False
        # Several share the device's memory: taken as it is needed. On a small CPU, a smoke run's interpreted kernels
        # hang with fewer threads than they have warpgroups.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "NPROC": "16"} | os.environ
        # What runs alike is compiled once; single measurements time what they compile themselves.
        if item.kind != "measures":
            environment = {"JAX_COMPILATION_CACHE_DIR": str((asked.out / "programs").absolute())} | environment
        command = [sys.executable, "-m", "experiments.bench.gpu", *_options(asked), "--here", item.name]
        self.process = subprocess.Popen(command, env=environment)

    def poll(self) -> bool:
        """Whether it has ended; asks it to when its time is over, and later ends it."""
        if self.process.poll() is not None:
            return True
        late = time.monotonic() - self.stop_at
        if late > 0 and not self.stopped:
            self.stopped = True
            self.process.send_signal(signal.SIGTERM)
        if late > _GRACE_S:
            self.process.kill()
        return False


def _options(asked: argparse.Namespace) -> list[str]:
    packed = ["--data.dir", asked.packed] if asked.packed else []
    numbers = ["--at-once", str(asked.at_once), "--seed", str(asked.seed)]
    return ["--out", str(asked.out), *packed, *numbers, *["--smoke"] * asked.smoke]


def run(asked: argparse.Namespace) -> int:
    """Do what is missing until the time is over; returns 1 when something failed or was not reached."""
    end = time.monotonic() + asked.seconds - _GRACE_S
    chosen = [item for item in items(asked.seed) if re.search(asked.only, item.name)]
    waiting = [item for item in chosen if not is_done(item, asked.out)]
    print(f"{len(chosen) - len(waiting)} of {len(chosen)} items are done already", flush=True)
    running: list[_Running] = []
    failed: set[str] = set()
    try:
        while waiting or running:
            for one in [one for one in running if one.poll()]:
                running.remove(one)
                _ended(one, asked.out, failed)
            if end - time.monotonic() < _LEAST_S and not running:
                break
            following = None if end - time.monotonic() < _LEAST_S else _next(waiting, running, chosen, failed, asked)
            if following is not None:
                waiting.remove(following)
                running.append(_Running(following, asked, end))
            elif running:
                time.sleep(_POLL_S)
            else:  # What is left waits for what failed.
                break
    finally:
        for one in running:
            one.process.terminate()
        for one in running:
            one.process.wait()
        archive(asked.out)
    late = [item.name for item in waiting]
    if late:
        print(f"not reached: {', '.join(late)}; the same command goes on with them", flush=True)
    return int(bool(failed or late))


def _next(
    waiting: Sequence[Item],
    running: Sequence[_Running],
    chosen: Sequence[Item],
    failed: set[str],
    asked: argparse.Namespace,
) -> Item | None:
    """The next item that may start now, if any."""
    left = {item.name for item in waiting} | {one.item.name for one in running} | failed
    for item in waiting:
        if item.after in left or (item.after and not is_done(_named(item.after, asked.seed), asked.out)):
            continue
        limit = {"steps": len(_STEPS), "runs": asked.at_once}.get(item.kind, 1)
        kinds = {one.item.kind for one in running}
        return item if kinds <= {item.kind} and len(running) < limit else None
    return None


def _named(name: str, seed: int) -> Item:
    found = next((item for item in items(seed) if item.name == name), None)
    if found is None:
        raise ValueError(f"no item {name!r}; expected one of {', '.join(item.name for item in items(seed))}")
    return found


def _ended(one: _Running, out: Path, failed: set[str]) -> None:
    seconds, path = time.monotonic() - one.begun, out / f"{one.item.name}.json"
    ok = one.process.returncode == 0
    if not ok:
        failed.add(one.item.name)
        facts = read_json(path) if path.exists() else {"item": one.item.name, "ok": False}
        if one.stopped:
            facts |= {"ok": False, "error": f"stopped after {seconds:.0f} s"}
        write_json(path, {"error": f"exit code {one.process.returncode}"} | facts)
    outcome = "done" if ok else "stopped, the time was over" if one.stopped else "FAILED"
    print(f"{one.item.name}: {outcome} in {seconds:.1f} s{_said(path) if ok else ''}", flush=True)
    archive(out)


def _said(path: Path) -> str:
    """What a record says, in short."""
    record = read_json(path)
    if "final_top1" in record:
        return (
            f"; top-1 {100 * record['final_top1']:.2f}, {record['conv_compression']:.2f}x, training "
            f"{record['train_seconds']:.1f} s, compiling {record['compile_seconds']:.1f} s"
        )
    said = [f"skipped, {record['skipped']}"] if "skipped" in record else []
    said += [f"left out: {', '.join(record['left_out'])}"] if record.get("left_out") else []
    said += [
        f"{row['way']} {row['ms']:.3f} ms (device {row['device_ms'] or 0:.3f}), compiled in "
        f"{row['compile_seconds']:.1f} s"
        for row in record.get("steps", [])
        if "way" in row
    ]
    return "".join(f"; {each}" for each in said)


def archive(out: Path) -> Path:
    """All records in one file, replaced in one piece: those of finished items, and runs as far as they are."""
    path = out / ARCHIVE
    temporary = path.with_suffix(".tmp")
    folders = sorted(path.parent for path in out.glob("runs/*/config.json"))
    keep(out / RUNS, (RunFolder(folder).record() for folder in folders))
    with tarfile.open(temporary, "w:gz") as tar:
        for file in sorted([*out.glob("*.json"), *out.glob(RUNS)]):
            tar.add(file, arcname=str(file.relative_to(out)))
    os.replace(temporary, path)
    return path


def main(arguments: list[str]) -> int:
    """The command; returns the exit code."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m experiments bench gpu", description=__doc__, formatter_class=layout)
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--data.dir", dest="packed", help="packed CIFAR-10, the file or what its parts begin with")
    parser.add_argument("--seconds", type=float, default=3600.0, help="in all")
    parser.add_argument("--only", default="", help="items whose name holds this regular expression")
    parser.add_argument("--at-once", type=int, default=1, help="runs at once on the device")
    parser.add_argument("--seed", type=int, default=0, help="of the runs")
    parser.add_argument("--smoke", action="store_true", help="everything tiny, on any device")
    parser.add_argument("--here", metavar="ITEM", help="one item, in this process")
    asked = parser.parse_args(arguments)
    if asked.at_once < 1:
        raise ValueError(f"--at-once {asked.at_once}; expected at least 1")
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.here:
        return int(not do(_named(asked.here, asked.seed), asked))
    return run(asked)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Interrupted as stop:
        sys.exit(128 + stop.signal_number)
