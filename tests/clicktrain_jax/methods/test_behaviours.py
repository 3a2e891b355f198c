"""What each method is known for, by hand: which weights, how many, when. The facts are the papers'."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax import methods
from clicktrain_jax.methods.gradual import cubic_density
from clicktrain_jax.methods.rigl import exchange_fraction

KEY = jax.random.key(0)


def row(values):
    """A layer of single weights."""
    return {"kernel": jnp.asarray(values, jnp.float32).reshape(1, 1, -1, 1)}


def values_of(tree):
    return np.asarray(tree["kernel"]).ravel().tolist()


def plan_of(params, fraction=0.5):
    return ct.make_plan(params, {".*": fraction})


def keep_of(state, name="kernel"):
    return np.asarray(ct.masks_of(state).layers[name].combined())


@pytest.mark.parametrize(
    ("weights", "density", "kept"),
    [
        ([0.1, -0.4, 0.2, 0.3], 0.5, [0, 1, 0, 1]),
        ([0.1, -0.4, 0.2, 0.3], 0.25, [0, 1, 0, 0]),
        ([1.0, -1.0, 1.0, 1.0], 0.5, [1, 1, 0, 0]),  # ties to the lower index
        ([0.0, 0.0, 0.0, 5.0], 0.75, [1, 1, 0, 1]),
        ([3.0, 2.0, 1.0, 0.5, 0.2], 0.5, [1, 1, 0, 0, 0]),  # 2.5 weights are 2, as Python rounds
        ([3.0, 2.0, 1.0], 1.0, [1, 1, 1]),
    ],
)
def test_magnitude_keeps_the_largest(weights, density, kept):
    params = row(weights)
    masks = methods.magnitude_masks(params, plan_of(params), {"kernel": density})
    assert values_of(masks.kernel) == [bool(stays) for stays in kept]
    tx = methods.magnitude(optax.sgd(1.0), plan_of(params), prune_step=1, densities={"kernel": density})
    state, still = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    for step in range(3):
        updates, state = tx.update(still, state, params)
        params = optax.apply_updates(params, updates)
        expected = weights if step < 1 else [weight * stays for weight, stays in zip(weights, kept)]
        np.testing.assert_allclose(values_of(params), expected, rtol=1e-6)
    assert ct.status(state) == ct.Status(3, 1, 1, 0, ())


def test_magnitude_is_judged_after_the_update():
    params = row([1.0, 0.9])
    tx = methods.magnitude(optax.sgd(1.0), plan_of(params), prune_step=0)
    updates, _ = tx.update(row([0.5, -0.5]), tx.init(params), params)
    np.testing.assert_allclose(values_of(optax.apply_updates(params, updates)), [0.0, 1.4], rtol=1e-6)


def test_layers_are_pruned_by_the_plans_rules():
    params = {name: jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 4, 8)), jnp.float32) for name in "abc"}
    masks = methods.magnitude_masks(params, ct.make_plan(params, {"a": 0.75, "b": None, "c": 0.9}))
    assert {name: int(layer.combined().sum()) for name, layer in masks.layers.items()} == {"a": 72, "c": 29}
    with pytest.raises(ValueError, match="densities=None, and 'a' is 'auto'"):
        methods.magnitude_masks(params, ct.make_plan(params, {"a": "auto", ".*": 0.5}, target=4.0))


@pytest.mark.parametrize(
    ("step", "density"), [(0, 1.0), (10, 1.0), (35, 0.4796875), (60, 0.2125), (85, 0.1140625), (110, 0.1), (500, 0.1)]
)
def test_the_cubic(step, density):
    """From step 10 to 110, to a tenth: 0.1 + 0.9 * (3/4, 1/2, 1/4)^3 at the quarters."""
    assert cubic_density(step, 10, 110, 0.1) == pytest.approx(density, abs=1e-12)


def test_another_schedule_than_the_cubic():
    params = row(np.arange(1, 101))
    linear = optax.linear_schedule(0.0, 1.0, 4)
    tx = methods.gradual_magnitude(
        optax.sgd(0.0), plan_of(params, 0.8), begin_step=0, end_step=4, every=1, schedule=linear
    )
    state, kept = tx.init(params), []
    for _ in range(6):
        _, state = tx.update(params, state, params)
        kept.append(int(keep_of(state).sum()))
    assert kept == [100, 80, 60, 40, 20, 20]
    for schedule, message in (
        (lambda step: 1.5, "schedule is 1.5 in update 0: expected a share"),
        (lambda step: step / 8, "schedule says 0 in update 0 and 0.5 in end_step=4"),
        (lambda step: 1.0 - step / 4, "never falls and ends at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            methods.gradual_magnitude(
                optax.sgd(0.1), plan_of(params), begin_step=0, end_step=4, every=1, schedule=schedule
            )


@pytest.mark.parametrize(
    ("step", "share"), [(0, 0.3), (25, 0.3 * (2 + 2**0.5) / 4), (50, 0.15), (75, 0.3 * (2 - 2**0.5) / 4), (100, 0.0)]
)
def test_the_cosine_of_rigl(step, share):
    assert exchange_fraction(step, 100, 0.3) == pytest.approx(share, abs=1e-12)


def exchanges(tx, params, steps):
    """How many weights changed places in each update, and the states."""
    states, changed = [tx.init(params)], []
    for step in range(steps):
        grads = jax.tree.map(lambda w, step=step: jnp.sin(w * 7 + step), params)
        updates, state = tx.update(grads, states[-1], params)
        params = optax.apply_updates(params, updates)
        changed.append(int((keep_of(state) & ~keep_of(states[-1])).sum()))
        assert keep_of(state).sum() == keep_of(states[0]).sum()
        states.append(state)
    return changed, states


NORMAL = row(np.random.default_rng(0).normal(size=400))


def test_when_rigl_exchanges_and_how_many():
    tx = methods.rigl(optax.sgd(0.01), plan_of(NORMAL), key=KEY, every=2, end_step=8)
    # 200 stay; updates 2, 4 and 6 of 8: 0.15 * (1 + cos(pi / 4, pi / 2, 3 pi / 4)) of them.
    assert exchanges(tx, NORMAL, 10)[0] == [0, 0, 51, 0, 30, 0, 9, 0, 0, 0]


def test_rigl_with_a_schedule_of_its_own():
    settings = {"key": KEY, "every": 2, "end_step": 8}
    tx = methods.rigl(
        optax.sgd(0.01), plan_of(NORMAL), **settings, drop_fraction=optax.piecewise_constant_schedule(0.1, {3: 2.0})
    )
    assert exchanges(tx, NORMAL, 9)[0] == [0, 0, 20, 0, 40, 0, 40, 0, 0]
    with pytest.raises(ValueError, match="drop_fraction is 2.0 in update 2: expected a share"):
        methods.rigl(optax.sgd(0.01), plan_of(NORMAL), **settings, drop_fraction=lambda step: 2.0)


def test_set_exchanges_a_constant_share_and_grows_at_random():
    plan, settings = plan_of(NORMAL), {"every": 2, "end_step": 8}
    tx = methods.sparse_evolutionary(optax.sgd(0.01), plan, key=KEY, **settings)
    changed, states = exchanges(tx, NORMAL, 10)
    assert changed == [0, 0, 60, 0, 60, 0, 60, 0, 0, 0]
    again = exchanges(tx, NORMAL, 4)[1]
    np.testing.assert_array_equal(keep_of(again[4]), keep_of(states[4]))
    other = exchanges(methods.sparse_evolutionary(optax.sgd(0.01), plan, key=jax.random.key(1), **settings), NORMAL, 3)
    assert (keep_of(other[1][0]) != keep_of(states[0])).any()
    # From one state, other gradients and the same weights: the same grow. From another key: others.
    still = optax.sgd(0.0)
    grown = []
    for key, seed in ((KEY, 1), (KEY, 2), (jax.random.key(3), 1)):
        tx = methods.sparse_evolutionary(still, plan, key=key, **settings)
        state = states[2]._replace(inner_state=still.init(NORMAL))
        grads = row(np.random.default_rng(seed).normal(size=400))
        _, after = tx.update(grads, state, NORMAL)
        dropped = keep_of(state) & ~keep_of(after)
        magnitude = np.abs(np.asarray(NORMAL["kernel"]))
        assert magnitude[dropped].max() <= magnitude[keep_of(state) & keep_of(after)].min()
        grown.append(keep_of(after) & ~keep_of(state))
    np.testing.assert_array_equal(grown[0], grown[1])
    assert (grown[0] != grown[2]).any() and grown[0].sum() == 60


def test_random_masks_are_drawn_once_and_evenly():
    tx = methods.random(optax.sgd(0.1), plan_of(NORMAL, 0.75), key=KEY)
    changed, states = exchanges(tx, NORMAL, 4)
    assert changed == [0] * 4 and keep_of(states[0]).sum() == 100
    halves = keep_of(states[0]).reshape(2, 200).sum(axis=1)
    assert 30 < halves.min() and ct.status(states[-1]) == ct.Status(4, 0, 0, 0, ())
    assert ct.masks_of(states[0]).pending and not ct.masks_of(states[1]).pending


@pytest.mark.parametrize(
    ("n", "m", "kept"),
    [(1, 4, [0, 1, 0, 0, 0, 0, 0, 1]), (2, 4, [0, 1, 1, 0, 1, 0, 0, 1]), (1, 2, [0, 1, 1, 0, 1, 0, 0, 1])],
)
def test_n_of_m_by_hand(n, m, kept):
    params = row([0.1, -0.9, 0.3, 0.2, 0.5, 0.4, 0.1, -0.6])
    kept = [bool(stays) for stays in kept]
    assert values_of(methods.n_of_m_masks(params, plan_of(params), n, m).kernel) == kept
    tx = methods.n_of_m(optax.sgd(0.0), plan_of(params), prune_step=0, n=n, m=m)
    updates, state = tx.update(params, tx.init(params), params)
    assert keep_of(state).ravel().tolist() == kept
    assert [value != 0 for value in values_of(optax.apply_updates(params, updates))] == kept


def test_straight_through_training_may_bring_a_weight_back():
    """The dense weights live on: the gradient passes the mask, and what it masks may win a place later."""
    params = row([1.0, 0.9, 0.1, 0.0])
    plan = plan_of(params)
    tx = methods.sr_ste(optax.sgd(0.5), plan, n=1, m=4)
    state = tx.init(params)
    assert values_of(methods.straight_through(params, plan, 1, 4)) == [1.0, 0.0, 0.0, 0.0]

    def loss(params):
        masked = methods.straight_through(params, plan, 1, 4, decay=0.0)["kernel"]
        return jnp.sum(masked * jnp.array([1.0, -1.0, 0.0, 0.0]).reshape(1, 1, 4, 1))

    updates, state = tx.update(jax.grad(loss)(params), state, params)
    params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(values_of(params), [0.5, 1.4, 0.1, 0.0], rtol=1e-6)
    assert keep_of(state).ravel().tolist() == [False, True, False, False]
    masks = ct.masks_of(state)
    assert not masks.pending and ct.report(params, masks).conv_compression == 4.0


def test_admm_prunes_to_the_plan():
    params = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 8, 8)), jnp.float32)}
    settings = {"patterns": ct.patterns.fixed_set(4), "rho": 0.1, "every": 1}
    tx = methods.admm(optax.sgd(0.5), plan_of(params), **settings, prune_step=4)
    state = tx.init(params)
    for _ in range(6):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert int((params["kernel"] != 0).sum()) == 32 * 4 and ct.status(state).pruned == 4
    assert methods.admm_residual(state, params)["pattern"] >= 0
    with pytest.raises(ValueError, match="prune_step=2: expected more than begin_step=2"):
        methods.admm(optax.sgd(0.5), plan_of(params), **settings, begin_step=2, prune_step=2)


def two_convolutions(params, x):
    for kernel in (params["a"], params["b"]):
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x)
    return x


def test_prunetrain_masks_whole_channels_that_have_died():
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 3, 2, 6)), jnp.float32).at[..., 1].set(1e-5).at[..., 4].set(1e-5),
        "b": jnp.asarray(rng.normal(size=(3, 3, 6, 3)), jnp.float32).at[:, :, 1].set(-1e-5),
    }
    nodes = ct.channels.channel_nodes(two_convolutions, params, (8, 8, 2))
    tx = methods.prunetrain(optax.sgd(1e-3, momentum=0.9), nodes, prefix="", every=2)
    state, done = tx.init(params), []
    for _ in range(4):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = tx.update(jax.tree.map(lambda g: 1e-3 * g, grads), state, params, value=1e-6)
        params = optax.apply_updates(params, updates)
        done.append(ct.status(state).pruned)
    assert done == [None, 1, 1, 1]
    # Channel 4 is read by weights that live. What a kernel writes and reads goes together.
    lives = np.array([True, False, True, True, True, True])
    np.testing.assert_array_equal(keep_of(state, "a"), np.broadcast_to(lives, (3, 3, 2, 6)))
    np.testing.assert_array_equal(keep_of(state, "b"), np.broadcast_to(lives[:, None], (3, 3, 6, 3)))
    assert not params["a"][..., 1].any() and not params["b"][:, :, 1].any()
    for settings, message in (({"every": 0}, "every=0"), ({"every": 1, "threshold": -1.0}, "threshold=-1.0")):
        with pytest.raises(ValueError, match=message):
            methods.prunetrain(optax.sgd(0.1), nodes, prefix="", **settings)


def test_prunetrain_leaves_a_channel_of_each_group():
    params = {"a": jnp.full((3, 3, 2, 4), 1e-6).at[0, 0, 0, 2].set(2e-6), "b": jnp.full((3, 3, 4, 3), 1e-6)}
    nodes = ct.channels.channel_nodes(two_convolutions, params, (8, 8, 2))
    tx = methods.prunetrain(optax.sgd(0.0), nodes, prefix="", every=1)
    _, state = tx.update(params, tx.init(params), params, value=1.0)
    assert keep_of(state, "a")[0, 0, 0].tolist() == [False, False, True, False]
