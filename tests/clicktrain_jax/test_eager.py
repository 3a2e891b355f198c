"""A loop without jit: compiled once for its shapes, nothing from the second call on, memory flat."""

import gc
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import monitoring

import clicktrain_jax as ct


@pytest.fixture
def compilations():
    """A list that grows by one for each program that is compiled."""
    found = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    yield found
    monitoring.unregister_event_duration_listener(listen)


def loop(toy, tx, steps, tree=None, state=None, **extra):
    tree = toy.params() if tree is None else tree
    state = tx.init(tree) if state is None else state
    for step in range(steps):
        updates, state = tx.update(jax.tree.map(lambda w, step=step: jnp.sin(w + step), tree), state, tree, **extra)
        tree = optax.apply_updates(tree, updates)
    return tree, state


OPTIONS = {
    "plain": {},
    "gathered": {"importance_steps": 2},
    "schedule": {"coeff": optax.linear_schedule(0.0, 0.1, 5)},
    "patterns on a device": {"patterns": jnp.asarray(ct.patterns.fixed_set(4))},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_nothing_is_compiled_from_the_second_update_on(toy, compilations, options):
    tx = ct.clicktrain(optax.adam(1e-2), toy.plan(), **toy.SCHEDULE | options)
    tree, state = loop(toy, tx, 2)
    # The update as a whole, and what stands around it here.
    assert 0 < len(compilations) < 40
    compilations.clear()
    loop(toy, tx, toy.STOP - 2, tree, state)
    assert not compilations


MADE_ANEW = {
    "clicktrain": lambda toy, inner: ct.clicktrain(inner, toy.plan(), **toy.SCHEDULE),
    "sparse evolutionary": lambda toy, inner: ct.methods.sparse_evolutionary(
        inner, toy.plan(), key=jax.random.key(0), every=2, end_step=5
    ),
    "admm": lambda toy, inner: ct.methods.admm(
        inner, toy.plan(), patterns=ct.patterns.fixed_set(4), rho=1e-2, begin_step=2, every=2
    ),
}


@pytest.mark.parametrize("method", MADE_ANEW)
def test_one_that_is_made_anew_in_every_update_is_not_compiled_each_time(toy, compilations, method):
    """`optax.inject_hyperparams` makes the transformation around each update's values."""
    schedule = optax.linear_schedule(1e-2, 1e-3, 6)
    tx = optax.inject_hyperparams(lambda rate: MADE_ANEW[method](toy, optax.sgd(rate)))(rate=schedule)
    tree, state = loop(toy, tx, toy.STOP)
    compilations.clear()
    loop(toy, tx, toy.STOP)
    assert not compilations
    expected = loop(toy, MADE_ANEW[method](toy, optax.sgd(schedule)), toy.STOP)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, expected[0])
    jax.tree.map(np.testing.assert_array_equal, state.inner_state.count, expected[1].count)


def test_the_same_as_under_jit(toy):
    tx = ct.clicktrain(optax.adam(1e-2), toy.plan(), **toy.SCHEDULE)
    jitted = loop(toy, optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update)), toy.STOP)
    jax.tree.map(np.testing.assert_array_equal, loop(toy, tx, toy.STOP), jitted)
    with jax.disable_jit():
        slow = loop(toy, tx, toy.STOP)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), slow, jitted)
    assert ct.status(slow[1]) == ct.status(jitted[1])


def test_memory_is_flat(toy):
    tx = ct.clicktrain(optax.sgd(0.1, momentum=0.9), toy.plan(), **toy.SCHEDULE)
    tree, state = loop(toy, tx, 10)
    gc.collect()
    before = len(jax.live_arrays())
    tree, state = loop(toy, tx, 40, tree, state)
    gc.collect()
    assert len(jax.live_arrays()) <= before


def test_within_twenty_times_the_plain_optimizer(toy):
    """Coarse on purpose: it was a thousand times, and is less than three on a quiet machine."""
    tree = toy.params()

    def seconds(tx):
        state, best = tx.init(tree), 1e9
        for _ in range(30):
            start = time.perf_counter()
            updates, state = tx.update(tree, state, tree)
            jax.block_until_ready(updates)
            best = min(best, time.perf_counter() - start)
        return best

    plain = optax.sgd(0.1)
    assert seconds(ct.clicktrain(plain, toy.plan(), **toy.SCHEDULE)) < 20 * seconds(plain)


def with_extra(read):
    def update(updates, state, params=None, **extra):
        return jax.tree.map(lambda grad: -read(extra) * grad, updates), state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


EXTRAS = {
    "an array": (lambda extra: extra["value"], {"value": jnp.float32(0.5)}),
    "a number": (lambda extra: extra["value"], {"value": 0.5}),
    "a switch": (lambda extra: 0.5 if extra["fast"] else 0.1, {"fast": True}),
    "a name": (lambda extra: {"half": 0.5}[extra["which"]], {"which": "half"}),
    "a function": (lambda extra: extra["value_fn"](1.0), {"value_fn": lambda x: 0.5 * x}),
    "nothing": (lambda extra: 0.5 if extra["value"] is None else 0.1, {"value": None}),
}


@pytest.mark.parametrize("case", EXTRAS)
def test_arguments_for_the_inner_optimizer(toy, case):
    read, extra = EXTRAS[case]
    tx = ct.clicktrain(with_extra(read), toy.plan(), **toy.SCHEDULE)
    expected = loop(toy, ct.clicktrain(optax.sgd(0.5), toy.plan(), **toy.SCHEDULE), toy.STOP)
    got = loop(toy, tx, toy.STOP, **extra)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got[0], expected[0])
