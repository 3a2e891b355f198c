"""The ways to compute a convolution and its gradients: dense in several forms, and by patterns; and their judge.

Whoever compares ways gets all of them from here, so that the dense ones are as strong in a check as in a benchmark.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import conv_dense_forms as dense_forms
from experiments.bench.conv_dense_forms import Direction
from pallas_kernels import compat
from pallas_kernels.pattern_conv import api, cpu, xla
from pallas_kernels.pattern_conv.cases import Case, make_mask
from pallas_kernels.pattern_conv.geometry import Geometry, Layout, make_geometry
from pallas_kernels.pattern_conv.launches import for_batch
from pallas_kernels.pattern_conv.structure import Structure, make_structure

DIRECTIONS: tuple[Direction, ...] = ("forward", "input gradient", "weight gradient")
# Left open: whatever `pattern_conv` chooses by itself.
OPEN = "left open"
OURS = ("xla", "xla packed", "cpu", "cpu packed", "mosaic_gpu", OPEN)

# Allowed max|difference| / max|reference|, by dtype.
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case with fresh arrays on the device.

    Attributes:
        case: what it is an instance of.
        mask: bool (kh, kw, cin, cout).
        structure: of the mask.
        geometry: by layout.
        x, dy: by layout, of the case's dtype.
        w: (kh, kw, cin, cout), NaN where nothing is retained: whoever reads there is found out.
        masked_w: the same with zeros there, for the dense ways: the net's own weights after the prune.
    """

    case: Case
    mask: np.ndarray
    structure: Structure
    geometry: dict[Layout, Geometry]
    x: dict[Layout, jax.Array]
    dy: dict[Layout, jax.Array]
    w: jax.Array
    masked_w: jax.Array


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to compute one direction.

    Attributes:
        name: as it stands in tables.
        ours: whether it is by patterns (or might be, where it is left open).
        function: compiled.
        arguments: on the device.
        layout: of x, y and their gradients.
        note: what to say beside the name, "" for nothing.
    """

    name: str
    ours: bool
    function: Callable[..., jax.Array]
    arguments: tuple[Any, ...]
    layout: Layout
    note: str = ""

    def __call__(self) -> jax.Array:
        """Compute it."""
        return self.function(*self.arguments)


def make_problem(case: Case, rng: np.random.Generator, layouts: Sequence[Layout] | None = None) -> Problem:
    """Draw a mask and inputs.

    Args:
        case: what to draw for.
        rng: draws.
        layouts: in which x and dy are wanted; the case's own when None.
    """
    layouts = (case.layout,) if layouts is None else tuple(layouts)
    mask = make_mask(case, rng)
    # On the device: hosts take seconds to draw and to send what a large layer reads.
    keys = jax.random.split(jax.random.key(int(rng.integers(2**31))), 3)
    shapes = (case.x_shape, case.w_shape, case.y_shape)
    x, w, dy = (jax.random.normal(key, shape, jnp.float32) for key, shape in zip(keys, shapes))
    w = w / math.sqrt(math.prod(case.w_shape[:3]))  # outputs of about 1
    x, w, dy = (array.astype(case.dtype) for array in (x, w, dy))
    return Problem(
        case=case,
        mask=mask,
        structure=jax.device_put(make_structure(mask, tile=case.tile)),
        geometry={layout: _geometry(case, layout) for layout in layouts},
        x={layout: _moved(x, case.layout, layout) for layout in layouts},
        dy={layout: _moved(dy, case.layout, layout) for layout in layouts},
        w=jnp.where(mask, w, jnp.array(jnp.nan, w.dtype)),
        masked_w=jnp.where(mask, w, jnp.zeros((), w.dtype)),
    )


def with_mask(problem: Problem, case: Case, rng: np.random.Generator) -> Problem:
    """The same arrays with a mask of another case, which differs in that alone; the problem's own retains all."""
    mask = make_mask(case, rng)
    return dataclasses.replace(
        problem,
        case=case,
        mask=mask,
        structure=jax.device_put(make_structure(mask, tile=case.tile)),
        w=jnp.where(mask, problem.w, jnp.array(jnp.nan, problem.w.dtype)),
        masked_w=jnp.where(mask, problem.w, jnp.zeros((), problem.w.dtype)),
    )


