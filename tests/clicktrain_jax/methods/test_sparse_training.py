"""Gradual magnitude pruning and RigL, update by update on the toy problem."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.methods import gradual_magnitude, rigl
from clicktrain_jax.methods.gradual import cubic_density
from clicktrain_jax.methods.rigl import exchange_fraction
from clicktrain_jax.methods.states import masks_tree

DENSITIES = {"Conv_1/kernel": 0.3, "Conv_2/kernel": 0.45}
SIZES = {"Conv_1/kernel": 288, "Conv_2/kernel": 20}
GRADUAL = {"densities": DENSITIES, "begin_step": 2, "end_step": 9, "every": 3}
RENEWALS = (2, 5, 8, 9)
KEY = jax.random.key(5)
RIGL = {"densities": DENSITIES, "key": KEY, "every": 2, "end_step": 8, "drop_fraction": 0.4}
EXCHANGES = (2, 4, 6)
STEPS = 12
INNER = {
    "momentum": lambda: optax.sgd(0.1, momentum=0.9),
    "clipped adamw": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-2, weight_decay=0.1)),
}


def masks_of(state):
    """``{name: bool array}`` by the public function."""
    return {name: layer.combined() for name, layer in ct.masks_of(state).layers.items()}


def leaf(tree, name):
    layer, kernel = name.split("/")
    return np.asarray(tree[layer][kernel])


def masks_at(history, step):
    """Masks before an update, as numpy arrays."""
    return {name: np.asarray(mask) for name, mask in masks_of(history.states[step]).items()}


def top(values, count):
    """bool: the ``count`` largest, ties to the lowest index."""
    chosen = np.zeros(values.size, bool)
    chosen[np.argsort(-values, axis=None, kind="stable")[:count]] = True
    return chosen.reshape(values.shape)


@pytest.fixture(scope="module")
def runs(toy):
    """Of each method around each optimizer."""
    return {
        (method.__name__, name): toy.run(method(inner(), toy.plan(), **settings), steps=STEPS)
        for method, settings in ((gradual_magnitude, GRADUAL), (rigl, RIGL))
        for name, inner in INNER.items()
    }


@pytest.fixture(params=INNER)
def gradual_run(request, runs):
    return runs["gradual_magnitude", request.param]


@pytest.fixture(params=INNER)
def rigl_run(request, runs):
    return runs["rigl", request.param]


@pytest.fixture(params=[(method, name) for method in ("gradual_magnitude", "rigl") for name in INNER], ids="-".join)
def either(request, runs):
    return runs[request.param]


def test_compiled_once(either):
    assert either.traces == 1
    assert int(either.states[-1].count) == STEPS


def test_masked_weights_and_what_is_remembered_of_them_are_zero(either, toy):
    seen = 0
    for step in range(1, STEPS + 1):
        before = masks_at(either, step - 1)
        for name, mask in masks_at(either, step).items():
            weight = leaf(either.params[step], name)
            assert not weight[~mask].any()
            # Open since an update before: not zero. Just opened: zero.
            assert weight[mask & before[name]].all()
            assert not weight[mask & ~before[name]].any()
            memory = toy.mirrors(either.states[step].inner_state, name.split("/")[0])
            assert memory
            for array in memory:
                assert not array[~(mask & before[name])].any()
                assert array[mask & before[name]].any()
            seen += (~mask).sum()
    assert seen > 0
    for tree in either.params:
        assert all(np.all(tree[layer]["kernel"]) for layer in ("Conv_0", "Dense_0"))


@pytest.mark.parametrize("name", DENSITIES)
def test_gradual_density_falls_along_the_cubic(gradual_run, name):
    size, final = SIZES[name], DENSITIES[name]
    for step in range(STEPS):
        latest = [renewal for renewal in RENEWALS if renewal <= step]
        share = 1.0
        if latest:
            share = final + (1 - final) * (1 - (latest[-1] - 2) / 7) ** 3
        assert masks_at(gradual_run, step + 1)[name].sum() == round(share * size), f"update {step}"
    assert masks_at(gradual_run, STEPS)[name].sum() == round(final * size)
    assert cubic_density(0, 2, 9, 0.3) == 1.0 and cubic_density(50, 2, 9, 0.3) == 0.3


def test_gradual_keeps_the_largest_after_the_update(toy):
    """Without memory the weights after an unmasked update are known: those of a plain step from the masked weights."""
    rate = 0.1
    history = toy.run(gradual_magnitude(optax.sgd(rate), toy.plan(), **GRADUAL), steps=STEPS)
    differs = False
    for step in range(STEPS):
        old, new = masks_at(history, step), masks_at(history, step + 1)
        for name in DENSITIES:
            before = leaf(history.params[step], name)
            after = before - np.float32(rate) * leaf(history.grads[step], name) * old[name]
            if step in RENEWALS:
                expected = top(np.where(old[name], np.abs(after), -1), new[name].sum())
                np.testing.assert_array_equal(new[name], expected)
                differs |= bool((top(np.where(old[name], np.abs(before), -1), new[name].sum()) != expected).any())
            else:
                np.testing.assert_array_equal(new[name], old[name])
            assert not (new[name] & ~old[name]).any()
            np.testing.assert_allclose(leaf(history.params[step + 1], name), after * new[name], atol=1e-6)
    assert differs, "the weights before the update would have given the same masks: the problem tells nothing"


def test_gradual_before_its_begin_is_the_inner_optimizer(toy):
    history = toy.run(gradual_magnitude(optax.sgd(0.1), toy.plan(), **{**GRADUAL, "begin_step": 6}), steps=6)
    plain = toy.run(optax.sgd(0.1), steps=6)
    for got, wanted in zip(history.params, plain.params):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, wanted)
    assert all(mask.all() for mask in masks_at(history, 6).values())


def test_rigl_masks_start_at_random_with_exact_counts(toy):
    @toy.quick_jit
    def start(seed):
        settings = {**RIGL, "key": jax.random.key(seed)}
        return masks_of(rigl(optax.sgd(0.1), toy.plan(), **settings).init(toy.params()))

    first, again, other = start(0), start(0), start(1)
    for name, density in DENSITIES.items():
        assert first[name].shape == leaf(toy.params(), name).shape
        assert first[name].sum() == other[name].sum() == round(density * SIZES[name])
        np.testing.assert_array_equal(first[name], again[name])
        assert np.any(first[name] != other[name])
    by_tap = np.asarray(first["Conv_1/kernel"]).mean(axis=(2, 3))
    assert by_tap.min() > 0.05 and by_tap.max() < 0.6


@pytest.mark.parametrize("name", DENSITIES)
def test_rigl_counts_are_constant_and_exchanges_follow_the_cosine(rigl_run, name):
    kept = round(DENSITIES[name] * SIZES[name])
    for step in range(STEPS):
        old, new = masks_at(rigl_run, step)[name], masks_at(rigl_run, step + 1)[name]
        assert old.sum() == new.sum() == kept
        expected = round(0.2 * (1 + np.cos(np.pi * step / 8)) * kept) if step in EXCHANGES else 0
        assert (old & ~new).sum() == (new & ~old).sum() == expected
    assert exchange_fraction(0, 8, 0.4) == 0.4 and exchange_fraction(8, 8, 0.4) == pytest.approx(0)


def test_rigl_drops_the_smallest_and_grows_by_the_dense_gradient(toy):
    rate = 0.1
    history = toy.run(rigl(optax.sgd(rate), toy.plan(), **RIGL), steps=STEPS)
    exchanged = 0
    for step in range(1, STEPS):
        old, new = masks_at(history, step), masks_at(history, step + 1)
        for name in DENSITIES:
            grad = leaf(history.grads[step], name)
            after = leaf(history.params[step], name) - np.float32(rate) * grad * old[name]
            number = (old[name] & ~new[name]).sum()
            stays = top(np.where(old[name], np.abs(after), -1), old[name].sum() - number)
            grows = top(np.where(old[name], -1, np.abs(grad)), number)
            np.testing.assert_array_equal(new[name], stays | grows)
            np.testing.assert_allclose(leaf(history.params[step + 1], name), after * stays, atol=1e-6)
            exchanged += number
    assert exchanged > 40


def test_rigl_grown_weights_of_a_forked_run_start_at_zero(toy):
    """A state put together from a dense run's: weights outside the masks are not zero when an exchange comes."""
    params = toy.params()
    tx = rigl(optax.sgd(0.1, momentum=0.9), toy.plan(), **RIGL)
    state = toy.quick_jit(tx.init)(params)._replace(count=jnp.int32(2))
    updates, after = toy.quick_jit(tx.update)(toy.params(seed=1), state, params)
    new = optax.apply_updates(params, updates)
    for name, mask in masks_of(after).items():
        grown = np.asarray(mask & ~masks_of(state)[name])
        assert grown.any() and not leaf(new, name)[grown].any()
        assert not leaf(new, name)[~np.asarray(mask)].any()


