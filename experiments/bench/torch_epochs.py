"""Images a second of this project's training loop beside an eager PyTorch loop that augments on the host.

    python -m experiments bench torch --torch-python OTHER/bin/python --out RECORD.json

Both train the same VGG from the same weights on the same images, dense, with the same cores: ours with the images on
the device and augmentation within the compiled update, PyTorch's as is usual there (`experiments.bench.torch_loop`), in
a process of its own that waits while the other one works. Epochs are asked for in turns; the first of each is left out.
"""

import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from clicktrain_jax import models
from clicktrain_jax.trees import named_leaves
from experiments import configs
from experiments.bench import drawn
from experiments.bench.deploy import worst_difference
from experiments.bench.worker import Failed, Process
from experiments.data import normalise
from experiments.records import setting, write_json
from experiments.report.benchmarks import tables_of
from experiments.train.step import Trainer

OURS = "this project, compiled"
# How PyTorch's forms are called in the table; names are those of `experiments.bench.torch_loop`, which needs PyTorch to
# be imported. Those with a loader are whole loops, the others say what the loader costs.
FORMS = {
    "with its loader": "PyTorch, with its loader",
    "with its loader, channels_last": "PyTorch, with its loader, channels_last",
    "one fixed batch": "PyTorch, one fixed batch, no loader",
    "one fixed batch, channels_last": "PyTorch, one fixed batch, no loader, channels_last",
}
ROUNDS = 5
_TOLERANCE = 1e-3
_CHECKED_IMAGES = 8
# Labels are random: a rate at which nothing can diverge.
_LEARNING_RATE = 0.01
# After an epoch threads may wait for more work without a pause: that core is not to be missed by what comes next.
_REST_S = 0.2
_LONGEST_END_S = 20.0


class TorchLoop(Process):
    """The process of `experiments.bench.torch_loop`, to be used as a context and asked as any `Process` is."""

    def close(self) -> None:
        """Let it end, and its loader's workers with it."""
        with contextlib.suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self._process.stdin.close()
            self._process.wait(_LONGEST_END_S)
        super().close()


def run(
    *,
    torch_python: str | None = None,
    net: str = "vgg13",
    width: float = 0.25,
    batch_size: int = 128,
    images: int = 2560,
    rounds: int = ROUNDS,
    workers: int | None = None,
    out: Path | None = None,
) -> str:
    """The training loop beside an eager PyTorch loop with a host loader, in images a second.

    Args:
        torch_python: an interpreter that has PyTorch, NumPy and Pillow, where this one has not.
        net: which is trained, a VGG.
        width: of the net.
        batch_size: images an update.
        images: of an epoch.
        rounds: epochs of each that count.
        workers: processes of PyTorch's loader; one for each core by default.
        out: a JSON file to save the record in.

    Raises:
        ValueError: a net that is no VGG, sizes below 1, an interpreter without PyTorch, logits that differ, a loss
            that is not finite.
    """
    cores = len(os.sched_getaffinity(0))
    workers = cores if workers is None else workers
    if min(batch_size, images, rounds) < 1 or workers < 0:
        raise ValueError(
            f"batch_size={batch_size}, images={images}, rounds={rounds}, workers={workers}: expected 1 or more of "
            "each, and 0 or more workers"
        )
    trainer = make_trainer(net, width, batch_size, images)
    state = trainer.init(0)
    loads, begin = [os.getloadavg()], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        hand_over(trainer, state, Path(folder), threads=cores, workers=workers)
        command = [torch_python or sys.executable, "-m", "experiments.bench.torch_loop", folder]
        try:
            with TorchLoop(command) as torch_loop:
                difference = check_logits(trainer, state, torch_loop)
                found = alternate(ways(trainer, state, torch_loop), rounds)
                version = torch_loop.version
        except (Failed, OSError) as error:
            raise ValueError(
                f"PyTorch's loop does not work with {command[0]}: {error}; give --torch-python an interpreter that has "
                "torch, numpy and pillow"
            ) from error
    asked = f"--net {net} --width {width:g} --batch-size {batch_size} --images {images} --rounds {rounds}"
    record = {
        "what": "torch",
        "command": f"python -m experiments bench torch --torch-python ... {asked} --workers {workers}",
        "setting": setting(),
        # At the beginning and at the end: (1, 5, 15 minutes) each.
        "load_average": [*loads, os.getloadavg()],
        "seconds": time.perf_counter() - begin,
        "net": {"name": net, "width": width, "convolution": _convolution(trainer)},
        "batch_size": batch_size,
        "images": images,
        "rounds": rounds,
        "torch": {"version": version, "threads": cores, "workers": workers},
        "logits_difference": difference,
        "results": rows_of(found, images),
    }
    if out is not None:
        write_json(out, record)
    return tables_of(record)


