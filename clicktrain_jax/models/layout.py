"""Where the batch stands in a net's maps, and the operations that care.

Images come as (batch, height, width, channels), "NHWC". In "HWNC", (height, width, batch, channels), each pixel is one
matrix of images by channels, and each tap of a convolution an aligned block of rows: the form that kernels want which
run a pattern's taps as matrix products. A net in that layout transposes once, at its input; BatchNorm, ReLU and
additions do not care, and pooling runs over the first two axes. Parameters and logits are the same in either.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

Layout = Literal["NHWC", "HWNC"]
Pads = Sequence[tuple[int, int]]


def spatial_axes(layout: Layout) -> tuple[int, int]:
    """Returns the axes of height and width.

    Raises:
        ValueError: if the layout is another.
    """
    if layout not in ("NHWC", "HWNC"):
        raise ValueError(f"layout must be 'NHWC' or 'HWNC', got {layout!r}")
    return (1, 2) if layout == "NHWC" else (0, 1)


def per_axis(layout: Layout, rows: Any, columns: Any, other: Any) -> tuple[Any, Any, Any, Any]:
    """Returns one setting for each of the four axes: `other` for the batch and the channels."""
    settings = [other] * 4
    for axis, setting in zip(spatial_axes(layout), (rows, columns), strict=True):
        settings[axis] = setting
    return tuple(settings)


def from_nhwc(x: jax.Array, layout: Layout) -> jax.Array:
    """Brings (batch, height, width, channels) into `layout`."""
    return x if spatial_axes(layout) == (1, 2) else jnp.transpose(x, (1, 2, 0, 3))


def to_nhwc(x: jax.Array, layout: Layout) -> jax.Array:
    """Brings an array in `layout` back to (batch, height, width, channels)."""
    return x if spatial_axes(layout) == (1, 2) else jnp.transpose(x, (2, 0, 1, 3))


def max_pool(x: jax.Array, size: int, strides: int, layout: Layout, padding: Pads = ((0, 0), (0, 0))) -> jax.Array:
    """The largest value of each window of size x size pixels; of equal ones the first takes the gradient.

    Args:
        x: floating point, in `layout`.
        size: rows and columns of a window.
        strides: rows and columns between windows.
        layout: of `x` and of the result.
        padding: ((top, bottom), (left, right)) places that are never the largest.
    """
    side_by_side = size == strides and not any(map(any, padding))
    if side_by_side and not any(x.shape[axis] % size for axis in spatial_axes(layout)):
        return _max_pool_side_by_side(x, size, layout)
    return _largest(x, size, strides, layout, padding)


def _largest(x: jax.Array, size: int, strides: int, layout: Layout, padding: Pads) -> jax.Array:
    return lax.reduce_window(
        x,
        -jnp.inf,
        lax.max,
        per_axis(layout, size, size, 1),
        per_axis(layout, strides, strides, 1),
        per_axis(layout, padding[0], padding[1], (0, 0)),
    )


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_pool_side_by_side(x: jax.Array, size: int, layout: Layout) -> jax.Array:
    """`_largest` of windows that tile the map; only its derivative is another: the same bits, without a scatter.

    XLA's select-and-scatter, the derivative of reduce_window, took 40% of a slim VGG's update on a CPU; this one is
    5 to 25 times faster there.
    """
    return _largest(x, size, size, layout, ((0, 0), (0, 0)))


@_max_pool_side_by_side.defjvp
def _max_pool_derivative(size: int, layout: Layout, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (x_dot,) = primals, tangents
    y = _max_pool_side_by_side(x, size, layout)
    # Which place of its window is the largest: going backwards, the first of equal ones is written last.
    place = jnp.zeros(y.shape, jnp.int8)
    for number in reversed(range(size * size)):
        row, column = divmod(number, size)
        tap = x[per_axis(layout, slice(row, None, size), slice(column, None, size), slice(None))]
        place = jnp.where(tap == y, jnp.int8(number), place)
    # Kept as it is: fused into what follows it would be found again for every pixel.
    place = lax.optimization_barrier(place)
    rows, columns = spatial_axes(layout)
    inside = (rows + 1, columns + 2)  # axes within a window, once each spatial axis is split in two
    split = list(x.shape)
    split[rows : columns + 1] = (x.shape[rows] // size, size, x.shape[columns] // size, size)
    numbers = jnp.arange(size * size, dtype=jnp.int8).reshape([size if axis in inside else 1 for axis in range(6)])
    mine = numbers == jnp.expand_dims(place, inside)
    return y, jnp.where(mine, x_dot.reshape(split), 0).sum(inside)


def avg_pool(x: jax.Array, size: int, layout: Layout) -> jax.Array:
    """The mean of each window of size x size pixels, side by side and without padding."""
    window = per_axis(layout, size, size, 1)
    return lax.reduce_window(x, 0.0, lax.add, window, window, "VALID") / size**2


def conv_in_layout(conv: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """Returns the handed convolution, told the net's layout if it can be told.

    A convolution says that it knows layouts by a parameter of that name; it then gets the net's, whatever it held.

    Raises:
        ValueError: if the layout is unknown, or is not NHWC and `conv` has no parameter ``layout``: it would take
            rows for the batch and compute something else.
    """
    spatial_axes(layout)
    if "layout" in inspect.signature(conv).parameters:
        return partial(conv, layout=layout)
    if layout != "NHWC":
        raise ValueError(
            f"layout={layout!r}: the convolution {getattr(conv, '__name__', conv)!r} has no parameter `layout` and "
            "would read the maps as NHWC; hand in clicktrain_jax.models.PatternConv or PatchConv, or use layout='NHWC'"
        )
    return conv
