"""Convolutions by patterns against the dense ones, layer by layer, each way judged before it is timed.

    python -m experiments bench conv --which portable --out RECORD.json

Here are the lists of a GPU and of the portable form; a CPU's own kernels are measured by `experiments.bench.layers`.
"""

import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import layers as bench_layers
from experiments.bench.conv_ways import DIRECTIONS, OURS, Direction, Problem, Way, expected, judge, make_problem, ways
from experiments.records import setting, write_json
from experiments.report.conv import conv_tables
from pallas_kernels import native
from pallas_kernels.pattern_conv import cases
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.geometry import Geometry, Layout
from pallas_kernels.tuning import time_together

Which = Literal["cpu", "portable", "gpu", "auto"]

# How many times faster than dense the portable form's forward pass shall be on a CPU with two cores.
GOALS = {
    **dict(zip((f"channel-n1-{shape}" for shape in ("32x32-64", "16x16-256", "8x8-512")), (1.2, 1.8, 2.5))),
    **dict(zip((f"channel-n32-{shape}" for shape in ("32x32-64", "16x16-256", "8x8-512")), (1.4, 1.9, 2.1))),
    "tile64-n1-16x16-256": 3.0,
    "tile64-n1-8x8-512": 4.5,
    "tile64-n32-16x16-256": 1.9,
    "tile64-n32-8x8-512": 3.3,
    "block64-n1-16x16-256": 3.5,
    "block64-n1-8x8-512": 5.5,
    "block64-n32-16x16-256": 2.4,
    "block64-n32-8x8-512": 5.0,
}

# In blocks of (64, 64) a layer of 64 channels has one or two of them: at 8x it would lose everything, or too little.
# Tiles of (64, 16) keep such a layer among the others, where leaving it out would flatter the mean: it is limited by
# memory. With its few tiles it keeps 1/9 of the work (as other small layers do), which its row says.
_NARROW, _NARROW_TILE = 64, (64, 16)

# One direction of one case begins no new round after this.
_BUDGET_S = 6.0


def run(
    which: Which = "auto",
    filter: str = "",
    rounds: int = 20,
    engines_python: str | None = None,
    chain: int = 1,
    out: Path | None = None,
) -> str:
    """Convolutions and their gradients by patterns against the dense ones, layer by layer.

    Args:
        which: list of layers; cpu is that of the native kernels, auto goes by jax's first device.
        filter: only layers whose name holds this regular expression.
        rounds: samples of each function.
        engines_python: with --which cpu, an interpreter that has onnx, onnxruntime and PyTorch, to be compared with.
        chain: with --which cpu, calls of a layer one after the other in one program, as in a net.
        out: a JSON file to save the record in.

    Raises:
        ValueError: no case is left, or the list of a GPU is asked for without one.
    """
    platform = jax.default_backend()
    if which == "auto":
        which = "gpu" if platform == "gpu" else "cpu" if native.why_not() is None else "portable"
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: expected 1 or more")
    if (which == "gpu") != (platform == "gpu"):
        kind = "gpu" if which == "gpu" else "cpu"
        raise ValueError(f"--which {which}: jax runs on {platform} here; the list is for a {kind}")
    try:
        chosen = [case for case in list_of(which) if re.search(filter, case.name)]
    except re.error as error:
        raise ValueError(f"--filter {filter!r} is no regular expression: {error}") from None
    if not chosen:
        raise ValueError(f"--filter {filter!r} matches no case; one is {list_of(which)[0].name}")
    asked = f" --filter '{filter}'" if filter else ""
    if which == "cpu":
        return bench_layers.run(chosen, asked, rounds, engines_python, out, chain)
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    loads = [os.getloadavg()]
    ceilings = measure_ceilings()
    results = []
    for row in measure(chosen, np.random.default_rng(seed), ceilings, rounds=rounds):
        print(f"{len(results) + 1}/{len(chosen) * len(DIRECTIONS)} {row['case']}, {row['direction']}", file=sys.stderr)
        results.append(row)
    record = {
        "what": "conv",
        "command": f"python -m experiments bench conv --which {which}{asked} --rounds {rounds}",
        "setting": setting(),
        # At the beginning and at the end: (1, 5, 15 minutes) each.
        "load_average": [*loads, os.getloadavg()],
        "seed": seed,
        "ceilings": ceilings,
        "results": results,
    }
    if out is not None:
        write_json(out, record)
    return conv_tables(record)


def list_of(which: Literal["cpu", "portable", "gpu"]) -> tuple[Case, ...]:
    """The cases that are measured on a kind of device."""
    lists = {"cpu": cases.CPU, "portable": cases.PORTABLE}
    return lists[which] if which in lists else tuple(_wide_enough(case) for case in cases.GPU)


def _wide_enough(case: Case) -> Case:
    narrow = case.removed and case.cin <= _NARROW
    return dataclasses.replace(case, tile=_NARROW_TILE) if narrow else case


