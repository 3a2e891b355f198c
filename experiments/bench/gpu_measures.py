"""The single measurements of `python -m experiments bench gpu`, one JSON record each, within a time each.

Each is a function of whether it is to be tiny, of the seconds in which it may begin new things, and of an archive of
images, which are random without. What is right or wrong on a GPU is tested by ``pytest -m gpu``.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments import configs
from experiments.bench import drawn, gpu_convolutions, gpu_exports, updates
from experiments.data import DataConfig, load
from experiments.train.step import Trainer

# By whether it is to be tiny.
_NETS = {True: {"net": "vgg11", "width": 0.125}, False: {"net": "vgg16", "width": 1.0}}


def measure_update_costs(smoke: bool, budget_s: float, packed: str | None) -> dict[str, Any]:
    """Updates of every phase against the plain optax step."""
    size = _NETS[smoke] | ({"batch_size": 8, "repeats": 2} if smoke else {"batch_size": 128, "repeats": 30})
    return {"size": size, "rows": updates.measure_steps(**size)}


def measure_selection(smoke: bool, budget_s: float, packed: str | None) -> dict[str, Any]:
    """Seconds of the selection with each option, whole VGG-16."""
    size = _NETS[smoke] | {"batch_size": 1, "repeats": 1 if smoke else 7}
    return {"size": size, "rows": updates.measure_selection(**size)}


def measure_training(smoke: bool, budget_s: float, packed: str | None) -> dict[str, Any]:
    """Images a second of whole epochs of VGG-13, dense and pruned, in bfloat16 and float32."""
    count = 256 if smoke else 50_000
    dataset = load(DataConfig("cifar10", dir=packed)) if packed else drawn.images((32, 32, 3), count, evaluated=500)
    rates = {}
    asked = [*itertools.product(("vgg13-cifar10-dense", "vgg13-cifar10-9.0x"), ("bfloat16", "float32"))]
    for name, precision in asked[::3] if smoke else asked:
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


# By name: seconds that a measurement's process may take at most, and what measures.
MEASURES: dict[str, tuple[float, Callable[[bool, float, str | None], dict[str, Any] | Iterator[dict[str, Any]]]]] = {
    "conv-shift": (60, gpu_convolutions.measure_shift),
    "conv-sweeps": (75, gpu_convolutions.measure_sweeps),
    "conv-dense": (90, gpu_convolutions.measure_dense),
    "conv-mosaic": (150, gpu_convolutions.measure_mosaic),
    "steps": (90, gpu_convolutions.measure_steps),
    "deploy": (120, gpu_exports.measure),
    "update-costs": (180, measure_update_costs),
    "selection": (120, measure_selection),
    "training": (180, measure_training),
}
# Of those seconds, for a process to start and to end what it has begun.
_AROUND_S = 25


def measure(name: str, smoke: bool, packed: str | None) -> Iterator[dict[str, Any]]:
    """What one of `MEASURES` has found so far, again and again."""
    limit_s, function = MEASURES[name]
    found = function(smoke, limit_s - _AROUND_S, packed)
    return iter([found]) if isinstance(found, dict) else found