def expected(problem: Problem, direction: Direction, *, on_cpu: bool) -> jax.Array:
    """What the reference says, (batch, rows, columns, channels) or (kh, kw, cin, cout), as float32 on the device.

    Args:
        problem: what to compute.
        direction: which of the three.
        on_cpu: in float64 on the CPU; otherwise in float32 on the device, without shortcuts.
    """
    layout = problem.case.layout
    function = _by_backend("reference", direction, problem.geometry[layout])
    inputs = problem.x[layout], problem.masked_w, problem.dy[layout]
    if on_cpu:
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            wide = (jnp.asarray(np.asarray(array).astype(np.float64)) for array in inputs)
            result = function(*wide, jax.tree.map(np.asarray, problem.structure))
            result = np.asarray(result, np.float32)
    else:
        result = function(*(array.astype(jnp.float32) for array in inputs), problem.structure)
    result = jnp.asarray(result)
    return result if direction == "weight gradient" else _moved(result, layout, "NHWC")


def ways(problem: Problem, direction: Direction, *, ours: Sequence[str] = OURS) -> tuple[list[Way], dict[str, str]]:
    """Every way, the dense ones first, in all layouts that the problem has.

    Args:
        problem: what to compute.
        direction: which of the three.
        ours: which ways by patterns, of `OURS`; packed ones are there for the forward pass alone, the CPU's on CPUs.

    Returns:
        The ways, and for those that cannot do it here the reason, by name.
    """
    made, refused = dense_ways(problem, direction), {}
    case, structure = problem.case, problem.structure
    several = len(problem.geometry) > 1
    for name in ours:
        if name.startswith("cpu"):
            if jax.default_backend() == "cpu" and (name == "cpu" or direction == "forward"):
                reason = api.supported(structure, case.geometry(), jnp.dtype(case.dtype), case.batch)["cpu"]
                made += [native_way(problem, direction, name)] if reason is None else []
                refused |= {} if reason is None else {name: reason}
            continue
        if name == "xla packed":
            if direction == "forward":
                layout = "NHWC" if "NHWC" in problem.geometry else case.layout
                geometry, packed = problem.geometry[layout], _pack()(problem.w, structure)
                made.append(Way(name, True, _packed(geometry), (problem.x[layout], packed, structure), layout))
            continue
        # The portable form reads any layout; the others are asked in the case's own.
        for layout in problem.geometry if name == "xla" else (case.layout,):
            geometry, note = problem.geometry[layout], ""
            backend = name
            if name == OPEN:
                kind = jnp.dtype(case.dtype)
                backend = note = api.choose(structure, geometry, kind, case.batch, direction.replace(" ", "_"))
            reason = api.module_of(backend).why_not(structure, geometry, jnp.dtype(case.dtype), case.batch)
            if reason is not None:
                refused[name] = reason
                continue
            function = _by_backend(backend, direction, geometry)
            if name == OPEN and direction == "forward":
                function = _left_open(case.strides, geometry.padding, layout)
            held = structure
            if backend == "mosaic_gpu":  # as the training loop holds it
                held = for_batch(structure, geometry, case.batch, compat.multiprocessors(problem.w))
            arguments = (problem.x[layout], problem.w, problem.dy[layout], jax.device_put(held))
            made.append(
                Way(f"{name} {layout}" if several and name == "xla" else name, True, function, arguments, layout, note)
            )
    return made, refused


def native_way(problem: Problem, direction: Direction, name: str) -> Way:
    """The CPU's kernels: "cpu", or "cpu packed" for the forward pass on weights that are packed beforehand."""
    layout = problem.case.layout
    geometry, structure = problem.geometry[layout], problem.structure
    if name == "cpu packed":
        output = geometry.output if geometry.strides == (1, 1) else None
        packed = jax.device_put(cpu.pack(np.asarray(problem.w), jax.tree.map(np.asarray, structure), output))
        return Way(name, True, _packed(geometry, cpu), (problem.x[layout], packed, structure), layout)
    arguments = (problem.x[layout], problem.w, problem.dy[layout], structure)
    return Way(name, True, _by_backend("cpu", direction, geometry), arguments, layout)


