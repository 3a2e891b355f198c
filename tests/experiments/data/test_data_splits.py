"""Splits and the embedded digits: exact sizes, disjoint, stratified, the same every time."""

import dataclasses

import numpy as np
import pytest

from experiments.data import DataConfig, load
from experiments.data.splits import balanced_subset, hold_out, stratified_order

GOLDEN_ORDER = [9, 2, 4, 7, 5, 0, 11, 10, 6, 8, 3, 1]
UNEVEN = np.repeat(np.arange(4), [50, 30, 15, 5]).astype(np.int32)


def test_order_is_a_permutation_fixed_by_its_seed():
    order = stratified_order(UNEVEN, 7)
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, stratified_order(UNEVEN, 7))
    assert (order != stratified_order(UNEVEN, 8)).any()


def test_every_prefix_mirrors_the_class_frequencies():
    order = stratified_order(UNEVEN, 0)
    shares = np.array([0.5, 0.3, 0.15, 0.05])
    for count in range(1, 101):
        seen = np.bincount(UNEVEN[order[:count]], minlength=4)
        assert np.abs(seen - shares * count).max() < 2


def test_order_golden():
    # Fixed splits are only fixed if they never change: neither by numpy's version nor by an edit.
    labels = np.arange(12, dtype=np.int32) % 3
    assert stratified_order(labels, 1).tolist() == GOLDEN_ORDER


def test_equal_classes_are_held_out_equally():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 50)).astype(np.int32)
    kept, held = hold_out(labels, 100)
    assert np.bincount(labels[held]).tolist() == [10] * 10
    assert np.bincount(labels[kept]).tolist() == [40] * 10
    assert sorted([*kept, *held]) == list(range(500))


def test_subsets_are_nested_and_balanced():
    labels = np.arange(500, dtype=np.int32) % 10
    small, large = balanced_subset(labels, 60), balanced_subset(labels, 120)
    np.testing.assert_array_equal(small, large[:60])
    assert np.bincount(labels[small]).tolist() == [6] * 10


@pytest.mark.parametrize("count", [0, 100, -1])
def test_hold_out_refuses_an_empty_part(count):
    with pytest.raises(ValueError, match="cannot hold"):
        hold_out(UNEVEN, count)


def test_digits_sizes_and_content():
    test, validation = load(DataConfig()), load(DataConfig(eval_split="validation"))
    assert test.train_images.shape == (1198, 8, 8, 1) and test.eval_images.shape == (599, 8, 8, 1)
    assert len(validation.train_labels) == 1000 and len(validation.eval_labels) == 198
    for data in (test, validation):
        assert data.train_images.dtype == np.uint8 and data.train_labels.dtype == np.int32
        assert data.eval_images.dtype == np.uint8 and data.eval_labels.dtype == np.int32
        assert data.train_images.max() == 255 and data.train_images.min() == 0
        assert data.num_classes == 10 and data.encoding == "raw"
        for labels in (data.train_labels, data.eval_labels):  # Stratified: 10% a class, or nearly.
            assert np.abs(np.bincount(labels) / len(labels) - 0.1).max() < 0.01


def test_digits_parts_are_disjoint_and_complete():
    from sklearn.datasets import load_digits

    test, validation = load(DataConfig()), load(DataConfig(eval_split="validation"))
    parts = [validation.train_images, validation.eval_images, test.eval_images]
    together = sorted(image.tobytes() for part in parts for image in part)
    every = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    assert together == sorted(image.tobytes() for image in every)  # As multisets: each image once.


def test_digits_statistics_come_from_the_common_train_part():
    test, validation = load(DataConfig()), load(DataConfig(eval_split="validation"))
    scaled = validation.train_images.astype(np.float64) / 255
    assert test.mean == validation.mean == pytest.approx((scaled.mean(),), abs=1e-4)
    assert test.std == validation.std == pytest.approx((scaled.std(),), abs=1e-4)


def test_digits_are_deterministic_and_read_only():
    first, second = load(DataConfig()), load(DataConfig())
    assert first.fingerprint == second.fingerprint and len(first.fingerprint) == 16
    np.testing.assert_array_equal(first.train_images, second.train_images)
    with pytest.raises(ValueError, match="read-only"):
        first.train_images[0] = 0


def test_train_examples():
    some, more = (load(DataConfig(train_examples=count)) for count in (100, 200))
    np.testing.assert_array_equal(some.train_images, more.train_images[:100])
    assert np.abs(np.bincount(some.train_labels) - 10).max() <= 1
    assert len(some.eval_labels) == 599 and some.mean == more.mean
    assert some.fingerprint != more.fingerprint


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "imagenet2012"}, "does not fit in memory: give image_size"),
        ({"name": "cifar11"}, "'cifar11' is no known data set.*digits"),
        ({"eval_split": "train"}, "eval_split='train'.*'validation' or 'test'"),
        ({"train_examples": 0}, "train_examples=0.*at least 1"),
        ({"train_examples": 1199}, "train_examples=1199.*1198"),
        ({"dir": "/somewhere"}, "dir='/somewhere'.*embedded"),
    ],
)
def test_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        load(dataclasses.replace(DataConfig(), **changes))
