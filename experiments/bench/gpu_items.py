"""What `python -m experiments bench gpu` measures, piece by piece: whole steps, runs, convolutions' device time.

Every measurement yields what it has so far, so that a record is there if it must be stopped.
"""

import contextlib
import dataclasses
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

import clicktrain_jax as ct
import pallas_kernels as pk
from clicktrain_jax import models
from experiments import configs
from experiments.bench import conv as bench_conv
from experiments.bench import step as bench_step
from experiments.bench.conv_ways import DIRECTIONS, Way, make_problem, ways
from experiments.bench.device_time import device_time
from experiments.configs import TrainConfig, price
from experiments.data import DataConfig, load
from experiments.records import read_json, write_json
from experiments.train import loop
from experiments.train.programs import keep_on_disk
from experiments.train.pruned_phase import structure_names
from experiments.train.step import Trainer
from experiments.train.update import update_loop
from pallas_kernels.pattern_conv import cases

Outcome = Iterator[dict[str, Any]]
_NET = "vgg13"
# Updates of a timed loop, and of a traced one: a trace of hundreds of kernels an update takes long to read.
_UPDATES = 20
_SAMPLES = 7
# Whole layers whose device time is asked for, at two batch sizes, by VGG and ResNet.
_SIZES = ("8x8-256-256", "16x16-128-128", "4x4-512-512", "32x32-64-64", "2x2-512-512")
_RESNET = ("28x28-128-128", "14x14-256-256", "56x56-64-64", "7x7-512-512")
_REDUCTIONS = ("2.25x", "8x")


def steps(batch: int, tile: tuple[int, int], ways: tuple[str, ...], out: Path, smoke: bool) -> Outcome:
    """Whole updates in the training loop's compiled form, by the host's clock and on the device.

    Args:
        batch: images of an update.
        tile: of patterns and of removal at 8x, (filters, channels).
        ways: "dense", or the pruned phase's of `experiments.train.pruned_phase`.
        out: folder of the records.
        smoke: tiny, on any device.

    Yields:
        ``{"steps": rows}``; ms and device_ms are of one update.
    """
    net, width, updates = (_NET, 1.0, _UPDATES)
    if smoke:
        net, width, updates, batch, tile = "vgg11", 0.125, 2, 8, (4, 1)
        ways = tuple("pattern" if way == "pattern_hwnc" else way for way in ways)
    trainer = bench_step.random_trainer(net, width, batch, "bfloat16", "xla", tile, 8.0, updates=updates)
    state = trainer.init(0)
    pruned, structures = bench_step.pruned_state(trainer)
    metrics, data, order, _, key = bench_step.arguments(trainer)
    sizes = models.output_sizes(trainer.model, trainer.image_shape)
    work = ct.report(pruned.params, trainer.masks(pruned), output_sizes=sizes)
    rows, programs = [], {}
    # Ours first: while others compile theirs nothing disturbs them, whereas what chooses kernels by trying wants quiet.
    for way in sorted(ways, key=lambda way: way == "dense"):
        kind, begin, held = ("dense", state, {}) if way == "dense" else ("pruned", pruned, structures)
        row = {
            "net": net,
            "width": width,
            "batch": batch,
            "tile": list(tile),
            "way": way,
            "precision": "bfloat16",
            "conv_compression": 1.0 if way == "dense" else work.conv_compression,
            "multiply_adds": work.multiply_adds,
            "retained_multiply_adds": work.multiply_adds if way == "dense" else work.retained_multiply_adds,
            "layers_by_pattern": [] if way == "dense" else structure_names(structures),
        }
        rows.append(row)
        arguments = (begin, metrics, data, order, np.int32(0), key, held)
        with _device(out, alone=way == "dense"):
            start = time.perf_counter()
            lowered = jax.jit(update_loop(trainer, kind, batch, way, updates)).lower(*arguments)
            programs[way] = lowered.compile(pk.compiler_options("bfloat16")), arguments
            row["compile_seconds"] = time.perf_counter() - start
        yield {"steps": rows}
    with _device(out, alone=True):
        for row in rows:
            row |= _timed(*programs[row["way"]], updates, batch)
            yield {"steps": rows}


def _timed(program: Callable[..., Any], arguments: tuple[Any, ...], updates: int, batch: int) -> dict[str, Any]:
    jax.block_until_ready(program(*arguments))
    samples = []
    for _ in range(_SAMPLES):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        samples.append(1e3 * (time.perf_counter() - start) / updates)
    found = device_time(lambda: program(*arguments), 1, of_each=updates)
    ms = float(np.median(samples))
    return {"ms": ms, "ms_samples": samples, "images_per_s": 1e3 * batch / ms, **found.record(longest=30)}


