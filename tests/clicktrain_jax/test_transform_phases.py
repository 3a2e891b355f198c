"""What each phase does to the gradient and to the update, and the same from `phase_updates`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct


def recorder():
    """Plain gradient descent whose state is the gradient it was handed, flat: no mirror of the weights."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda grad: -0.1 * grad, updates), jax.tree.map(jnp.ravel, updates)

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.ravel, params), update)


@pytest.fixture(scope="module")
def recorded(toy):
    return toy.run(ct.clicktrain(recorder(), toy.plan(), **toy.SCHEDULE))


def handed(history, step):
    """The gradient that the inner optimizer got in update ``step``, in the shapes of the weights."""
    flat = history.states[step + 1].inner_state
    return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), flat, history.grads[step])


def assert_equal(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_close(got, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)


def test_selection_uses_that_updates_weights_and_gradient(recorded, toy, oracle):
    expected = toy.expected_keep(oracle, recorded.params[toy.SELECT], recorded.grads[toy.SELECT])
    assert_equal(toy.keep_of(recorded.states[toy.SELECT + 1]), expected)


def test_dense_and_selecting_updates_are_ordinary(recorded, toy):
    plain = toy.run(recorder(), steps=toy.SELECT + 1)
    # Rounding only: without the conditional in between, the compiler joins w - 0.1 g to one multiply-add.
    assert_close(recorded.params[: toy.SELECT + 2], plain.params)
    for step in range(toy.SELECT + 1):
        assert_equal(handed(recorded, step), recorded.grads[step])


def test_regularized_gradient_has_the_lasso_added(recorded, toy):
    masks = ct.masks_of(recorded.states[toy.SELECT + 1])
    for step in range(toy.SELECT + 1, toy.PRUNE):
        tree, raw = recorded.params[step], recorded.grads[step]
        total = jax.grad(lambda p, s=step: toy.loss(p, s) + toy.SCHEDULE["coeff"] * sum(ct.group_lasso(p, masks)))(tree)
        assert_close(handed(recorded, step), total)
        assert np.any(handed(recorded, step)["Conv_1"]["kernel"] != raw["Conv_1"]["kernel"])
        for layer in ("Conv_0", "Dense_0"):
            assert_equal(handed(recorded, step)[layer], raw[layer])


def test_pruning_updates_gradient_is_whole_and_without_lasso(recorded, toy):
    assert_equal(handed(recorded, toy.PRUNE), recorded.grads[toy.PRUNE])
    keep = toy.keep_of(recorded.states[-1])["Conv_1"]
    assert np.asarray(handed(recorded, toy.PRUNE)["Conv_1"]["kernel"])[~keep].all()


def test_later_gradients_are_masked(recorded, toy):
    for step in range(toy.PRUNE + 1, toy.STOP):
        for layer, keep in toy.keep_of(recorded.states[-1]).items():
            raw = np.asarray(recorded.grads[step][layer]["kernel"])
            assert raw[~keep].all()
            np.testing.assert_array_equal(handed(recorded, step)[layer]["kernel"], np.where(keep, raw, 0))


def test_updates_are_counted(recorded, toy):
    assert [int(state.count) for state in recorded.states] == list(range(toy.STOP + 1))
    assert all(state.count.dtype == jnp.int32 for state in recorded.states)


def run_by_phase(toy, inner, tree, plan, compile):
    """`toy.run` for a loop that knows its phase; yields weights and state after each update."""
    updates_of = ct.phase_updates(inner, plan, coeff=toy.SCHEDULE["coeff"])
    schedule = ct.PhaseSchedule(toy.SELECT, toy.PRUNE)

    @functools.cache
    def train_step(phase):
        def step(tree, state, grads):
            updates, state = getattr(updates_of, phase.name.lower())(grads, state, tree)
            return optax.apply_updates(tree, updates), state

        return compile(step)

    state = updates_of.init(tree)
    for step in range(toy.STOP):
        tree, state = train_step(schedule.phase(step))(tree, state, jax.grad(toy.loss)(tree, jnp.float32(step)))
        yield tree, state


INNERS = {"momentum": optax.sgd(0.1, momentum=0.9), "adamw": optax.adamw(1e-2, weight_decay=0.1)}


@pytest.mark.parametrize("inner", INNERS.values(), ids=INNERS)
def test_compiled_phase_updates_are_the_transformation(toy, inner):
    """The same masks and zeros, weights within rounding: the compiler fuses the two programs differently."""
    expected = toy.run(ct.clicktrain(inner, toy.plan(), **toy.SCHEDULE))
    for step, (tree, state) in enumerate(run_by_phase(toy, inner, toy.params(), toy.plan(), toy.quick_jit)):
        assert_close(tree, expected.params[step + 1])
        assert_close(state, expected.states[step + 1])
        assert_equal(state._replace(inner_state=()), expected.states[step + 1]._replace(inner_state=()))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a == 0, b == 0), tree, expected.params[step + 1])


