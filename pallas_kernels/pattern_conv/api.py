"""The door: check what is given, choose a backend or refuse with the reason."""

import dataclasses
import importlib
import math
import numbers
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import compat, native
from pallas_kernels.pattern_conv import cpu, dense, mosaic_gpu, xla
from pallas_kernels.pattern_conv.geometry import Geometry, Padding, make_geometry
from pallas_kernels.pattern_conv.launches import for_batch, is_scheduling
from pallas_kernels.pattern_conv.pieces import Direction, dense_work, work
from pallas_kernels.pattern_conv.structure import Structure
from pallas_kernels.pattern_conv.vjp import differentiable, epilogue, with_epilogue

Backend = Literal["reference", "dense", "xla", "cpu", "mosaic_gpu"]
# Of `pack`: the portable form's tuples, or the bytes of the CPU's kernels.
Packed = xla.Packed | jax.Array | np.ndarray
DIRECTIONS: tuple[Direction, ...] = ("forward", "input_gradient", "weight_gradient")
BACKENDS = ("reference", "dense", "xla", "cpu", "mosaic_gpu")

# An estimate must promise this much before the dense convolution is left.
LEAST_GAIN = 1.15


def pattern_conv(
    x: jax.Array,
    w: jax.Array,
    structure: Structure,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    layout: Literal["NHWC", "HWNC"] = "NHWC",
    precision: Any = None,
    backend: Backend | None = None,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """Convolve with the retained weights only.

    Args:
        x: float32, bfloat16, float16 or float64, (batch, height, width, cin), or (height, width, batch, cin) for
            the layout "HWNC".
        w: (kh, kw, cin, cout) of the same dtype. What the structure does not retain is never read as a value: it may
            hold anything.
        structure: of `make_structure`, for w's shape. Its arrays may be traced.
        strides: (rows, columns).
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        layout: of ``x`` and of the result.
        precision: as `jax.lax.conv_general_dilated` takes it, for what XLA multiplies; other kernels sum in float32.
        backend: "reference" (dense with masked weights, in full precision), "dense" (the same in the device's fastest
            form), "xla" (any device, any structure), "cpu" (compiled C++, float32 and bfloat16, NHWC, any structure) or
            "mosaic_gpu" (Hopper and later, 16-bit, HWNC, blocks). One that is named is used or refused; None takes
            the best that is supported, the dense convolution included.
        scale: (cout,), multiplies the output; None for 1.
        bias: (cout,), is added after it; None for 0.
        relu: whether negative outputs become 0.

    Returns:
        The output in x's layout and dtype, summed in float32 or wider. Differentiable in ``x``, ``w``, ``scale`` and
        ``bias``; the gradient of ``w`` has exact zeros where nothing is retained.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a named backend that cannot do this: the message says why and
            what it could do.
    """
    _check(x, w, structure)
    geometry = make_geometry(x.shape, structure.shape[:2], strides, padding, layout, precision)
    batch = x.shape[geometry.batch_axis]
    _check_vectors(structure.shape[3], scale, bias)
    if backend is None:
        chosen: list[Backend] = [choose(structure, geometry, x.dtype, batch, direction) for direction in DIRECTIONS]
        module = Mixed(*chosen)
        module = module_of(module.forward_by) if module.alike else module
    else:
        module = module_of(backend)
        # The GPU's kernels can be traced and interpreted anywhere; those of the CPU are there or not.
        reason = _why_not(backend, structure, geometry, x.dtype, batch) if module is cpu else None
        reason = module.why_not(structure, geometry, x.dtype, batch) if reason is None else reason
        if reason is not None:
            raise ValueError(f"backend {backend!r} cannot do this convolution: {reason}")
    if module is mosaic_gpu:
        structure = for_batch(structure, geometry, batch, compat.multiprocessors(x))
        if is_scheduling():  # for shapes alone: tracing the kernels would take seconds
            return jnp.zeros(geometry.shape(batch, geometry.output, w.shape[3]), x.dtype)
    if getattr(module, "FUSES_EPILOGUE", False) and (relu or scale is not None or bias is not None):
        return with_epilogue(x, w, scale, bias, structure, relu, geometry, module)
    return epilogue(differentiable(x, w, structure, geometry, module), scale, bias, relu)


def pack(
    w: jax.Array | np.ndarray,
    structure: Structure,
    *,
    backend: Literal["xla", "cpu"] = "xla",
    output: tuple[int, int] | None = None,
) -> Packed:
    """The retained weights laid out as a backend reads them, for weights that change no more; see `packed_conv`.

    Args:
        w: floating point, (kh, kw, cin, cout). For "xla", numpy weights with a structure of numpy arrays are packed by
            numpy: at once, with nothing to compile; others may be traced. For "cpu" float32 or bfloat16, concrete.
        structure: that they are packed for.
        backend: that will read them. What is packed for "cpu" is for this machine's instruction set; another one
            refuses it.
        output: (height, width) of what the convolutions make, all of them with strides of 1, where that is known. For
            "cpu": kernels of one 2x2 corner each, in tiles of 8 filters and more, then take 9 products for a square of
            2x2 outputs in place of 16 (Winograd's minimal filtering), where the images are large enough. Their weights
            take 9/4 of the memory, results differ in the last bits, and what is not finite in an image may reach all of
            a square. Other strides are refused then.

    Raises:
        ValueError: another backend, or what "cpu" does not take.
        RuntimeError: for "cpu", there are no native kernels here.
    """
    if backend not in ("xla", "cpu"):
        raise ValueError(f"weights are packed for the backend 'xla' or 'cpu', got {backend!r}")
    return xla.pack(w, structure) if backend == "xla" else cpu.pack(w, structure, output)


def packed_conv(
    x: jax.Array,
    packed: Packed,
    structure: Structure,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    layout: Literal["NHWC", "HWNC"] = "NHWC",
    precision: Any = None,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    relu: bool = False,
) -> jax.Array:
    """The forward pass on weights that `pack` has prepared, by the backend that they were packed for.

    Args:
        x: floating point, (batch, height, width, cin), or (height, width, batch, cin) for the layout "HWNC". Under
            `jax.export` the batch of "NHWC" may be symbolic, with weights packed for "xla".
        packed: of `pack`, from weights of x's dtype.
        structure: that they were packed for.
        strides: (rows, columns).
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        layout: of ``x`` and of the result.
        precision, scale, bias, relu: as `pattern_conv` takes them.

    Raises:
        ValueError: shapes that do not fit, or weights packed for "cpu" where that cannot do this: the message says why.
    """
    if jnp.ndim(x) != 4 or x.shape[3] != structure.shape[2]:
        raise ValueError(f"x of shape {jnp.shape(x)} does not fit a kernel {structure.shape}")
    geometry = make_geometry(x.shape, structure.shape[:2], strides, padding, layout, precision)
    _check_vectors(structure.shape[3], scale, bias)
    if isinstance(packed, tuple):
        return epilogue(xla.forward_packed(x, packed, structure, geometry), scale, bias, relu)
    reason = _why_not("cpu", structure, geometry, x.dtype, x.shape[geometry.batch_axis])
    if reason is not None:
        raise ValueError(f"weights packed for backend 'cpu' cannot be used for this convolution: {reason}")
    return cpu.forward_packed(x, packed, structure, geometry, scale=scale, bias=bias, relu=relu)


def dense_conv(
    x: jax.Array,
    w: jax.Array,
    *,
    strides: Sequence[int] = (1, 1),
    padding: Padding = "SAME",
    layout: Literal["NHWC", "HWNC"] = "NHWC",
    precision: Any = None,
    backend: Literal["xla", "cpu"] | None = None,
) -> jax.Array:
    """The plain convolution in the device's fastest form: what `pattern_conv` must beat. Differentiable.

    Args:
        x: floating point, (batch, height, width, cin), or (height, width, batch, cin) for "HWNC".
        w: (kh, kw, cin, cout) of the same dtype.
        strides: (rows, columns).
        padding: "SAME", "VALID", or ((top, bottom), (left, right)).
        layout: of ``x`` and of the result.
        precision: as `pattern_conv` takes it.
        backend: "cpu": the native kernels with all weights retained; "xla": XLA's own, on any device and for
            `jax.export`; None for the native ones where they can do it.

    Raises:
        ValueError: as `pattern_conv`.
    """
    if jnp.ndim(w) != 4:
        raise ValueError(f"w is (kh, kw, cin, cout), got {jnp.shape(w)}")
    _check_arrays(x, w)
    geometry = make_geometry(x.shape, w.shape[:2], strides, padding, layout, precision)
    if backend not in (None, "xla", "cpu"):
        raise ValueError(f"backend is 'xla', 'cpu' or None for the faster, got {backend!r}")
    if backend == "cpu":
        reason = _why_not("cpu", None, geometry, x.dtype, x.shape[geometry.batch_axis])
        if reason is not None:
            raise ValueError(f"backend 'cpu' cannot do this convolution: {reason}")
    is_native = backend == "cpu"
    if backend is None:
        is_native = dense.is_native(geometry, x.dtype, x.shape[geometry.batch_axis])
    return differentiable(x, w, None, geometry, cpu) if is_native else dense.convolve(x, w, geometry)


def estimated_gain(
    structure: Structure,
    direction: Direction | Literal["training"] = "forward",
    pixels: float = math.inf,
    *,
    backend: Literal["xla", "cpu"] = "xla",
) -> float:
    """How many times faster than dense a form should be on a CPU, by counting its work; below 1: slower.

    Args:
        structure: what is retained.
        direction: of one of the three computations; "training": of all three together.
        pixels: output pixels of all images; for few of them, what "xla" does once a call counts.
        backend: "xla" for the portable form beside XLA's dense convolution, "cpu" for the native kernels beside their
            own dense form.
    """
    directions = DIRECTIONS if direction == "training" else (direction,)
    if backend == "cpu":
        return len(directions) / sum(1 / cpu.estimated_gain(structure, each) for each in directions)
    needed = [work(structure.pieces, structure.tile[0], structure.shape, each, pixels) for each in directions]
    return len(directions) * dense_work(structure.shape, pixels) / max(sum(needed), 1.0)


def supported(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> dict[str, str | None]:
    """For each backend why it cannot do this convolution here, or None where it can.

    Args:
        structure: of `make_structure`.
        geometry: of `pallas_kernels.pattern_conv.geometry.make_geometry`.
        dtype: of images and weights.
        batch: number of images.
    """
    return {name: _why_not(name, structure, geometry, dtype, batch) for name in BACKENDS}


def choose(
    structure: Structure,
    geometry: Geometry,
    dtype: jnp.dtype,
    batch: int,
    direction: Direction = "forward",
    *,
    is_packed: bool = False,
) -> Backend:
    """The backend that is taken when none is named: the fastest by estimate, dense included.

    What is done once a call counts less the more pixels there are, and not at all for weights packed before.
    """
    if _why_not("mosaic_gpu", structure, geometry, dtype, batch) is None:
        return "mosaic_gpu"
    if _why_not("cpu", structure, geometry, dtype, batch) is None and native.is_fast():
        return "cpu" if estimated_gain(structure, direction, backend="cpu") > LEAST_GAIN else "dense"
    # A symbolic batch may be anything: many images, then. Of none there is nothing to count.
    is_counted = isinstance(batch, numbers.Integral) and not is_packed and batch
    pixels = batch * math.prod(geometry.output) if is_counted else math.inf
    gain = estimated_gain(structure, direction, pixels)
    return "xla" if gain > LEAST_GAIN else "dense"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A backend whose three directions are run by different ones."""

    forward_by: Backend
    input_gradient_by: Backend
    weight_gradient_by: Backend

    @property
    def alike(self) -> bool:
        """Whether they are one and the same."""
        return len(set(dataclasses.astuple(self))) == 1

    def forward(self, x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
        """As every backend's."""
        return module_of(self.forward_by).forward(x, w, structure, geometry)

    def input_gradient(self, dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
        """As every backend's."""
        return module_of(self.input_gradient_by).input_gradient(dy, w, structure, geometry)

    def weight_gradient(self, x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
        """As every backend's."""
        return module_of(self.weight_gradient_by).weight_gradient(x, dy, structure, geometry)


def module_of(backend: str) -> ModuleType:
    """The module of a backend's name.

    Raises:
        ValueError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, or None for the best, got {backend!r}")
    return importlib.import_module(f"pallas_kernels.pattern_conv.{backend}")


def _why_not(backend: str, structure: Structure | None, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    module = module_of(backend)
    if module is cpu:
        # What can be told without the kernels first: asking for them may build them.
        return module.why_not(structure, geometry, dtype, batch) or module.why_not_here()
    here = getattr(module, "why_not_here", lambda: None)()
    return here if here is not None else module.why_not(structure, geometry, dtype, batch)


def _check(x: jax.Array, w: jax.Array, structure: Structure) -> None:
    if not isinstance(structure, Structure):
        raise ValueError(f"structure comes from make_structure(mask), got {type(structure).__name__}")
    if jnp.shape(w) != structure.shape:
        raise ValueError(f"w has shape {jnp.shape(w)}, the structure was made for {structure.shape}")
    _check_arrays(x, w)


def _check_vectors(filters: int, scale: jax.Array | None, bias: jax.Array | None) -> None:
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and jnp.shape(vector) != (filters,):
            raise ValueError(f"{name} has one entry a filter, ({filters},), got {jnp.shape(vector)}")


def _check_arrays(x: jax.Array, w: jax.Array) -> None:
    if jnp.ndim(x) != 4:
        raise ValueError(f"x has four axes, (batch, height, width, channels) or as its layout says, got {jnp.shape(x)}")
    if x.shape[3] != w.shape[2]:
        raise ValueError(f"x of shape {x.shape} has {x.shape[3]} channels, a kernel {w.shape} takes {w.shape[2]}")
    if x.dtype != w.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x and w have one floating dtype, got {x.dtype} and {w.dtype}: cast one of them")
