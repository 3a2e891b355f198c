"""The CPU's kernels on layers of VGG-13 and ResNet-50, beside the dense convolutions of everybody.

    python -m experiments bench conv --which cpu --engines-python OTHER/bin/python [--chain 8] --out RECORD.json

All masks of a layer are timed in the same rounds as its dense forms, of which the fastest is the base of all ratios:
this project's own, XLA's, and with another interpreter those of onnxruntime and PyTorch (oneDNN). With a chain, so
many calls of a layer stand in one program, each reading what the one before wrote, as in a net.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench.conv_engines import ENGINES, ConvEngine
from experiments.bench.conv_ways import (
    BOUNDS,
    DIRECTIONS,
    Direction,
    Problem,
    Way,
    dense_ways,
    judge,
    make_problem,
    native_way,
    with_mask,
)
from experiments.bench.worker import Failed
from experiments.records import setting, write_json
from experiments.report.layers import layers_tables
from pallas_kernels import native
from pallas_kernels.pattern_conv.cases import Case, with_changes
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.tuning import time_together

# XLA's own form of each direction in this project's dense ways, the one that is fastest on CPUs, and the native one.
_XLA = {"forward": "XLA", "input gradient": "flipped", "weight gradient": "channel-major patches"}
_NATIVE = "backend dense"
# One direction of one layer begins no new round after this.
_BUDGET_S = 6.0
# Of every function alike, as of the other engines': calls that are not counted, then a sample.
_WARM_S, _SAMPLE_S = 0.02, 0.03


def run(
    chosen: Sequence[Case], asked: str, rounds: int, engines_python: str | None, out: Path | None, chain: int = 1
) -> str:
    """Measure, save the record when ``out`` is given, and return the tables to print.

    Args:
        chosen: cases, those of one layer and batch beside each other.
        asked: the options that chose them, for the record.
        rounds: samples of every way.
        engines_python: an interpreter with onnx, onnxruntime and PyTorch; None leaves them out.
        out: a JSON file.
        chain: calls of a layer in one program; above 1 only the forward pass of layers that can follow themselves.

    Raises:
        ValueError: no layer can follow itself; there are no native kernels here, or that interpreter has none of the
            engines.
    """
    if chain > 1:
        chosen = [case for case in chosen if case.cin == case.cout and case.x_shape == case.y_shape]
        asked += f" --chain {chain}"
    if chain < 1 or not chosen:
        raise ValueError(f"--chain {chain}: expected 1 or more, and a layer whose output is as large as its input")
    reason = native.why_not()
    if reason is not None:
        raise ValueError(f"--which cpu measures the native kernels: {reason}; --which portable does without")
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    loads, begin = [os.getloadavg()], time.perf_counter()
    results, unavailable = [], {}
    with contextlib.ExitStack() as stack:
        engines = []
        for name in ENGINES if engines_python else ():
            try:
                engines.append(stack.enter_context(ConvEngine(name, engines_python)))
            except (Failed, OSError) as error:
                unavailable[name] = str(error)
        if engines_python and not engines:
            raise ValueError(f"--engines-python {engines_python} has none of the engines: {unavailable}")
        versions = [engine.version for engine in engines]
        directions = DIRECTIONS if chain == 1 else DIRECTIONS[:1]
        rng = np.random.default_rng(seed)
        for row in measure(chosen, rng, engines, directions=directions, rounds=rounds, chain=chain):
            print(f"{row['layer']}, N = {row['batch']}, {row['direction']}", file=sys.stderr, flush=True)
            results.append(row)
    asked += " --engines-python ..." if engines_python else ""
    record = {
        "what": "layers",
        "command": f"python -m experiments bench conv --which cpu{asked} --rounds {rounds}",
        "setting": setting(),
        # At the beginning and at the end: (1, 5, 15 minutes) each.
        "load_average": [*loads, os.getloadavg()],
        "seconds": time.perf_counter() - begin,
        "seed": seed,
        "instructions": native.instruction_set(),
        "chain": chain,
        "engines": versions,
        "unavailable": unavailable,
        "results": results,
    }
    if out is not None:
        write_json(out, record)
    return layers_tables(record)


def measure(
    chosen: Sequence[Case],
    rng: np.random.Generator,
    engines: Sequence[ConvEngine] = (),
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    rounds: int = 12,
    chain: int = 1,
) -> Iterator[dict[str, Any]]:
    """Time all masks of each layer, and its dense forms, in turns; one row of plain data a layer, batch and direction.

    Args:
        chosen: cases, float32 and NHWC; those that differ in their masks alone, one after the other, make a layer.
        rng: draws masks and inputs.
        engines: of other libraries.
        directions: which of the three.
        rounds: samples of every way.
        chain: calls in one program, of layers that can follow themselves; above 1 of the forward pass alone.

    Returns:
        An iterator over rows ``{"layer", "batch", "direction", "dense_flops", "dense": name of the fastest dense form,
        "ways": [{"name", "mask": None for dense ones or {"tile", "reduction"}, "median", "p20", "p80" in seconds a
        call, "samples", "ratio", "error"}], "wrong": {way: reason}}``.
    """
    for _, members in itertools.groupby(chosen, _layer_of):
        members = list(members)
        # Nothing is removed from what the dense forms compute.
        (whole,) = with_changes(members[:1], tile=(None, None), patterns=(), removed=0.0)
        dense = make_problem(whole, rng)
        pruned = {name_of(case): with_mask(dense, case, rng) for case in members}
        for direction in directions:
            yield _row(members[0], dense, pruned, direction, engines, rounds, chain)


def name_of(case: Case) -> str:
    """Its mask: tile, and how many times less work."""
    return case.name.partition("-tile")[2] or case.name


def layer_name(case: Case) -> str:
    """Net and shape."""
    return f"{case.name.partition('-')[0]} {case.image[0]}x{case.image[1]}, {case.cin} to {case.cout}"


def _layer_of(case: Case) -> tuple[Any, ...]:
    return case.name.partition("-")[0], case.x_shape, case.w_shape, case.strides, case.padding


def _row(
    case: Case,
    dense: Problem,
    pruned: Mapping[str, Problem],
    direction: Direction,
    engines: Sequence[ConvEngine],
    rounds: int,
    chain: int,
) -> dict[str, Any]:
    functions: dict[str, Any] = {}
    errors, wrong, masks = {}, {}, {}

    def admit(name: str, function: Any, error: float, reason: str | None) -> None:
        if reason is None:
            functions[name], errors[name] = function, error
        else:
            wrong[name] = reason

    wanted = reference(dense, direction, chain)
    ways = dense_ways(dense, direction, only=(_XLA[direction], _NATIVE))
    if chain > 1:
        # In a net the weights are packed.
        ways[1:] = [dataclasses.replace(native_way(dense, direction, "cpu packed"), name=_NATIVE, ours=False)]
    for way in [_chained(way, chain) for way in ways]:
        name = "ClickTrain dense" if way.name == _NATIVE else "XLA" if way.name == "XLA" else f"XLA, {way.name}"
        admit(name, way, *judge(way, direction, wanted, dense))
    for name, (remote, error, reason) in _elsewhere(dense, direction, wanted, engines, chain).items():
        admit(name, remote, error, reason)
    for mask, problem in pruned.items():
        # The gradient of the weights is the dense one where they are retained.
        gradient = direction == "weight gradient"
        right = jnp.where(problem.mask, wanted, 0) if gradient else reference(problem, direction, chain)
        kinds = ("cpu packed",) if chain > 1 else ("cpu", "cpu packed") if direction == "forward" else ("cpu",)
        for kind in kinds:
            way = _chained(native_way(problem, direction, kind), chain)
            name = f"{kind} {mask}"
            masks[name] = {"tile": list(problem.case.tile), "reduction": problem.mask.size / problem.mask.sum()}
            admit(name, way, *judge(way, direction, right, problem))
    timings = (
        time_together(functions, rounds=rounds, budget_s=_BUDGET_S, warm_s=_WARM_S, sample_s=_SAMPLE_S)
        if functions
        else {}
    )
    medians = {name: timing.median_s for name, timing in timings.items() if name not in masks}
    base = min(medians, key=medians.get, default=None)
    return {
        "layer": layer_name(case),
        "batch": case.batch,
        "direction": direction if chain == 1 else f"{direction}, {chain} in a program",
        "dense_flops": float(case.dense_flops()),
        "dense": base,
        "ways": [
            {
                "name": name,
                "mask": masks.get(name),
                "median": timing.median_s / chain,
                "p20": timing.low_s / chain,
                "p80": timing.high_s / chain,
                "samples": timing.samples,
                "ratio": None if base is None else medians[base] / timing.median_s,
                "error": errors[name],
            }
            for name, timing in timings.items()
        ],
        "wrong": wrong,
    }


def _chained(way: Way, count: int) -> Way:
    """So many calls of a forward pass in one program."""
    if count == 1:
        return way

    def program(x: Any, *others: Any) -> Any:
        return functools.reduce(lambda y, _: way.function(y, *others), range(count), x)

    return dataclasses.replace(way, function=jax.jit(program))


def _elsewhere(
    problem: Problem, direction: Direction, wanted: jax.Array, engines: Sequence[ConvEngine], chain: int
) -> dict[str, tuple[Any, float, str | None]]:
    """(function, error, why it is wrong or None) of each form of the other engines."""
    case, found = problem.case, {}
    geometry = problem.geometry[case.layout]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arrays.npz"
        np.savez(path, x=problem.x[case.layout], w=problem.w, dy=problem.dy[case.layout])
        for engine in engines:
            try:
                remotes, results = engine.prepare(path, direction, geometry.strides, geometry.padding, chain)
            except Failed as reason:
                found[engine.engine] = (None, np.inf, str(reason))
                continue
            for form, remote in remotes.items():
                error = float(np.abs(results[form] - np.asarray(wanted)).max() / np.abs(wanted).max())
                # So written that a NaN does not pass.
                right = error <= BOUNDS[case.dtype]
                found[form] = (remote, error, None if right else f"wrong by {error:.2g} of the largest value")
    return found


def reference(problem: Problem, direction: Direction, chain: int = 1) -> jax.Array:
    """What is right, summed in float64 tap by tap: NHWC or (kh, kw, cin, cout), as float32; after so many calls.

    NumPy's matrix products, as XLA's convolutions in float64 would take minutes for these layers.
    """
    layout = problem.case.layout
    if chain > 1:
        before = reference(problem, direction, chain - 1)
        return reference(dataclasses.replace(problem, x={layout: before}), direction)
    x, w, dy = (np.asarray(array, np.float64) for array in (problem.x[layout], problem.masked_w, problem.dy[layout]))
    padded = np.pad(x, ((0, 0), *problem.geometry[layout].padding, (0, 0)))
    result = np.zeros({"forward": dy, "input gradient": padded, "weight gradient": w}[direction].shape)
    # As matrices: NumPy multiplies what does not lie in one piece without BLAS.
    pixels = dy.reshape(-1, dy.shape[3])
    for tap, read in _reads(problem.geometry[layout]):
        if direction == "forward":
            result += (padded[read].reshape(-1, x.shape[3]) @ w[tap]).reshape(dy.shape)
        elif direction == "input gradient":
            result[read] += (pixels @ w[tap].T).reshape(padded[read].shape)
        else:
            result[tap] = (padded[read].reshape(-1, x.shape[3]).T @ pixels) * problem.mask[tap]
    if direction == "input gradient":
        (top, _), (left, _) = problem.geometry[layout].padding
        result = result[:, top : top + x.shape[1], left : left + x.shape[2]]
    return jnp.asarray(result.astype(np.float32))


def _reads(geometry: Geometry) -> Iterator[tuple[tuple[int, int], tuple[slice, ...]]]:
    """Each tap, and what it reads of the padded images."""
    for tap in np.ndindex(*geometry.window):
        places = zip(tap, geometry.output, geometry.strides)
        yield tap, (slice(None), *(slice(at, at + (out - 1) * step + 1, step) for at, out, step in places))