def test_gradual_revives_nothing_in_a_forked_run(toy):
    params = toy.params()
    tx = gradual_magnitude(optax.sgd(0.1), toy.plan(), **GRADUAL)
    state = tx.init(params)
    masks = {name: jnp.asarray(leaf(toy.params(seed=9), name) > -0.2) for name in DENSITIES}
    state = state._replace(count=jnp.int32(9), masks=masks_tree(params, masks))
    _, after = toy.quick_jit(tx.update)(toy.params(seed=1), state, params)
    for name, mask in masks_of(after).items():
        assert mask.sum() == round(DENSITIES[name] * SIZES[name]) and not (mask & ~masks[name]).any()


@pytest.mark.parametrize("which", [0, 1], ids=["gradual", "rigl"])
def test_the_inner_optimizer_sees_the_masked_gradient(toy, which):
    """So that a norm to clip by counts no weight that is gone."""

    def update(grads, state, params=None):
        return jax.tree.map(lambda grad: -0.1 * grad, grads), optax.tree.norm(grads)

    tx = methods(toy, optax.GradientTransformation(lambda _: jnp.float32(0), update))[which]
    history = toy.run(tx, steps=4)
    for step in range(4):
        grads = jax.tree.map(np.asarray, history.grads[step])
        squares = sum(np.square(grad).sum() for grad in jax.tree.leaves(grads))
        for name, mask in masks_at(history, step).items():
            squares -= np.square(leaf(grads, name)[~mask]).sum()
        assert float(history.states[step + 1].inner_state) == pytest.approx(squares**0.5, rel=1e-5)
    assert not masks_at(history, 3)["Conv_1/kernel"].all()


