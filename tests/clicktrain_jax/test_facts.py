"""What a run does when it does not go as planned: the facts in its state decide, and `status` tells of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.importance import rescaled, times_power_of_two

FOUR = ct.patterns.fixed_set(4)


def params(scale=1.0, names=("a", "b")):
    rng = np.random.default_rng(0)
    return {name: {"kernel": jnp.asarray(scale * rng.normal(size=(3, 3, 8, 16)), jnp.float32)} for name in names}


def grads(step, scale=1.0, tree=None):
    rng = np.random.default_rng(100 + step)
    return jax.tree.map(lambda w: jnp.asarray(scale * rng.normal(size=w.shape), jnp.float32), tree or params())


def plan(tree=None, rules=None):
    return ct.make_plan(params() if tree is None else tree, rules or {".*/kernel": 0.5})


SGD = optax.sgd(0.01)


def made(inner=SGD, rules=None, **options):
    options = {"select_step": 2, "prune_step": 5, "coeff": 1e-3} | options
    return ct.clicktrain(inner, plan(rules=rules), **options)


@functools.cache
def transform(inner=SGD, **options):
    """Made once for equal arguments, and so traced and compiled once."""
    return made(inner, **options)


@functools.cache
def if_finite(inner):
    return optax.apply_if_finite(inner, 9)


def run(tx, steps, bad=(), state=None, tree=None, value=jnp.nan):
    """``(params, state)`` before each update and after the last, the gradients of ``bad`` updates not finite."""
    update = jax.jit(tx.update)
    tree = params() if tree is None else tree
    history = [(tree, tx.init(tree) if state is None else state)]
    for step in range(steps):
        tree, state = history[-1]
        found = grads(step, tree=tree)
        if step in bad:
            found["a"]["kernel"] = found["a"]["kernel"].at[0, 0, 0, 0].set(value)
        updates, state = update(found, state, tree)
        # What optax.apply_if_finite, or a loss scale, makes of such an update.
        history.append((tree if step in bad else optax.apply_updates(tree, updates), state))
    return history


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def is_selected(state):
    return not all(mask.all() for mask in jax.tree.leaves(ct.masks_of(state).kernel))


def scores_of(history, steps):
    found = [ct.importance.taylor(history[step][0], grads(step)) for step in steps]
    return jax.tree.map(lambda *each: np.sum(each, axis=0, dtype=np.float32), *found)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_update_that_is_not_finite_puts_the_selection_off(value):
    history = run(transform(), 8, bad=(2, 3), value=value)
    assert [is_selected(state) for _, state in history] == [False] * 5 + [True] * 4
    same(ct.masks_of(history[-1][1]), ct.select_masks(ct.importance.taylor(history[4][0], grads(4)), plan(), FOUR))
    assert [ct.masks_of(state).pending for _, state in history] == [False] * 5 + [True] + [False] * 3
    assert ct.status(history[4][1]) == ct.Status(4, None, None, 2, ())
    assert str(ct.status(history[4][1])) == (
        "4 updates done; nothing is selected yet; put off by 2 updates whose scores were not finite"
    )
    assert ct.status(history[-1][1]) == ct.Status(8, 4, 5, 2, ())
    same(ct.apply_masks(history[6][0], ct.masks_of(history[6][1])), history[6][0])


def test_the_prune_waits_for_the_selection():
    history = run(transform(), 12, bad=(2, 3, 4, 5, 6))
    assert ct.status(history[-1][1]) == ct.Status(12, 7, 8, 5, ())
    assert all(np.all(leaf) for leaf in jax.tree.leaves(history[8][0]))
    final, state = history[-1]
    keep = ct.apply_masks(jax.tree.map(jnp.ones_like, final), ct.masks_of(state))
    same(jax.tree.map(lambda w: w != 0, final), jax.tree.map(lambda k: k != 0, keep))


def test_an_update_whose_loss_is_not_finite_elsewhere_is_no_matter():
    """Scores decide: a layer that is not pruned may say what it likes."""
    history = run(made(rules={"b/kernel": 0.5, "a/kernel": None}), 4, bad=(2,))
    assert ct.status(history[-1][1]).selected == 2


@pytest.mark.parametrize("bad", [(1,), (0, 2), (2,)], ids=str)
def test_the_mean_is_over_as_many_finite_updates(bad):
    history = run(transform(importance_steps=3, prune_step=9), 8, bad=bad)
    finite = [step for step in range(8) if step not in bad][:3]
    status = ct.status(history[-1][1])
    assert (status.selected, status.postponed) == (finite[-1], len(bad))
    same(ct.masks_of(history[-1][1]), ct.select_masks(scores_of(history, finite), plan(), FOUR))
    assert all(not np.any(total) for total in history[-1][1].scores.values())


def test_a_second_selection_is_put_off_too_and_the_prune_waits():
    history = run(transform(reselect_step=4), 10, bad=(4, 5))
    assert ct.status(history[6][1]) == ct.Status(6, 2, None, 2, ())
    assert ct.status(history[-1][1]) == ct.Status(10, 6, 7, 2, ())
    same(ct.masks_of(history[-1][1]), ct.select_masks(ct.importance.taylor(history[6][0], grads(6)), plan(), FOUR))


@pytest.mark.parametrize(("steps", "selected"), [(1, 20), (4, 23)])
def test_a_run_resumed_past_its_selection_selects_at_once(steps, selected):
    tree, state = run(transform(select_step=100, prune_step=200, importance_steps=steps), 20)[-1]
    later = run(transform(select_step=10, prune_step=15, importance_steps=steps), 8, state=state, tree=tree)
    status = ct.status(later[-1][1])
    assert (status.selected, status.pruned) == (selected, selected + 1)
    same(ct.apply_masks(later[-1][0], ct.masks_of(later[-1][1])), later[-1][0])


def test_a_run_that_is_pruned_stays_so_whatever_the_new_schedule():
    tree, state = run(transform(), 8)[-1]
    later = run(transform(select_step=20, prune_step=40, reselect_step=30), 5, state=state, tree=tree)[-1]
    same(ct.masks_of(later[1]), ct.masks_of(state))
    same(ct.apply_masks(later[0], ct.masks_of(state)), later[0])
    assert ct.status(later[1]) == ct.Status(13, 2, 5, 0, ())


@pytest.mark.parametrize(("stop", "again"), [(9, 20), (10, 20), (10, 11)], ids=str)
def test_a_run_stopped_inside_its_window_forgets_it_when_the_selection_comes_later(stop, again):
    """Scores of before the new window: none of them counts, whole updates pass between or not."""
    options = {"importance_steps": 3, "prune_step": 30}
    tree, state = run(transform(select_step=10, **options), stop)[-1]
    assert int(state.gathered) == stop - 8
    history = run(transform(select_step=again, **options), 25 - stop, state=state, tree=tree)
    # Of a window that is already open nobody knows which scores are its own: it begins anew.
    selected = max(again, stop + 2)
    assert ct.status(history[-1][1]).selected == selected
    scores = [
        ct.importance.taylor(history[step - stop][0], grads(step - stop)) for step in range(selected - 2, selected + 1)
    ]
    total = jax.tree.map(lambda *each: np.sum(each, axis=0, dtype=np.float32), *scores)
    same(ct.masks_of(history[-1][1]), ct.select_masks(total, plan(), FOUR))


def test_updates_by_phase_forget_what_was_gathered_too():
    updates_of = ct.phase_updates(optax.sgd(0.0), plan(), coeff=0.0, importance_steps=2)
    state, tree = updates_of.init(params()), params()
    for step, name in enumerate(("gather", "dense", "gather", "select")):
        _, state = getattr(updates_of, name)(grads(step), state, tree)
    expected = ct.select_masks(scores_of([(tree, None)] * 4, (2, 3)), plan(), FOUR)
    same(ct.masks_of(state), expected)
    assert ct.status(state).selected == 3


@pytest.mark.parametrize("importance", ["taylor", "group_taylor", lambda w, g: ct.importance.taylor(w, g)])
def test_a_layer_that_says_nothing_is_judged_by_magnitude(importance):
    tree, tx = params(), transform(select_step=0, prune_step=1, importance=importance)
    found = grads(0) | {"a": jax.tree.map(jnp.zeros_like, tree["a"])}
    _, state = jax.jit(tx.update)(found, tx.init(tree), tree)
    scores = ct.importance.criterion(importance)(tree, found) | {"a": ct.importance.magnitude(tree)["a"]}
    same(ct.masks_of(state), ct.select_masks(scores, plan(), FOUR))
    assert ct.status(state).by_magnitude == ("a/kernel",)
    assert str(ct.status(state)).endswith("by magnitude, for scores that were all alike: a/kernel")


def test_scores_that_are_all_alike_are_no_order():
    tree, tx = params(), transform(select_step=0, prune_step=1, importance=lambda w, g: jax.tree.map(jnp.ones_like, w))
    _, state = jax.jit(tx.update)(grads(0), tx.init(tree), tree)
    same(ct.masks_of(state), ct.select_masks(ct.importance.magnitude(tree), plan(), FOUR))
    assert ct.status(state).by_magnitude == ("a/kernel", "b/kernel")


@pytest.mark.parametrize("importance", ["taylor", "group_taylor"])
@pytest.mark.parametrize(
    ("weights", "slopes"), [(1, 2.0**-80), (2.0**-70, 2.0**-70), (1, 2.0**100), (2.0**60, 2.0**60)], ids=str
)
def test_scores_neither_underflow_nor_overflow(weights, slopes, importance):
    """By powers of two the order is the same to the last bit, where float32's squares are 0 or infinite."""
    tx = transform(select_step=3, prune_step=5, importance_steps=4, importance=importance)
    states = []
    for scale, slope in ((1, 1), (weights, slopes)):
        tree = jax.tree.map(lambda w, scale=scale: w * scale, params())
        state, update = tx.init(tree), jax.jit(tx.update)
        for step in range(4):
            _, state = update(grads(step, slope), state, tree)
        states.append(state)
    same(ct.masks_of(states[1]), ct.masks_of(states[0]))
    assert ct.status(states[1]) == ct.Status(4, 3, None, 0, ())


