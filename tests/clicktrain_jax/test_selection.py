"""Scores -> masks: hand-worked examples, then whatever hypothesis finds, against the loops of `oracle`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clicktrain_jax as ct

FOUR = ct.patterns.fixed_set(4)
# Programs here run once: compiled without optimisation they are ready sooner.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few_examples = settings(max_examples=15, deadline=None, derandomize=True)


def select(scores, fraction, tile=(1, 1), patterns=FOUR, jit=False):
    """One layer's ``(pattern mask, kernel mask)``."""
    tree = {"kernel": jnp.asarray(scores, jnp.float32)}
    plan = ct.make_plan(tree, {"kernel": fraction}, tile=tile, groups={"kernel": 1})
    function = quick_jit(ct.select_masks, static_argnums=1) if jit else ct.select_masks
    masks = function(tree, plan, patterns)
    return masks.pattern["kernel"], masks.kernel["kernel"]


def per_kernel(values):
    """Scores (3, 3, cin, cout) whose sum over the taps is ``values`` (cin, cout)."""
    scores = np.zeros((3, 3, *np.shape(values)))
    scores[1, 1] = values
    return scores


def grid(cin_by_cout, mask):
    """The (cin, cout) mask behind a kernel mask that is constant over the taps."""
    mask = np.asarray(mask)
    assert mask.dtype == bool and (mask == mask[:1, :1]).all()
    np.testing.assert_array_equal(mask[0, 0], np.array(cin_by_cout, bool))


def test_smallest_kernels_go():
    _, kernel = select(per_kernel([[4, 1], [3, 2], [9, 5]]), 0.5)
    grid([[1, 0], [0, 0], [1, 1]], kernel)


def test_equal_kernels_go_by_lowest_filter_then_channel():
    # In OIHW order filter 0's kernels (the first column) come before filter 1's.
    _, kernel = select(per_kernel(np.ones((3, 2))), 0.5)
    grid([[0, 1], [0, 1], [0, 1]], kernel)
    _, kernel = select(per_kernel(np.ones((3, 2))), 2 / 3)
    grid([[0, 0], [0, 1], [0, 1]], kernel)


def test_ties_at_the_threshold_only():
    _, kernel = select(per_kernel([[7, 2], [2, 0], [2, 7]]), 0.5)
    grid([[1, 1], [0, 0], [0, 1]], kernel)


def test_a_count_is_rounded_up():
    _, kernel = select(per_kernel([[1, 2, 3]]), 0.01)
    grid([[0, 1, 1]], kernel)


def test_55_percent_of_1600_is_880():
    assert 0.55 * 1600 > 880
    scores = np.random.default_rng(0).random((3, 3, 40, 40))
    _, kernel = select(scores, 0.55)
    assert int((~kernel[0, 0]).sum()) == 880


@pytest.mark.parametrize("index", range(4))
def test_a_kernel_takes_the_pattern_that_retains_most(index):
    scores = np.full((3, 3, 1, 1), 0.1)
    scores[FOUR[index]] = 1.0
    pattern, kernel = select(scores, 0.0)
    np.testing.assert_array_equal(np.asarray(pattern)[:, :, 0, 0], FOUR[index])
    assert kernel.all()


def test_equal_patterns_go_to_the_lowest_index():
    # All four corner blocks hold the centre, so on this score they tie.
    pattern, _ = select(per_kernel(np.ones((1, 1))), 0.0)
    np.testing.assert_array_equal(np.asarray(pattern)[:, :, 0, 0], FOUR[0])
    # The right-hand blocks, 0 and 2, tie; so do, on the left, 1 and 3.
    scores = np.zeros((3, 3, 1, 2))
    scores[1, 2, 0, 0] = scores[1, 0, 0, 1] = 1
    pattern, _ = select(scores, 0.0)
    np.testing.assert_array_equal(np.asarray(pattern)[:, :, 0, 0], FOUR[0])
    np.testing.assert_array_equal(np.asarray(pattern)[:, :, 0, 1], FOUR[1])


def test_kernels_are_removed_by_all_taps_not_by_the_retained_ones():
    scores = np.ones((3, 3, 1, 2))
    scores[..., 1] = 0
    scores[:2, :2, 0, 1] = 2  # retains 8 of 8, the other one 4 of 9
    _, kernel = select(scores, 0.5)
    grid([[1, 0]], kernel)


def test_1x1_layers_have_no_patterns():
    scores = {"kernel": jnp.arange(6.0).reshape(1, 1, 2, 3)}
    plan = ct.make_plan(scores, {"kernel": 0.5})
    for function in (ct.select_masks, jax.jit(ct.select_masks, static_argnums=1)):
        masks = function(scores, plan, FOUR)
        assert masks.pattern == {"kernel": None}
        grid([[0, 0, 0], [1, 1, 1]], masks.kernel["kernel"])


def test_5x5_patterns():
    patterns = np.zeros((2, 5, 5), bool)
    patterns[0, :2] = patterns[1, 3:] = True
    scores = np.zeros((5, 5, 2, 2))
    scores[4, 4] = 1
    pattern, _ = select(scores, 0.0, patterns=patterns)
    np.testing.assert_array_equal(pattern, np.broadcast_to(patterns[1][:, :, None, None], (5, 5, 2, 2)))


