"""The codings of one layer's mask: bytes by hand, which one is taken, round trips, bytes that no mask gives."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clicktrain_jax.deploy.storage.layers import Coding, decode, encode, stored_bytes
from clicktrain_jax.masks import FullMask

# Two patterns of a 1x8 kernel. The table holds them by the number that their taps' bits make, tap 0 the lowest.
LEFT, RIGHT = [True] * 4 + [False] * 4, [False] * 4 + [True] * 4
TABLE = (0b11110000, 0b00001111)


def from_ids(ids, patterns, shape=None):
    """A layer mask from pattern numbers (cin, cout), -1 where the kernel goes."""
    ids, patterns = np.asarray(ids), np.asarray(patterns, bool)
    stays = ids >= 0
    pattern = np.where(stays[..., None], patterns[ids], True)
    taps = patterns.shape[1]
    shape = shape or (1, taps, *ids.shape)
    kernel = np.broadcast_to(stays, (taps, *ids.shape))
    return FullMask(np.moveaxis(pattern, -1, 0).reshape(shape), kernel.reshape(shape))


def same(one, other):
    for a, b in zip(one, other):
        assert (a is None) == (b is None)
        if a is not None:
            assert b.dtype == bool and a.shape == b.shape
            np.testing.assert_array_equal(a, b)


def round_trip(mask):
    coding, data = encode(mask)
    shape = mask.combined().shape
    assert stored_bytes(coding, shape) == len(data)
    back = decode(coding, data, shape)
    assert back.parts == mask.parts
    np.testing.assert_array_equal(back.combined(), mask.combined())
    assert coding.kept == np.count_nonzero(mask.combined())
    return coding, data, back


def random_ids(rng, cin, cout, removed, patterns):
    ids = rng.integers(0, patterns, (cin, cout))
    ids[rng.random((cin, cout)) < removed] = -1
    return ids


def random_patterns(rng, count, taps, entries):
    found = {}
    while len(found) < count:
        pattern = np.zeros(taps, bool)
        pattern[rng.permutation(taps)[:entries]] = True
        found[pattern.tobytes()] = pattern
    return np.stack(list(found.values()))


def test_bits_by_hand():
    mask = from_ids([[0, 1, -1], [-1, 0, 1], [1, 1, 0], [0, 0, 0]], [LEFT, RIGHT])
    coding, data, back = round_trip(mask)
    assert coding == Coding("bits", "both", kept=40, filters=3, patterns=2, kernels=10)
    # Which kernels stay, channel by channel: 110 011 111 111; patterns of those: 01 01 110 000.
    assert data == bytes([*TABLE, 0b11001111, 0b11110000, 0b01011100, 0b00000000])
    same(back, mask)


def test_indices_by_hand():
    ids = np.full((32, 2), -1)
    ids[3, 0], ids[9, 0], ids[15, 1] = 1, 0, 1
    mask = from_ids(ids, [LEFT, RIGHT])
    coding, data, back = round_trip(mask)
    assert coding == Coding("indices", "both", kept=12, filters=2, patterns=2, kernels=3)
    # Counts of (filter, pattern) 1 1 0 1 in six planes of bits; channels 9, 3, 15 in five: 111 011 001 101 000.
    assert data == bytes([*TABLE, 0b11010000, 0, 0, 0b11101100, 0b11010000])
    same(back, mask)


def test_equal_filters_are_stored_once_by_hand():
    column = [[0], [-1], [1], [0], [-1], [-1], [1], [0]]
    mask = from_ids(np.repeat(column, 9, axis=1), [LEFT, RIGHT])
    coding, data, back = round_trip(mask)
    assert (coding.filters, coding.kept) == (1, 9 * 5 * 4)
    # Nothing tells filters apart, there is one: table, which kernels stay, their patterns.
    assert data == bytes([*TABLE, 0b10110011, 0b01010000])
    same(back, mask)


def test_equal_filters_are_found_in_any_order():
    rng = np.random.default_rng(0)
    patterns = random_patterns(rng, 4, 9, 4)
    ids = np.repeat(random_ids(rng, 64, 8, 0.7, 4), 64, axis=1)
    in_order = from_ids(ids, patterns, (3, 3, 64, 512))
    mixed = from_ids(ids[:, rng.permutation(512)], patterns, (3, 3, 64, 512))
    for mask in (in_order, mixed):
        coding, data, back = round_trip(mask)
        assert coding.filters == 8
        assert len(data) < 512 * 3 / 8 + 64 * 8 * 2
        same(back, mask)


def test_many_kernels_take_bits_few_take_indices_and_others_take_weights():
    rng = np.random.default_rng(1)
    patterns = random_patterns(rng, 4, 9, 4)
    for removed, expected in ((0.0, "bits"), (0.7, "bits"), (0.97, "indices")):
        mask = from_ids(random_ids(rng, 128, 64, removed, 4), patterns, (3, 3, 128, 64))
        coding, data, back = round_trip(mask)
        assert coding.coding == expected
        same(back, mask)
    unstructured = FullMask(None, rng.random((3, 3, 128, 64)) < 0.3)
    coding, data, back = round_trip(unstructured)
    assert coding.coding == "weights" and len(data) == 9 * 128 * 64 / 8
    same(back, unstructured)


def test_the_paper_form_costs_about_one_bit_a_kernel_and_two_a_kept_one():
    rng = np.random.default_rng(2)
    mask = from_ids(random_ids(rng, 256, 256, 0.7, 4), random_patterns(rng, 4, 9, 4), (3, 3, 256, 256))
    coding, data, _ = round_trip(mask)
    assert len(data) == 5 + 256 * 256 // 8 + -(-2 * coding.kernels // 8)


@pytest.mark.parametrize("shape", [(3, 3, 8, 16), (5, 5, 3, 7), (1, 1, 13, 5), (7, 7, 3, 4), (3, 3, 1, 1)])
def test_all_and_nothing(shape):
    for fill in (True, False):
        full = np.full(shape, fill)
        for mask in (FullMask(full, full), FullMask(None, full), FullMask(full, None)):
            _, data, back = round_trip(mask)
            assert back.parts == mask.parts
            if back.kernel is not None:
                np.testing.assert_array_equal(back.kernel, full)
    assert len(data) < 16


@pytest.mark.parametrize(
    "shape",
    [(0,), (), (5,), (4, 6), (0, 3), (3, 0), (2, 3, 4), (2, 2, 3, 4, 5), (3, 3, 0, 4), (0, 3, 4, 4), (9, 9, 2, 2)],
)
def test_any_rank_and_size(shape):
    rng = np.random.default_rng(3)
    keep = np.asarray(rng.random(shape) < 0.5)
    kernel = np.asarray(rng.random(shape) < 0.5)
    for mask in (FullMask(None, keep), FullMask(keep, None), FullMask(keep, kernel)):
        back = round_trip(mask)[2]
        if mask.parts == "both":
            np.testing.assert_array_equal(back.kernel, kernel)
            np.testing.assert_array_equal(back.pattern | ~kernel, keep | ~kernel)


def test_patterns_come_back_all_true_where_their_kernel_goes():
    rng = np.random.default_rng(4)
    shape = (3, 3, 6, 5)
    pattern = rng.random(shape) < 0.5
    kernel = np.broadcast_to(rng.random(shape[2:]) < 0.5, shape)
    back = round_trip(FullMask(pattern, kernel))[2]
    np.testing.assert_array_equal(back.kernel, kernel)
    np.testing.assert_array_equal(back.pattern, pattern | ~kernel)


def test_a_kernel_that_stays_without_any_tap():
    """Kept, by the kernel mask, and yet all zero by its pattern: not the same as removed."""
    kernel = np.ones((3, 3, 2, 2), bool)
    pattern = kernel.copy()
    pattern[:, :, 0, 0] = False
    same(round_trip(FullMask(pattern, kernel))[2], FullMask(pattern, kernel))


def test_a_kernel_mask_that_differs_between_taps():
    rng = np.random.default_rng(6)
    pattern, kernel = rng.random((2, 3, 3, 16, 16)) < 0.5
    coding, data, back = round_trip(FullMask(pattern, kernel))
    assert (coding.coding, coding.kernel_weights, len(data)) == ("weights", True, 2 * 9 * 16 * 16 / 8)
    same(back, FullMask(pattern | ~kernel, kernel))


def test_more_patterns_than_a_byte_tells_apart():
    rng = np.random.default_rng(5)
    patterns = random_patterns(rng, 300, 25, 8)
    mask = from_ids(random_ids(rng, 300, 100, 0.4, 300), patterns, (5, 5, 300, 100))
    coding, _, back = round_trip(mask)
    assert coding.coding == "bits" and coding.patterns == 300
    same(back, mask)


@st.composite
def layer_masks(draw):
    taps = draw(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 5), (2, 2)]))
    cin, unique, repeats = draw(st.integers(1, 20)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (*taps, cin, unique)
    pattern = rng.random(shape) < draw(st.floats(0, 1))
    if draw(st.booleans()):  # a few patterns, shared
        few = pattern.reshape(-1, cin * unique)[:, rng.integers(0, min(3, cin * unique), cin * unique)]
        pattern = few.reshape(shape)
    kernel = rng.random(shape[2:] if draw(st.booleans()) else shape) < draw(st.floats(0, 1))
    order = rng.permutation(unique * repeats) % unique
    pattern, kernel = pattern[..., order], np.broadcast_to(kernel, shape)[..., order]
    return draw(st.sampled_from([FullMask(pattern, kernel), FullMask(pattern, None), FullMask(None, kernel)]))


@settings(deadline=None, max_examples=150)
@given(layer_masks())
def test_round_trips_of_any_mask(mask):
    coding, data, back = round_trip(mask)
    size = mask.combined().size
    assert len(data) <= -(-size // 8) * (2 if mask.parts == "both" else 1) + 8
    if mask.kernel is not None:
        np.testing.assert_array_equal(back.kernel, mask.kernel)
    if mask.parts == "both":
        np.testing.assert_array_equal(back.pattern, mask.pattern | ~mask.kernel)


@settings(deadline=None, max_examples=200)
@given(layer_masks(), st.randoms(use_true_random=False), st.sampled_from(["bytes", "cut", "coding"]))
def test_bytes_that_no_mask_gives_are_refused_or_give_a_mask(mask, random, how):
    """Whatever the bytes are: a mask of the right shape, or a ValueError."""
    coding, data = encode(mask)
    shape = mask.combined().shape
    data = bytearray(data)
    if how == "cut" and data:
        del data[random.randrange(len(data)) :]
    elif how == "bytes":
        for at in range(len(data)):
            data[at] = random.randrange(256)
    else:
        field = random.choice(["filters", "patterns", "kernels"])
        coding = coding._replace(**{field: max(0, getattr(coding, field) + random.choice([-1, 1]))})
    try:
        back = decode(coding, bytes(data), shape)
    except ValueError:
        return
    assert back.combined().shape == shape and back.combined().dtype == bool
