"""How many weights stay, and the exact choice of the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.methods import SparseState, densities, masks_of
from clicktrain_jax.methods.sparse import counts_of, largest

SHAPES = {"a": (3, 3, 4, 8), "b": (3, 3, 64, 32), "c": (1, 1, 32, 48), "d": (3, 3, 4, 5)}
SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items()}
TOTAL = sum(SIZES.values())
PLAN = ct.make_plan({name: jnp.zeros(shape) for name, shape in SHAPES.items()}, {".*": 0.0})


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("retained", [4, 5, 97, 1234, 9999, TOTAL - 1, TOTAL])
def test_counts_add_up_exactly(distribution, retained):
    shares = densities(PLAN, retained, distribution)
    assert list(shares) == list(SIZES)
    counts = {name: round(shares[name] * size) for name, size in SIZES.items()}
    assert sum(counts.values()) == retained
    assert all(1 <= counts[name] <= size for name, size in SIZES.items())
    assert counts_of(PLAN, shares) == counts


def test_uniform_shares_are_alike():
    for name, share in densities(PLAN, TOTAL // 5).items():
        assert abs(share * SIZES[name] - SIZES[name] / TOTAL * (TOTAL // 5)) < 1 + 1e-9


def test_erk_shares_are_in_proportion_below_one():
    def raw(name):
        return sum(SHAPES[name]) / SIZES[name]

    # "a" and "d" would have more than all of their weights: they are full, and the others stay in proportion.
    shares = densities(PLAN, 3500, "erk")
    assert shares["a"] == shares["d"] == 1.0
    assert shares["b"] / raw("b") == pytest.approx(shares["c"] / raw("c"), rel=2e-3)
    few = densities(PLAN, TOTAL // 30, "erk")
    scales = [few[name] / raw(name) for name in SIZES]
    assert max(few.values()) < 1
    np.testing.assert_allclose(scales, scales[0], rtol=0.02)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((100, "ER"), "distribution='ER'"),
        ((3,), r"retained=3: expected 4 .* to 20436"),
        ((TOTAL + 1,), "retained=20437"),
        ((10.0,), "retained=10.0"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        densities(PLAN, *arguments)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": 0.0}, "densities.'a'.=0.0: expected the share that stays"),
        ({"a": 1.5}, "=1.5"),
        ({"a": float("nan")}, "=nan"),
        ({"d": 1e-3}, "leaves none of 180 weights"),
        ({"e": 0.5}, "'e' is no layer of the plan"),
    ],
)
def test_wrong_densities_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        counts_of(PLAN, {**dict.fromkeys(SIZES, 0.5), **change})


def test_a_missing_density_is_named():
    with pytest.raises(ValueError, match="'b' has no density"):
        counts_of(PLAN, {"a": 0.5, "c": 0.5, "d": 0.5})


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_largest_are_chosen_and_ties_go_to_the_lowest_index(levels):
    values = np.random.default_rng(levels).integers(0, levels, (3, 5, 4)).astype(np.float32)
    order = np.argsort(-values, axis=None, kind="stable")
    choose = jax.jit(largest)
    for count in (0, 1, 7, 30, 60):
        expected = np.zeros(60, bool)
        expected[order[:count]] = True
        np.testing.assert_array_equal(choose(values, count), expected.reshape(values.shape))


def test_masks_are_found_wherever_the_state_stands():
    masks = {"a": jnp.ones((1, 1, 2, 2), bool)}
    state = SparseState(jnp.int32(1), masks, optax.EmptyState())
    for where in (state, (optax.EmptyState(), state), {"opt": state}, {"0": state._asdict()}):
        assert masks_of(where) is masks
    for where, number in (((), 0), ((state, state), 2)):
        with pytest.raises(ValueError, match=f"found {number}"):
            masks_of(where)