def test_layers_choose_apart_and_dense_leaves_have_no_masks():
    scores = {"a": per_kernel([[1, 2]]), "b": per_kernel([[8, 9]]), "c": per_kernel([[1, 2]]), "bias": np.ones(2)}
    plan = ct.make_plan(scores, {"[ab]": 0.5, "c": None}, groups={".*": 1})
    masks = ct.select_masks(jax.tree.map(jnp.asarray, scores), plan, FOUR)
    grid([[0, 1]], masks.kernel["a"])
    grid([[0, 1]], masks.kernel["b"])
    assert masks.kernel["c"] is masks.pattern["c"] is masks.kernel["bias"] is masks.pattern["bias"] is None


# Few whole numbers: ties everywhere, and sums that are exact in any order.
def layer_scores(sizes, taps):
    def build(shape_and_seed):
        (cin, cout), seed = shape_and_seed
        return np.random.default_rng(seed).integers(0, 3, (*taps, cin, cout)).astype(np.float32)

    return st.tuples(st.sampled_from(sizes), st.integers(0, 2**32 - 1)).map(build)


# Shapes come from a short list, so that compiled programs are found again.
scores_3x3 = layer_scores([(3, 5), (8, 4)], (3, 3))
scores_1x1 = layer_scores([(8, 4)], (1, 1))
percents = st.sampled_from([0, 35, 90])


@few_examples
@given(scores=scores_3x3, percent=percents, number=st.sampled_from([4, 12]))
def test_kernels_and_patterns_agree_with_the_loops(oracle, scores, percent, number):
    patterns = ct.patterns.fixed_set(number)
    pattern, kernel = select(scores, percent / 100, patterns=patterns)
    np.testing.assert_array_equal(pattern, oracle.pattern_mask(scores, patterns))
    np.testing.assert_array_equal(kernel, oracle.kernel_mask(scores, percent))


@few_examples
@given(scores=scores_1x1, percent=percents)
def test_1x1_kernels_agree_with_the_loops(oracle, scores, percent):
    pattern, kernel = select(scores, percent / 100)
    assert pattern is None
    np.testing.assert_array_equal(kernel, oracle.kernel_mask(scores, percent))


@few_examples
@given(scores=scores_3x3, percent=st.integers(0, 99), tile=st.sampled_from([(1, 1), (2, 3)]))
def test_count_is_exact(oracle, scores, percent, tile):
    tiles = -(-scores.shape[2] // tile[1]) * -(-scores.shape[3] // tile[0])
    if tile != (1, 1) and oracle.removed_count(percent, tiles) == tiles:
        with pytest.raises(ValueError, match=f"removes all of the {tiles} unit"):
            ct.make_plan({"k": scores}, {"k": percent / 100}, tile=tile, groups={"k": 1})
        return
    plan = ct.make_plan({"k": scores}, {"k": percent / 100}, tile=tile, groups={"k": 1})
    (layer,) = plan.layers
    assert layer.num_removed == oracle.removed_count(percent, tiles)
    assert layer.unit_grid == (-(-scores.shape[2] // tile[1]), -(-scores.shape[3] // tile[0]))


TILES = [(2, 1), (1, 2), (2, 3), (4, 4), (None, 1), (1, None), (None, 2), (None, None), (64, 64)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", [(3, 3, 3, 5), (1, 1, 8, 4)], ids=str)
def test_tiles_agree_with_the_loops(oracle, shape, tile):
    scores = np.random.default_rng(5).integers(0, 3, shape).astype(np.float32)
    percent = 45 if tile not in [(None, None), (64, 64)] else 0
    pattern, kernel = select(scores, percent / 100, tile, jit=True)
    np.testing.assert_array_equal(kernel, oracle.kernel_mask(scores, percent, tile))
    expected = oracle.pattern_mask(scores, FOUR, tile)
    assert (pattern is None) == (expected is None) == (shape[0] == 1)
    for mask in [kernel] if pattern is None else [pattern, kernel]:
        for i in oracle.blocks(shape[2], tile[1]):
            for o in oracle.blocks(shape[3], tile[0]):
                block = np.asarray(mask)[:, :, i, o]
                assert (block == block[:, :, :1, :1]).all()
    if pattern is not None:
        np.testing.assert_array_equal(pattern, expected)


@pytest.mark.parametrize("traced", [False, True], ids=["patterns closed over", "patterns traced"])
def test_jit_selects_the_same(traced):
    tree = {"kernel": jnp.asarray(np.random.default_rng(3).random((3, 3, 8, 4)), jnp.float32)}
    plan = ct.make_plan(tree, {"kernel": 0.35})
    expected = ct.select_masks(tree, plan, FOUR)
    if traced:
        got = jax.jit(ct.select_masks, static_argnums=1)(tree, plan, jnp.asarray(FOUR))
    else:
        got = jax.jit(lambda scores: ct.select_masks(scores, plan, FOUR))(tree)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_scores_of_bfloat16_weights_are_float32():
    params = {"kernel": jnp.full((3, 3, 2, 2), 1e-3, jnp.bfloat16), "none": None}
    for scores in (ct.importance.taylor(params, params), ct.importance.magnitude(params)):
        assert scores["kernel"].dtype == jnp.float32 and scores["none"] is None


def test_fixed_sets():
    assert np.array_equal(FOUR[0], [[0, 0, 0], [0, 1, 1], [0, 1, 1]])
    for number in (4, 8, 12):
        patterns = ct.patterns.fixed_set(number)
        assert patterns.shape == (number, 3, 3) and patterns.dtype == bool
        assert (patterns.sum(axis=(1, 2)) == 4).all() and len(np.unique(patterns, axis=0)) == number
        np.testing.assert_array_equal(patterns, ct.patterns.fixed_set(12)[:number])
        for pattern in patterns:
            np.testing.assert_array_equal(ct.patterns.parse(ct.patterns.to_text(pattern)), pattern)
