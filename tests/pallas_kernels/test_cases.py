"""The lists of convolutions, and that their masks are what they say."""

import dataclasses
import itertools

import numpy as np
import pytest

from pallas_kernels.pattern_conv import cases, make_structure, mask_of

EVERY_LIST = {name: getattr(cases, name) for name in ("SMALL", "SMALL_BLOCKS", "CPU", "GPU", "COMPILED")}
small = pytest.mark.parametrize("case", cases.SMALL + cases.SMALL_BLOCKS, ids=str)


def blocks_of(mask, case):
    """The mask's tiles, (channel block, filter tile) -> bool (kh * kw, channels, filters)."""
    filters, channels = case.tile[0] or case.cout, case.tile[1] or case.cin
    taps = mask.reshape(-1, case.cin, case.cout)
    rows, columns = range(0, case.cin, channels), range(0, case.cout, filters)
    return {(i, j): taps[:, i : i + channels, j : j + filters] for i, j in itertools.product(rows, columns)}


@pytest.mark.parametrize("name", EVERY_LIST)
def test_names_tell_cases_apart_and_sizes_fit(name):
    names = [case.name for case in EVERY_LIST[name]]
    assert len(set(names)) == len(names)
    for case in EVERY_LIST[name]:
        assert len(case.y_shape) == 4 and min(case.y_shape) >= 1 and case.dense_flops() > 0


@small
def test_exactly_the_stated_tiles_are_removed_and_the_rest_have_a_pattern(case):
    mask = cases.make_mask(case, np.random.default_rng(1))
    assert mask.dtype == bool and mask.shape == case.w_shape
    allowed = {tuple(taps) for taps in case.patterns} or {tuple(range(case.window[0] * case.window[1]))}
    removed = 0
    for block in blocks_of(mask, case).values():
        assert (block == block[:, :1, :1]).all()
        taps = tuple(np.flatnonzero(block[:, 0, 0]).tolist())
        assert taps in allowed or not taps
        removed += not taps
    assert removed == case.num_removed == round(case.removed * np.prod(case.grid))


@small
def test_the_structure_holds_with_the_stated_tile(case):
    mask = cases.make_mask(case, np.random.default_rng(2))
    np.testing.assert_array_equal(mask_of(make_structure(mask, tile=case.tile)), mask)
    np.testing.assert_array_equal(mask_of(cases.structure_of(case, np.random.default_rng(2))), mask)


def test_channels_share_a_pattern_over_all_filters_only_where_so_stated():
    case = cases.Case("c", (4, 4), 1, 40, 40, tile=(4, 2), pattern_of="channels", removed=0.5)
    for sharing, shared in (("channels", True), ("tile", False)):
        mask = cases.make_mask(dataclasses.replace(case, pattern_of=sharing), np.random.default_rng(3))
        patterns = {}
        for (channel, _), block in blocks_of(mask, case).items():
            if block.any():
                patterns.setdefault(channel, set()).add(block[:, 0, 0].tobytes())
        assert (max(len(found) for found in patterns.values()) == 1) is shared


def test_masks_follow_the_generator():
    case = cases.Case("c", (4, 4), 1, 16, 16, tile=(1, 1), removed=0.3)
    first, again, other = (cases.make_mask(case, np.random.default_rng(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and first.sum() == other.sum()


@small
def test_inputs_have_the_stated_shapes_and_outputs_are_about_one(case):
    x, w, dy = cases.make_inputs(case, np.random.default_rng(4))
    assert (x.shape, w.shape, dy.shape) == (case.x_shape, case.w_shape, case.y_shape)
    assert {str(array.dtype) for array in (x, w, dy)} == {case.dtype}
    assert np.sum(w.astype(np.float64) ** 2) / case.cout < 4


def test_geometry_counts_what_the_arrays_hold():
    case = next(case for case in cases.SMALL if case.name == "stride-2-by-1-hwnc")
    assert case.x_shape == (7, 6, 2, 6) and case.y_shape == (4, 6, 2, 8)
    assert case.dense_flops() == 2 * 2 * 4 * 6 * 9 * 6 * 8


@pytest.mark.parametrize(("reduction", "removed"), [(2.25, 0.0), (4.5, 0.5), (8, 0.71875)])
def test_work_reduction_of_patterns_and_removal(reduction, removed):
    assert cases.removed_for(reduction) == pytest.approx(removed, abs=1e-12)


def test_less_reduction_than_the_patterns_alone_is_refused():
    with pytest.raises(ValueError, match="save 2.25x, not 2x"):
        cases.removed_for(2)


def test_the_lists_cover_the_nets():
    weights = sum(case.layers * np.prod(case.w_shape) for case in cases.vgg16(1))
    assert weights == 14_710_464 - 3 * 3 * 3 * 64  # VGG-16's convolutions but the first
    layers = cases.resnet50(1) + cases.resnet50_1x1(1)
    assert sum(case.layers for case in layers) == 52
    # ResNet-50 has 23,454,912 convolution weights, the 7x7 stem's among them.
    assert sum(case.layers * np.prod(case.w_shape) for case in layers) == 23_454_912 - 7 * 7 * 3 * 64
    # 4.1 G multiply-adds an image in all, 0.12 of them the stem's.
    assert sum(case.layers * case.dense_flops() for case in layers) / 2 == pytest.approx(3.97e9, rel=0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patterns": ((0, 9),)}, "taps from 0 to 8"),
        ({"patterns": ((),)}, "at least one"),
        ({"removed": 1.5}, "between 0 and 1, got 1.5"),
        ({"pattern_of": "filters"}, "'tile' or 'channels', got 'filters'"),
        ({"tile": (0, 1)}, r"positive or None, got \(0, 1\)"),
    ],
)
def test_a_case_that_cannot_be_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        cases.Case("c", (4, 4), 1, 2, 2, **change)
