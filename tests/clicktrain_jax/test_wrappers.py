"""Where a state may lie when its masks are asked for, and what may stand around the transformation."""

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

OPTIONS = {"select_step": 0, "prune_step": 1, "coeff": 1e-3}


def params():
    rng = np.random.default_rng(0)
    shapes = {"conv": {"kernel": (3, 3, 8, 16)}, "head": {"kernel": (16, 5)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@pytest.fixture(scope="module")
def ended():
    tree = params()
    tx = ct.clicktrain(optax.adam(0.1), ct.make_plan(tree, {"conv/kernel": 0.5}), **OPTIONS)
    state = tx.init(tree)
    for _ in range(3):
        updates, state = tx.update(tree, state, tree)
        tree = optax.apply_updates(tree, updates)
    return tx, tree, state


def nnx_states(state):
    class Holder(nnx.Module):
        pass

    holder = Holder()
    holder.opt_state = nnx.data(jax.tree.map(nnx.Variable, state))
    return nnx.state(holder)


PLACES = {
    "train state": lambda tx, tree, state: TrainState(step=0, apply_fn=None, params=tree, tx=tx, opt_state=state),
    "nnx state": lambda tx, tree, state: nnx_states(state),
    "pure dictionary": lambda tx, tree, state: nnx.to_pure_dict(nnx_states(state)),
    "flattened": lambda tx, tree, state: flatten_dict(nnx.to_pure_dict(nnx_states(state))),
    "flattened to strings": lambda tx, tree, state: flatten_dict(flax.serialization.to_state_dict(state), sep="/"),
    "restored": lambda tx, tree, state: flax.serialization.msgpack_restore(
        flax.serialization.to_bytes({"a": [state, 1]})
    ),
    "chained in a tuple": lambda tx, tree, state: (optax.EmptyState(), (state,), {"params": tree}),
    "replicated": lambda tx, tree, state: jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), state),
}


@pytest.mark.parametrize("place", PLACES)
def test_places(ended, place):
    held, expected = PLACES[place](*ended), ct.masks_of(ended[2])
    found = ct.masks_of(held)
    jax.tree.map(np.testing.assert_array_equal, found.layers, expected.layers)
    assert ct.status(held) == ct.Status(3, 0, 1, 0, ())
    applied = ct.apply_masks(ended[1], found)
    jax.tree.map(np.testing.assert_array_equal, applied, ended[1])
    assert ct.report(ended[1], found) == ct.report(ended[1], expected)


def test_states_that_differ_along_a_leading_axis(ended):
    tx, tree, state = ended
    several = jax.tree.map(lambda one, two: jnp.stack([one, two]), state, tx.init(tree))
    with pytest.raises(ValueError, match="2 states along a leading axis, and they differ: take one"):
        ct.masks_of(several)


LABELS = {"conv": "train", "head": "freeze"}
OUTER = {
    "multi_transform": lambda tx: optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, LABELS),
    "masked": lambda tx: optax.masked(tx, {"conv": True, "head": False}),
    "labels by a function": lambda tx: optax.multi_transform(
        {"train": tx, "freeze": optax.set_to_zero()}, lambda tree: LABELS
    ),
    "masked, by a function": lambda tx: optax.masked(tx, lambda tree: jax.tree.map(lambda leaf: leaf.ndim == 4, tree)),
    "masked twice": lambda tx: optax.masked(
        optax.masked(tx, {"conv": True, "head": False}), {"conv": True, "head": True}
    ),
    "masked, leaf by leaf": lambda tx: optax.masked(tx, {"conv": {"kernel": True}, "head": {"kernel": False}}),
}


@pytest.mark.parametrize("whole", [True, False], ids=["plan of all", "plan of a part"])
@pytest.mark.parametrize("outer", OUTER)
def test_an_outer_transformation_that_takes_a_part(outer, whole):
    tree = params()
    plan = ct.make_plan(tree if whole else {"conv": tree["conv"]}, {"conv/kernel": 0.5})
    tx = OUTER[outer](ct.clicktrain(optax.sgd(0.1, momentum=0.9), plan, **OPTIONS))
    state = tx.init(tree)
    for _ in range(3):
        updates, state = jax.jit(tx.update)(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        tree = optax.apply_updates(tree, updates)
    masks = ct.masks_of(state)
    keep = masks.pattern["conv"]["kernel"] & masks.kernel["conv"]["kernel"]
    np.testing.assert_array_equal(tree["conv"]["kernel"] != 0, keep)
    assert int(keep.sum()) == 256
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(tree, masks), tree)
    report = ct.report(tree, masks)
    assert report.conv_retained == 256 and [layer.pruned for layer in report.layers] == [True, False]


