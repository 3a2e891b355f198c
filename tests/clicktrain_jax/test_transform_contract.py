"""One contract over every kind of inner optimizer: all phases in an unchanged loop, compiled once, zeros held.

Some optimizers go through it without jit and where jax is strict too, and on meshes: `test_data_parallel` runs this
file in a process that has four devices, for the number of devices is fixed when jax starts.
"""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct


def clip_before(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


def in_multi_steps(tx):
    return optax.MultiSteps(tx, every_k_schedule=2)


def same(tx):
    return tx


# name: (inner optimizer, what the user wraps around clicktrain, moments kept per weight, calls per update)
OPTIMIZERS = {
    "sgd": (lambda: optax.sgd(0.1), same, 0, 1),
    "momentum": (lambda: optax.sgd(0.1, momentum=0.9), same, 1, 1),
    "nesterov and decay": (
        lambda: optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, 0.9, nesterov=True)),
        same,
        1,
        1,
    ),
    "adam": (lambda: optax.adam(1e-2), same, 2, 1),
    "adamw": (lambda: optax.adamw(1e-2, weight_decay=0.1), clip_before, 2, 1),
    "clip before momentum": (lambda: optax.sgd(0.1, momentum=0.9), clip_before, 1, 1),
    "injected": (lambda: optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-2, 1e-3, 8)), same, 2, 1),
    "multi steps": (lambda: optax.sgd(0.1, momentum=0.9), in_multi_steps, 1, 2),
}


@contextlib.contextmanager
def strict():
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True):
        yield


def on(size, axis, kind):
    """Places each kernel whose axis can be cut in ``size`` so, on a mesh of that many devices."""

    def place(leaf):
        mesh = jax.make_mesh((size,), ("d",), devices=jax.devices()[:size], axis_types=(kind,))
        cut = leaf.ndim == 4 and leaf.shape[axis] % size == 0
        spec = jax.sharding.PartitionSpec(*["d" if cut and at == axis else None for at in range(leaf.ndim)])
        return jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec))

    return place


EXPLICIT, AUTO = jax.sharding.AxisType.Explicit, jax.sharding.AxisType.Auto
# name: (mode, where parameters lie, options of the loop)
WAYS = {"eager": (contextlib.nullcontext, None, {"jit": lambda step: step}), "strict": (strict, None, {})}
MESHES = {
    "2 devices": (contextlib.nullcontext, on(2, 3, EXPLICIT), {}),
    "4 devices": (strict, on(4, 2, EXPLICIT), {}),
    "4 devices, auto": (contextlib.nullcontext, on(4, 2, AUTO), {}),
}
JIT = (contextlib.nullcontext, None, {})
if "host_platform_device_count=4" in os.environ.get("XLA_FLAGS", ""):
    CASES = [(name, way) for way in MESHES for name in ("momentum", "adamw", "multi steps")]
else:
    CASES = [(name, "jit") for name in OPTIMIZERS]
    CASES += [(name, way) for way in WAYS for name in ("momentum", "adamw", "multi steps")]


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def case(request, toy):
    """``(history sampled once per update, moments per weight)``."""
    name, way = request.param
    inner, wrap, moments, calls = OPTIMIZERS[name]
    mode, place, options = ({"jit": JIT} | WAYS | MESHES)[way]
    tx = wrap(ct.clicktrain(inner(), toy.plan(), **toy.SCHEDULE))
    tree = jax.tree.map(place, toy.params()) if place else None
    with mode():
        history = toy.run(tx, tree, steps=toy.STOP * calls, **options)
    # optax makes counters of its own on one device, whatever mesh the parameters lie on: they compile it once more.
    counters = way in MESHES and name != "momentum"
    assert history.traces == (toy.STOP * calls if way == "eager" else 1 + counters)
    # A gradient accumulator mirrors weights too, but is the wrapper's own and empty after each whole update.
    sampled = history._replace(params=history.params[::calls], states=history.states[::calls])
    return sampled, moments


def test_all_is_kept_until_the_selection_and_nothing_changes_after(case, toy):
    history, _ = case
    for state in history.states[: toy.SELECT + 1]:
        assert all(keep.all() for keep in toy.keep_of(state).values())
    selected = toy.keep_of(history.states[toy.SELECT + 1])
    assert not any(keep.all() for keep in selected.values())
    for state in history.states[toy.SELECT + 1 :]:
        jax.tree.map(np.testing.assert_array_equal, toy.keep_of(state), selected)


def test_nothing_is_zero_before_the_prune(case, toy):
    history, _ = case
    for tree in history.params[: toy.PRUNE + 1]:
        assert all(np.all(leaf) for leaf in jax.tree.leaves(tree))


