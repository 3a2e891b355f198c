"""BatchNorm of a training step and what follows it, as one operation with its own derivative.

Forward: one pass for the statistics, one for everything else. Backward: one pass for the sums, one for the gradient of
the images; what lies between the normalisation and the result is computed again and never kept.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from pallas_kernels import native
from pallas_kernels.native import meshes
from pallas_kernels.pattern_conv import cpu

Backend = Literal["xla", "cpu"]
Layout = Literal["NHWC", "HWNC"]


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    added: jax.Array | None = None,
    epsilon: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
    around: jax.Array | None = None,
    layout: Layout = "NHWC",
    backend: Backend | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the batch's statistics: y = pool(relu((x - mean) / sqrt(var + epsilon) * scale + bias + added)).

    Differentiable once, in reverse mode, in x, scale, bias and ``added``, through all three results. A slope that is
    not finite makes its channel's gradients so; with the backend "xla" behind a closed ReLU too.

    Args:
        x: images (batch, height, width, channels), or (height, width, batch, channels) for the layout "HWNC", floating
            point; it has pixels.
        scale, bias: (channels,).
        added: of x's shape and dtype, as of a shortcut; None for nothing.
        epsilon: added to the variance.
        relu: whether what is negative becomes zero.
        pool: whether the largest of each 2x2 pixels side by side is taken; of equal ones the first has the gradient.
        around: (channels,), about what the means are, such as running ones: any finite values are right, and near ones
            precise; None to look at a pixel. Has no gradient; the native kernels look for themselves.
        layout: of x, of ``added`` and of y.
        backend: "cpu", the native kernels, which take float32 and bfloat16 in NHWC on CPUs; "xla", everything; None for
            the first that can.

    Returns:
        y of x's dtype, half as high and wide where it is pooled; the mean and the biased variance,
        (channels,), in float32 or wider.

    Raises:
        ValueError: shapes or dtypes that do not fit, an image of odd size or something added where it is pooled, or a
            named backend that cannot do it.
    """
    _check(x, scale, bias, added, epsilon, pool, layout)
    reason = _why_not_cpu(x, layout)
    if backend not in (None, "xla", "cpu"):
        raise ValueError(f"backend must be 'xla', 'cpu' or None, got {backend!r}")
    if backend == "cpu" and reason is not None:
        raise ValueError(f"backend 'cpu' cannot do this normalisation: {reason}")
    if backend is None:
        backend = "cpu" if reason is None and native.is_fast() else "xla"
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale, bias = jnp.asarray(scale, wide), jnp.asarray(bias, wide)
    if around is not None:
        around = jax.lax.stop_gradient(jnp.asarray(around, wide)) if backend == "xla" else None
    return _normalise(x, scale, bias, added, around, (float(epsilon), bool(relu), bool(pool), backend, layout))


def _check(x: Any, scale: Any, bias: Any, added: Any, epsilon: float, pool: bool, layout: str) -> None:
    if layout not in ("NHWC", "HWNC"):
        raise ValueError(f"layout must be 'NHWC' or 'HWNC', got {layout!r}")
    if x.ndim != 4 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x must be floating-point images (batch, height, width, channels) with pixels, got {x.dtype} {x.shape}"
        )
    for name, vector in (("scale", scale), ("bias", bias)):
        if jnp.shape(vector) != x.shape[3:]:
            raise ValueError(f"{name} must have one entry for each of {x.shape[3]} channels, got {jnp.shape(vector)}")
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon!r}")
    if added is not None and (added.shape, added.dtype) != (x.shape, x.dtype):
        raise ValueError(f"added must be {x.dtype} {x.shape} as x is, got {added.dtype} {added.shape}")
    if pool and added is not None:
        raise ValueError("added and pool do not go together: pool the result")
    height, width = x.shape[_rows(layout) :][:2]
    if pool and (height % 2 or width % 2):
        raise ValueError(f"pool takes images of even height and width, got {height}x{width}")


def _rows(layout: str) -> int:
    """The axis of the rows; that of the columns follows."""
    return 1 if layout == "NHWC" else 0