def make_trainer(net: str, width: float, batch_size: int, images: int) -> Trainer:
    """A dense run of the net on random images, without mixup, which PyTorch's loop has not.

    Raises:
        ValueError: the net is no VGG.
    """
    if not isinstance(models.build(net, num_classes=10), models.VGG):
        raise ValueError(f"net={net!r}: only the VGGs are written in experiments/bench/torch_loop.py; give one of them")
    config = dataclasses.replace(
        configs.get("vgg13-cifar10-dense"),
        name="bench-torch",
        net=net,
        width=width,
        batch_size=batch_size,
        learning_rate=_LEARNING_RATE,
        mixup_epoch=None,
    )
    return Trainer(config, drawn.images(models.default_image_shape(net), images, _CHECKED_IMAGES))


def hand_over(trainer: Trainer, state: Any, folder: Path, *, threads: int, workers: int) -> None:
    """Write what PyTorch's loop reads: what to do, images and labels, and the weights to begin with."""
    config, dataset, model = trainer.config, trainer.dataset, trainer.model
    params, filters = state.params, []
    for count in model.convs_per_stage:
        first = sum(map(len, filters))
        filters.append([params[f"Conv_{index}"]["kernel"].shape[-1] for index in range(first, first + count)])
    job = {
        "net": {
            "channels": dataset.train_images.shape[-1],
            "stages": filters,
            "hidden": [params[f"Dense_{index}"]["kernel"].shape[-1] for index in range(2)],
            "classes": dataset.num_classes,
            "dropout": model.dropout,
        },
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "crop_padding": config.crop_padding,
        "flip": config.flip,
        "mean": dataset.mean,
        "std": dataset.std,
        "threads": threads,
        "workers": workers,
    }
    (folder / "job.json").write_text(json.dumps(job))
    np.savez(folder / "images.npz", images=dataset.train_images, labels=dataset.train_labels.astype(np.int64))
    variables = {"params": params, "batch_stats": state.batch_stats}
    np.savez(folder / "weights.npz", **{name: np.asarray(leaf) for name, leaf in named_leaves(variables)})


def check_logits(trainer: Trainer, state: Any, torch_loop: Any) -> float:
    """max|difference| / max|logit| of both nets on a few images.

    Raises:
        ValueError: it is not small: nothing is timed that computes something else.
    """
    dataset = trainer.dataset
    images = normalise(dataset.train_images[:_CHECKED_IMAGES], dataset.mean, dataset.std)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    expected = jax.jit(lambda variables, images: trainer.model.apply(variables, images, train=False))(variables, images)
    found = np.array(torch_loop.ask("logits", count=_CHECKED_IMAGES)["logits"], np.float32)
    difference = worst_difference(found, np.asarray(expected))
    if not difference <= _TOLERANCE:
        raise ValueError(
            f"logits of the net in PyTorch differ from ours by {difference:.3g} of the largest, expected at most "
            f"{_TOLERANCE:g}: experiments/bench/torch_loop.py is another net than {trainer.config.net}"
        )
    return difference


def ways(trainer: Trainer, state: Any, torch_loop: Any) -> dict[str, Callable[[], float]]:
    """Functions that train an epoch and return its seconds, by name; compiling is left out."""
    epoch = 0

    def ours() -> float:
        nonlocal state, epoch
        compiled, begin = trainer.compile_seconds, time.perf_counter()
        state, metrics = trainer.run_epoch(state, epoch, 0)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - begin - (trainer.compile_seconds - compiled)
        epoch += 1
        _check_loss(OURS, float(metrics[:, 0].mean()))
        return seconds

    def theirs(form: str) -> float:
        answer = torch_loop.ask("epoch", form=form)
        _check_loss(form, answer["loss"])
        if answer["images"] != len(trainer.dataset.train_labels):
            raise ValueError(f"{form}: an epoch had {answer['images']} images, ours has another number")
        return answer["seconds"]

    return {OURS: ours} | {name: lambda form=form: theirs(form) for form, name in FORMS.items()}


def alternate(functions: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds by name, of functions called in turns, each round beginning with another; the first of each is left out.

    Args:
        functions: by name; each returns the seconds that it took.
        rounds: how many count.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for index in range(rounds + 1):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            took = functions[name]()
            if index:
                seconds[name].append(took)
            time.sleep(_REST_S)
    return seconds


def rows_of(seconds: Mapping[str, Sequence[float]], images: int) -> list[dict[str, Any]]:
    """Rows of the record: images a second (median, 20th and 80th percentile), and how many times slower than ours."""
    base = float(np.median(seconds[OURS]))
    rows = []
    for name, samples in seconds.items():
        low, median, high = np.percentile(images / np.asarray(samples), (20, 50, 80)).tolist()
        slower = float(np.median(samples)) / base
        rows.append(
            {"name": name, "images_per_s": median, "p20": low, "p80": high, "slower": slower, "samples": list(samples)}
        )
    return rows


def _convolution(trainer: Trainer) -> str:
    """How the loop runs its convolutions, in words."""
    dense = trainer.model.conv
    return getattr(getattr(dense, "keywords", {}).get("dense"), "__name__", getattr(dense, "__name__", "?"))


def _check_loss(name: str, loss: float) -> None:
    if not math.isfinite(loss):
        raise ValueError(f"{name}: the loss is {loss}; a diverged net is not timed")
