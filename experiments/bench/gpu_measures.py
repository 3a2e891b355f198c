"""The single measurements of `python -m experiments bench gpu`, one JSON record each, within a time each.

What is right or wrong on a GPU is tested by ``pytest -m gpu``. Images are random unless an archive is named.
"""

import dataclasses
import functools
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import configs
from experiments.bench import gpu_convolutions
from experiments.bench import gpu_exports as gpu_check
from experiments.bench import updates as bench
from experiments.data import DataConfig, Dataset, load
from experiments.records import setting, write_json
from experiments.train.loop import Interrupted
from experiments.train.step import Trainer


def _random_images(count: int) -> Dataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, count).astype(np.int32)
    held_out = images[:500], labels[:500]
    return Dataset("random", images, labels, *held_out, 10, (0.5,) * 3, (0.25,) * 3, "test", "raw", f"random{count}")


def measure_update_costs(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Updates of every phase against the plain optax step."""
    size = (
        {"net": "vgg11", "width": 0.125, "batch_size": 8, "repeats": 2}
        if smoke
        else {"net": "vgg16", "width": 1.0, "batch_size": 128, "repeats": 30}
    )
    return {"size": size, "rows": bench.measure_steps(**size)}


def measure_selection(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Seconds of the selection with each option, whole VGG-16."""
    size = (
        {"net": "vgg11", "width": 0.125, "batch_size": 1, "repeats": 1}
        if smoke
        else {"net": "vgg16", "width": 1.0, "batch_size": 1, "repeats": 7}
    )
    return {"size": size, "rows": bench.measure_selection(**size)}


def measure_training(smoke: bool, packed: str | None) -> dict[str, Any]:
    """Images a second of whole epochs of VGG-13, dense and pruned, in bfloat16 and float32."""
    dataset = _random_images(256 if smoke else 50_000)
    if packed:
        dataset = load(DataConfig("cifar10", dir=packed))
    rates = {}
    for name in ("vgg13-cifar10-dense", "vgg13-cifar10-9.0x"):
        for precision in ("bfloat16", "float32"):
            config = dataclasses.replace(configs.get(name), precision=precision, width=0.125 if smoke else 1.0)
            trainer = Trainer(config, dataset)
            state = trainer.init(0)
            # Mixup is on in both: it begins with the prune, also in the dense run.
            epoch = config.mixup_epoch + 1
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                state, _ = trainer.run_epoch(state, epoch, 0)
                seconds.append(time.perf_counter() - start)
            # The first epoch compiles.
            rates[f"{name}, {precision}"] = len(dataset.train_labels) / min(seconds[1:])
    return {"images_per_second": rates}


# Seconds that a measurement's process may take at most.
LIMITS_S = {
    "conv-shift": 60,
    "conv-sweeps": 75,
    "conv-dense": 90,
    "conv-mosaic": 150,
    "steps": 90,
    "deploy": 120,
    "update-costs": 180,
    "selection": 120,
    "training": 180,
}
# Of those, for a process to start and to end what it has begun.
_AROUND_S = 25


def _within(name: str, function: Callable[[bool, float], Iterator[dict[str, Any]]]) -> Callable[..., Any]:
    """The measurement, told how long it may go on beginning new things."""

    @functools.wraps(function)
    def measure(smoke: bool, packed: str | None) -> Iterator[dict[str, Any]]:
        return function(smoke, LIMITS_S[name] - _AROUND_S)

    return measure


MEASURES: dict[str, Callable[[bool, str | None], dict[str, Any] | Iterator[dict[str, Any]]]] = {
    "conv-shift": _within("conv-shift", gpu_convolutions.measure_shift),
    "conv-sweeps": _within("conv-sweeps", gpu_convolutions.measure_sweeps),
    "conv-dense": _within("conv-dense", gpu_convolutions.measure_dense),
    "conv-mosaic": _within("conv-mosaic", gpu_convolutions.measure_mosaic),
    "steps": _within("steps", gpu_convolutions.measure_steps),
    "deploy": _within("deploy", gpu_check.measure),
    "update-costs": measure_update_costs,
    "selection": measure_selection,
    "training": measure_training,
}


def run(name: str, out: Path, smoke: bool, packed: str | None) -> bool:
    """Measure one in this process and write its record as it grows; returns whether it went well."""
    start = time.perf_counter()
    facts = {"item": name, "what": (MEASURES[name].__doc__ or "").strip(), "smoke": smoke, "setting": setting()}
    found: dict[str, Any] = {}

    def write(**outcome: Any) -> None:
        write_json(out / f"{name}.json", facts | {"seconds": time.perf_counter() - start, **outcome, **found})

    unfinished = {"ok": False, "error": "it was stopped before its end"}
    write(**unfinished)
    try:
        result = MEASURES[name](smoke, packed)
        for part in [result] if isinstance(result, dict) else result:
            found = part
            write(**unfinished)
        outcome: dict[str, Any] = {"ok": True}
    except Interrupted:
        raise
    except Exception:  # a record of what went wrong is the point
        outcome = {"ok": False, "error": traceback.format_exc()}
    write(**outcome)
    said = "ok" if outcome["ok"] else "FAILED"
    said = f"skipped, {found['skipped']}" if outcome["ok"] and "skipped" in found else said
    left_out = f"; left out: {', '.join(found['left_out'])}" if found.get("left_out") else ""
    print(f"{name}: {said} in {time.perf_counter() - start:.1f} s{left_out}", flush=True)
    if not outcome["ok"]:
        print(outcome["error"], flush=True)
    return outcome["ok"]