def _why_not_cpu(x: jax.Array, layout: str) -> str | None:
    if layout != "NHWC":
        return f"it takes the layout NHWC, got {layout}"
    if x.dtype.name not in cpu.DTYPES:
        return f"it takes {' or '.join(cpu.DTYPES)}, got {x.dtype.name}"
    return cpu.why_not_here()


Settings = tuple[float, bool, bool, str, str]
# Sums that run side by side: of fewer a GPU's compiler writes the addends first, as each would take it long.
AT_ONCE = 2**15


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _normalise(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    added: jax.Array | None,
    around: jax.Array | None,
    settings: Settings,
) -> tuple:
    if settings[3] == "cpu":
        return _forward_native(x, scale, bias, added, settings)
    return _forward_xla(x, scale, bias, added, around, settings)[0]


def _forward(*given: Any) -> tuple:
    (x, scale, bias, added, around), settings = jax.tree.map(lambda each: each.value, given[:-1]), given[-1]
    if settings[3] == "cpu":
        results = _forward_native(x, scale, bias, added, settings)
        moments = results[1:]
    else:
        results, moments = _forward_xla(x, scale, bias, added, around, settings)
    # Alone, what let a pixel through is computed again: the result would be read for it.
    gate: Any = results[0] if settings[1] and added is not None else None
    if settings[2] and settings[3] == "xla":
        # All at once, in the pass that has read x; a compiler would find the places later, in another one.
        y, *gate = jax.lax.optimization_barrier((results[0], *_places(x, scale, bias, moments, settings)))
        results = (y, *results[1:])
    return results, (x, scale, bias, moments, gate, added is not None, around is not None)


