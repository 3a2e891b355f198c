"""The optimizer state through what users save it with, in every phase; masks are read back from what is restored."""

import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

PHASES = {"before the selection": 2, "regularize": 4, "pruned": 7}


@pytest.fixture(scope="module")
def tx(toy):
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        ct.clicktrain(optax.adam(optax.linear_schedule(1e-2, 1e-3, 8)), toy.plan(), **toy.SCHEDULE),
    )


@pytest.fixture(scope="module")
def history(toy, tx):
    return toy.run(tx)


@pytest.fixture(params=PHASES)
def step(request):
    return PHASES[request.param]


def assert_same_state(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for new, old in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert new.dtype == old.dtype
        np.testing.assert_array_equal(new, old)


def assert_same_masks(got, expected):
    for kind in ct.Masks._fields:
        expected_leaves = dict(named_leaves(getattr(expected, kind)))
        for name, mask in named_leaves(getattr(got, kind)):
            if mask is None:
                assert expected_leaves.pop(name, None) is None, name
            else:
                np.testing.assert_array_equal(mask, expected_leaves.pop(name), err_msg=name)
        assert all(mask is None for mask in expected_leaves.values()), list(expected_leaves)


@pytest.fixture(scope="module")
def checkpoints(history, tmp_path_factory):
    """One orbax checkpoint a phase: ``(checkpointer, {step: path})``."""
    ocp = pytest.importorskip("orbax.checkpoint")
    folder = tmp_path_factory.mktemp("orbax")
    checkpointer = ocp.StandardCheckpointer()
    paths = {step: folder / str(step) for step in PHASES.values()}
    for step, path in paths.items():
        checkpointer.save(path, history.states[step])
    checkpointer.wait_until_finished()
    yield checkpointer, paths
    checkpointer.close()


def test_orbax_with_a_template(checkpoints, history, tx, toy, step):
    checkpointer, paths = checkpoints
    template = jax.eval_shape(tx.init, toy.params())
    restored = checkpointer.restore(paths[step], template)
    assert_same_state(restored, history.states[step])
    assert_same_masks(ct.masks_of(restored), ct.masks_of(history.states[step]))


def test_orbax_without_a_template(checkpoints, history, step):
    checkpointer, paths = checkpoints
    restored = checkpointer.restore(paths[step])
    assert_same_masks(ct.masks_of(restored), ct.masks_of(history.states[step]))
    params = history.params[step]
    jax.tree.map(
        np.testing.assert_array_equal,
        ct.apply_masks(params, ct.masks_of(restored)),
        ct.apply_masks(params, ct.masks_of(history.states[step])),
    )


def test_flax_serialization(history, tx, toy, step):
    data = flax.serialization.to_bytes(history.states[step])
    assert_same_state(flax.serialization.from_bytes(tx.init(toy.params()), data), history.states[step])
    # Without a template: nested dictionaries.
    assert_same_masks(ct.masks_of(flax.serialization.msgpack_restore(data)), ct.masks_of(history.states[step]))


def test_pickle(history, step):
    restored = pickle.loads(pickle.dumps(history.states[step]))
    assert_same_state(restored, history.states[step])
    assert_same_masks(ct.masks_of(restored), ct.masks_of(history.states[step]))
    plain = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, history.states[step])))
    assert_same_masks(ct.masks_of(plain), ct.masks_of(history.states[step]))


def test_a_run_resumes_bit_for_bit(history, tx, toy):
    @toy.quick_jit
    def train_step(tree, state, step):
        updates, state = tx.update(jax.grad(toy.loss)(tree, step), state, tree)
        return optax.apply_updates(tree, updates), state

    for start in PHASES.values():
        state = pickle.loads(pickle.dumps(history.states[start]))
        tree = history.params[start]
        for step in range(start, toy.STOP):
            tree, state = train_step(tree, state, jnp.float32(step))
        jax.tree.map(np.testing.assert_array_equal, tree, history.params[-1])
        assert_same_state(state, history.states[-1])
    assert train_step._cache_size() == 1
