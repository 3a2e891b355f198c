"""Convolutions on a GPU: how fast they are (`experiments.bench.gpu_measures`); ``pytest -m gpu`` says whether right.

Every measurement yields what it has so far, so that a record is there if it must be stopped.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import conv as bench_conv
from experiments.bench import step as bench_step
from experiments.bench.conv_ways import BOUNDS, expected, make_problem
from experiments.bench.device_time import device_time
from pallas_kernels import compat
from pallas_kernels.pattern_conv import cases, launches, mosaic_gpu
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.schedule import costs
from pallas_kernels.tuning import Cache, Timing, autotune, time_together

Outcome = Iterator[dict[str, Any]]

# What the sweeps look at: (image, batch, channels) and the masks' tiles (filters, channels). Small tiles, then larger
# ones: the larger a tile of outputs, the fewer bytes the second cache has to deliver for a product.
_SWEPT_LAYERS = ((28, 128, 128), (8, 512, 256))
_SWEPT_TILES = ((64, 16), (64, 32), (16, 64), (32, 64), (64, 64), (128, 64))
# Steps of smoke runs are interpreted: the smallest that the kernels take.
_TINY = Case("tiny-n8-2x2-64", (2, 2), 8, 64, 64, tile=(64, 64), dtype="bfloat16", layout="HWNC")


def measure_shift(smoke: bool, budget_s: float, packed: str | None) -> Outcome:
    """One pattern a channel for all filters, nothing removed: the portable form against dense, no kernel of our own."""
    layers = [cases.SMALL[0]] if smoke else _spread([*cases.vgg16(512), *cases.resnet50(128)])
    chosen = cases.with_changes(layers, "" if smoke else "-2.25x", tile=(None, 1), layout="NHWC")
    yield from _measured(chosen, smoke, budget_s, ours=("xla", "xla packed"))


def measure_sweeps(smoke: bool, budget_s: float, packed: str | None) -> Outcome:
    """Forward pass of the Hopper kernel, tile by tile: small tiles of the mask, and how many bytes a product reads."""
    missing = kernels_missing(smoke)
    if missing:
        yield {"skipped": missing}
        return
    deadline = time.monotonic() + budget_s
    rng, rows, left_out = np.random.default_rng(), [], []
    chosen = (
        [_TINY]
        if smoke
        else [
            Case(
                f"sweep-n{batch}-{size}x{size}-{width}-tile{tile[0]}x{tile[1]}",
                (size, size),
                batch,
                width,
                width,
                padding=((1, 1), (1, 1)),
                tile=tile,
                removed=cases.removed_for(4.5),
                dtype="bfloat16",
                layout="HWNC",
            )
            for tile in _SWEPT_TILES
            for size, batch, width in _SWEPT_LAYERS
        ]
    )
    for case in chosen:
        if time.monotonic() > deadline:
            left_out.append(case.name)
        else:
            with kernels(smoke)():
                rows += _sweep(case, rng, smoke)
        yield {"sweeps": rows, "left_out": left_out}
    if not any(row["median"] for row in rows):
        raise AssertionError(f"no tiles could be measured; the first: {(rows or ['none was begun'])[0]}")


def _sweep(case: Case, rng: np.random.Generator, smoke: bool) -> list[dict[str, Any]]:
    problem = make_problem(case, rng)
    geometry, x = problem.geometry["HWNC"], problem.x["HWNC"]
    structure = jax.tree.map(np.asarray, problem.structure)
    options = launches.options(structure, geometry, case.batch, "forward")
    options = dict(itertools.islice(options.items(), 2 if smoke else 8))
    works = {
        name: launches.launch(structure, geometry, case.batch, False, compat.multiprocessors(x), tiles)
        for name, tiles in options.items()
    }

    def candidate(name: str) -> Callable[[], jax.Array]:
        held = dataclasses.replace(problem.structure, work=(works[name],))
        function = jax.jit(lambda x, w, structure: mosaic_gpu.forward(x, w, structure, geometry))
        return lambda: function(x, problem.w, held)

    wanted = jnp.transpose(expected(problem, "forward", on_cpu=smoke), (1, 2, 0, 3))
    facts = launches.facts(structure, geometry, case.batch, "forward")
    try:
        # Kept: `pattern_conv` takes the winner where such a convolution is run.
        choice = autotune(
            {name: candidate(name) for name in options},
            wanted,
            facts,
            tolerance=BOUNDS[case.dtype],
            rounds=1 if smoke else 10,
            budget_s=2,
            cache=None if smoke else Cache(),
            timer=time_together if smoke else _on_the_device,
        )
    except RuntimeError as error:
        return [{"case": case.name, "tiles": "", "median": None, "why": str(error)[:1000]}]
    flops = bench_conv.work_of(problem, "forward")["flops"]
    rows = []
    for name in options:
        timing = choice.timings.get(name)
        row = {"case": case.name, "tiles": name, "best": name == choice.winner, "why": choice.dropped.get(name)}
        row["median"] = timing.median_s if timing else None
        if timing:
            row["flops_per_s"] = flops / timing.median_s
            cost = costs(works[name].plan, structure.pairs, structure.pair_counts)
            row["read_bytes_per_s"] = 2 * float(cost.sum()) / timing.median_s
        rows.append(row)
    return rows


def _on_the_device(functions: dict[str, Callable[[], Any]], *, rounds: int, budget_s: float) -> dict[str, Timing]:
    """As `time_together`, by a profiler's trace: a host's clock sees the launch of a call, which takes longer."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.monotonic() + budget_s
    while not all(times.values()) or (time.monotonic() < end and len(min(times.values(), key=len)) < rounds):
        for name, function in functions.items():
            times[name].append(1e-3 * (device_time(function, 5).milliseconds or np.nan))
    return {
        name: Timing(*(float(np.quantile(seconds, q)) for q in (0.5, 0.2, 0.8)), len(seconds), 5)
        for name, seconds in times.items()
    }


