"""n:m masks along the input channels, their straight-through gradient, and random importance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.methods import n_of_m_mask, n_of_m_masks, random_importance, random_scores, straight_through


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def loops(w, n, m):
    """Along axis 2, group by group."""
    mask = np.zeros(w.shape, bool)
    for a, b, d in itertools.product(*(range(w.shape[axis]) for axis in (0, 1, 3))):
        for start in range(0, w.shape[2], m):
            order = sorted(range(start, start + m), key=lambda c: (-abs(w[a, b, c, d]), c))
            mask[a, b, order[:n], d] = True
    return mask


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize("levels", [2, None])
def test_exactly_n_of_m_stay(toy, n, m, levels):
    w = np.asarray(normal((3, 3, 8, 5)))
    if levels:
        w = np.round(w)  # many ties
    mask = np.asarray(toy.quick_jit(lambda w: n_of_m_mask(w, n, m))(w))
    np.testing.assert_array_equal(mask, loops(w, n, m))
    assert (mask.reshape(3, 3, 8 // m, m, 5).sum(axis=3) == n).all()


@pytest.mark.parametrize("axis", [0, -1])
def test_other_axes_are_grouped_alike(toy, axis):
    w = np.asarray(normal((8, 3, 5, 4)))
    mask = toy.quick_jit(lambda w: n_of_m_mask(w, 1, 4, axis=axis))(w)
    np.testing.assert_array_equal(np.moveaxis(mask, axis, 2), loops(np.moveaxis(w, axis, 2), 1, 4))


def test_the_gradient_passes_the_mask_and_pulls_what_is_masked(toy):
    params, targets = toy.params(), toy.params(seed=1)
    decay = 0.01

    def loss(params):
        masked = straight_through(params, toy.plan(), decay=decay)
        return sum(0.5 * jnp.sum(jnp.square(a - b)) for a, b in zip(jax.tree.leaves(masked), jax.tree.leaves(targets)))

    found = toy.quick_jit(lambda params: n_of_m_masks(params, toy.plan()))(params)
    masks = {name: layer.combined() for name, layer in found.layers.items()}
    assert set(masks) == {"Conv_1/kernel", "Conv_2/kernel"}
    grads = toy.quick_jit(jax.grad(loss))(params)
    masked = toy.quick_jit(lambda params: straight_through(params, toy.plan(), decay=decay))(params)
    for layer in ("Conv_1", "Conv_2"):
        w, mask = params[layer]["kernel"], masks[f"{layer}/kernel"]
        np.testing.assert_array_equal(mask, loops(np.asarray(w), 2, 4))
        np.testing.assert_array_equal(masked[layer]["kernel"], np.where(mask, w, 0))
        expected = np.where(mask, w, 0) - targets[layer]["kernel"] + decay * np.where(mask, 0, w)
        np.testing.assert_allclose(grads[layer]["kernel"], expected, atol=1e-6)
    for layer in ("Conv_0", "Dense_0"):
        np.testing.assert_array_equal(masked[layer]["kernel"], params[layer]["kernel"])
        np.testing.assert_allclose(grads[layer]["kernel"], params[layer]["kernel"] - targets[layer]["kernel"])


def test_masked_weights_decay_when_nothing_else_pulls():
    params = {"kernel": normal((1, 1, 8, 4))}
    plan = ct.make_plan(params, {"kernel": 0.0})
    mask = n_of_m_mask(params["kernel"])
    grads = jax.grad(lambda params: 0.0 * jnp.sum(straight_through(params, plan, decay=0.1)["kernel"]))(params)
    new = optax.apply_updates(params, jax.tree.map(jnp.negative, grads))["kernel"]
    np.testing.assert_allclose(new, jnp.where(mask, params["kernel"], 0.9 * params["kernel"]), rtol=1e-6)


def test_dtypes_are_kept():
    params = {"kernel": normal((1, 1, 8, 4), dtype=jnp.bfloat16)}
    plan = ct.make_plan(params, {"kernel": 0.0})
    value, grads = jax.value_and_grad(lambda tree: jnp.sum(straight_through(tree, plan)["kernel"]))(params)
    assert value.dtype == grads["kernel"].dtype == jnp.bfloat16


def test_wrong_arguments_are_refused():
    params = {"odd": jnp.ones((3, 3, 6, 4)), "even": jnp.ones((3, 3, 8, 4))}
    plan = ct.make_plan(params, {".*": 0.0})
    for refused in (lambda: straight_through(params, plan), lambda: n_of_m_masks(params, plan)):
        with pytest.raises(ValueError, match="'odd' has 6 input channels, which is no multiple of m=4"):
            refused()
    fine = ct.make_plan(params, {"even": 0.0})
    for arguments, message in (
        ({"n": 5}, "n=5, m=4"),
        ({"n": 0}, "n=0"),
        ({"m": 0}, "m=0"),
        ({"decay": -1.0}, "decay=-1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            straight_through(params, fine, **arguments)
    with pytest.raises(ValueError, match="another tree"):
        straight_through({"even": params["even"]}, fine)
    with pytest.raises(ValueError, match="multiple of m=4"):
        n_of_m_mask(jnp.ones((3, 3, 6, 4)))


def test_random_importance_depends_on_seed_and_name_alone(toy):
    weights, shape = {"none": None, "a": jnp.zeros((3, 3, 10, 12)), "b": jnp.zeros((3, 3, 10, 12))}, (3, 3, 10, 12)
    first, other_seed = (toy.quick_jit(random_importance(seed))(weights) for seed in (0, 1))
    again = toy.quick_jit(random_importance(0))({"a": jnp.ones(shape)}, {"a": jnp.ones(shape)})
    np.testing.assert_array_equal(first["a"], again["a"])
    assert first["none"] is None and first["a"].dtype == jnp.float32 and first["a"].shape == shape
    for other in (first["b"], other_seed["a"]):
        assert np.mean(first["a"] == other) < 0.01
    assert 0 <= first["a"].min() and first["a"].max() < 1 and abs(float(first["a"].mean()) - 0.5) < 0.05


def test_random_scores_depend_on_the_weights(toy):
    score, shape = toy.quick_jit(random_scores), (3, 3, 10, 12)
    first, again, other = (score({"a": normal(shape, seed), "none": None}) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first["a"], again["a"])
    assert np.mean(first["a"] == other["a"]) < 0.01 and first["none"] is None
    assert first["a"].dtype == jnp.float32 and abs(float(first["a"].mean()) - 0.5) < 0.05


@pytest.mark.parametrize("criterion", [random_importance(3), random_scores], ids=["importance", "scores"])
def test_random_importance_selects(toy, criterion):
    updates = ct.phase_updates(optax.sgd(0.1), toy.plan(), coeff=0.0, importance=criterion)
    params = toy.params()
    _, state = toy.quick_jit(updates.select)(params, updates.init(params), params)
    assert ct.status(state).selected == 0 and set(ct.masks_of(state).layers) == {"Conv_1/kernel", "Conv_2/kernel"}
    assert not any(keep.all() for keep in toy.keep_of(state).values())


def test_a_seed_must_be_an_integer():
    for seed in (-1, 0.5, None):
        with pytest.raises(ValueError, match=f"seed={seed}"):
            random_importance(seed)