def test_rigl_cannot_exchange_more_than_is_masked(toy):
    dense = {"Conv_1/kernel": 1.0, "Conv_2/kernel": 0.95}
    history = toy.run(rigl(optax.sgd(0.1), toy.plan(), **{**RIGL, "densities": dense, "drop_fraction": 1.0}), steps=4)
    assert masks_at(history, 4)["Conv_1/kernel"].all()
    for step in range(5):
        assert masks_at(history, step)["Conv_2/kernel"].sum() == 19


@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_jit_is_eager(toy, method):
    params = {"Conv_2": {"kernel": toy.params()["Conv_1"]["kernel"]}}
    plan = ct.make_plan(params, {".*": 0.0})
    one = {"densities": {"Conv_2/kernel": 0.45}, "every": 1}
    if method == "gradual":
        tx = gradual_magnitude(optax.sgd(0.1, 0.9), plan, **{**GRADUAL, **one, "begin_step": 0})
    else:
        tx = rigl(optax.sgd(0.1, 0.9), plan, **{**RIGL, **one})
    update = toy.quick_jit(tx.update)
    eager = jitted = toy.quick_jit(tx.init)(params)
    for step in range(2):
        grads = {"Conv_2": {"kernel": toy.params(seed=step + 1)["Conv_1"]["kernel"]}}
        (updates, eager), (same, jitted) = tx.update(grads, eager, params), update(grads, jitted, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), (updates, eager), (same, jitted))
        params = optax.apply_updates(params, updates)
    assert not masks_of(eager)["Conv_2/kernel"].all()


def methods(toy, inner):
    return [
        gradual_magnitude(inner, toy.plan(), **{**GRADUAL, "begin_step": 0, "every": 1}),
        rigl(inner, toy.plan(), **{**RIGL, "every": 1}),
    ]


@pytest.mark.parametrize("which", [0, 1], ids=["gradual", "rigl"])
@pytest.mark.parametrize("weights, grad_dtype", [(jnp.float32, jnp.bfloat16), (jnp.bfloat16, jnp.float32)])
def test_dtypes_are_kept_and_extra_arguments_reach_the_inner_optimizer(toy, which, weights, grad_dtype):
    """Also with gradients of fewer bits than the weights: masked ones are still exactly zero."""

    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda grad: -0.1 * grad, updates), state + value

    inner = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)
    tx = methods(toy, inner)[which]
    history = toy.run(tx, toy.params(weights), steps=3, grad_dtype=grad_dtype, value=jnp.float32(3))
    assert float(history.states[-1].inner_state) == 9
    assert all(leaf.dtype == weights for leaf in jax.tree.leaves(history.params[-1]))
    for name, mask in masks_at(history, 3).items():
        assert not leaf(history.params[3], name)[~mask].any() and not mask.all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"end_step": 2}, "end_step=2: expected more than begin_step=2"),
        ({"begin_step": -1}, "begin_step=-1"),
        ({"every": 0}, "every=0"),
        ({"densities": {"Conv_1/kernel": 0.3}}, "'Conv_2/kernel' has no density"),
    ],
)
def test_gradual_refuses_wrong_arguments(toy, change, message):
    with pytest.raises(ValueError, match=message):
        gradual_magnitude(optax.sgd(0.1), toy.plan(), **{**GRADUAL, **change})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"end_step": 0}, "end_step=0"),
        ({"every": True}, "every=True"),
        ({"drop_fraction": 1.1}, "drop_fraction=1.1"),
        ({"key": 3}, "key=3"),
        ({"densities": {**DENSITIES, "Conv_9/kernel": 0.5}}, "'Conv_9/kernel' is no layer"),
    ],
)
def test_rigl_refuses_wrong_arguments(toy, change, message):
    with pytest.raises(ValueError, match=message):
        rigl(optax.sgd(0.1), toy.plan(), **{**RIGL, **change})


@pytest.mark.parametrize("which", [0, 1], ids=["gradual_magnitude", "rigl"])
def test_wrong_trees_are_refused(toy, which):
    params, tx = toy.params(), methods(toy, optax.sgd(0.1))[which]
    with pytest.raises(ValueError, match="another tree"):
        tx.init(params["Conv_1"])
    state = toy.quick_jit(tx.init)(params)
    with pytest.raises(ValueError, match=f"{['gradual_magnitude', 'rigl'][which]} needs the parameters"):
        tx.update(params, state)
    with pytest.raises(ValueError, match="'Conv_2/kernel' is in the plan, but it has no gradient"):
        tx.update({**params, "Conv_2": {"kernel": None}}, state, params)