def _backward(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    saved, had_around = kept[:-1], kept[-1]
    slopes = (_backward_native if settings[3] == "cpu" else _backward_xla)(settings, saved, slopes)
    return *slopes, jnp.zeros_like(saved[2]) if had_around else None


_normalise.defvjp(_forward, _backward, symbolic_zeros=True)


def _forward_xla(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    added: jax.Array | None,
    around: jax.Array | None,
    settings: Settings,
) -> tuple:
    """``((y, mean, var), moments)``, these as `_unit` takes them."""
    epsilon, relu, pool, _, layout = settings
    # One pass, and right where the mean is far larger than the deviations: both are taken from near the mean.
    pixel = x[0, 0, 0].astype(scale.dtype)
    shift = jnp.where(jnp.isfinite(pixel), pixel, 0) if around is None else around
    off, share = x.astype(scale.dtype) - shift, x.shape[3] / x.size

    def moments_of(total: jax.Array, squares: jax.Array) -> list[jax.Array]:
        mean, square = total * share, squares * share
        var = jnp.where(square < mean * mean, 0, square - mean * mean)
        return [mean, var, jax.lax.rsqrt(var + epsilon)]

    mean, var, inverse = _sums(off, off * off, moments_of)
    moments = (shift, mean, inverse)
    z = _unit(x, moments) * scale + bias
    z = z if added is None else z + added.astype(z.dtype)
    if pool:
        z = functools.reduce(jnp.maximum, _pixels(z, layout))
    return ((jax.nn.relu(z) if relu else z).astype(x.dtype), shift + mean, var), moments


def _backward_xla(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    _, relu, pool, _, layout = settings
    x, scale, bias, moments, gate, has_added = kept
    dy, dmean, dvar = slopes
    dz, share = _whole(dy).astype(scale.dtype), x.shape[3] / x.size
    seen = gate[1] if pool else x

    def summed(inverse: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What the sums see, and the unit there."""
        unit = _unit(seen, (*moments[:2], inverse))
        if not relu:
            return dz, unit
        # A product: of truth values a GPU's compiler keeps an array, and reads x twice.
        return dz * jnp.sign(jnp.maximum(gate if has_added else unit * scale + bias, 0)), unit

    # Of vectors that are one to us and two to the compiler: what has several uses it keeps too.
    one = jax.lax.optimization_barrier(moments[2])
    passed, unit = summed(jax.lax.optimization_barrier(one))
    dbias, dscale, mean, slope = _sums(
        summed(one)[0], passed * unit, lambda total, product: [total, product, total * share, product * share]
    )
    unit = _unit(x, moments)
    if pool:
        place, row = gate[0], _rows(layout)
        inside = (row + 1, row + 3)  # a window's own axes, once rows and columns are split in two
        numbers = jnp.arange(4, dtype=place.dtype).reshape([2 if axis in inside else 1 for axis in range(6)])
        mine = numbers == jnp.expand_dims(place, inside)
        dz = jnp.where(mine, jnp.expand_dims(dz, inside), 0).reshape(x.shape)
    elif relu:
        dz = jnp.where((gate if has_added else unit * scale + bias) > 0, dz, 0)
    dx = (dz - mean - unit * slope) * moments[2] * scale
    # Nobody's, where the statistics are only kept: no zeros are then added to every pixel.
    if not isinstance(dmean, SymbolicZero):
        dx += dmean * share
    if not isinstance(dvar, SymbolicZero):
        dx += unit * (dvar * (2 * share) / moments[2])
    return dx.astype(x.dtype), dscale, dbias, dz.astype(x.dtype) if has_added else None


def _sums(
    one: jax.Array, two: jax.Array, finish: Callable[[jax.Array, jax.Array], list[jax.Array]]
) -> tuple[jax.Array, ...]:
    """What ``finish`` makes of the sums of two arrays over all but the channels, (channels,) each.

    Both are summed in the same two kernels, of parts and of their sums, and the last one's addition does what is left
    to do: of itself a GPU's compiler makes a kernel of that, or does anew for every pixel what has no division in it.
    """
    zero, channels = jnp.zeros((), one.dtype), one.shape[3]
    pixels = one.size // channels
    asked = max(math.isqrt(pixels), AT_ONCE // channels)
    parts = max(number for number in range(1, min(asked, pixels) + 1) if pixels % number == 0)

    def add(so_far: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
        return [so_far[0] + new[0], so_far[1] + new[1]]

    def add_and_finish(so_far: list[jax.Array], new: list[jax.Array]) -> list[jax.Array]:
        return [*add(so_far, new), *finish(*add(so_far, new))]

    sums = jax.lax.reduce([each.reshape(parts, -1, channels) for each in (one, two)], [zero] * 2, add, (1,))
    if parts == 1:  # XLA leaves out the addition of a single part, and all that it does
        return tuple(finish(*(each[0] for each in sums)))
    more = len(jax.eval_shape(finish, zero, zero))  # whatever stands in their places is not looked at
    return tuple(jax.lax.reduce([*sums, *sums[1:] * more], [zero] * (2 + more), add_and_finish, (0,))[2:])


def _unit(x: jax.Array, moments: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
    """With a mean of zero and a variance of one; of vectors that need not be computed first."""
    shift, mean, inverse = moments
    return (x.astype(shift.dtype) - shift - mean) * inverse


def _whole(slope: jax.Array | SymbolicZero) -> jax.Array:
    """A slope as an array, also where it is known to be zero."""
    if not isinstance(slope, SymbolicZero):
        return slope
    aval: Any = slope.aval
    return jnp.zeros(aval.shape, aval.dtype)


def _pixels(z: jax.Array, layout: str) -> list[jax.Array]:
    """The four pixels of each window, row by row."""
    before = (slice(None),) * _rows(layout)
    return [z[*before, row::2, column::2] for row in range(2) for column in range(2)]


def _places(x: Any, scale: Any, bias: Any, moments: Any, settings: Settings) -> tuple[jax.Array, jax.Array]:
    """Which pixel of a window has the gradient, int8, the first of equal ones, 4 for none; and what stands there in x.

    Both are of the pooled shape: the sums need not look at the others.
    """
    _, relu, _, _, layout = settings
    there = _pixels(x, layout)
    pixels = [_unit(pixel, moments) * scale + bias for pixel in there]
    largest = functools.reduce(jnp.maximum, pixels)
    place, seen = jnp.full(largest.shape, 4, jnp.int8), there[0]
    for number in reversed(range(4)):
        is_it = pixels[number] == largest
        place, seen = jnp.where(is_it, jnp.int8(number), place), jnp.where(is_it, there[number], seen)
    return jnp.where(largest > 0, place, jnp.int8(4)) if relu else place, seen


def _forward_native(
    x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array | None, settings: Settings
) -> tuple:
    step = 2 if settings[2] else 1
    epsilon, has_added = settings[0], added is not None
    more = np.zeros((0,), x.dtype) if added is None else added

    def call(x: jax.Array, *others: jax.Array) -> tuple:
        batch, height, width, channels = x.shape
        y = jax.ShapeDtypeStruct((batch, height // step, width // step, channels), x.dtype)
        vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
        return _call("clicktrain_batch_norm", (y, vector, vector), (x, *others), settings)

    def on_shares(names: tuple[str, ...]) -> Callable[..., tuple]:
        def divided(x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array) -> tuple:
            _, own_mean, own_var = call(x, scale, bias, added)
            mean = jax.lax.pmean(own_mean, names)
            var = jax.lax.pmean(own_var + (own_mean - mean) ** 2, names)
            # So that the kernel, which normalises by its own images, normalises by all.
            factor = scale * jax.lax.rsqrt(var + epsilon)
            y, _, _ = call(x, factor * jnp.sqrt(own_var + epsilon), bias + (own_mean - mean) * factor, added)
            return y, mean, var

        return divided if names else call

    arguments, batched = (x, scale, bias, more), (True, False, False, has_added)
    return meshes.call(on_shares, arguments, batched, (4, 1, 1), (True, False, False))


def _backward_native(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    x, scale, bias, (mean, var), gate, has_added = kept
    epsilon, has_gate = settings[0], gate is not None
    slopes = tuple(map(_whole, slopes))
    gate = np.zeros((0,), x.dtype) if gate is None else gate

    def call(*arguments: jax.Array) -> tuple:
        x, mean = arguments[3], arguments[7]
        vector = jax.ShapeDtypeStruct(mean.shape, jnp.float32)
        # Without a ReLU what was added has dy itself for its gradient.
        added = jax.ShapeDtypeStruct(x.shape if has_gate else (0,), x.dtype)
        results = (jax.ShapeDtypeStruct(x.shape, x.dtype), vector, vector, added)
        return _call("clicktrain_batch_norm_gradient", results, arguments, settings)

    def on_shares(names: tuple[str, ...]) -> Callable[..., tuple]:
        def divided(dy: jax.Array, dmean: jax.Array, dvar: jax.Array, *others: jax.Array) -> tuple:
            _, _, scale, _, _, var = others
            _, own_dscale, own_dbias, _ = call(dy, dmean, dvar, *others)
            dscale, dbias = jax.lax.psum((own_dscale, own_dbias), names)
            count = jax.lax.psum(1, names)
            # So that the kernel, which adds up its own images, has what all add up to.
            factor = scale * jax.lax.rsqrt(var + epsilon)
            dmean = (dmean - factor * dbias) / count + factor * own_dbias
            dvar = dvar / count + (own_dscale - dscale / count) * scale / (2 * (var + epsilon))
            dx, _, _, dadded = call(dy, dmean, dvar, *others)
            return dx, dscale, dbias, dadded

        return divided if names else call

    arguments = (*slopes, x, gate, scale, bias, mean, var)
    batched = (True, False, False, True, has_gate, False, False, False, False)
    found = meshes.call(on_shares, arguments, batched, (4, 1, 1, gate.ndim), (True, False, False, has_gate))
    dx, dscale, dbias, dadded = found
    return dx, dscale, dbias, (dadded if has_gate else slopes[0]) if has_added else None


def _call(target: str, results: tuple, arguments: tuple, settings: Settings) -> tuple:
    native.library()  # registers the handlers
    epsilon, relu, pool, *_ = settings
    how = {"epsilon": np.float32(epsilon), "relu": relu, "pool": pool}
    return tuple(jax.ffi.ffi_call(target, results)(*arguments, **how))
