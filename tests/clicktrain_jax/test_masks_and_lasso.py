"""Masks applied and combined; the group lasso's value and gradient against float64 and against jax.grad."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax.masks import combine

SHAPE = (3, 3, 4, 5)


@pytest.fixture(scope="module")
def masks():
    rng = np.random.default_rng(0)
    kernel = np.broadcast_to(rng.random(SHAPE[2:]) < 0.5, SHAPE)
    narrow = jnp.asarray(rng.random((1, 1, 5, 3)) < 0.5)
    return ct.Masks(
        pattern={"bias": None, "conv": jnp.asarray(rng.random(SHAPE) < 0.5), "narrow": None},
        kernel={"bias": None, "conv": jnp.asarray(kernel), "narrow": narrow},
    )


def params(dtype=jnp.float32, seed=1):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (5,), "conv": SHAPE, "narrow": (1, 1, 5, 3)}
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}


def bits(array):
    return np.asarray(array).tobytes()


def test_combine(masks):
    keep = combine(masks)
    assert keep["bias"] is None and keep["narrow"] is masks.kernel["narrow"]
    np.testing.assert_array_equal(keep["conv"], np.asarray(masks.pattern["conv"]) & np.asarray(masks.kernel["conv"]))
    alone = combine(ct.Masks(pattern=masks.pattern, kernel={"bias": None, "conv": None, "narrow": None}))
    assert alone["conv"] is masks.pattern["conv"] and alone["narrow"] is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf, -np.inf, -0.0])
def test_masked_weights_become_plus_zero(masks, dtype, bad):
    weights = jax.tree.map(lambda w: jnp.full(w.shape, bad, dtype), params())
    keep = combine(masks)
    applied = ct.apply_masks(weights, masks)
    assert bits(applied["bias"]) == bits(weights["bias"])
    for name in ("conv", "narrow"):
        assert applied[name].dtype == dtype
        expected = np.where(np.asarray(keep[name]), np.asarray(weights[name]), np.zeros((), dtype))
        assert bits(applied[name]) == bits(expected)


def test_apply_masks_under_jit_twice_is_once(masks):
    once = jax.jit(ct.apply_masks)(params(), masks)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(once, masks), once)
    all_kept = jax.tree.map(jnp.ones_like, masks)
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(params(), all_kept), params())


def test_group_lasso_against_float64(masks, oracle):
    weights = params()
    expected = [
        sum(oracle.lasso_sum(np.asarray(weights[name]), getattr(masks, kind)[name]) for name in ("conv", "narrow"))
        for kind in ("pattern", "kernel")
    ]
    sums = jax.jit(ct.group_lasso)(weights, masks)
    assert [value.dtype for value in sums] == [jnp.float32] * 2 and [value.shape for value in sums] == [()] * 2
    np.testing.assert_allclose(np.array(sums), expected, rtol=1e-6)


def test_every_kernel_counts_a_constant(masks):
    """Nothing marked: 1e-4 a kernel in both sums, and a 1x1 layer adds to the pattern sum too."""
    all_kept = jax.tree.map(jnp.ones_like, masks)
    pattern_sum, kernel_sum = ct.group_lasso(params(), all_kept)
    assert float(pattern_sum) == pytest.approx(35e-4, rel=1e-6)
    assert float(kernel_sum) == pytest.approx(35e-4, rel=1e-6)


def test_many_small_terms_do_not_drift():
    keep = jnp.ones((1, 1, 512, 512), bool)
    _, kernel_sum = ct.group_lasso({"k": jnp.ones(keep.shape)}, ct.Masks(pattern={"k": None}, kernel={"k": keep}))
    assert float(kernel_sum) == pytest.approx(512 * 512 * 1e-4, rel=1e-5)


@pytest.mark.parametrize("enable_x64", [False, True], ids=["float32", "float64"])
def test_gradient_is_that_of_the_value(masks, oracle, enable_x64):
    with jax.enable_x64(enable_x64):
        dtype = jnp.float64 if enable_x64 else jnp.float32
        weights, grads = params(dtype), params(dtype, seed=2)
        automatic = jax.grad(lambda p: sum(ct.group_lasso(p, masks)))(weights)
        got = ct.add_group_lasso(grads, weights, masks, 0.5)
        for name in weights:
            assert got[name].dtype == dtype
            push = np.asarray(got[name]) - np.asarray(grads[name])
            np.testing.assert_allclose(push, 0.5 * np.asarray(automatic[name]), atol=1e-6)
        for name in ("conv", "narrow"):
            weight = np.asarray(weights[name])
            kinds = (masks.pattern[name], masks.kernel[name])
            exact = 0.5 * sum(oracle.lasso_gradient(weight, keep) for keep in kinds)
            np.testing.assert_allclose(np.asarray(got[name]) - np.asarray(grads[name]), exact, atol=1e-6)


def test_gradient_is_finite_at_zero(masks):
    zeros = jax.tree.map(jnp.zeros_like, params())
    got = ct.add_group_lasso(zeros, zeros, masks, 1.0)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(got))


def test_kept_weights_and_other_leaves_are_untouched(masks):
    grads, weights = params(seed=2), params()
    got = ct.add_group_lasso(grads, weights, masks, 10.0)
    assert got["bias"] is grads["bias"]
    keep = np.asarray(combine(masks)["conv"])
    np.testing.assert_array_equal(np.asarray(got["conv"])[keep], np.asarray(grads["conv"])[keep])
    assert (np.asarray(got["conv"])[~keep] != np.asarray(grads["conv"])[~keep]).all()
    assert ct.apply_masks(weights, masks)["bias"] is weights["bias"]


@pytest.mark.parametrize("weight_dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
def test_bfloat16_gradients_stay_so_and_are_summed_in_float32(masks, weight_dtype):
    grads, weights = params(jnp.bfloat16, seed=2), params(weight_dtype)
    got = ct.add_group_lasso(grads, weights, masks, 0.25)
    wide = [jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (grads, weights)]
    expected = ct.add_group_lasso(*wide, masks, 0.25)
    for name in got:
        assert got[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(got[name], expected[name].astype(jnp.bfloat16))


def test_coefficient_may_be_traced(masks):
    run = jax.jit(ct.add_group_lasso)
    got = run(params(seed=2), params(), masks, jnp.float32(0.5))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        got,
        ct.add_group_lasso(params(seed=2), params(), masks, 0.5),
    )
