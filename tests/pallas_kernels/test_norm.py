"""`batch_norm` against its definition and derivatives in NumPy's float64."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import native

BACKENDS = ["xla", "cpu"]
WHAT = [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)]  # added, relu, pool
# Channels of less than a line, of no whole vector, of several lines; several pieces; one pixel.
SHAPES = [(4, 6, 8, 16), (1, 2, 2, 3), (3, 4, 10, 37), (2, 32, 32, 48), (1, 1, 1, 5), (70, 3, 5, 130)]
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


def windows(z):
    """(batch, height, width, channels) -> the pixels of each window last, row by row."""
    batch, height, width, channels = z.shape
    parts = z.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
    return parts.reshape(*parts.shape[:4], 4)


def whole(parts):
    batch, height, width, channels, _ = parts.shape
    z = parts.reshape(batch, height, width, channels, 2, 2).transpose(0, 1, 4, 2, 5, 3)
    return z.reshape(batch, 2 * height, 2 * width, channels)


def defined(x, scale, bias, added, relu, pool):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    z = (x - mean) / np.sqrt(var + 1e-5) * scale + bias
    z = z if added is None else z + added
    z = windows(z).max(4) if pool else z
    return np.maximum(z, 0) if relu else z, mean, var


def defined_gradients(x, scale, bias, added, relu, pool, dy, dmean, dvar):
    """Of x, scale, bias and added, by the chain rule from the result back."""
    axes, pixels = (0, 1, 2), x[..., 0].size
    inverse = 1 / np.sqrt(x.var(axes) + 1e-5)
    normal = (x - x.mean(axes)) * inverse
    z = normal * scale + bias
    z = z if added is None else z + added
    dz = np.where(defined(x, scale, bias, added, True, pool)[0] > 0, dy, 0) if relu else dy
    if pool:
        dz = whole(np.where(np.arange(4) == windows(z).argmax(4)[..., None], dz[..., None], 0))
    dnormal = dz * scale
    dx = inverse * (dnormal - dnormal.mean(axes) - normal * (dnormal * normal).mean(axes))
    dx += (dmean + 2 * dvar * (x - x.mean(axes))) / pixels
    return dx, (dz * normal).sum(axes), dz.sum(axes), dz


def drawn(shape, dtype, has_added, pool, mean=0.5, deviation=2.0):
    rng = np.random.default_rng(0)
    x = (mean + deviation * rng.standard_normal(shape)).astype(dtype)
    if pool:  # No two pixels of a window are alike, nor become so by rounding.
        place = sum(np.indices(shape)[axis] % 2 * factor for axis, factor in ((1, 2), (2, 1)))
        x = ((4 * rng.integers(-8, 8, shape) + (place + np.arange(shape[3])) % 4) / 8).astype(dtype)
    scale, bias, dmean, dvar = rng.standard_normal((4, shape[-1])).astype(np.float32)
    scale += 0.3 * np.sign(scale)
    added = rng.standard_normal(shape).astype(dtype) if has_added else None
    y = (shape[0], shape[1] // 2, shape[2] // 2, shape[3]) if pool else shape
    return (x, scale, bias, added), (rng.standard_normal(y).astype(dtype), dmean, dvar)


def in_double(arrays):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), arrays)


def check(result, wanted, bound, what):
    result = np.asarray(result).astype(np.float64)
    assert result.shape == wanted.shape, what
    assert np.abs(result - wanted).max() <= bound * max(1.0, np.abs(wanted).max()), what


def differentiated(function, arguments, slopes):
    def run(arguments, slopes):
        results, pull_back = jax.vjp(function, *arguments)
        return *results, *pull_back(slopes)

    return jax.jit(run)(arguments, slopes)


def fits(shape, pool):
    return not pool or shape[1] % 2 == shape[2] % 2 == 0


# The portable form is left to XLA: one shape says as much as all.
CASES = [
    (backend, shape, dtype, what)
    for backend, shapes in (("cpu", SHAPES), ("xla", [SHAPES[2], (1, 1, 1, 5), (7, 1, 1, 5)]))
    for shape in shapes
    for dtype in BOUNDS
    for what in WHAT
    # A gradient through a variance of zero is all rounding in bfloat16.
    if fits(shape, what[2]) and (shape != (1, 1, 1, 5) or dtype == "float32")
]


@pytest.mark.parametrize("backend, shape, dtype, what", CASES, ids=str)
def test_value_and_gradients(backend, shape, dtype, what):
    has_added, relu, pool = map(bool, what)
    arguments, slopes = drawn(shape, dtype, has_added, pool)

    def function(x, scale, bias, added):
        return pk.batch_norm(x, scale, bias, added=added, relu=relu, pool=pool, backend=backend)

    results = differentiated(function, arguments, slopes)
    assert results[0].dtype == results[3].dtype == jnp.dtype(dtype)
    assert {result.dtype for result in (*results[1:3], *results[4:6])} == {jnp.dtype("float32")}
    wide, wide_slopes = in_double(arguments), in_double(slopes)
    wanted = (*defined(*wide, relu, pool), *defined_gradients(*wide, relu, pool, *wide_slopes))
    for name, result, exact in zip("y mean var dx dscale dbias dadded".split(), results, wanted):
        if result is not None:
            check(result, exact, BOUNDS[dtype] * (5 if name[0] == "d" else 1), name)
    assert (results[6] is None) == (not has_added)


@pytest.mark.parametrize("what", WHAT)
def test_the_derivatives_here_are_those_of_the_definition(what):
    """By differences along a drawn direction."""
    has_added, relu, pool = map(bool, what)
    arguments, slopes = map(in_double, drawn((3, 4, 6, 5), "float32", has_added, pool))
    rng = np.random.default_rng(1)
    step = [None if leaf is None else 1e-6 * rng.standard_normal(leaf.shape) for leaf in arguments]

    def value(sign):
        moved = [None if leaf is None else leaf + sign * change for leaf, change in zip(arguments, step)]
        return sum((slope * result).sum() for slope, result in zip(slopes, defined(*moved, relu, pool)))

    gradients = defined_gradients(*arguments, relu, pool, *slopes)
    wanted = sum((slope * change).sum() for slope, change in zip(gradients, step) if change is not None)
    np.testing.assert_allclose((value(1) - value(-1)) / 2, wanted, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variance_far_below_the_square_of_the_mean(backend):
    (x, scale, bias, _), _ = drawn((8, 16, 16, 24), "float32", False, False, mean=3000.0, deviation=0.1)
    y, mean, var = pk.batch_norm(x, scale, bias, backend=backend)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-3)
    assert np.all(np.asarray(var) > 0) and np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 2, 3)])
def test_what_is_not_finite_stays_in_its_channel(backend, pixel, bad):
    (x, scale, bias, _), (dy, dmean, dvar) = drawn((2, 4, 4, 20), "float32", False, False)
    x[*pixel, 7] = bad
    slopes = (dy, dmean, dvar)
    results = differentiated(lambda *a: pk.batch_norm(*a, relu=True, backend=backend), (x, scale, bias), slopes)
    for result in results:
        lost = np.isnan(np.asarray(result)).reshape(-1, 20).any(0)
        assert not lost[np.arange(20) != 7].any()
    y, mean, var, dx, *_ = map(np.asarray, results)
    assert np.isnan(var[7]) and np.isnan(y[..., 7]).all() and np.isnan(dx[..., 7]).all()
    np.testing.assert_equal(mean[7], np.float32(bad))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_pixels_takes_the_gradient(backend):
    x = np.float32([1, 1, -1, 1]).reshape(1, 2, 2, 1)
    slope = jax.grad(lambda x: pk.batch_norm(x, np.ones(1), np.zeros(1), pool=True, backend=backend)[0].sum())(x)
    slope = np.ravel(slope)
    assert slope[0] > slope[1] and slope[1] == slope[3]


@pytest.mark.parametrize("what", WHAT)
def test_with_the_batch_inside_it_is_the_same(what):
    has_added, relu, pool = map(bool, what)
    (x, scale, bias, added), (dy, dmean, dvar) = drawn((3, 4, 6, 5), "float32", has_added, pool)

    def run(layout, order):
        turned = [None if maps is None else np.transpose(maps, order) for maps in (x, added, dy)]

        def function(x, scale, bias, added):
            return pk.batch_norm(x, scale, bias, added=added, relu=relu, pool=pool, layout=layout, backend="xla")

        results = differentiated(function, (turned[0], scale, bias, turned[1]), (turned[2], dmean, dvar))
        return [
            result if result is None or result.ndim < 4 else np.transpose(result, np.argsort(order))
            for result in results
        ]

    for one, two in zip(run("HWNC", (1, 2, 0, 3)), run("NHWC", (0, 1, 2, 3))):
        assert (one is None) == (two is None)
        if one is not None:
            np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


def test_only_the_first_derivative_in_reverse_mode():
    (x, scale, bias, _), _ = drawn((2, 4, 4, 8), "float32", False, False)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: pk.batch_norm(x, scale, bias)[0], (x,), (x,))
    with pytest.raises(Exception, match="cannot be differentiated"):
        jax.grad(lambda x: jnp.sum(jax.grad(lambda x: pk.batch_norm(x, scale, bias, backend="cpu")[0].sum())(x)))(x)


def test_mapped():
    (x, scale, bias, _), _ = drawn((2, 4, 4, 8), "float32", False, False)
    xs = np.stack([x, 2 * x])
    mapped = jax.vmap(lambda x: pk.batch_norm(x, scale, bias, relu=True, backend="cpu")[0])(xs)
    np.testing.assert_array_equal(mapped[1], pk.batch_norm(xs[1], scale, bias, relu=True, backend="cpu")[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 3, 8), np.float32)}, "images .batch, height, width, channels. with pixels, got float32"),
        ({"x": np.zeros((0, 4, 4, 8), np.float32)}, "with pixels"),
        ({"x": np.zeros((2, 4, 4, 8), np.int32)}, "floating-point images .* got int32"),
        ({"scale": np.zeros(7)}, "scale must have one entry for each of 8 channels, got .7,."),
        ({"epsilon": -1.0}, "epsilon must not be negative, got -1.0"),
        ({"added": np.zeros((2, 4, 4, 7), np.float32)}, "added must be float32 .2, 4, 4, 8."),
        ({"added": np.zeros((2, 4, 4, 8), np.float32), "pool": True}, "do not go together"),
        ({"x": np.zeros((2, 3, 4, 8), np.float32), "pool": True}, "even height and width, got 3x4"),
        ({"layout": "NCHW"}, "layout must be 'NHWC' or 'HWNC', got 'NCHW'"),
        ({"layout": "HWNC", "x": np.zeros((2, 3, 4, 8), np.float32), "pool": True}, "even height and width, got 2x3"),
        ({"layout": "HWNC", "backend": "cpu"}, "takes the layout NHWC, got HWNC"),
        ({"backend": "gpu"}, "backend must be 'xla', 'cpu' or None, got 'gpu'"),
        ({"x": np.zeros((2, 4, 4, 8), np.float16), "backend": "cpu"}, "takes float32 or bfloat16, got float16"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": np.zeros((2, 4, 4, 8), np.float32), "scale": np.ones(8), "bias": np.zeros(8), **change}
    with pytest.raises(ValueError, match=message):
        pk.batch_norm(**arguments)


def test_without_the_library(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    x = np.ones((2, 4, 4, 8), np.float32)
    assert "custom_call" not in jax.jit(pk.batch_norm).lower(x, np.ones(8), np.zeros(8)).as_text()
    with pytest.raises(ValueError, match="turned off by CLICKTRAIN_NATIVE=0"):
        pk.batch_norm(x, np.ones(8), np.zeros(8), backend="cpu")


@pytest.mark.parametrize(("added", "relu", "pool"), WHAT)
def test_images_on_several_devices(added, relu, pool):
    """Each computes its own images, by the statistics of all; mapped, each batch has its own."""
    program = f"""
    import jax, jax.numpy as jnp, numpy as np, pallas_kernels as pk
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    added, relu, pool = {bool(added)}, {bool(relu)}, {bool(pool)}
    rng = np.random.default_rng(0)
    x, more = (rng.normal(3, 2, (8, 4, 6, 5)).astype(np.float32) for _ in range(2))
    x *= np.arange(1, 9, dtype=np.float32)[:, None, None, None]  # devices have other means and variances
    scale, bias = (rng.normal(1, 1, 5).astype(np.float32) for _ in range(2))
    dy = rng.normal(0, 1, (8, 2, 3, 5) if pool else x.shape).astype(np.float32)
    how = dict(epsilon=1e-3, relu=relu, pool=pool)

    def loss(backend, x, scale, bias, more, dy):
        y, mean, var = pk.batch_norm(x, scale, bias, added=more if added else None, backend=backend, **how)
        return (y * dy).sum() + (mean * scale).sum() + (var * bias).sum(), (y, mean, var)

    def both(backend):
        return lambda *arrays: jax.value_and_grad(lambda *a: loss(backend, *a), (0, 1, 2, 3), has_aux=True)(*arrays)

    def close(found, wanted):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1, np.abs(b).max()))

    arrays = (x, scale, bias, more, dy)
    wanted = both("xla")(*arrays)
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((4,), ("d",), axis_types=(kind,))
        with jax.set_mesh(mesh):
            places = [P("d"), P(), P(), P("d"), P("d")]
            shared = [jax.device_put(array, NamedSharding(mesh, place)) for array, place in zip(arrays, places)]
            compiled = jax.jit(both("cpu")).lower(*shared).compile()
            close(compiled(*shared), wanted)
        text = compiled.as_text()
        calls = [line for line in text.splitlines() if 'custom_call_target="clicktrain_batch_norm' in line]
        assert calls and all("f32[2,4,6,5]" in line for line in calls), calls
    many = [jnp.stack([array, 2 * array]) for array in arrays]
    close(jax.vmap(both("cpu"))(*many), jax.vmap(both("xla"))(*many))
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, env=environment)
