"""`batch_norm` against its definition in float64, derivatives by jax of that definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import native

BACKENDS = ["xla", "cpu"]
SHAPES = [(4, 6, 8, 16), (1, 2, 2, 3), (3, 4, 10, 37), (2, 32, 32, 64), (1, 1, 1, 5), (70, 3, 5, 130)]
BOUNDS = {"float32": 2e-5, "bfloat16": 2e-2}


def defined(x, scale, bias, added, relu, pool):
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))
    y = (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias
    y = y if added is None else y + added
    y = jax.nn.relu(y) if relu else y
    if pool:
        y = y.reshape(y.shape[0], y.shape[1] // 2, 2, y.shape[2] // 2, 2, -1).max((2, 4))
    return y, mean, var


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


def check(result, wanted, bound, what):
    result, wanted = (np.asarray(array).astype(np.float64) for array in (result, wanted))
    assert result.shape == wanted.shape, what
    assert np.abs(result - wanted).max() <= bound * max(1.0, np.abs(wanted).max()), what


def differentiated(function, arguments, slopes, compiled=True):
    def run(arguments, slopes):
        results, pull_back = jax.vjp(function, *arguments)
        return *results, *pull_back(slopes)

    return (jax.jit(run) if compiled else run)(arguments, slopes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(BOUNDS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("has_added, relu, pool", [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_value_and_gradients(backend, dtype, shape, has_added, relu, pool):
    if pool and (shape[1] % 2 or shape[2] % 2):
        pytest.skip("images of odd size are not pooled")
    if shape == (1, 1, 1, 5) and dtype == "bfloat16":
        pytest.skip("a gradient through a variance of zero is all rounding")
    arguments, slopes = drawn(shape, dtype, has_added, pool)

    def function(x, scale, bias, added):
        return pk.batch_norm(x, scale, bias, added=added, relu=bool(relu), pool=bool(pool), backend=backend)

    results = differentiated(function, arguments, slopes)
    assert results[0].dtype == results[3].dtype == jnp.dtype(dtype)
    assert {result.dtype for result in (*results[1:3], *results[4:6])} == {jnp.dtype("float32")}
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        wide = jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), (arguments, slopes))
        # Step by step: where XLA computes z anew for the maximum's derivative, no pixel need be equal to the maximum.
        wanted = differentiated(lambda *a: defined(*a, relu, pool), *wide, compiled=False)
        for what, result, exact in zip("y mean var dx dscale dbias dadded".split(), results, wanted):
            if exact is not None:
                check(result, exact, BOUNDS[dtype] * (5 if what[0] == "d" else 1), what)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_variance_far_below_the_square_of_the_mean(backend):
    (x, scale, bias, _), _ = drawn((8, 16, 16, 24), "float32", False, False, mean=3000.0, deviation=0.1)
    y, mean, var = pk.batch_norm(x, scale, bias, backend=backend)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean((0, 1, 2)), rtol=1e-7)
    np.testing.assert_allclose(var, exact.var((0, 1, 2)), rtol=1e-3)
    assert np.all(np.asarray(var) > 0) and np.isfinite(np.asarray(y)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_channel(backend, bad):
    (x, scale, bias, _), (dy, dmean, dvar) = drawn((2, 4, 4, 20), "float32", False, False)
    x[1, 2, 3, 7] = bad
    slopes = (dy, dmean, dvar)
    results = differentiated(lambda *a: pk.batch_norm(*a, relu=True, backend=backend), (x, scale, bias), slopes)
    for result in results:
        lost = np.isnan(np.asarray(result)).reshape(-1, 20).any(0)
        assert not lost[np.arange(20) != 7].any()
    y, mean, var, dx, *_ = map(np.asarray, results)
    assert np.isnan(var[7]) and np.isnan(y[..., 7]).all() and np.isnan(dx[..., 7]).all()
    assert not np.isfinite(mean[7])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_pixels_takes_the_gradient(backend):
    x = np.float32([1, 1, -1, 1]).reshape(1, 2, 2, 1)
    slope = jax.grad(lambda x: pk.batch_norm(x, np.ones(1), np.zeros(1), pool=True, backend=backend)[0].sum())(x)
    slope = np.ravel(slope)
    assert slope[0] > slope[1] and slope[1] == slope[3]


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
