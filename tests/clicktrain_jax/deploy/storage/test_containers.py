"""Masks from zeros, and leaves by name."""

import jax.numpy as jnp
import numpy as np
import pytest

import clicktrain_jax as ct
from clicktrain_jax.deploy import storage
from clicktrain_jax.deploy.storage.containers import find_prefix, split
from clicktrain_jax.masks import combine
from clicktrain_jax.trees import named_leaves, nest


def test_masks_from_zeros_by_hand():
    kernel = np.arange(1.0, 37.0, dtype=np.float32).reshape(3, 3, 2, 2)
    kernel[:, :, 0, 1] = 0.0  # a kernel that is gone
    kernel[0, 1, 1, 0] = -0.0  # a tap of one that stays
    kernel[2, 2, 1, 1] = np.nan
    params = {"conv": {"kernel": kernel, "bias": np.zeros(2)}, "one": np.array([[[[0.0, 2.0]]]]), "full": kernel + 100}
    masks = storage.masks_from_zeros(params)
    pattern, stays = masks.pattern["conv"]["kernel"], masks.kernel["conv"]["kernel"]
    expected = np.ones((3, 3, 2, 2), bool)
    expected[0, 1, 1, 0] = False
    np.testing.assert_array_equal(pattern, expected)
    np.testing.assert_array_equal(stays, np.broadcast_to([[True, False], [True, True]], (3, 3, 2, 2)))
    assert masks.pattern["one"] is None and masks.kernel["one"].tolist() == [[[[False, True]]]]
    assert masks.pattern["conv"]["bias"] is None and masks.kernel["conv"]["bias"] is None
    assert masks.pattern["full"] is None and masks.kernel["full"] is None


def test_masks_are_found_again_in_what_they_made(exports):
    tree = exports.variables()
    masks = exports.masks(tree)
    params = ct.apply_masks(tree["params"], masks)
    found = storage.masks_from_zeros(params)
    for (name, given), (_, back) in zip(named_leaves(combine(masks)), named_leaves(combine(found))):
        assert (given is None) == (back is None), name
        if given is not None:
            np.testing.assert_array_equal(given, back)
    np.testing.assert_array_equal(found.kernel["Conv_1"]["kernel"], masks.kernel["Conv_1"]["kernel"])


def test_a_checkpoint_without_masks_is_exported_by_its_zeros(exports, tmp_path):
    tree = exports.variables()
    tree["params"] = ct.apply_masks(tree["params"], exports.masks(tree))
    whole = storage.write(tmp_path / "zeros", tree, storage.masks_from_zeros(tree), facts={})
    found = storage.read(tmp_path / "zeros")
    for (name, given), (_, back) in zip(named_leaves(tree), named_leaves(found.variables)):
        assert np.asarray(given).tobytes() == np.asarray(back).tobytes(), name
    assert whole["leaves"]["params/Conv_1/kernel"]["mask"]["kept"] < 1152


def test_integer_kernels_have_no_masks():
    masks = storage.masks_from_zeros({"w": jnp.zeros((3, 3, 2, 2), jnp.int8), "n": None})
    assert masks.pattern == {"w": None, "n": None}


@pytest.mark.parametrize(("shape", "parts"), [((3, 3, 2, 2), "both"), ((1, 1, 2, 2), "kernel"), ((4, 5), "pattern")])
def test_one_mask_split_in_two(shape, parts):
    keep = np.random.default_rng(0).random(shape) < 0.3
    mask = split(keep)
    assert mask.parts == parts
    np.testing.assert_array_equal(mask.combined(), keep)


def test_prefixes():
    names = ["params/a/w", "params/b", "stats/a/m", "step"]
    assert find_prefix(names, ["a/w", "b"]) == "params/"
    assert find_prefix(names, ["params/b"]) == ""
    assert find_prefix(["deep/er/a", "other/b"], ["a"]) == "deep/er/"
    with pytest.raises(ValueError, match="masks: belongs to another tree"):
        find_prefix(names, ["a/w", "c"])


def test_nested_dictionaries():
    assert nest({"a/b": 1, "a/c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}
    assert nest({"": 1}) == 1
