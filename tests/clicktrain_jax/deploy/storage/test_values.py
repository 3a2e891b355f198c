"""How the values of one leaf are narrowed and come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax.deploy.storage.values import STORABLE, narrow, stored_dtype, to_numpy, widen

BFLOAT16 = STORABLE["bfloat16"]


def back(array, keep, stored):
    values, scale = narrow("leaf", array, keep, stored)
    assert values.dtype.name == stored
    return widen(values, scale, keep, array.shape, array.dtype.name)


def bits(array):
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("dtype", sorted(STORABLE))
def test_every_dtype_comes_back_bit_for_bit(dtype):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2 if dtype == "bool" else 256, (3, 5, STORABLE[dtype].itemsize), np.uint8)
    array = raw.view(STORABLE[dtype])[..., 0]  # NaN payloads, infinities and negative zeros among them
    assert bits(back(array, None, dtype)) == bits(array)
    keep = rng.random((3, 5)) < 0.5
    found = back(array, keep, dtype)
    assert bits(found[keep]) == bits(array[keep])
    assert not np.frombuffer(bits(found[~keep]), np.uint8).any()


def test_nan_and_negative_zero_do_not_leak_through_a_mask():
    array = np.array([[np.nan, -0.0], [1.0, -0.0]], np.float32)
    keep = np.array([[False, False], [True, True]])
    assert bits(back(array, keep, "float32")) == bits(np.array([[0.0, 0.0], [1.0, -0.0]], np.float32))
    np.testing.assert_array_equal(back(array, keep, "int8"), [[0, 0], [1, 0]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "int8"])
@pytest.mark.parametrize(
    ("shape", "own", "masked", "narrowed"),
    [
        ((3, 3, 2, 2), "float32", True, True),
        ((4, 2), "float32", False, True),
        ((4,), "float32", False, False),  # a bias, BatchNorm
        ((4,), "float32", True, True),
        ((), "float32", False, False),
        ((4, 2), "int32", False, False),
        ((4, 2), "bool", True, False),
        ((4, 2), "float64", False, True),
    ],
)
def test_which_leaves_are_narrowed(shape, own, masked, narrowed, dtype):
    assert stored_dtype(np.zeros(shape, own), masked, dtype) == (dtype if narrowed else own)
    assert stored_dtype(np.zeros(shape, own), masked, "float32") == own


def test_nothing_is_made_wider_or_traded_for_another_half():
    half = np.zeros((2, 2), np.float16)
    assert stored_dtype(half, True, "bfloat16") == "float16"
    assert stored_dtype(half.astype(BFLOAT16), True, "float16") == "bfloat16"
    assert stored_dtype(half.astype(BFLOAT16), True, "int8") == "int8"
    assert stored_dtype(half.astype(np.float64), True, "float32") == "float64"


@pytest.mark.parametrize(("stored", "error"), [("float16", 2.0**-11), ("bfloat16", 2.0**-8)])
def test_halves_round_to_the_nearest(stored, error):
    array = np.random.default_rng(1).standard_normal((3, 3, 8, 8)).astype(np.float32)
    found = back(array, array > 0, stored)
    assert found.dtype == np.float32
    np.testing.assert_array_less(np.abs(found - np.where(array > 0, array, 0)), error * np.abs(array) + 1e-6)
    np.testing.assert_array_equal(found[array > 0], array[array > 0].astype(STORABLE[stored]).astype(np.float32))


def test_halves_keep_what_was_infinite_and_refuse_to_make_it():
    array = np.array([[np.inf, np.nan], [-np.inf, 1.0]], np.float32)
    np.testing.assert_array_equal(back(array, None, "float16"), array)
    with pytest.raises(ValueError, match="'leaf' holds 7e.04, which is infinite in float16"):
        narrow("leaf", np.array([[7e4, 1.0]], np.float32), None, "float16")
    with pytest.raises(ValueError, match="infinite in bfloat16"):
        narrow("leaf", np.array([[np.finfo(np.float32).max]], np.float32), None, "bfloat16")
    # What the mask removes may hold anything.
    narrow("leaf", np.array([[7e4, 1.0]], np.float32), np.array([[False, True]]), "float16")


def test_int8_by_hand():
    array = np.array([[1.0, -254.0], [-0.4, 3.0], [0.01, 0.0]], np.float32)
    values, scale = narrow("leaf", array, None, "int8")
    np.testing.assert_array_equal(scale, np.array([1 / 127, 2.0], np.float32))
    np.testing.assert_array_equal(values, [[127, -127], [-51, 2], [1, 0]])
    found = widen(values, scale, None, array.shape, "float32")
    np.testing.assert_array_equal(found[:, 1], [-254.0, 4.0, 0.0])
    # Only what stays decides the scale.
    keep = np.array([[False, False], [True, True], [True, True]])
    values, scale = narrow("leaf", array, keep, "int8")
    np.testing.assert_array_equal(scale, np.array([0.4, 3.0], np.float32) / np.float32(127))
    np.testing.assert_array_equal(values, [-127, 127, 3, 0])


@pytest.mark.parametrize("own", ["float32", "float64", "bfloat16", "float16"])
def test_int8_is_within_half_a_step(own):
    rng = np.random.default_rng(2)
    array = (rng.standard_normal((3, 3, 7, 5)) * 10.0 ** rng.integers(-4, 3, 5)).astype(STORABLE[own])
    keep = rng.random(array.shape) < 0.4
    found = back(array, keep, "int8")
    assert found.dtype == array.dtype
    kept = np.where(keep, array.astype(np.float64), 0)
    step = np.abs(kept).reshape(-1, 5).max(axis=0) / 127
    allowed = 0.501 * step + 2.0**-7 * np.abs(kept) * (own in ("bfloat16", "float16"))
    assert (np.abs(found.astype(np.float64) - kept) <= allowed).all()
    assert not found[~keep].any()


def test_int8_of_zeros_of_tiny_and_of_huge_filters():
    tiny, huge = np.float32(1e-45), np.finfo(np.float32).max
    array = np.array([[0.0, tiny, huge, 1.0], [0.0, -tiny, -huge, -0.0]], np.float32)
    found = back(array, None, "int8")
    np.testing.assert_array_equal(found[:, [0, 1]], 0)
    np.testing.assert_allclose(found[:, 2], array[:, 2], rtol=1e-6)
    assert np.isfinite(found).all() and found[0, 3] == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_int8_refuses_what_it_cannot_hold(bad):
    array = np.array([[1.0, bad]], np.float32)
    with pytest.raises(ValueError, match="'leaf' holds NaN or infinite values, which int8 cannot hold"):
        narrow("leaf", array, None, "int8")
    assert back(array, np.array([[True, False]]), "int8").tolist() == [[1.0, 0.0]]


def test_int8_refuses_float64_beyond_its_scales():
    with pytest.raises(ValueError, match="beyond the float32 scales"):
        narrow("leaf", np.array([[1e300]]), None, "int8")


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3, 3, 0, 4), (0,), (), (5,)])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "int8"])
def test_leaves_of_no_size_and_of_no_axes(shape, stored):
    array = np.full(shape, 2.0, np.float32)
    for keep in (None, np.ones(shape, bool), np.zeros(shape, bool)):
        expected = array if keep is None else np.where(keep, array, 0)
        np.testing.assert_allclose(back(array, keep, stored), expected, rtol=1e-6)


def test_leaves_of_many_kinds_become_arrays():
    assert to_numpy("leaf", 3)[0].shape == ()
    assert to_numpy("leaf", jnp.ones((2,), jnp.bfloat16))[0].dtype == BFLOAT16
    data, key = to_numpy("leaf", jax.random.key(0))
    assert (data.dtype, data.shape, key) == (np.uint32, (2,), "threefry2x32")
    column = np.arange(6.0).reshape(2, 3)[:, 1]
    assert to_numpy("leaf", column)[0].flags.c_contiguous


@pytest.mark.parametrize("leaf", [np.complex64(1), np.array(["text"]), np.array([object()])])
def test_what_cannot_be_stored_is_refused(leaf):
    with pytest.raises(ValueError, match="'leaf' has dtype .*cannot be stored"):
        to_numpy("leaf", leaf)
    with pytest.raises(ValueError, match="'leaf' is a ShapeDtypeStruct"):
        to_numpy("leaf", jax.ShapeDtypeStruct((2,), jnp.float32))
