"""The one form of a layer's mask: small in a state, its boolean views, and masks of strangers beside it."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.masks import FullMask, LayerMask, Masks, build_masks, combine

SHAPES = [(3, 3, 8, 4), (3, 3, 16, 3), (3, 3, 5, 4), (3, 3, 1, 1), (5, 5, 2, 3), (1, 1, 8, 3), (1, 1, 3, 5)]


def some_choice(shape, num_patterns):
    rng = np.random.default_rng(sum(shape))
    kernel = jnp.asarray(rng.random(shape[2:]) < 0.5)
    if shape[0] == 1:
        return LayerMask(None, kernel, None)
    ids = jnp.asarray(rng.integers(0, num_patterns, shape[2:]), jnp.uint8)
    return LayerMask(ids, kernel, jnp.asarray(rng.random((num_patterns, *shape[:2])) < 0.5))


@pytest.mark.parametrize("host", [False, True], ids=["on the device", "on the host"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_patterns", [4, 255])
def test_views(shape, num_patterns, host):
    choice = some_choice(shape, num_patterns)
    choice = jax.device_get(choice) if host else choice
    found, whole = choice.full(), choice.combined()
    assert choice.shape == shape and all(isinstance(part, np.ndarray) == host for part in found if part is not None)
    np.testing.assert_array_equal(found.kernel, np.broadcast_to(choice.kernel, shape))
    assert found.kernel.dtype == bool and found.kernel.shape == shape
    if shape[0] == 1:
        assert found.pattern is None
        np.testing.assert_array_equal(whole, found.kernel)
        return
    by_indexing = np.asarray(choice.patterns)[np.asarray(choice.pattern_ids)]  # (cin, cout, kh, kw)
    np.testing.assert_array_equal(found.pattern, by_indexing.transpose(2, 3, 0, 1))
    assert found.pattern.dtype == bool
    np.testing.assert_array_equal(whole, np.asarray(found.pattern) & np.asarray(found.kernel))


def test_views_under_jit():
    choice = some_choice((3, 3, 16, 3), 4)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda one: one.full())(choice), choice.full())


def test_masks_are_a_tree_of_layer_masks():
    tree = {"a": {"kernel": some_choice((3, 3, 8, 4), 4), "bias": None}, "b": [some_choice((1, 1, 8, 3), 4)]}
    masks = Masks.of(tree)
    assert list(masks.layers) == ["a/kernel", "b/0"] and masks.names == ("a/bias", "a/kernel", "b/0")
    assert masks.pattern["a"]["bias"] is masks.kernel["a"]["bias"] is masks.pattern["b"][0] is None
    again = pickle.loads(pickle.dumps(masks))
    for other in (jax.jit(lambda one: one)(masks), again, Masks(pattern=masks.pattern, kernel=masks.kernel)):
        for one, two in zip(masks, other, strict=True):
            jax.tree.map(np.testing.assert_array_equal, one, two)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda one: one.kernel)(masks), masks.kernel)
    assert repr(masks) == "Masks(2 of 3 leaves: 'a/kernel': (3, 3, 8, 4), 'b/0': (1, 1, 8, 3))"


def test_boolean_trees_of_strangers_count_as_the_choice_they_spell_out():
    shapes = {"a": (3, 3, 8, 4), "b": (1, 1, 8, 3)}
    ours = build_masks({"a": 0, "b": 0, "c": 0}, {name: some_choice(shape, 4) for name, shape in shapes.items()})
    theirs, combined = Masks(*ours), combine(ours)
    assert all(isinstance(layer, FullMask) for layer in theirs.layers.values())
    shapes["c"] = (4,)
    weights = {name: jnp.arange(1.0, 1 + np.prod(shape)).reshape(shape) for name, shape in shapes.items()}
    expected = ct.apply_masks(weights, ours)
    for masks in (theirs, combined):
        jax.tree.map(np.testing.assert_array_equal, ct.apply_masks(weights, masks), expected)
        assert ct.report(weights, masks).conv_retained == ct.report(weights, ours).conv_retained > 0
    assert ct.report(weights, theirs) == ct.report(weights, ours)
    jax.tree.map(np.testing.assert_array_equal, ct.group_lasso(weights, theirs), ct.group_lasso(weights, ours))


def test_masks_of_a_part_leave_the_rest_dense():
    part = build_masks({"a": 0}, {"a": some_choice((3, 3, 8, 4), 4)})
    weights = {"a": jnp.ones((3, 3, 8, 4)), "other": {"kernel": jnp.ones((3, 3, 4, 4))}}
    applied = ct.apply_masks(weights, part)
    np.testing.assert_array_equal(applied["a"] != 0, combine(part)["a"])
    assert applied["other"]["kernel"] is weights["other"]["kernel"]
    report = ct.report(weights, part)
    assert [layer.pruned for layer in report.layers] == [True, False]
    for kind, total in enumerate(ct.group_lasso(weights, part)):
        np.testing.assert_allclose(total, ct.group_lasso({"a": weights["a"]}, part)[kind])
    with pytest.raises(ValueError, match="masks: belongs to another tree.*'a'"):
        ct.apply_masks({"other": weights["other"]}, part)


def state_of(shape):
    params = {"conv": {"kernel": jnp.zeros(shape)}, "bias": jnp.zeros(3)}
    plan = ct.make_plan(params, {"conv/kernel": 0.5})
    return ct.clicktrain(optax.identity(), plan, select_step=1, prune_step=2, coeff=0.0).init(params)


def test_state_is_small():
    masks = state_of((3, 3, 64, 64)).masks
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(masks))
    kernels, weights = 64 * 64, 64 * 64 * 9
    assert num_bytes < weights * 4 / 15
    assert num_bytes == 2 * kernels + 4 * 9  # a byte and a bool a kernel, and the set of patterns


@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[-1:], ids=str)
def test_all_is_kept_before_the_selection(shape):
    masks = ct.masks_of(state_of(shape))
    assert masks.kernel["bias"] is masks.pattern["bias"] is None
    assert masks.kernel["conv"]["kernel"].all() and masks.kernel["conv"]["kernel"].shape == shape
    if shape[0] == 1:
        assert masks.pattern["conv"]["kernel"] is None
    else:
        assert masks.pattern["conv"]["kernel"].all() and masks.pattern["conv"]["kernel"].shape == shape