def test_masked_weights_are_zero_from_the_prune_on(case, toy):
    history, _ = case
    for tree, state in list(zip(history.params, history.states))[toy.PRUNE + 1 :]:
        for layer, keep in toy.keep_of(state).items():
            np.testing.assert_array_equal(np.asarray(tree[layer]["kernel"]) != 0, keep, err_msg=layer)
        for layer in ("Conv_0", "Dense_0"):
            assert np.all(tree[layer]["kernel"])


def test_optimizer_memory_is_zero_from_the_prune_on(case, toy):
    history, moments = case
    for state in history.states[toy.PRUNE + 1 :]:
        for layer, keep in toy.keep_of(state).items():
            arrays = toy.mirrors(state, layer)
            assert len(arrays) >= moments
            for array in arrays:
                assert not array[~keep].any()
            assert sum(array[keep].all() for array in arrays) == moments
    before = toy.mirrors(history.states[toy.PRUNE], "Conv_1")
    assert sum(array.all() for array in before) == moments


def test_weights_move_in_every_update(case):
    history, _ = case
    for old, new in zip(history.params, history.params[1:]):
        assert np.any(old["Conv_1"]["kernel"] != new["Conv_1"]["kernel"])
        assert np.any(old["Dense_0"]["kernel"] != new["Dense_0"]["kernel"])


def test_initial_state_has_the_structure_of_every_state(case):
    history, _ = case
    first = jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), history.states[0])
    for state in history.states[1:]:
        assert jax.tree.map(lambda leaf: (jnp.shape(leaf), leaf.dtype), state) == first


def test_state_can_be_shaped_without_being_computed(toy):
    tx = clip_before(ct.clicktrain(optax.adam(1e-2), toy.plan(), **toy.SCHEDULE))
    shapes = jax.eval_shape(tx.init, toy.params())
    state = tx.init(toy.params())
    assert jax.tree.structure(shapes) == jax.tree.structure(state)
    assert [(s.shape, s.dtype) for s in jax.tree.leaves(shapes)] == [(a.shape, a.dtype) for a in jax.tree.leaves(state)]


def test_extra_arguments_reach_the_inner_optimizer(toy):
    def update(updates, state, params=None, *, value, **extra):
        return jax.tree.map(lambda grad: -0.1 * grad, updates), state + value

    inner = optax.GradientTransformationExtraArgs(lambda _: jnp.float32(0), update)
    history = toy.run(ct.clicktrain(inner, toy.plan(), **toy.SCHEDULE), value=jnp.float32(3))
    assert float(history.states[-1].inner_state) == 3 * toy.STOP
    # An inner optimizer that takes none is not handed any.
    plain = toy.run(ct.clicktrain(optax.sgd(0.1), toy.plan(), **toy.SCHEDULE), value=jnp.float32(3))
    jax.tree.map(np.testing.assert_array_equal, plain.params[-1], history.params[-1])


def test_first_update_may_select_and_the_next_prune(toy):
    tx = ct.clicktrain(optax.sgd(0.1, momentum=0.9), toy.plan(), select_step=0, prune_step=1, coeff=1e3)
    history = toy.run(tx, steps=3)
    assert history.traces == 1
    assert all(keep.all() for keep in toy.keep_of(history.states[0]).values())
    for tree, state in list(zip(history.params, history.states))[2:]:
        for layer, keep in toy.keep_of(state).items():
            np.testing.assert_array_equal(np.asarray(tree[layer]["kernel"]) != 0, keep)
    assert all(np.all(leaf) for leaf in jax.tree.leaves(history.params[1]))
    # No update is regularised, so that even this coefficient does nothing.
    idle = ct.clicktrain(optax.sgd(0.1, momentum=0.9), toy.plan(), select_step=0, prune_step=1, coeff=0.0)
    jax.tree.map(np.testing.assert_array_equal, toy.run(idle, steps=3).params, history.params)


def test_buffers_may_be_donated(toy):
    tx = ct.clicktrain(optax.adam(1e-2), toy.plan(), **toy.SCHEDULE)

    def train_step(tree, state, step):
        updates, state = tx.update(jax.grad(toy.loss)(tree, step), state, tree)
        return optax.apply_updates(tree, updates), state

    train_step = toy.quick_jit(train_step, donate_argnums=(0, 1))
    tree, state = toy.params(), tx.init(toy.params())
    for step in range(toy.STOP):
        tree, state = train_step(tree, state, jnp.float32(step))
    expected = toy.run(tx)
    jax.tree.map(np.testing.assert_array_equal, tree, expected.params[-1])
    assert train_step._cache_size() == 1
