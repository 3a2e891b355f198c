"""What `pattern_conv` is compared with: cases beside `cases.SMALL`, drawn arrays, the definition in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels.pattern_conv import cases
from pallas_kernels.pattern_conv.cases import Case

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
BOUNDS = {"float64": 1e-12, "float32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}

MORE = (
    Case("smaller-than-the-window", (2, 1), 2, 5, 6, padding=((1, 0), (2, 2)), tile=(2, 1)),
    Case("smaller-than-a-5x5-window", (2, 4), 2, 4, 6, (5, 5), (1, 2), patterns=((0, 12, 24), (6, 7)), tile=(3, 2)),
    Case("batch-1-hwnc", (4, 5), 1, 5, 6, tile=(4, 1), removed=0.5, layout="HWNC"),
    Case("stride-over-the-window", (7, 8), 2, 4, 6, strides=(4, 3), padding="VALID", tile=(3, 1)),
    Case("one-window-stride-2-by-1", (6, 7), 2, 4, 6, strides=(2, 1)),
    Case("1x1-padded", (3, 4), 2, 4, 6, window=(1, 1), padding=((1, 0), (0, 2)), tile=(2, 2), patterns=(), removed=0.5),
)
ALL = {case.name: case for case in (*cases.SMALL, *MORE)}
GEOMETRIES = (
    *("per-channel-hwnc", "short-last-tiles", "stride-2", "stride-2-even-padded", "stride-2-by-1-hwnc", "valid"),
    *("lopsided-padding", "wide-padding", "one-pixel", "window-5x5", "window-2x2", "1x1-stride-2", "all-removed"),
    *(case.name for case in MORE),
)


def draw(case, dtype, seed=0):
    """(x, w, dy, mask, structure); what is not retained of w is NaN here, infinite there."""
    rng = np.random.default_rng(seed)
    mask = cases.make_mask(case, rng)
    x, w, dy = (array.astype(jnp.dtype(dtype)) for array in cases.make_inputs(case, rng))
    w[~mask] = np.resize([np.nan, np.inf, -np.inf], (~mask).sum()).astype(w.dtype)
    return x, w, dy, mask, pk.make_structure(mask, tile=case.tile)


def expected(x, w, dy, mask, geometry):
    """(y, dx, dw) in float64, a tap at a time."""
    x, w, dy = (np.asarray(array, np.float64) for array in (x, w, dy))
    if geometry.layout == "HWNC":
        x, dy = np.moveaxis(x, 2, 0), np.moveaxis(dy, 2, 0)
    w = np.where(mask, w, 0.0)
    (top, bottom), (left, right) = geometry.padding
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    y, dpadded, dw = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(w.shape)
    (rows, columns), (down, across) = dy.shape[1:3], geometry.strides
    pixels = dy.reshape(-1, dy.shape[3])
    for i, j in itertools.product(*map(range, w.shape[:2])):
        at = (slice(None), slice(i, i + (rows - 1) * down + 1, down), slice(j, j + (columns - 1) * across + 1, across))
        seen = padded[at].reshape(-1, w.shape[2])
        y += (seen @ w[i, j]).reshape(y.shape)
        dpadded[at] += (pixels @ w[i, j].T).reshape(*dy.shape[:3], -1)
        dw[i, j] = seen.T @ pixels
    dx = dpadded[:, top : top + x.shape[1], left : left + x.shape[2]]
    if geometry.layout == "HWNC":
        y, dx = np.moveaxis(y, 0, 2), np.moveaxis(dx, 0, 2)
    return y, dx, np.where(mask, dw, 0.0)


def convolve(x, w, structure, case, backend, **more):
    how = dict(strides=case.strides, padding=case.padding, layout=case.layout, backend=backend)
    return pk.pattern_conv(x, w, structure, **how, **more)


def value_and_gradients(x, w, dy, structure, case, backend):
    y, transposed = jax.vjp(lambda x, w: convolve(x, w, structure, case, backend), x, w)
    return y, *transposed(dy)


def check(result, wanted, bound, what):
    result = np.asarray(result, np.float64)
    assert result.shape == wanted.shape, what
    assert np.isfinite(result).all(), f"{what}: something that is not retained came through"
    error = np.abs(result - wanted).max() / max(np.abs(wanted).max(), 1e-30)
    assert error < bound, f"{what}: {error:.2g}"


def check_case(case, dtype, backend, seed=0):
    """Value and both gradients, by one compiled program; the structure's arrays are its arguments."""
    with jax.enable_x64(dtype == "float64"):
        x, w, dy, mask, structure = draw(case, dtype, seed)
        compute = functools.partial(value_and_gradients, case=case, backend=backend)
        results = jax.device_get(quick_jit(compute)(x, w, dy, structure))
    wanted = expected(x, w, dy, mask, case.geometry())
    for what, result, exact in zip(("value", "input gradient", "weight gradient"), results, wanted):
        assert result.dtype == x.dtype
        check(result, exact, BOUNDS[dtype], what)
    assert not results[2][~mask].any(), "the weight gradient is exactly zero off the structure"


def finite(case, dtype="float64", seed=0):
    """(x, w, structure, scale, bias) without poison, for whatever adds up all that is there."""
    x, w, _, _, structure = draw(case, dtype, seed)
    scale, bias = np.random.default_rng(seed).standard_normal((2, case.cout)).astype(dtype)
    return x, np.where(np.isfinite(w), w, 1).astype(w.dtype), structure, scale, bias


def check_transformations(backend):
    """vmap over images and weights, checkpoint, scan: each as the plain loop."""
    case = ALL["tiles-one-channel"]
    x, w, dy, mask, structure = draw(case, "float32")
    rng = np.random.default_rng(5)
    xs = rng.standard_normal((3, *x.shape)).astype(np.float32)
    ws = np.where(mask, rng.standard_normal((3, *w.shape)), np.nan).astype(np.float32)
    gradients = functools.partial(value_and_gradients, case=case, backend=backend)
    every = [expected(x, w, dy, mask, case.geometry()) for x, w in zip(xs, ws)]
    mapped = quick_jit(jax.vmap(gradients, (0, 0, None, None)))(xs, ws, dy, structure)
    shared = quick_jit(jax.vmap(gradients, (0, None, None, None)))(xs, ws[0], dy, structure)
    for number in range(3):
        for what, result, exact in zip("y dx dw".split(), mapped, every[number]):
            check(result[number], exact, 1e-5, f"vmap {what}")
        wanted = expected(xs[number], ws[0], dy, mask, case.geometry())
        for what, result, exact in zip("y dx dw".split(), shared, wanted):
            check(result[number], exact, 1e-5, f"vmap, shared weights, {what}")

    def loss(x, w):
        return jnp.sum(convolve(x, w, structure, case, backend) * dy)

    again = quick_jit(jax.grad(jax.checkpoint(loss), (0, 1)))(xs[0], ws[0])
    for what, result, exact in zip(("dx", "dw"), again, every[0][1:]):
        check(result, exact, 1e-5, f"checkpoint {what}")

    def total(xs, ws):
        return jax.lax.scan(lambda carry, both: (carry + loss(*both), None), 0.0, (xs, ws))[0]

    dxs, dws = quick_jit(jax.grad(total, (0, 1)))(xs, ws)
    for number in range(3):
        check(dxs[number], every[number][1], 1e-5, "scan dx")
        check(dws[number], every[number][2], 1e-5, "scan dw")