@contextlib.contextmanager
def _device(out: Path, *, alone: bool) -> Iterator[None]:
    """Hold the device alone, or beside others that do not measure either."""
    with open(out / "device.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield


def convolutions(smoke: bool, seconds: float) -> Outcome:
    """Device time of single layers, dense (NHWC, through XLA) and by the Hopper kernels, in three directions.

    Args:
        smoke: one tiny layer by the portable form, on any device.
        seconds: no new layer is begun after so long.

    Yields:
        ``{"conv_device": rows, "left_out": names}``; us are microseconds of a call.
    """
    end = time.monotonic() + seconds
    known = {case.name: case for case in bench_conv.list_of("cpu" if smoke else "gpu")}
    names = [f"vgg16-n{n}-{size}-{r}" for size in _SIZES for n in (512, 128) for r in _REDUCTIONS]
    names += [f"resnet50-n128-{size}-{r}" for size in _RESNET for r in _REDUCTIONS]
    chosen = [known[name] for name in names if name in known] or list(known.values())[:1]
    layouts, ours = (None, "xla") if smoke else (("NHWC", "HWNC"), "mosaic_gpu")
    dense = "XLA" if smoke else "XLA NHWC"
    rng, rows, left_out = np.random.default_rng(0), [], []
    for case in chosen:
        if time.monotonic() > end:
            left_out.append(case.name)
            continue
        problem = make_problem(case, rng, layouts)
        for direction in DIRECTIONS:
            row = {"case": case.name, "direction": direction, **bench_conv.work_of(problem, direction), "us": {}}
            rows.append(row)
            for way in ways(problem, direction, ours=(ours,))[0]:
                if way.name in (dense, ours):
                    _add_device_time(row, way, "dense" if way.name == dense else ours)
        yield {"conv_device": rows, "left_out": left_out}


def _add_device_time(row: dict[str, Any], way: Way, name: str) -> None:
    try:
        jax.block_until_ready(way())
        found = device_time(way, 10)
    except Exception as failure:  # A kernel may fail in any way; the others shall be measured.
        row.setdefault("failed", {})[name] = f"{type(failure).__name__}: {str(failure)[:500]}"
        return
    row["us"][name] = found.milliseconds and 1e3 * found.milliseconds
    row.setdefault("longest", {})[name] = found.record(longest=4)["longest"]


def run_config(name: str, seed: int, out: Path) -> TrainConfig:
    """The config of a run by name, on packed images yet to be named.

    The narrow net of as many multiply-adds as the net without tiles keeps is made from that one's finished run.

    Raises:
        ValueError: an unknown name; that run is not there.
    """
    if name == f"{price.GROUP}-vgg13-narrow-multiply-adds":
        summary = read_json(run_folder(out, equal_work(), seed) / "summary.json")
        config = price.narrow("multiply-adds", summary["retained_multiply_adds"])
    else:
        config = configs.get(name)
    # Not measured: it would compile what is then not taken. Blocks are what Hopper's kernels gain by.
    blocks = config.prune is not None and config.prune.tile == cases.BLOCK
    way = "pattern_hwnc" if blocks else "dense"
    host = dataclasses.replace(
        config.loop,
        progress=False,
        checkpoint_every_epochs=config.total_epochs,
        eval_every_epochs=5,
        pruned_convolution=way,
    )
    return dataclasses.replace(config, seed=seed, precision="bfloat16", loop=host)


def equal_work() -> str:
    """The run whose multiply-adds the narrow net has."""
    return f"{price.GROUP}-vgg13-own-9.0x-1x1"


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Where a run lies below the records' folder."""
    return out / "runs" / f"{name}-seed{seed}"


def train(name: str, seed: int, out: Path, packed: str | None, at_once: int, smoke: bool) -> dict[str, Any]:
    """Train one run, or go on with it; its setting says how many ran at once on the device.

    Raises:
        ValueError: no images; what `experiments.train.loop.train` refuses.
    """
    config = run_config(name, seed, out)
    if smoke:
        data, prune = DataConfig("digits", train_examples=140), config.prune
        prune = prune and dataclasses.replace(
            prune, fractions=(), target=4.0, tile=(1, 1), floor=None, select_epoch=0, prune_epoch=1, importance_steps=1
        )
        # The loop that a GPU takes, not the one that "auto" takes on a CPU.
        config = dataclasses.replace(
            config,
            net="small",
            data=data,
            epochs=2,
            batch_size=32,
            width=0.25,
            lr_milestones=(),
            mixup_epoch=None,
            method=prune,
            loop=dataclasses.replace(config.loop, epoch_program="scan"),
        )
    elif packed is None:
        raise ValueError(f"{name} wants images: give --data.dir an archive made by `python -m experiments pack-data`")
    else:
        config = dataclasses.replace(config, data=DataConfig(config.data.name, dir=packed))
    folder = run_folder(out, name, seed)
    setting = folder / "setting.json"
    try:
        keep_on_disk()
        summary = loop.train(config, folder, trainer=Trainer(config, load(config.data)))
    finally:  # Of one that was stopped as well.
        if setting.exists():
            write_json(setting, read_json(setting) | {"runs_at_once": at_once})
    return {
        key: summary[key]
        for key in ("final_top1", "conv_compression", "retained_multiply_adds", "train_seconds", "compile_seconds")
    }
