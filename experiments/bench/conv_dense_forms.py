"""Dense convolutions in XLA in the forms that are fastest somewhere: what `experiments.bench.conv_ways` compares with.

Functions of (x, w, dy), compiled once for each geometry: layers of one shape, whatever their masks, share them.
"""

import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from clicktrain_jax.models.conv import patch_convolution
from pallas_kernels.pattern_conv.geometry import Geometry

Direction = Literal["forward", "input gradient", "weight gradient"]


@functools.cache
def xla_dense(direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """XLA's convolution, or its transposes."""

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x, w, geometry.strides, geometry.padding, dimension_numbers=geometry.dimension_numbers
        )

    return _directed(convolve, direction)


@functools.cache
def patches(direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """A product over patches, or its transposes."""

    def convolve(x: jax.Array, w: jax.Array) -> jax.Array:
        return patch_convolution(x, w, strides=geometry.strides, padding=geometry.padding, layout=geometry.layout)

    return _directed(convolve, direction)


def _directed(convolve: Callable[..., jax.Array], direction: Direction) -> Callable[..., jax.Array]:
    if direction == "forward":
        return jax.jit(lambda x, w, dy: convolve(x, w))
    if direction == "input gradient":  # the value is not asked for, so that it is not computed
        return jax.jit(lambda x, w, dy: jax.linear_transpose(lambda x: convolve(x, w), x)(dy)[0])
    return jax.jit(lambda x, w, dy: jax.linear_transpose(lambda w: convolve(x, w), w)(dy)[0])


@functools.cache
def flipped(direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """The input gradient as a convolution of dy with the flipped kernel, in the order of axes that XLA likes best."""
    pads = _flipped_pads(geometry)

    def function(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        flipped = jnp.swapaxes(jnp.flip(w, (0, 1)), 2, 3)
        return jax.lax.conv_general_dilated(
            dy, flipped, (1, 1), pads, lhs_dilation=geometry.strides, dimension_numbers=geometry.dimension_numbers
        )

    return jax.jit(function)


@functools.cache
def flipped_patches(direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """The same by patches; a stride is spread with zeros first."""
    pads = _flipped_pads(geometry)

    def function(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        config = [(0, 0, 0)] * 4
        for axis, (low, high), stride in zip(geometry.spatial_axes, pads, geometry.strides):
            config[axis] = (low, high, stride - 1)
        spread = jax.lax.pad(dy, jnp.zeros((), dy.dtype), config)
        flipped = jnp.swapaxes(jnp.flip(w, (0, 1)), 2, 3)
        none = ((0, 0), (0, 0))
        return patch_convolution(spread, flipped, strides=(1, 1), padding=none, layout=geometry.layout)

    return jax.jit(function)


def _flipped_pads(geometry: Geometry) -> list[tuple[int, int]]:
    pads = []
    sizes = zip(geometry.image, geometry.output, geometry.window, geometry.strides, geometry.padding)
    for length, out, size, stride, (before, _) in sizes:
        low = size - 1 - before
        pads.append((low, length + size - 1 - ((out - 1) * stride + 1) - low))
    return pads


@functools.cache
def channel_major(direction: Direction, geometry: Geometry) -> Callable[..., jax.Array]:
    """The weight gradient as one product over patches whose rows are long: (taps * cin, rows * columns * batch)."""
    (kh, kw), (rows, columns) = geometry.window, geometry.output
    (row_stride, column_stride), pads = geometry.strides, [(0, 0)] * 4
    for axis, pair in zip(geometry.spatial_axes, geometry.padding):
        pads[axis] = pair

    def function(x: jax.Array, w: jax.Array, dy: jax.Array) -> jax.Array:
        planes = jnp.transpose(jnp.pad(x, pads), (3, *geometry.spatial_axes, geometry.batch_axis))
        # Written out once, or XLA's CPU backend transposes again at every read.
        planes = jax.lax.optimization_barrier(planes)
        last_row, last_column = (rows - 1) * row_stride, (columns - 1) * column_stride
        taps = [
            planes[:, row : row + last_row + 1 : row_stride, column : column + last_column + 1 : column_stride]
            for row in range(kh)
            for column in range(kw)
        ]
        patches = jnp.concatenate(taps).reshape(kh * kw * x.shape[3], -1)
        flat = jnp.transpose(dy, (*geometry.spatial_axes, geometry.batch_axis, 3)).reshape(-1, dy.shape[3])
        return jnp.matmul(patches, flat).reshape(w.shape)

    return jax.jit(function)
