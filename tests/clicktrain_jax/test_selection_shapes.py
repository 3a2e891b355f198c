"""Shapes of the choice: retained scores, balance, floors, two levels and quads, against plain numpy loops."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clicktrain_jax as ct
from clicktrain_jax.selection import kernel_choice

FOUR = ct.patterns.fixed_set(4)
# Two pairs that share no tap: four of them fit beside each other.
PAIRED = np.stack([ct.patterns.parse(text) for text in ("110/110/000", "001/001/110", "000/011/011", "111/100/000")])
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
few_examples = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**16)


def random_scores(seed, shape, levels=5):
    """Small integers: sums are exact and ties are frequent."""
    return np.random.default_rng(seed).integers(0, levels, shape).astype(np.float32)


def select(scores, fraction, patterns=FOUR, **options):
    """``(pattern mask, kernel mask)`` of one layer, the kernel mask as (cin, cout)."""
    plan = ct.make_plan({"k": scores}, {"k": fraction}, groups={"k": 1}, **options)
    masks = quick_jit(lambda tree: ct.select_masks(tree, plan, patterns))({"k": jnp.asarray(scores)})
    pattern = masks.pattern["k"]
    return None if pattern is None else np.asarray(pattern), np.asarray(masks.kernel["k"])[0, 0]


def retained(scores, pattern):
    return np.where(pattern, scores, 0).sum(axis=(0, 1))


@few_examples
@given(seed=seeds, percent=st.sampled_from([30, 55, 80]))
def test_retained_scores_decide_when_asked(seed, percent):
    scores = random_scores(seed, (3, 3, 6, 5))
    pattern, kernel = select(scores, percent / 100, removal_score="retained")
    kept = retained(scores, pattern)
    assert (~kernel).sum() == np.ceil(round(percent / 100 * 30, 6))
    assert kept[~kernel].max() <= kept[kernel].min()
    whole_pattern, whole_kernel = select(scores, percent / 100)
    np.testing.assert_array_equal(pattern, whole_pattern)
    assert (kept * kernel).sum() >= (kept * whole_kernel).sum()


@few_examples
@given(seed=seeds, percent=st.sampled_from([10, 50, 85]))
def test_every_filter_loses_the_same(seed, percent):
    scores = random_scores(seed, (3, 3, 7, 5))
    _, kernel = select(scores, percent / 100, removal_scope="filter")
    count = int(np.ceil(round(percent / 100 * 7, 6)))
    np.testing.assert_array_equal((~kernel).sum(axis=0), count)
    for filter_index in range(5):
        whole = scores[..., filter_index].sum(axis=(0, 1))
        expected = np.ones(7, bool)
        expected[np.argsort(whole, kind="stable")[:count]] = False
        np.testing.assert_array_equal(kernel[:, filter_index], expected)


def test_every_tile_loses_the_same_and_short_tiles_in_proportion():
    scores = random_scores(1, (3, 3, 10, 6), levels=1000)
    _, kernel = select(scores, 0.5, removal_scope="tile", tile=(4, 4), removal_tile=(1, 1))
    removed = [[int((~kernel[r : r + 4, c : c + 4]).sum()) for c in (0, 4)] for r in (0, 4, 8)]
    assert removed == [[8, 4], [8, 4], [4, 2]]
    with pytest.raises(ValueError, match="multiples of the removal tiles"):
        select(scores, 0.5, removal_scope="tile", tile=(4, 4), removal_tile=(3, 1))


@few_examples
@given(seed=seeds)
def test_the_floor_empties_no_filter_and_no_channel(seed):
    scores = random_scores(seed, (3, 3, 8, 6), levels=3)
    # One filter and one channel score nothing: without a floor they go first.
    scores[..., 2] = 0
    scores[:, :, 3] = 0
    _, free = select(scores, 0.7)
    _, held = select(scores, 0.7, floor=True)
    assert not free[:, 2].any() and not free[3].any()
    assert held.any(axis=0).all() and held.any(axis=1).all()
    assert (~free).sum() == (~held).sum() == np.ceil(round(0.7 * 48, 6))


def test_a_floor_that_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"leaves 10 of 48 units that compete, and the floor may hold 13"):
        select(random_scores(0, (3, 3, 8, 6)), 0.79, floor=True)


WHOLE = [
    {"tile": (8, 1), "removal_scope": "tile"},
    {"removal_scope": "tile"},
    {"tile": (8, None), "removal_scope": "filter"},
    {"tile": (None, None)},
]


@pytest.mark.parametrize("options", WHOLE, ids=str)
def test_a_fraction_that_would_remove_all_that_competes_is_refused(options):
    with pytest.raises(ValueError, match=r"a fraction of 0.5 removes all of the 1 unit\(s\)"):
        select(random_scores(0, (3, 3, 16, 32)), 0.5, **options)


def test_equal_counts_cannot_promise_a_floor():
    for scope in ("filter", "tile"):
        with pytest.raises(ValueError, match=f"floor=True with removal_scope='{scope}'"):
            select(
                random_scores(0, (3, 3, 8, 8)), 0.5, removal_scope=scope, tile=(4, 4), removal_tile=(1, 1), floor=True
            )


@few_examples
@given(seed=seeds, size=st.sampled_from([5, 6]), tile=st.sampled_from([(4, 1), (3, 2), (None, None)]))
def test_a_superset_contains_its_patterns_and_is_the_best(seed, size, tile):
    scores = random_scores(seed, (3, 3, 4, 6))
    patterns = ct.patterns.candidates((3, 3), 4)[::7]
    pattern, _ = select(scores, 0.0, patterns, tile=tile, superset=size)
    supersets = np.array([np.isin(np.arange(9), taps) for taps in itertools.combinations(range(9), size)])
    flat = patterns.reshape(-1, 9)
    filters, channels = tile[0] or 6, tile[1] or 4
    for o, i in itertools.product(range(0, 6, filters), range(0, 4, channels)):
        block = scores[:, :, i : i + channels, o : o + filters].reshape(9, -1)
        chosen = pattern[:, :, i : i + channels, o : o + filters].reshape(9, -1)
        assert chosen.any(axis=1).sum() <= size
        assert all((flat == kernel).all(axis=1).any() for kernel in chosen.T)
        best = max(
            np.max([np.where(p[:, None], block, 0).sum(axis=0) for p in flat if not (p & ~s).any()], axis=0).sum()
            for s in supersets
            if any(not (p & ~s).any() for p in flat)
        )
        assert (block * chosen).sum() == best


@few_examples
@given(seed=seeds, cin=st.sampled_from([4, 8, 6, 7]))
def test_quads_are_two_of_four_at_every_tap_and_the_best(seed, cin):
    scores = random_scores(seed, (3, 3, cin, 3))
    pattern, _ = select(scores, 0.0, PAIRED, quads=True)
    for start, o in itertools.product(range(0, cin, 4), range(3)):
        block, chosen = scores[:, :, start : start + 4, o], pattern[:, :, start : start + 4, o]
        assert chosen.sum(axis=2).max() <= 2
        best = max(
            sum((block[..., k] * p).sum() for k, p in enumerate(four))
            for four in itertools.product(PAIRED, repeat=block.shape[2])
            if sum(p.astype(int) for p in four).max() <= 2
        )
        assert (block * chosen).sum() == best


def test_quads_with_generated_pairs():
    scores = np.random.default_rng(0).random((3, 3, 16, 8)).astype(np.float32)
    pattern, _ = select(scores, 0.25, ct.patterns.Generated(4, complementary=True), quads=True)
    assert (pattern.reshape(9, 4, 4, 8).sum(axis=2) <= 2).all()
    assert (pattern.sum(axis=(0, 1)) == 4).all()


def test_a_shared_pattern_is_chosen_over_the_kernels_that_stay():
    scores = np.zeros((3, 3, 1, 4), np.float32)
    scores[0, 0] = [[0, 9, 9, 0]]  # kept by the last of FOUR alone
    scores[2, 2] = [[8, 6, 6, 8]]  # kept by the first
    pattern, kernel = select(scores, 0.5, tile=(4, 1), removal_tile=(1, 1), removal_score="retained")
    # Over all four kernels the corner (2, 2) holds 28 against 18; its best two kernels are the outer ones.
    np.testing.assert_array_equal(kernel, [[True, False, False, True]])
    np.testing.assert_array_equal(pattern[:, :, 0, 0], FOUR[0])
    scores[2, 2] = [[4, 6, 6, 4]]
    scores[0, 0] = [[0, 7, 7, 0]]
    pattern, kernel = select(scores, 0.5, tile=(4, 1), removal_tile=(1, 1), removal_score="retained")
    # Now 20 against 14 choose (2, 2) and with it the inner kernels, of which (0, 0) holds more.
    np.testing.assert_array_equal(kernel, [[False, True, True, False]])
    np.testing.assert_array_equal(pattern[:, :, 0, 1], FOUR[3])


def test_entries_differ_by_layer():
    tree = {"a": jnp.asarray(random_scores(0, (3, 3, 4, 4))), "b": jnp.asarray(random_scores(1, (5, 5, 4, 4)))}
    plan = ct.make_plan(tree, {".": 0.0}, entries={"a": 2, "b": 9})
    masks = quick_jit(lambda scores: ct.select_masks(scores, plan, ct.patterns.Generated(3)))(tree)
    assert (np.asarray(masks.pattern["a"]).sum(axis=(0, 1)) == 2).all()
    assert (np.asarray(masks.pattern["b"]).sum(axis=(0, 1)) == 9).all()


BAD = [
    ({"removal_score": "best"}, "removal_score='best': expected one of"),
    ({"removal_scope": "net"}, "removal_scope='net': expected one of"),
    ({"removal_tile": (0, 1)}, r"removal_tile=\(0, 1\): expected"),
    ({"quads": True, "tile": (4, 1)}, "quads choose a pattern for each kernel"),
    ({"quads": True, "superset": 5}, "quads choose a pattern for each kernel"),
    ({"quads": True, "entries": 5}, "quads cannot hold 4 patterns of 5 taps"),
    ({"superset": 9}, "superset=9, expected 4"),
    ({"superset": 3}, "superset=3, expected 4"),
    ({"superset": 5.0}, "superset=5.0: expected a number of taps"),
    ({"entries": 0}, "entries=0, expected 1 to 8"),
    ({"entries": {"nothing": 3}}, "entries: rule 'nothing' matches nothing"),
    ({"entries": True}, "entries=True: expected a mapping"),
    ({"entries": {"k": "four"}}, "entries: 'k' has 'four'; expected taps of 1 or more"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ct.make_plan({"k": np.zeros((3, 3, 8, 8))}, {"k": 0.5}, **options)


def test_numbers_that_no_generation_can_meet_are_refused_at_once():
    tree = {"k": np.ones((3, 3, 8, 8), np.float32)}
    plan = ct.make_plan(tree, {"k": 0.5}, entries=8)
    with pytest.raises(ValueError, match="'k': num_patterns=12: there are 9 patterns of 8 of 3x3 taps"):
        ct.clicktrain(optax.sgd(0.1), plan, select_step=1, prune_step=2, coeff=0.0, patterns=ct.patterns.Generated(12))


def test_negative_scores_are_refused():
    tree = {"k": -np.ones((3, 3, 8, 8), np.float32)}
    with pytest.raises(ValueError, match="scores of 'k' hold negative values"):
        ct.select_masks(tree, ct.make_plan(tree, {"k": 0.5}), FOUR)


def test_patterns_that_do_not_fit_the_options():
    tree = {"k": np.ones((3, 3, 8, 8), np.float32)}
    quads = ct.make_plan(tree, {"k": 0.5}, quads=True)
    with pytest.raises(ValueError, match="no 4 of these patterns use every tap at most twice"):
        ct.select_masks(tree, quads, FOUR)
    with pytest.raises(ValueError, match="complementary=True"):
        ct.select_masks(tree, quads, ct.patterns.Generated(8))
    with pytest.raises(ValueError, match="at most 16 are supported"):
        ct.select_masks(tree, quads, ct.patterns.candidates((3, 3), 4))
    with pytest.raises(ValueError, match="the smallest pattern has 8 taps"):
        ct.select_masks(tree, ct.make_plan(tree, {"k": 0.5}, superset=6), ct.patterns.candidates((3, 3), 8))
    small = {"k": np.ones((2, 2, 8, 8), np.float32)}
    with pytest.raises(ValueError, match="entries=4"):
        ct.select_masks(small, ct.make_plan(small, {"k": 0.5}), ct.patterns.Generated(3))


def test_places_of_a_short_block_are_rounded_up():
    # Three units where others have four: the first goes with the second of the others, and so on.
    levels = kernel_choice._levels(np.array([4, 3]), 4)
    np.testing.assert_array_equal(levels, [[1, 2, 3, 4], [2, 3, 4, 5]])
