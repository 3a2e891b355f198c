"""What an all-reduce of gradients carries once weights are gone. On devices: reductions.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax import models

SHAPES = {"a": {"kernel": (3, 3, 4, 8)}, "b": {"kernel": (5, 3)}}
PARAMS = jax.tree.map(lambda shape: jnp.ones(shape), SHAPES, is_leaf=lambda node: isinstance(node, tuple))
PLAN = ct.make_plan(PARAMS, {"a/kernel": 0.5})
MASKS = ct.select_masks(ct.importance.magnitude(PARAMS), PLAN, ct.patterns.fixed_set(4))


def alone(grads, retained, **options):
    """One device, a mapped axis of size one."""
    return jax.vmap(lambda grads: ct.reduction.pmean(grads, retained, "i", **options), axis_name="i")(
        jax.tree.map(lambda leaf: leaf[None], grads)
    )


def test_removed_weights_get_zero_and_the_rest_what_it_had():
    grads = jax.tree.map(lambda leaf: jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape).astype(jnp.bfloat16), PARAMS)
    got = jax.tree.map(lambda leaf: leaf[0], alone(grads, ct.reduction.retained(PARAMS, MASKS)))
    jax.tree.map(np.testing.assert_array_equal, got, ct.apply_masks(grads, MASKS))
    assert got["a"]["kernel"].dtype == jnp.bfloat16


def test_counts():
    retained = ct.reduction.retained(PARAMS, MASKS)
    assert retained.sizes == {"a/kernel": 16 * 4, "b/kernel": 15}
    assert ct.reduction.num_bytes(PARAMS, retained) == (4 * 303, 4 * 79, 4 * 288, 4 * 64)
    assert "79 weights" in repr(retained)
    back = jax.tree.map(lambda leaf: leaf, retained)
    assert back.sizes == retained.sizes and jax.tree.structure(back) == jax.tree.structure(retained)


def test_masks_that_keep_everything_need_no_indices():
    everything = ct.masks_of(ct.clicktrain(optax.sgd(0.1), PLAN, select_step=5, prune_step=6, coeff=0.0).init(PARAMS))
    retained = ct.reduction.retained(PARAMS, everything)
    assert not retained.indices and retained.sizes["a/kernel"] == 288


def test_marked_weights_still_need_their_gradient():
    tx = ct.clicktrain(optax.sgd(0.1), PLAN, select_step=0, prune_step=5, coeff=1e-3)
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="between selection and prune"):
        ct.reduction.retained(PARAMS, ct.masks_of(state))


def test_bad_input_is_named():
    retained = ct.reduction.retained(PARAMS, MASKS)
    with pytest.raises(ValueError, match="grads: belongs to another tree"):
        alone({"a": PARAMS["a"]}, retained)
    with pytest.raises(ValueError, match="'b/kernel' has 4 entries, 15 were expected"):
        alone({"a": PARAMS["a"], "b": {"kernel": jnp.ones((2, 2))}}, retained)
    with pytest.raises(ValueError, match="traced"):
        jax.jit(lambda masks: ct.reduction.retained(PARAMS, masks).indices)(MASKS)


@pytest.mark.parametrize("net", ["vgg11", "resnet18"])
def test_a_net_pruned_eight_times_sends_as_much_less(net):
    model, shape = models.build(net, num_classes=10, width=0.25), models.default_image_shape(net)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))["params"]
    plan = ct.make_plan(params, None, target=8.0)
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), params)
    masks = jax.jit(lambda scores: ct.select_masks(scores, plan, ct.patterns.fixed_set(4)))(scores)
    travels = ct.reduction.num_bytes(params, ct.reduction.retained(params, masks))
    dense = 4 * ct.report(params, masks).conv_weights - travels.pruned_dense
    assert (travels.pruned_dense + dense) / (travels.pruned_compact + dense) == pytest.approx(8.0, rel=0.01)