def test_a_wrapper_that_mixes_states_by_arithmetic():
    """optax's SAM picks one of two states by a weighted sum, which makes integers of all that is bool."""
    tree = params()
    tx = ct.clicktrain(optax.sgd(0.1), ct.make_plan(tree, {"conv/kernel": 0.5}), **OPTIONS)
    tx = optax.contrib.sam(tx, optax.sgd(0.01), sync_period=2)
    state, update = tx.init(tree), jax.jit(tx.update)
    for _ in range(6):
        updates, state = update(tree, state, tree)
        tree = optax.apply_updates(tree, updates)
    masks = ct.masks_of(state)
    assert masks.kernel["conv"]["kernel"].dtype == masks.layers["conv/kernel"].kernel.dtype == bool
    assert ct.status(state) == ct.Status(3, 0, 1, 0, ())
    jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(tree, masks), tree)
    assert int((tree["conv"]["kernel"] != 0).sum()) == 256


@pytest.mark.parametrize("steps", [1, 2])
def test_what_of_a_state_is_sharded_like_the_parameters(ended, steps):
    _, tree, _ = ended
    plan = ct.make_plan(tree, {"conv/kernel": 0.5})
    options = OPTIONS | {"select_step": steps, "prune_step": steps + 1, "importance_steps": steps}
    tx = optax.chain(optax.clip(1.0), ct.clicktrain(optax.adam(0.1), plan, **options))
    specs = jax.tree.map(lambda leaf: f"{leaf.ndim} axes", tree)
    state = tx.init(tree)
    found = optax.tree.map_params(tx, lambda _, spec: spec, state, specs, transform_non_params=lambda _: "whole")
    assert jax.tree.structure(found) == jax.tree.structure(state)
    (adam, _), said = found[1].inner_state, found[1]._replace(inner_state=None)
    assert (adam.mu, adam.nu, adam.count) == (specs, specs, "whole")
    assert set(jax.tree.leaves(said)) == {"whole"}
    with pytest.raises(ValueError, match="params: belongs to another tree, 0 leaves"):
        tx.init({})


def test_a_planned_layer_that_is_masked_away_is_refused():
    tree = params()
    tx = optax.masked(
        ct.clicktrain(optax.sgd(0.1), ct.make_plan(tree, {"conv/kernel": 0.5}), **OPTIONS),
        {"conv": False, "head": True},
    )
    with pytest.raises(ValueError, match="holds None at 'conv/kernel', which the plan prunes"):
        tx.init(tree)


def test_a_loop_of_public_names_alone():
    """One that knows its phase, reads what happened, and tries again: the transformation's own results."""
    tree = params()
    plan = ct.make_plan(tree, {"conv/kernel": 0.5})
    updates_of = ct.phase_updates(optax.sgd(0.1), plan, coeff=1e-3, importance_steps=2)
    schedule = ct.PhaseSchedule(select_step=2, prune_step=5, importance_steps=2)
    tx = ct.clicktrain(optax.sgd(0.1), plan, coeff=1e-3, select_step=2, prune_step=5, importance_steps=2)
    state, theirs, other = updates_of.init(tree), tx.init(tree), tree
    compiled = {name: jax.jit(update) for name, update in updates_of._asdict().items()}
    done, facts = 0, None
    while done < 8:
        for phase, gathers, first, end in schedule.segments(done, 8, facts):
            for step in range(first, end):
                bad = jnp.nan if step == 2 else 1.0
                grads, wanted = (jax.tree.map(lambda w, bad=bad: bad * jnp.cos(w), each) for each in (tree, other))
                updates, state = compiled["gather" if gathers else phase.name.lower()](grads, state, tree)
                wanted, theirs = jax.jit(tx.update)(wanted, theirs, other)
                if step != 2:
                    tree, other = optax.apply_updates(tree, updates), optax.apply_updates(other, wanted)
            done = end
            if phase is ct.Phase.SELECT:
                facts = int(state.selected), int(state.pruned), int(state.gathered)
                break
    assert ct.status(state) == ct.status(theirs) == ct.Status(8, 3, 5, 1, ())
    jax.tree.map(np.testing.assert_array_equal, ct.masks_of(state), ct.masks_of(theirs))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6), tree, other)
    assert dict(named_leaves(tree))["conv/kernel"].size - int((tree["conv"]["kernel"] == 0).sum()) == 256