def measure_dense(smoke: bool, budget_s: float, packed: str | None) -> Outcome:
    """The dense convolutions in NHWC and HWNC: what everything else is compared with."""
    layers = [_TINY] if smoke else _spread([*cases.vgg16(512), *cases.resnet50(128)])
    yield from _measured(layers, smoke, budget_s, ours=())


def measure_mosaic(smoke: bool, budget_s: float, packed: str | None) -> Outcome:
    """The Hopper kernels against the best dense form, at 2.25x and at 8x."""
    missing = kernels_missing(smoke)
    if missing:
        yield {"skipped": missing}
        return
    # Both reductions of a layer one after the other: the dense programs are the same.
    pairs: dict[str, list[Case]] = {}
    for case in bench_conv.list_of("gpu"):
        if not case.name.startswith("vgg16-n128"):
            pairs.setdefault(case.name.rpartition("-")[0], []).append(case)
    chosen = [_TINY] if smoke else [case for pair in _spread(list(pairs.values())) for case in pair]
    yield from _measured(chosen, smoke, budget_s, ours=("mosaic_gpu",))


def measure_steps(smoke: bool, budget_s: float, packed: str | None) -> Outcome:
    """Whole training steps of VGG-13 and ResNet-18, dense against pruned, as `python -m experiments bench step`."""
    deadline = time.monotonic() + budget_s
    nets, width, batch_size, tile = ("vgg13", "resnet18"), 1.0, 512, cases.BLOCK
    if smoke:
        nets, width, batch_size, tile = ("small",), 1.0, 4, (16, 1)
    rows, left_out = [], []
    for net in nets:
        if time.monotonic() > deadline:
            left_out.append(net)
        else:
            measured = bench_step.measure_step(net, width, batch_size, 1 if smoke else 20, "bfloat16", tile)
            rows += [row | {"name": f"{net}, batch {batch_size}: {row['name']}"} for row in measured]
        yield {"steps": rows, "left_out": left_out}
    if not rows:
        raise AssertionError("none was measured")


def _measured(chosen: Sequence[Case], smoke: bool, budget_s: float, ours: Sequence[str]) -> Outcome:
    deadline = time.monotonic() + budget_s
    ceilings = bench_conv.measure_ceilings(small=smoke)
    rng, rows, left_out = np.random.default_rng(), [], []
    layouts = ("NHWC", "HWNC")
    for case in chosen:
        if time.monotonic() > deadline:
            left_out.append(case.name)
        else:
            rows += bench_conv.measure(
                [case], rng, ceilings, ours=ours, layouts=layouts, rounds=1 if smoke else 20, kernels=kernels(smoke)
            )
        yield {"ceilings": ceilings, "conv_rows": rows, "left_out": left_out}
    wrong = [f"{row['case']}, {row['direction']}, {name}: {why}" for row in rows for name, why in row["wrong"].items()]
    if wrong or not rows:
        raise AssertionError(f"{len(wrong)} ways are wrong; the first: {(wrong or ['none was measured'])[0]}")


def _spread(items: list[Any]) -> list[Any]:
    """Every third, then those between: what the time does not reach is not one end of the list."""
    return [item for start in range(3) for item in items[start::3]]


def kernels(smoke: bool) -> Callable[[], contextlib.AbstractContextManager]:
    """What the kernels run in: interpreted where this is a trial on a CPU."""
    if smoke and compat.HAS_MOSAIC_GPU and mosaic_gpu.why_not_here() is not None:
        return lambda: compat.interpreted(num_cores_or_threads=1)
    return contextlib.nullcontext


def kernels_missing(smoke: bool) -> str | None:
    """Why the Hopper kernels cannot run here; None if they can, interpreted at least."""
    if smoke:
        return None if compat.HAS_MOSAIC_GPU else f"{compat.MOSAIC_GPU_NEEDS}, this is {jax.__version__}"
    return mosaic_gpu.why_not_here() or (None if compat.HAS_MOSAIC_GPU else compat.MOSAIC_GPU_NEEDS)
