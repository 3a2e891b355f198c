"""Scores over several updates and a second selection, inside the transformation and by phase."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct

FOUR = ct.patterns.fixed_set(4)
STEPS = {"select_step": 3, "prune_step": 8, "coeff": 0.05}


def same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def masks_from(toy, history, steps, criterion=ct.importance.taylor):
    """What the mean of the scores of these updates selects."""
    scores = [criterion(history.params[step], history.grads[step]) for step in steps]
    mean = jax.tree.map(lambda *each: np.sum(each, axis=0, dtype=np.float32) / np.float32(len(each)), *scores)
    return ct.select_masks(mean, toy.plan(), FOUR)


@pytest.fixture(scope="module")
def gathered(toy):
    return toy.run(ct.clicktrain(optax.sgd(0.1), toy.plan(), **STEPS, importance_steps=3, reselect_step=7), steps=10)


def test_each_selection_takes_the_mean_of_the_updates_that_end_with_it(toy, gathered):
    assert all(keep.all() for keep in toy.keep_of(gathered.states[3]).values())
    first = masks_from(toy, gathered, (1, 2, 3))
    second = masks_from(toy, gathered, (5, 6, 7))
    alone = masks_from(toy, gathered, (3,))
    for step in (4, 7):
        same(ct.masks_of(gathered.states[step]), first)
    for step in (8, 10):
        same(ct.masks_of(gathered.states[step]), second)
    differ = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second))]
    assert any(differ)
    assert any(not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(alone)))
    assert gathered.traces == 1


def test_the_sums_are_empty_between_the_selections_and_gone_when_not_asked_for(toy, gathered):
    def sums(step):
        state = gathered.states[step]
        scales = dict(zip(sorted(state.scores), np.asarray(state.exponents)))
        return [float(jnp.sum(leaf)) * 2.0 ** max(-1000, scales[name]) for name, leaf in state.scores.items()]

    # Before updates 1 and 2 of the first window and 5 and 6 of the second: nothing, then one update, then two.
    for start in (1, 5):
        assert sums(start) == [0, 0]
        assert all(0 < one < two for one, two in zip(sums(start + 1), sums(start + 2)))
    assert sums(4) == sums(8) == sums(10) == [0, 0]
    assert [int(state.gathered) for state in gathered.states] == [0, 0, 1, 2, 0, 0, 1, 2, 0, 0, 0]
    plain = ct.clicktrain(optax.sgd(0.1), toy.plan(), **STEPS).init(toy.params())
    assert plain.scores == {}


def test_pruned_weights_follow_the_second_selection(toy, gathered):
    keep = toy.keep_of(gathered.states[10])
    for layer in toy.PRUNED:
        np.testing.assert_array_equal(np.asarray(gathered.params[10][layer]["kernel"]) != 0, keep[layer])


def test_updates_by_phase_are_the_transformation(toy, gathered):
    inner, plan = optax.sgd(0.1), toy.plan()
    schedule = ct.PhaseSchedule(3, 8, 7, 3)
    updates_of = ct.phase_updates(inner, plan, coeff=STEPS["coeff"], importance_steps=3)
    tree = toy.params()
    state = updates_of.init(tree)
    for step in range(10):
        phase, grads = schedule.phase(step), jax.grad(toy.loss)(tree, jnp.float32(step))
        due = schedule.due(step, *schedule.planned(step))
        update = updates_of.gather if due.gathers else getattr(updates_of, phase.name.lower())
        updates, state = update(grads, state, tree)
        tree = optax.apply_updates(tree, updates)
    same(ct.masks_of(state), ct.masks_of(gathered.states[10]))
    assert ct.status(state) == ct.status(gathered.states[10])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), tree, gathered.params[10])


def test_generated_patterns_inside_the_transformation(toy):
    source = ct.patterns.Generated(3)
    history = toy.run(ct.clicktrain(optax.sgd(0.1), toy.plan(), **STEPS, patterns=source), steps=9)
    scores = ct.importance.taylor(history.params[3], history.grads[3])
    same(ct.masks_of(history.states[4]), ct.select_masks(scores, toy.plan(), source))
    patterns = np.asarray(history.states[4].masks["Conv_1"]["kernel"].patterns)
    assert patterns.shape == (3, 3, 3) and (patterns.sum(axis=(1, 2)) == 4).all()


def test_a_target_inside_the_transformation(toy):
    tree = {f"Conv_{i}": {"kernel": toy.params(seed=i)["Conv_1"]["kernel"]} for i in range(3)}
    plan = ct.make_plan(tree, {"Conv_[12]/kernel": "auto"}, target=2.0, floor=False)
    history = toy.run(ct.clicktrain(optax.sgd(0.1), plan, **STEPS), tree, steps=9)
    masks = ct.masks_of(history.states[9])
    assert ct.report(history.params[9], masks).conv_compression == pytest.approx(2.0, rel=0.02)


def test_group_taylor_by_hand():
    weight = np.zeros((3, 3, 1, 2), np.float32)
    grad = np.ones_like(weight)
    weight[0, 0, 0] = (3, 3)
    weight[1, 1, 0] = (1, -1)
    scores = np.asarray(ct.importance.group_taylor({"k": weight}, {"k": grad})["k"])
    # Changes 3 and 1 add to 4, changes 3 and -1 to 2: 16 and 4, in proportion to 9 and 1.
    np.testing.assert_allclose(scores.sum(axis=(0, 1)), [[16, 4]], rtol=1e-6)
    np.testing.assert_allclose(scores[0, 0, 0], [14.4, 3.6], rtol=1e-6)
    assert (scores >= 0).all() and scores.dtype == np.float32
    nothing = ct.importance.group_taylor(
        {"k": 0 * weight, "bias": np.ones(2), "no": None}, {"k": grad, "bias": 2 * np.ones(2), "no": None}
    )
    assert not np.asarray(nothing["k"]).any() and nothing["no"] is None
    np.testing.assert_array_equal(nothing["bias"], [4, 4])


def test_group_scores_of_several_batches_average_kernel_by_kernel():
    rng = np.random.default_rng(0)
    weight = {"k": rng.normal(size=(3, 3, 4, 5)).astype(np.float32)}
    grads = [{"k": rng.normal(size=(3, 3, 4, 5)).astype(np.float32)} for _ in range(3)]
    mean = sum(np.asarray(ct.importance.group_taylor(weight, grad)["k"]) for grad in grads) / 3
    expected = np.mean([(weight["k"] * grad["k"]).sum(axis=(0, 1)) ** 2 for grad in grads], axis=0)
    np.testing.assert_allclose(mean.sum(axis=(0, 1)), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"importance_steps": 0}, "importance_steps=0: expected 1 to 4"),
        ({"importance_steps": 5}, "importance_steps=5: expected 1 to 4, the updates up to select_step=3"),
        ({"importance_steps": 1.5}, "importance_steps=1.5: expected an integer"),
        ({"reselect_step": 3}, "reselect_step=3: expected it before prune_step=8 and at least importance_steps=1"),
        ({"reselect_step": 8}, "reselect_step=8: expected it before prune_step=8"),
        ({"reselect_step": 5, "importance_steps": 3}, "reselect_step=5: expected it .* at least importance_steps=3"),
    ],
    ids=str,
)
def test_bad_steps(toy, options, message):
    with pytest.raises(ValueError, match=message):
        ct.clicktrain(optax.sgd(0.1), toy.plan(), **STEPS, **options)


def test_gathering_what_nobody_asked_for(toy):
    updates_of = ct.phase_updates(optax.sgd(0.1), toy.plan(), coeff=0.0)
    with pytest.raises(ValueError, match="importance_steps=1: there is nothing to gather"):
        updates_of.gather(toy.params(), updates_of.init(toy.params()), toy.params())
