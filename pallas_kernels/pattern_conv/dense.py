"""The dense convolution in its best form on this device: what every other way must beat."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import native
from pallas_kernels.pattern_conv import cpu
from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.reference import masked
from pallas_kernels.pattern_conv.structure import Structure


def why_not(structure: Structure, geometry: Geometry, dtype: jnp.dtype, batch: int) -> str | None:
    """None: everything is supported."""
    return None


def is_native(geometry: Geometry, dtype: jnp.dtype, batch: int) -> bool:
    """Whether the native kernels do it here: on CPUs they are faster than XLA's convolutions."""
    if cpu.why_not(None, geometry, dtype, batch) is not None or cpu.why_not_here() is not None:
        return False
    return native.is_fast()


def forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """x in the geometry's layout, w (kh, kw, cin, cout) of the same dtype -> y of that dtype."""
    if is_native(geometry, x.dtype, x.shape[geometry.batch_axis]):
        return cpu.forward(x, masked(w, structure), None, geometry)
    return convolve(x, masked(w, structure), geometry)


def input_gradient(dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """dy of the output's shape -> dx of the input's."""
    if is_native(geometry, dy.dtype, dy.shape[geometry.batch_axis]):
        return cpu.input_gradient(dy, masked(w, structure), None, geometry)
    return convolve_input_gradient(dy, masked(w, structure), geometry)


def weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry) -> jax.Array:
    """-> dw (kh, kw, cin, cout) in float32 or wider, exact zeros where nothing is retained."""
    if is_native(geometry, x.dtype, x.shape[geometry.batch_axis]):
        return masked(cpu.weight_gradient(x, dy, None, geometry), structure)
    return masked(convolve_weight_gradient(x, dy, geometry), structure)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(x: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """XLA's plain convolution in the geometry's layout, result in x's dtype; differentiable."""
    return window_sum(x, w, geometry.strides, geometry.padding, geometry.layout, precision=geometry.precision)


def convolve_input_gradient(dy: jax.Array, w: jax.Array, geometry: Geometry) -> jax.Array:
    """dy, w -> dx."""
    pads = []
    for length, out, size, stride, (before, _) in zip(
        geometry.image, geometry.output, geometry.window, geometry.strides, geometry.padding
    ):
        spread = (out - 1) * stride + 1
        pads.append((size - 1 - before, length + before - spread))
    flipped = jnp.swapaxes(jnp.flip(w, (0, 1)), 2, 3)
    more = {"dilation": geometry.strides, "precision": geometry.precision}
    return window_sum(dy, flipped, (1, 1), pads, geometry.layout, **more)


def convolve_weight_gradient(x: jax.Array, dy: jax.Array, geometry: Geometry) -> jax.Array:
    """x, dy -> dw in float32 or wider."""
    shape = (*geometry.window, x.shape[3], dy.shape[3])
    place = (geometry.strides, geometry.padding, geometry.layout)
    return window_weight_gradient(x, dy, shape, *place, precision=geometry.precision)


def _forward(x: jax.Array, w: jax.Array, geometry: Geometry) -> tuple:
    return convolve(x, w, geometry), (x, w)


def _backward(geometry: Geometry, kept: tuple, dy: jax.Array) -> tuple:
    x, w = kept
    return convolve_input_gradient(dy, w, geometry), convolve_weight_gradient(x, dy, geometry).astype(w.dtype)


convolve.defvjp(_forward, _backward)


def window_sum(
    x: jax.Array,
    w: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    layout: str,
    dilation: Sequence[int] = (1, 1),
    precision: Any = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` with ``lhs_dilation``, summed in float32 or wider, in x's dtype."""
    axes = (1, 2) if layout == "NHWC" else (0, 1)
    image = [(x.shape[axis] - 1) * step + 1 for axis, step in zip(axes, dilation)]
    if jax.default_backend() == "cpu" and any(length < size for length, size in zip(image, w.shape)):
        # XLA takes the larger of the two for the image, and what comes of that is 50 times slower on a CPU.
        config = [(0, 0, 0)] * 4
        for axis, step, (before, after) in zip(axes, dilation, padding):
            config[axis] = (before, after, step - 1)
        x = jax.lax.optimization_barrier(jax.lax.pad(x, jnp.zeros((), x.dtype), config))
        padding, dilation = ((0, 0), (0, 0)), (1, 1)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    y = jax.lax.conv_general_dilated(
        x,
        w,
        strides,
        padding,
        lhs_dilation=dilation,
        dimension_numbers=(layout, "HWIO", layout),
        precision=precision,
        preferred_element_type=None if x.dtype == wide else wide,
    )
    return y.astype(x.dtype)


def window_weight_gradient(
    x: jax.Array,
    dy: jax.Array,
    shape: tuple[int, ...],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    layout: str,
    precision: Any = None,
) -> jax.Array:
    """The gradient of `window_sum` by a kernel of ``shape``, in float32 or wider."""
    more = {"dimension_numbers": (layout, "HWIO", layout), "precision": precision}
    transposed = jax.linear_transpose(
        lambda w: jax.lax.conv_general_dilated(x, w, strides, padding, **more), jax.ShapeDtypeStruct(shape, x.dtype)
    )
    return transposed(dy)[0].astype(jnp.promote_types(x.dtype, jnp.float32))