def judge(way: Way, direction: Direction, wanted: jax.Array, problem: Problem) -> tuple[float, str | None]:
    """Run a way once over poisoned memory: its error, and why it is wrong, or None.

    Args:
        way: to judge.
        direction: what it computes.
        wanted: of `expected`.
        problem: whose arrays it has.

    Returns:
        max|difference| / max|reference| (infinite where something is not finite), and a sentence or None.
    """
    shape = jax.eval_shape(way.function, *way.arguments)
    # Freed at once: the next array of this size is likely to get this memory; what stays unwritten is NaN.
    jax.block_until_ready(jnp.full(shape.shape, jnp.nan, shape.dtype))
    result = way()
    if direction == "weight gradient":
        # Dense training computes all entries; the retained ones are what must be right.
        error, stray = _compare(result, wanted, problem.mask, way.ours)
    else:
        error, stray = _compare(_moved(result, way.layout, "NHWC"), wanted, None, True)
    error, bound = float(error), BOUNDS[problem.case.dtype]
    if not np.isfinite(error):
        return float("inf"), "its result is not finite: it read what is not retained, or left a place unwritten"
    if error > bound:
        return error, f"wrong by {error:.2g} of the largest value, {bound:g} is allowed"
    if bool(stray):
        return error, "it is not exactly zero where nothing is retained"
    return error, None


@functools.partial(jax.jit, static_argnums=3)
def _compare(result: jax.Array, wanted: jax.Array, mask: jax.Array | None, all_entries: bool) -> Any:
    result = result.astype(jnp.float32)
    stray = jnp.any(~mask & (result != 0)) if mask is not None and all_entries else False
    if mask is not None and not all_entries:
        result = jnp.where(mask, result, 0)
    largest = jnp.max(jnp.abs(wanted), initial=0)
    return jnp.max(jnp.abs(result - wanted), initial=0) / jnp.where(largest > 0, largest, 1), stray


def dense_ways(problem: Problem, direction: Direction, only: Sequence[str] | None = None) -> list[Way]:
    """XLA's own in each layout, on a CPU also the forms that are faster there for some shapes; or ``only`` some."""
    forms: dict[str, Callable[[Direction, Geometry], Callable[..., jax.Array]]] = {"XLA": dense_forms.xla_dense}
    # In 16 bits the CPU's matrix products sum in 16 bits too: their patches are not accurate enough to compare with.
    if jax.default_backend() == "cpu" and problem.case.dtype == "float32":
        forms |= {
            "forward": {"patches": dense_forms.patches},
            "input gradient": {"flipped": dense_forms.flipped, "flipped patches": dense_forms.flipped_patches},
            "weight gradient": {"patches": dense_forms.patches, "channel-major patches": dense_forms.channel_major},
        }[direction]
    made = []
    for layout, geometry in problem.geometry.items():
        arguments = (problem.x[layout], problem.masked_w, problem.dy[layout])
        for form, maker in forms.items():
            name = f"{form} {layout}" if len(problem.geometry) > 1 else form
            made.append(Way(name, False, maker(direction, geometry), arguments, layout))
        # What `pattern_conv` takes where it takes the dense convolution: masks the weights, or their gradient, itself.
        name = f"backend dense {layout}" if len(problem.geometry) > 1 else "backend dense"
        function = _by_backend("dense", direction, geometry)
        made.append(Way(name, False, function, (*arguments, problem.structure), layout))
    return made if only is None else [way for way in made if way.name in only]


def _geometry(case: Case, layout: Layout) -> Geometry:
    shape = (case.batch, *case.image, case.cin) if layout == "NHWC" else (*case.image, case.batch, case.cin)
    return make_geometry(shape, case.window, case.strides, case.padding, layout)


def _moved(array: jax.Array, layout: str, to: str) -> jax.Array:
    if layout == to:
        return array
    return jnp.transpose(array, (1, 2, 0, 3) if layout == "NHWC" else (2, 0, 1, 3))


# Functions of (x, w, dy, structure) or of what is packed, compiled once for each geometry.


@functools.cache
def _by_backend(backend: str, direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """A backend's function of (x, w, dy, structure)."""
    module = api.module_of(backend)
    if direction == "forward":
        return jax.jit(lambda x, w, dy, structure: module.forward(x, w, structure, geometry))
    if direction == "input gradient":
        return jax.jit(lambda x, w, dy, structure: module.input_gradient(dy, w, structure, geometry))
    return jax.jit(lambda x, w, dy, structure: module.weight_gradient(x, dy, structure, geometry))


@functools.cache
def _left_open(strides: tuple[int, int], padding: Any, layout: Layout) -> Callable[..., jax.Array]:
    """As a user calls it."""
    return jax.jit(
        lambda x, w, dy, structure: api.pattern_conv(x, w, structure, strides=strides, padding=padding, layout=layout)
    )


@functools.cache
def _pack() -> Callable[..., Any]:
    return jax.jit(xla.pack)


@functools.cache
def _packed(geometry: Geometry, module: ModuleType = xla) -> Callable[..., jax.Array]:
    return jax.jit(lambda x, packed, structure: module.forward_packed(x, packed, structure, geometry))
