"""Reading between measured points, by hand: every figure here was worked out on paper."""

import math

import pytest

from experiments.report import frontier

# Accuracy against compression: falls by 1 from 4x to 8x, by 4 from 8x to 16x.
FALLING = [(8.0, 89.0), (4.0, 90.0), (16.0, 85.0)]
# Accuracy against seconds, one budget being worse than a smaller one.
RISING = [(10.0, 80.0), (20.0, 84.0), (40.0, 83.0), (80.0, 88.0)]


def interpolate(points, x, **options):
    """The y at an x, by the weights."""
    shares = frontier.weights([place for place, _ in points], x, **options)
    return None if shares is None else sum(share * points[place][1] for place, share in shares.items())


def test_between_two_points_the_logarithm_is_divided_evenly():
    # sqrt(8 * 16) lies in the middle of 8 and 16.
    assert interpolate(FALLING, math.sqrt(128)) == pytest.approx(87.0)
    # 4 * 2 ** 0.25 is a quarter of the way from 4 to 8.
    assert interpolate(FALLING, 4 * 2**0.25) == pytest.approx(89.75)
    assert frontier.weights([8.0, 4.0, 16.0], math.sqrt(128)) == pytest.approx({0: 0.5, 2: 0.5})


def test_at_a_point_it_is_the_point():
    for x, y in FALLING:
        assert interpolate(FALLING, x) == y
    assert frontier.weights([8.0, 4.0, 16.0], 4.0) == {1: 1.0}


def test_outside_there_is_nothing():
    assert interpolate(FALLING, 3.99) is None
    assert interpolate(FALLING, 16.01) is None
    assert interpolate([], 4.0) is None
    assert frontier.weights([], 4.0) is None


def test_a_little_outside_counts_as_the_end_when_it_is_allowed():
    assert interpolate(FALLING, 16.7, tolerance=0.05) == 85.0
    assert interpolate(FALLING, 3.85, tolerance=0.05) == 90.0
    assert interpolate(FALLING, 16.9, tolerance=0.05) is None
    assert interpolate(FALLING, 3.8, tolerance=0.05) is None
    # Inside, the allowance changes nothing.
    assert interpolate(FALLING, math.sqrt(128), tolerance=0.05) == pytest.approx(87.0)


def test_points_of_one_x_count_as_their_mean():
    points = [(4.0, 90.0), (4.0, 88.0), (8.0, 85.0)]
    assert interpolate(points, 4.0) == 89.0
    assert interpolate(points, math.sqrt(32)) == pytest.approx(87.0)
    assert frontier.envelope(points, "falling") == [(4.0, 89.0), (8.0, 85.0)]


def test_envelopes_never_turn_back():
    assert frontier.envelope(RISING, "rising") == [(10.0, 80.0), (20.0, 84.0), (40.0, 84.0), (80.0, 88.0)]
    bumpy = [(4.0, 88.0), (8.0, 89.0), (16.0, 85.0)]
    assert frontier.envelope(bumpy, "falling") == [(4.0, 89.0), (8.0, 89.0), (16.0, 85.0)]


def test_solving_finds_the_smallest_budget_and_the_largest_compression():
    # Half of the way from 80 to 84 is half of the way from 10 to 20, in logarithms.
    assert frontier.solve(RISING, 82.0, "rising") == pytest.approx(math.sqrt(200))
    # 84 is reached at 20 already, and no smaller accuracy later on takes that back.
    assert frontier.solve(RISING, 84.0, "rising") == 20.0
    assert frontier.solve(RISING, 86.0, "rising") == pytest.approx(math.sqrt(3200))
    # 87 is half of the way from 89 at 8x to 85 at 16x.
    assert frontier.solve(FALLING, 87.0, "falling") == pytest.approx(math.sqrt(128))
    assert frontier.solve([(4.0, 89.0), (8.0, 89.0), (16.0, 85.0)], 89.0, "falling") == 8.0


def test_solving_says_nothing_outside():
    assert frontier.solve(RISING, 88.1, "rising") is None
    assert frontier.solve(RISING, 79.9, "rising") is None
    assert frontier.solve(FALLING, 90.1, "falling") is None
    assert frontier.solve(FALLING, 84.9, "falling") is None
    assert frontier.solve([], 84.9, "falling") is None


def test_solving_undoes_interpolating():
    for x in (4.5, 7.0, 9.0, 15.0):
        assert frontier.solve(FALLING, interpolate(FALLING, x), "falling") == pytest.approx(x)


def test_seeds_are_read_alike_and_only_where_all_have_them():
    values = {0: {0: 90.0, 1: 92.0, 2: 50.0}, 2: {0: 80.0, 1: 86.0}}
    assert frontier.by_seed(values, {0: 0.75, 2: 0.25}) == {0: 87.5, 1: 90.5}


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="x=0.0: expected a positive number"):
        interpolate([(0.0, 1.0), (2.0, 2.0)], 1.0)
    with pytest.raises(ValueError, match="x=-1.0"):
        frontier.weights([1.0, 2.0], -1.0)
    with pytest.raises(ValueError, match="direction='up'"):
        frontier.envelope(FALLING, "up")
    with pytest.raises(ValueError, match="x=0.0"):
        frontier.solve([(0.0, 1.0), (2.0, 2.0)], 1.5, "rising")