@pytest.mark.parametrize("exponent", [-125, -7, 0, 3, 126])
def test_scaling_by_powers_of_two_is_exact(exponent):
    values = np.float32([1.0, 0.75, 0.0]) * np.float32(2.0**exponent)
    scaled, left = rescaled(jnp.asarray(values), 10)
    np.testing.assert_array_equal(scaled, np.float32([1.0, 0.75, 0.0]) * 2**10)
    assert int(left) == exponent - 10
    np.testing.assert_array_equal(times_power_of_two(scaled, left), values)


def test_gathered_scores_of_very_different_scales_add_up():
    tree, slopes = params(), (2.0**-75, 2.0**10, 2.0**-40)
    tx, state = transform(importance_steps=3), None
    state = tx.init(tree)
    for step, slope in enumerate(slopes):
        _, state = jax.jit(tx.update)(grads(step, slope), state, tree)
    same(ct.masks_of(state), ct.select_masks(ct.importance.taylor(tree, grads(1)), plan(), FOUR))


def test_given_scores_of_any_scale_select_alike():
    scores = ct.importance.taylor(params(), grads(0))
    expected = ct.select_masks(scores, plan(), ct.patterns.Generated(4))
    for scale in (2.0**-100, 2.0**120):
        same(
            ct.select_masks(jax.tree.map(lambda s, scale=scale: s * scale, scores), plan(), ct.patterns.Generated(4)),
            expected,
        )