def test_phase_updates_are_the_transformation_bit_for_bit(toy):
    """Operation by operation, without a compiler's freedom, they are the same arithmetic."""
    inner = INNERS["momentum"]
    tree = {"Conv_1": toy.params()["Conv_1"]}
    plan = ct.make_plan(tree, {"Conv_1/kernel": 0.55})
    tx = ct.clicktrain(inner, plan, **toy.SCHEDULE)
    with jax.disable_jit():
        state = tx.init(tree)
        by_phase = run_by_phase(toy, inner, tree, plan, lambda function: function)
        for step, (other_tree, other_state) in enumerate(by_phase):
            updates, state = tx.update(jax.grad(toy.loss)(tree, jnp.float32(step)), state, tree)
            tree = optax.apply_updates(tree, updates)
            assert_equal(other_tree, tree)
            assert_equal(other_state, state)


def test_one_update_under_masks_is_each_phases_own(toy):
    """`PhaseUpdates.masked`, told when to prune: operation by operation what the three phases' updates do."""
    inner, tree = INNERS["momentum"], {"Conv_1": toy.params()["Conv_1"]}
    plan = ct.make_plan(tree, {"Conv_1/kernel": 0.55})
    updates_of = ct.phase_updates(inner, plan, coeff=toy.SCHEDULE["coeff"])
    with jax.disable_jit():
        state = updates_of.init(tree)
        for step, (other_tree, other_state) in enumerate(run_by_phase(toy, inner, tree, plan, lambda update: update)):
            grads = jax.grad(toy.loss)(tree, jnp.float32(step))
            if step <= toy.SELECT:
                update = updates_of.dense if step < toy.SELECT else updates_of.select
                updates, state = update(grads, state, tree)
            else:
                updates, state = updates_of.masked(grads, state, tree, step == toy.PRUNE)
            tree = optax.apply_updates(tree, updates)
            assert_equal(other_tree, tree)
            assert_equal(other_state, state)


def test_updates_by_phase_hold_no_conditional_and_the_transformation_one(toy):
    tree, plan = toy.params(), toy.plan()

    def conditionals(update, state):
        text = jax.jit(update).lower(tree, state, tree).as_text()
        return text.count("stablehlo.case") + text.count("stablehlo.if")

    for steps in (1, 2):
        updates_of = ct.phase_updates(optax.adam(1e-2), plan, coeff=0.1, importance_steps=steps)
        state = updates_of.init(tree)
        names = set(updates_of._fields) - {"init"} - ({"gather"} if steps == 1 else set())
        assert {name: conditionals(getattr(updates_of, name), state) for name in names} == dict.fromkeys(names, 0)
        tx = ct.clicktrain(optax.adam(1e-2), plan, **toy.SCHEDULE, importance_steps=steps)
        assert conditionals(tx.update, tx.init(tree)) == 1


def own_criterion(params, grads):
    return jax.tree.map(lambda w, g: jnp.square(w), params, grads)


@pytest.mark.parametrize("importance", ["magnitude", own_criterion], ids=["by name", "own function"])
def test_other_criteria(toy, oracle, importance):
    tx = ct.clicktrain(recorder(), toy.plan(), select_step=0, prune_step=1, coeff=0.0, importance=importance)
    # Scores (w g)^2 become w^2 for this w and g.
    roots = jax.tree.map(lambda w: np.sqrt(np.abs(np.asarray(w, np.float64))), toy.params())
    assert_equal(toy.keep_of(toy.run(tx, steps=1).states[-1]), toy.expected_keep(oracle, roots, roots))
