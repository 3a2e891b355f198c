"""The wrapper's whole life where jax is asked to be strict: init, every phase, and what is read from the state."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

SHAPES = {"a": (3, 3, 8, 4), "b": (1, 1, 4, 8)}
RULES = {"[ab]/kernel": 0.5}
GENERATED = ct.patterns.Generated(4)

# name: (what the plan is asked for, what the wrapper is asked for)
CASES = {
    "plain": ({}, {}),
    "gathered": ({}, {"importance_steps": 2, "reselect_step": 4}),
    "generated": ({}, {"patterns": GENERATED}),
    "group taylor": ({}, {"importance": "group_taylor"}),
    "magnitude": ({}, {"importance": "magnitude"}),
    "schedule": ({}, {"coeff": optax.linear_schedule(0.0, 1e-2, 5)}),
    "target": ({"rules": {"[ab]/kernel": "auto"}, "target": 4.0, "floor": False}, {}),
    "tiles": ({"tile": (4, 1), "removal_tile": (1, 1), "removal_score": "retained"}, {}),
    "by filter": ({"removal_scope": "filter"}, {}),
    "superset": ({"rules": {"a/kernel": 0.5}, "tile": (4, 1), "removal_tile": (1, 1), "superset": 6}, {}),
    "quads": ({"rules": {"a/kernel": 0.5}, "quads": True}, {"patterns": ct.patterns.Generated(4, complementary=True)}),
    "whole kernels": ({"entries": {"a/kernel": None}}, {}),
}


def params():
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)} for name, shape in SHAPES.items()}


def transform(case, inner=None):
    plan_options, options = CASES[case]
    plan = ct.make_plan(params(), **{"rules": RULES} | plan_options)
    options = {"select_step": 2, "prune_step": 5, "coeff": 1e-3} | options
    return ct.clicktrain(inner or optax.adam(1e-2), plan, **options)


@pytest.mark.parametrize("case", CASES)
def test_no_rank_and_no_dtype_is_promoted(case):
    """What would be is refused while it is traced. optax's Adam promotes dtypes, its momentum does not."""
    tree, tx = params(), transform(case, optax.sgd(0.1, momentum=0.9))
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        state = jax.eval_shape(tx.init, tree)
        updates, after = jax.eval_shape(tx.update, tree, state, tree)
        for read in (lambda masks: masks.pattern, lambda masks: ct.group_lasso(ct.apply_masks(tree, masks), masks)):
            jax.eval_shape(lambda state, read=read: read(ct.masks_of(state)), after)
    assert jax.tree.structure(updates) == jax.tree.structure(tree)


def test_no_dtype_is_promoted_in_patterns_of_large_kernels():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        found = jax.eval_shape(lambda scores: ct.patterns.generate(scores, 4), jnp.ones((5, 5, 8, 4)))
    assert found.shape == (4, 5, 5)


def life():
    tree, tx = params(), transform("gathered")
    slope = jax.jit(lambda tree, step: jax.tree.map(lambda w: jnp.sin(3 * w + step.astype(w.dtype)), tree))
    steps, init, update = [jnp.float32(step) for step in range(7)], jax.jit(tx.init), jax.jit(tx.update)
    move = jax.jit(optax.apply_updates)
    mode = yield
    with mode:
        state = init(tree)
        for step in steps:
            updates, state = update(slope(tree, step), state, tree)
            tree = move(tree, updates)
            masks = ct.masks_of(state)
            said = ct.status(state)
            if step is steps[-1] or not said.count % 3:
                report = ct.report(tree, masks)
                zeroed = ct.apply_masks(tree, masks)
    assert report.marked == 0
    jax.tree.map(np.testing.assert_array_equal, zeroed, tree)
    yield tree, masks, said


def lived(mode):
    running = life()
    next(running)
    return running.send(mode)


@pytest.fixture(scope="module")
def expected():
    return lived(contextlib.nullcontext())


MODES = {
    "no NaN": lambda: jax.debug_nans(True),
    "no infinity": lambda: jax.debug_infs(True),
    "no implicit transfer": lambda: jax.transfer_guard("disallow"),
    "float64": lambda: jax.enable_x64(True),
    "no leaked tracer": lambda: jax.checking_leaks(),
}


@pytest.mark.parametrize("mode", MODES)
def test_the_same_life(expected, mode):
    tree, masks, said = lived(MODES[mode]())
    jax.tree.map(np.testing.assert_array_equal, masks.layers, expected[1].layers)
    assert said == expected[2] == ct.Status(7, 4, 5, 0, ())
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6), tree, expected[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype("float32")}