def measure(
    chosen: Sequence[Case],
    rng: np.random.Generator,
    ceilings: dict[str, Any],
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    ours: Sequence[str] = OURS,
    layouts: Sequence[Layout] | None = None,
    rounds: int = 20,
    on_cpu: bool | None = None,
    kernels: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[dict[str, Any]]:
    """Time all ways of each case and direction in turns; one row of plain data each.

    Args:
        chosen: cases.
        rng: draws masks and inputs.
        ceilings: of `measure_ceilings`.
        directions: which of the three.
        ours: which ways by patterns.
        layouts: of the dense ways; NHWC and HWNC when None, on a CPU the case's own alone (there XLA brings every
            layout into the same form: measured alike).
        rounds: samples of every way.
        on_cpu: whether the reference is computed in float64 on the CPU; when None, if jax runs there.
        kernels: everything runs inside such a context.

    Returns:
        An iterator over rows; seconds are seconds a call.
    """
    here = jax.default_backend() == "cpu"
    for case in chosen:
        wanted_layouts = layouts or ((case.layout,) if here else ("NHWC", "HWNC"))
        problem = make_problem(case, rng, wanted_layouts)
        for direction in directions:
            with kernels():
                yield _row(problem, direction, ceilings, ours, rounds, here if on_cpu is None else on_cpu)


def _row(
    problem: Problem, direction: Direction, ceilings: dict[str, Any], ours: Sequence[str], rounds: int, on_cpu: bool
) -> dict[str, Any]:
    case = problem.case
    found, refused = ways(problem, direction, ours=ours)
    wanted = expected(problem, direction, on_cpu=on_cpu)
    errors, wrong, right = {}, {}, {}
    for way in found:
        try:
            error, reason = judge(way, direction, wanted, problem)
        except Exception as failure:  # A kernel may fail in any way; the others shall be measured.
            error, reason = math.inf, f"{type(failure).__name__}: {(str(failure).strip() or '?').splitlines()[0]}"
        errors[way.name] = error
        if reason is None:
            right[way.name] = way
        else:
            wrong[way.name] = reason
    timings = time_together(right, rounds=rounds, budget_s=_BUDGET_S) if right else {}
    medians = {name: timings[name].median_s for name, way in right.items() if not way.ours}
    best = min(medians, key=medians.get, default=None)
    work = work_of(problem, direction)
    floor_s = max(work["flops"] / ceilings["flops_per_s"], work["bytes"] / ceilings["bytes_per_s"])

    def facts(name: str, way: Way) -> dict[str, Any]:
        timing = timings[name]
        return {
            "name": name,
            "ours": way.ours,
            "note": way.note,
            "median": timing.median_s,
            "p20": timing.low_s,
            "p80": timing.high_s,
            "samples": timing.samples,
            "ratio": None if best is None else medians[best] / timing.median_s,
            "error": errors[name],
            "flops_per_s": work["flops"] / timing.median_s,
            "dense_flops_per_s": work["dense_flops"] / timing.median_s,
            "floor_share": floor_s / timing.median_s,
        }

    return {
        "case": case.name,
        "direction": direction,
        "dtype": case.dtype,
        "layout": case.layout,
        "tile": list(problem.structure.tile),
        "layers": case.layers,
        **work,
        "floor_s": floor_s,
        "goal": GOALS.get(case.name) if direction == "forward" else None,
        "dense": best,
        "ways": [facts(name, way) for name, way in right.items()],
        "refused": refused,
        "wrong": wrong,
    }


def work_of(problem: Problem, direction: Direction) -> dict[str, float]:
    """What must be done at least, and what the dense convolution does.

    Returns:
        ``flops``: of the retained weights, a multiply-add counted as two, where a tap meets the image: what reads
        padding need not be done. ``dense_flops``: of all weights, padding included, as is usual. ``reduction``: all
        weights over retained ones. ``bytes``: every input read and every output written once, weights as far as they
        are retained; the weight gradient is written whole.
    """
    case, mask = problem.case, problem.mask
    geometry = problem.geometry[next(iter(problem.geometry))]
    met = np.outer(*_pixels_met(geometry)).ravel()  # for each tap, output pixels at which it meets the image
    flops = 2 * case.batch * float(mask.reshape(len(met), -1).sum(axis=1) @ met)
    size = jnp.dtype(case.dtype).itemsize
    images = size * case.batch * (math.prod(case.image) * case.cin + math.prod(geometry.output) * case.cout)
    weights = mask.size * max(size, 4) if direction == "weight gradient" else int(mask.sum()) * size
    return {
        "flops": flops,
        "dense_flops": float(case.dense_flops()),
        "reduction": mask.size / max(int(mask.sum()), 1),
        "bytes": float(images + weights),
    }


def _pixels_met(geometry: Geometry) -> list[np.ndarray]:
    counts = []
    for length, out, size, stride, (before, _) in zip(
        geometry.image, geometry.output, geometry.window, geometry.strides, geometry.padding
    ):
        read = np.arange(out) * stride + np.arange(size)[:, None] - before
        counts.append(((read >= 0) & (read < length)).sum(axis=1))
    return counts


def measure_ceilings(small: bool = False) -> dict[str, Any]:
    """What the device does at best: a large matrix product and a large copy, each at its 20th percentile.

    Args:
        small: tiny ones, to see that this runs.

    Returns:
        ``flops_per_s``, ``bytes_per_s`` (read and written), and in words what was measured.
    """
    here = jax.default_backend() == "cpu"
    dtype = jnp.float32 if here else jnp.bfloat16
    width, length = (64, 2**12) if small else (2048, 2**26) if here else (8192, 2**29)
    square = jax.random.normal(jax.random.key(0), (width, width), dtype)
    product = jax.jit(lambda a: jnp.matmul(a, a))
    # In place: on a CPU new memory costs page faults, which a loop of training does not have.
    negate = jax.jit(jnp.negative, donate_argnums=0)
    state = jnp.ones(length, dtype)

    def copy() -> jax.Array:
        nonlocal state
        state = negate(state)
        return state

    begin = time.perf_counter()
    timings = time_together({"product": lambda: product(square), "copy": copy}, rounds=15, budget_s=10)
    name = jnp.dtype(dtype).name
    return {
        "flops_per_s": 2 * width**3 / timings["product"].low_s,
        "bytes_per_s": 2 * state.nbytes / timings["copy"].low_s,
        "what": f"{name} product of {width} x {width} matrices, {name} copy of {state.nbytes / 2**20:g} MiB in place",
        "seconds": time.perf_counter() - begin,
    }