def test_a_schedule_for_the_coefficient():
    schedule = optax.linear_schedule(0.0, 1e-2, 4)
    history = run(transform(optax.sgd(1.0), coeff=schedule), 5)
    tree, state = history[3]
    masks = ct.masks_of(state)
    expected = ct.add_group_lasso(grads(3), tree, masks, schedule(3))
    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6),
        jax.tree.map(jnp.subtract, tree, history[4][0]),
        expected,
    )


@pytest.mark.parametrize("static", [(), ("inner", "plan", "select_step", "prune_step")], ids=["plain", "static"])
@pytest.mark.parametrize("jitted", [True, False])
def test_injected_hyperparameters(static, jitted):
    schedule = optax.linear_schedule(0.0, 1e-2, 4)
    options = {"inner": optax.sgd(0.01), "plan": plan(), "select_step": 2, "prune_step": 5}
    tx = optax.inject_hyperparams(ct.clicktrain, static_args=static)(**options, coeff=schedule)
    update = jax.jit(tx.update) if jitted else tx.update
    tree, state = params(), tx.init(params())
    for step in range(7):
        updates, state = update(grads(step), state, tree)
        tree = optax.apply_updates(tree, updates)
    expected = run(transform(coeff=schedule), 7)[-1]
    same(ct.masks_of(state), ct.masks_of(expected[1]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, expected[0])
    assert ct.status(state) == ct.status(expected[1])


RESUMED = {
    "one layer more": ({"rules": {"a/kernel": 0.5}}, {}, "'b/kernel' is pruned by the plan alone"),
    "one layer less": ({}, {"rules": {"a/kernel": 0.5}}, "'b/kernel' is pruned by the state alone"),
    "other patterns": ({}, {"patterns": ct.patterns.fixed_set(8)}, "'a/kernel' has 4 patterns in the state, 8 asked"),
    "other gathering": ({}, {"importance_steps": 2}, "importance_steps=2, and the optimizer state was made for 1"),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_state_of_another_plan_names_what_differs(case):
    saved, resumed, message = RESUMED[case]
    with pytest.raises(ValueError, match=message):
        jax.jit(made(**resumed).update)(grads(0), made(**saved).init(params()), params())


def test_the_layout_of_a_state_counts():
    tree = {"a": {"kernel": jnp.ones((3, 3, 3, 3))}}
    hwio, oihw = (
        ct.clicktrain(
            optax.sgd(0.1), ct.make_plan(tree, {".*": 0.5}, axes=axes), select_step=0, prune_step=1, coeff=0.0
        )
        for axes in ("HWIO", "OIHW")
    )
    with pytest.raises(ValueError, match="'a/kernel' is OIHW in the plan, and not in the state"):
        oihw.update(tree, hwio.init(tree), tree)


@pytest.mark.parametrize("name", ["dense", "gather", "select", "regularize", "prune", "pruned", "masked"])
def test_updates_by_phase_refuse_a_state_of_another_plan(name):
    one, both = (
        ct.phase_updates(optax.sgd(0.1), plan(rules=rules), coeff=0.0, importance_steps=2)
        for rules in ({"a/kernel": 0.5}, {".*": 0.5})
    )
    with pytest.raises(ValueError, match="'b/kernel' is pruned by the plan alone"):
        getattr(both, name)(grads(0), one.init(params()), params())


MOMENTUM = optax.sgd(0.01, momentum=0.9)
NOT_FINITE = {"the selection": (2,), "the prune": (5,), "both": (2, 5), "between": (3, 4), "after it": (6, 7)}


@pytest.mark.parametrize("outside", [False, True], ids=["inside", "outside"])
@pytest.mark.parametrize("when", NOT_FINITE)
def test_updates_that_are_skipped_never_leave_a_run_dense(when, outside):
    """By the optimizer that is wrapped, or by one around the wrapper, for which they never happened."""
    bad = NOT_FINITE[when]
    tx = if_finite(transform(MOMENTUM)) if outside else transform(if_finite(MOMENTUM))
    tree, state, update = params(), tx.init(params()), jax.jit(tx.update)
    for step in range(10):
        found = grads(step, tree=tree)
        if step in bad:
            found["a"]["kernel"] = found["a"]["kernel"].at[0, 0, 0, 0].set(jnp.inf)
        updates, state = update(found, state, tree)
        tree = optax.apply_updates(tree, updates)
    put_off = 2 in bad and not outside
    said = ct.status(state)
    assert (said.count, said.selected, said.pruned) == (10 - len(bad) * outside, 2 + put_off, 5)
    assert said.postponed == put_off and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))
    same(ct.apply_masks(tree, ct.masks_of(state)), tree)
    assert ct.report(tree, ct.masks_of(state)).conv_compression == pytest.approx(4.5)


def test_not_the_state_of_clicktrain():
    with pytest.raises(ValueError, match="state is a tuple: expected the ClickTrainState"):
        transform().update(grads(0), optax.sgd(0.1).init(params()), params())
    restored = transform().init(params())._asdict()
    with pytest.raises(ValueError, match=r"state is a dict: .*without a template is restored with one, init\(params\)"):
        transform().update(grads(0), restored, params())
