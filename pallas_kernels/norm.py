"""BatchNorm of a training step and what follows it, as one operation with its own derivative.

Forward: one pass for the statistics, one for everything else. Backward: one pass for the sums, one for the gradient of
the images; what lies between the normalisation and the result is computed again and never kept.
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import native
from pallas_kernels.pattern_conv import cpu

Backend = Literal["xla", "cpu"]


def batch_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    *,
    added: jax.Array | None = None,
    epsilon: float = 1e-5,
    relu: bool = False,
    pool: bool = False,
    backend: Backend | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises by the batch's statistics: y = pool(relu((x - mean) / sqrt(var + epsilon) * scale + bias + added)).

    Differentiable once, in reverse mode, in x, scale, bias and ``added``, through all three results.

    Args:
        x: images (batch, height, width, channels), floating point; it has pixels.
        scale, bias: (channels,).
        added: of x's shape and dtype, as of a shortcut; None for nothing.
        epsilon: added to the variance.
        relu: whether what is negative becomes zero.
        pool: whether the largest of each 2x2 pixels side by side is taken; of equal ones the first has the gradient.
        backend: "cpu", the native kernels, which take float32 and bfloat16 on CPUs; "xla", any device and dtype; None
            for the first that can.

    Returns:
        y of x's dtype, (batch, height / 2, width / 2, channels) where it is pooled; the mean and the biased variance,
        (channels,), in float32 or wider.

    Raises:
        ValueError: shapes or dtypes that do not fit, an image of odd size or something added where it is pooled, or a
            named backend that cannot do it.
    """
    _check(x, scale, bias, added, epsilon, pool)
    reason = _why_not_cpu(x)
    if backend not in (None, "xla", "cpu"):
        raise ValueError(f"backend must be 'xla', 'cpu' or None, got {backend!r}")
    if backend == "cpu" and reason is not None:
        raise ValueError(f"backend 'cpu' cannot do this normalisation: {reason}")
    if backend is None:
        backend = "cpu" if reason is None and native.is_fast() else "xla"
    wide = jnp.promote_types(x.dtype, jnp.float32)
    scale, bias = jnp.asarray(scale, wide), jnp.asarray(bias, wide)
    return _normalise(x, scale, bias, added, (float(epsilon), bool(relu), bool(pool), backend))


def _check(x: Any, scale: Any, bias: Any, added: Any, epsilon: float, pool: bool) -> None:
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
    if pool and (x.shape[1] % 2 or x.shape[2] % 2):
        raise ValueError(f"pool takes images of even height and width, got {x.shape[1]}x{x.shape[2]}")


def _why_not_cpu(x: jax.Array) -> str | None:
    if x.dtype.name not in cpu.DTYPES:
        return f"it takes {' or '.join(cpu.DTYPES)}, got {x.dtype.name}"
    return cpu.why_not_here()


Settings = tuple[float, bool, bool, str]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalise(x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array | None, settings: Settings) -> tuple:
    return (_forward_native if settings[3] == "cpu" else _forward_xla)(x, scale, bias, added, settings)


def _forward(x: Any, scale: Any, bias: Any, added: Any, settings: Settings) -> tuple:
    results = _normalise(x, scale, bias, added, settings)
    y, mean, var = results
    gate = y if added is not None and settings[1] else None
    return results, (x, scale, bias, mean, var, gate, added is not None)


