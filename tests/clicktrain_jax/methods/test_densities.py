"""How many weights stay, and the exact choice of the largest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax.methods import densities
from clicktrain_jax.methods.densities import by_plan, counts_of
from clicktrain_jax.methods.sparse import largest

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


def test_a_share_of_all_weights():
    assert densities(PLAN, 0.25) == densities(PLAN, round(0.25 * TOTAL))


def test_erk_by_hand():
    """Two layers of 144 and 4096 weights, of which half stay: 2120. They get 16 and 130 parts of 146 (the sums of their
    axes): 232 of the first one's 144 would stay, so it is full, and the second has the other 1976."""
    params = {"small": jnp.zeros((3, 3, 2, 8)), "large": jnp.zeros((1, 1, 64, 64))}
    plan = ct.make_plan(params, {".*": 0.0})
    assert densities(plan, 0.5, "erk") == {"small": 1.0, "large": 1976 / 4096}
    # A tenth: 424 weights.
    few = densities(plan, 0.1, "erk")
    assert few["small"] == round(424 * 16 / 146) / 144 and few["large"] == round(424 * 130 / 146) / 4096


def test_densities_of_the_plans_rules():
    params = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    plan = ct.make_plan(params, {"a": 0.75, "b": 0.9, "c": None, "d": 0.0})
    assert by_plan(plan, None) == {"a": 0.25, "b": pytest.approx(0.1), "d": 1.0}
    assert by_plan(plan, {"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="densities=None, and 'a' is 'auto' in the plan"):
        by_plan(ct.make_plan(params, {".*": "auto"}, target=4.0), None)


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
        ((-0.5,), "retained=-0.5: .* or the share of them as a float between 0 and 1"),
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