def _backward(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    return (_backward_native if settings[3] == "cpu" else _backward_xla)(settings, kept, slopes)


_normalise.defvjp(_forward, _backward)


def _forward_xla(x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array | None, settings: Settings) -> tuple:
    epsilon, relu, pool, _ = settings
    wide = x.astype(scale.dtype)
    # One pass, and right where the mean is far larger than the deviations: both are taken from some pixel.
    shift = jnp.where(jnp.isfinite(wide[:1, :1, :1]), wide[:1, :1, :1], 0)
    off = wide - shift
    mean_off, square = off.mean((0, 1, 2)), (off * off).mean((0, 1, 2))
    var = jnp.where(square < mean_off**2, 0, square - mean_off**2)
    mean = shift[0, 0, 0] + mean_off
    z = _affine(wide, scale, bias, mean, var, epsilon)
    z = z if added is None else z + added.astype(z.dtype)
    if pool:
        z = functools.reduce(jnp.maximum, _pixels(z))
    return (jax.nn.relu(z) if relu else z).astype(x.dtype), mean, var


def _backward_xla(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    epsilon, relu, pool, _ = settings
    x, scale, bias, mean, var, gate, has_added = kept
    dy, dmean, dvar = slopes
    wide, dz = x.astype(scale.dtype), dy.astype(scale.dtype)
    d = wide - mean
    z = _affine(wide, scale, bias, mean, var, epsilon)
    if pool:
        pixels = _pixels(z)
        largest = functools.reduce(jnp.maximum, pixels)
        dz = jnp.where(largest > 0, dz, 0) if relu else dz
        parts, taken = [], jnp.zeros(largest.shape, bool)
        for pixel in pixels:
            first = (pixel == largest) & ~taken
            parts.append(jnp.where(first, dz, 0))
            taken = taken | first
        upper, lower = (jnp.stack(pair, 3) for pair in (parts[:2], parts[2:]))
        dz = jnp.stack([upper, lower], 2).reshape(x.shape)
    elif relu:
        dz = jnp.where((z if gate is None else gate) > 0, dz, 0)
    inverse = jax.lax.rsqrt(var + epsilon)
    pixels = x.size // x.shape[3]
    total, product = dz.sum((0, 1, 2)), (dz * d).sum((0, 1, 2))
    slope = (2 * dvar - scale * product * inverse**3) / pixels
    constant = (dmean - scale * inverse * total) / pixels
    dx = dz * (scale * inverse) + d * slope + constant
    return dx.astype(x.dtype), product * inverse, total, dz.astype(x.dtype) if has_added else None


def _affine(x: Any, scale: Any, bias: Any, mean: Any, var: Any, epsilon: float) -> jax.Array:
    return (x - mean) * (scale * jax.lax.rsqrt(var + epsilon)) + bias


def _pixels(z: jax.Array) -> list[jax.Array]:
    """The four pixels of each window, row by row."""
    return [z[:, row::2, column::2] for row in range(2) for column in range(2)]


def _forward_native(
    x: jax.Array, scale: jax.Array, bias: jax.Array, added: jax.Array | None, settings: Settings
) -> tuple:
    batch, height, width, channels = x.shape
    step = 2 if settings[2] else 1
    y = jax.ShapeDtypeStruct((batch, height // step, width // step, channels), x.dtype)
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32)
    added = jnp.zeros((0,), x.dtype) if added is None else added
    return tuple(_call("clicktrain_batch_norm", (y, vector, vector), (x, scale, bias, added), settings))


def _backward_native(settings: Settings, kept: tuple, slopes: tuple) -> tuple:
    x, scale, bias, mean, var, gate, has_added = kept
    vector = jax.ShapeDtypeStruct(mean.shape, jnp.float32)
    # Without a ReLU what was added has dy itself for its gradient.
    added = jax.ShapeDtypeStruct(x.shape if gate is not None else (0,), x.dtype)
    gate = jnp.zeros((0,), x.dtype) if gate is None else gate
    results = (jax.ShapeDtypeStruct(x.shape, x.dtype), vector, vector, added)
    arguments = (*slopes, x, gate, scale, bias, mean, var)
    dx, dscale, dbias, dadded = _call("clicktrain_batch_norm_gradient", results, arguments, settings)
    return dx, dscale, dbias, (dadded if gate.size else slopes[0]) if has_added else None


def _call(target: str, results: tuple, arguments: tuple, settings: Settings) -> Any:
    native.library()  # registers the handlers
    epsilon, relu, pool, _ = settings
    how = {"epsilon": np.float32(epsilon), "relu": relu, "pool": pool}
    return jax.ffi.ffi_call(target, results, vmap_method="sequential")(*arguments, **how)
