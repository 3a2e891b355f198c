"""The native kernels through their plain C entries, against numpy in float64, for every set of instructions here.

What is not retained of the weights is NaN or infinite, outputs are NaN before, and behind a list's count stands no
entry. Results have the same bits for any number of threads, and for packed weights.
"""

import ctypes
import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.native import build
from pallas_kernels.pattern_conv.cases import CORNERS, Case
from tests.pallas_kernels import convolved as common

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
NHWC = [case for case in common.ALL.values() if case.layout == "NHWC"]
# Rests of blocks, panels and vectors in every direction.
ODD = (
    Case("rests", (9, 7), 3, 13, 77, tile=(64, 1), removed=0.4),
    Case("rests-of-16", (7, 9), 2, 37, 43, tile=(16, 2), removed=0.5),
    Case("rests-of-8-stride-3", (11, 8), 2, 19, 21, strides=(3, 2), tile=(8, 1), removed=0.3),
    Case("many-images", (3, 2), 35, 5, 9, tile=(1, 1), removed=0.3),
    Case("many-images-stride-2", (6, 5), 33, 18, 17, strides=(2, 2), tile=(1, 1), removed=0.3),
    Case("parts-of-channels", (9, 8), 17, 43, 18, tile=(1, 1), removed=0.3),
    Case("parts-of-channels-stride-2", (17, 16), 17, 43, 18, strides=(2, 2), tile=(1, 1), removed=0.3),
    Case("wide-image", (1, 61), 1, 6, 20, tile=(1, 1)),
    Case("singles", (8, 8), 2, 20, 19, tile=(1, 1), patterns=((0, 4, 8), (2,), (1, 3, 5, 7)), removed=0.2),
    Case("corners-and-singles", (8, 8), 2, 20, 19, tile=(1, 1), patterns=(CORNERS[0], (4,), CORNERS[3]), removed=0.2),
    Case("weights-beyond-the-cache", (3, 4), 1, 700, 70, tile=(None, 1), patterns=(tuple(range(9)), CORNERS[1])),
    Case("window-7x7", (9, 9), 2, 5, 20, window=(7, 7), tile=(8, 1), patterns=((0, 24, 48), tuple(range(49)))),
    Case("window-1x62", (2, 65), 1, 3, 9, window=(1, 62), tile=(8, 1), patterns=((0, 31, 61),)),
    Case("window-2x31", (4, 40), 2, 3, 9, window=(2, 31), tile=(1, 1), patterns=((0, 31, 61), (1, 2, 32, 33))),
)


def _layer(name, size, batch, cin, cout, tile, window=3, stride=1, removed=0.6):
    patterns = CORNERS if window == 3 else ()
    padding = ((window // 2, window // 2),) * 2
    square = {"image": (size, size), "window": (window, window), "strides": (stride, stride)}
    return Case(
        name, batch=batch, cin=cin, cout=cout, padding=padding, tile=tile, patterns=patterns, removed=removed, **square
    )


# Of VGG-13 on 32x32 images, ResNet-18 and ResNet-50 on 224x224; both kinds of kernels.
LAYERS = tuple(
    _layer(f"{name}-{tile[0]}", size, batch, cin, cout, tile, *more)
    for tile in ((64, 1), (16, 1), (1, 1))
    for name, size, batch, cin, cout, *more in (
        ("vgg13-first", 32, 2, 3, 64, 3, 1, 0.0),
        ("vgg13-32", 32, 1, 64, 64),
        ("vgg13-8", 8, 4, 128, 256),
        ("vgg13-2", 2, 8, 512, 512),
        ("resnet18-28-s2", 56, 1, 64, 128, 3, 2),
        ("resnet18-7", 7, 2, 512, 512),
        ("resnet18-shortcut", 28, 1, 128, 256, 1, 2),
        ("resnet50-stem", 224, 1, 3, 64, 7, 2, 0.0),
        ("resnet50-1x1", 14, 2, 256, 1024, 1, 1, 0.5),
        ("resnet50-56", 56, 1, 64, 64),
    )
)
SOME_LAYERS = ("vgg13-8-64", "vgg13-8-1", "vgg13-first-64", "resnet18-28-s2-16", "resnet18-28-s2-1")


def sets():
    """What this processor runs; by default the fastest alone, which is built anyway."""
    fastest, *others = build.instruction_sets_here()
    return [fastest, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@functools.cache
def library(instructions):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(build.ENVIRONMENT, instructions)
        loaded = ctypes.CDLL(os.fspath(build.built()[0]))
    loaded.clicktrain_instruction_set.restype = ctypes.c_char_p
    loaded.clicktrain_packed_bytes.restype = ctypes.c_int64
    assert loaded.clicktrain_instruction_set().decode() == instructions
    return loaded


# Above all other parameters: the sets take turns on one case after the other, which has one reference for all.
in_each_set = pytest.mark.parametrize("native", sets())


@functools.lru_cache(maxsize=1)
def drawn(case, dtype, seed=0):
    """``(x, w, dy, mask, structure)`` and what it comes to."""
    x, w, dy, mask, structure = common.draw(case, dtype, seed)
    return (x, w, dy, mask, structure), common.expected(x, w, dy, mask, case.geometry())


class Convolution:
    """One convolution as the plain entries take it; `structure` None for a dense one."""

    def __init__(self, native, case, structure, dtype):
        self.native, self.case, self.dtype = library(native), case, DTYPES[dtype]
        geometry = case.geometry()
        lists = [None] * 4
        tile, rooms = (1, 1), (0, 0)
        if structure is not None:
            tile = structure.tile
            by_filters, by_channels = (structure.pairs, structure.pair_counts), None
            by_channels = (structure.pairs_by_channel, structure.pair_counts_by_channel)
            lists = [*_with_no_rest(*by_filters), *_with_no_rest(*by_channels)]
            rooms = (lists[0].shape[1], lists[2].shape[1])
        (top, _), (left, _) = geometry.padding
        numbers = (list(DTYPES).index(dtype), case.batch, *case.image, *geometry.output, *case.window, *case.strides)
        numbers = np.array((*numbers, top, left, case.cin, case.cout, *tile, *rooms), np.int64)
        self._kept = (numbers, *lists)
        self._facts = [_pointer(array) for array in self._kept]

    def forward(self, x, w, threads=1, scale=None, bias=None, relu=False, packed=None):
        y = np.full(self.case.y_shape, np.nan, self.dtype)
        weights = (None if packed is not None else _pointer(w), _pointer(packed))
        more = (_pointer(scale), _pointer(bias), ctypes.c_int64(relu))
        self.native.clicktrain_forward(*self._facts, _pointer(x), *weights, *more, _pointer(y), ctypes.c_int64(threads))
        return y

    def input_gradient(self, dy, w, threads=1):
        dx = np.full(self.case.x_shape, np.nan, self.dtype)
        arrays = map(_pointer, (dy, w, dx))
        self.native.clicktrain_input_gradient(*self._facts, *arrays, ctypes.c_int64(threads))
        return dx

    def weight_gradient(self, x, dy, threads=1):
        dw = np.full(self.case.w_shape, np.nan, np.float32)
        arrays = map(_pointer, (x, dy, dw))
        self.native.clicktrain_weight_gradient(*self._facts, *arrays, ctypes.c_int64(threads))
        return dw

    def pack(self, w, sized=False):
        """For outputs of any size, or of this one."""
        numbers = self._kept[0].copy()
        if not sized:
            numbers[1:6] = 0
        facts = [_pointer(numbers), *self._facts[1:]]
        size = self.native.clicktrain_packed_bytes(*facts)
        room = np.full(size + 64, 255, np.uint8)
        packed = room[-room.ctypes.data % 64 :][:size]
        self.native.clicktrain_pack(*facts, _pointer(w), _pointer(packed))
        return packed

    def all(self, x, w, dy, threads=1):
        return self.forward(x, w, threads), self.input_gradient(dy, w, threads), self.weight_gradient(x, dy, threads)


def _pointer(array):
    return None if array is None else ctypes.c_void_p(array.ctypes.data)


def _with_no_rest(entries, counts):
    entries = np.array(entries, np.int32)
    entries[np.arange(entries.shape[1]) >= np.asarray(counts)[:, None]] = np.iinfo(np.int32).max
    return entries, np.array(counts, np.int32)


def check_all(native, case, dtype, seed=0, threads=(2, 3, 8)):
    (x, w, dy, mask, structure), wanted = drawn(case, dtype, seed)
    convolution = Convolution(native, case, structure, dtype)
    results = convolution.all(x, w, dy)
    # The weight gradient is float32 whatever the images are.
    bounds = (common.BOUNDS[dtype], common.BOUNDS[dtype], common.BOUNDS["float32"])
    for what, result, exact, bound in zip(("value", "input gradient", "weight gradient"), results, wanted, bounds):
        common.check(result, exact, bound, what)
    assert not results[2][~mask].any(), "the weight gradient is exactly zero off the structure"
    for number in threads:
        for what, result, one in zip("y dx dw".split(), convolution.all(x, w, dy, number), results):
            assert result.tobytes() == one.tobytes(), f"{what} depends on the number of threads"
    assert convolution.forward(x, None, 2, packed=convolution.pack(w)).tobytes() == results[0].tobytes()
    # Packed for their size, corners in tiles are summed otherwise: near the reference all the same, for any threads.
    sized = convolution.pack(w, sized=True)
    value = convolution.forward(x, None, 1, packed=sized)
    common.check(value, wanted[0], bounds[0], "value of weights packed for the size")
    for number in threads:
        assert convolution.forward(x, None, number, packed=sized).tobytes() == value.tobytes()


@in_each_set
@pytest.mark.parametrize("case", (*NHWC, *ODD), ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_directions(native, case, dtype):
    check_all(native, case, dtype)


def some_layers():
    return [case if case.name in SOME_LAYERS else pytest.param(case, marks=pytest.mark.slow) for case in LAYERS]


@in_each_set
@pytest.mark.parametrize("case", some_layers(), ids=str)
def test_layers_of_real_nets(native, case):
    check_all(native, case, "float32", threads=(2,))


@st.composite
def convolutions(draw):
    size, window, pad = st.integers(1, 19), st.integers(1, 5), st.integers(0, 5)
    window = (draw(window), draw(window))
    padding = tuple((draw(pad), draw(pad)) for _ in range(2))
    image = tuple(max(draw(size), taps - sum(pads)) for taps, pads in zip(window, padding))
    strides = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    cin, cout = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    tile = (draw(st.integers(1, cout)), draw(st.integers(1, cin)))
    taps = st.lists(st.integers(0, window[0] * window[1] - 1), min_size=1, unique=True).map(sorted).map(tuple)
    patterns = tuple(draw(st.lists(taps, max_size=3)))
    removed = draw(st.sampled_from((0.0, 0.3, 0.7, 1.0)))
    batch = draw(st.integers(1, 35))
    batch = max(1, min(batch, 2_000_000 // (image[0] * image[1] * cin * cout)))
    return Case("drawn", image, batch, cin, cout, window, strides, padding, tile, patterns, "tile", removed)


@in_each_set
@given(case=convolutions(), dtype=st.sampled_from(sorted(DTYPES)), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_drawn_convolutions(native, case, dtype, seed):
    check_all(native, case, dtype, seed, threads=(3,))


@in_each_set
@pytest.mark.parametrize("name", ["rests", "many-images-stride-2", "window-7x7", "resnet18-shortcut-1"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dense(native, name, dtype):
    case = next(case for case in (*ODD, *LAYERS) if case.name == name)
    case = dataclasses.replace(case, tile=(None, None), patterns=(), removed=0.0)
    (x, w, dy, mask, structure), wanted = drawn(case, dtype)
    dense = Convolution(native, case, None, dtype)
    results = dense.all(x, w, dy, 2)
    # One kernel for both, so that times compare: the dense form's sums are those of a mask that retains everything.
    for result, same in zip(results, Convolution(native, case, structure, dtype).all(x, w, dy)):
        assert result.tobytes() == same.tobytes()
    common.check(results[0], wanted[0], common.BOUNDS[dtype], "value")
    assert dense.forward(x, None, packed=dense.pack(w)).tobytes() == results[0].tobytes()


@in_each_set
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_more_taps_than_a_number_has_bits(native, strides):
    case = Case("9x9", (12, 11), 2, 5, 40, (9, 9), strides, tile=(None, None), patterns=())
    rng = np.random.default_rng(0)
    x, w, dy = (rng.standard_normal(shape).astype(np.float32) for shape in (case.x_shape, case.w_shape, case.y_shape))
    wanted = common.expected(x, w, dy, np.ones(w.shape, bool), case.geometry())
    results = Convolution(native, case, None, "float32").all(x, w, dy, 2)
    for what, result, exact in zip("y dx dw".split(), results, wanted):
        common.check(result, exact, 1e-5, what)


@in_each_set
@pytest.mark.parametrize("name", ["rests", "rests-of-8-stride-3", "singles", "many-images-stride-2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_epilogue(native, name, dtype):
    case = next(case for case in ODD if case.name == name)
    (x, w, _, _, structure), (y, _, _) = drawn(case, dtype)
    rng = np.random.default_rng(1)
    scale, bias = (rng.standard_normal(case.cout).astype(np.float32) for _ in range(2))
    convolution = Convolution(native, case, structure, dtype)
    for scales, shifts, relu in np.ndindex(2, 2, 2):
        more = dict(scale=scale if scales else None, bias=bias if shifts else None, relu=bool(relu))
        wanted = y * (scale if scales else 1) + (bias if shifts else 0)
        wanted = np.maximum(wanted, 0) if relu else wanted
        for packed in (None, convolution.pack(w)):
            result = convolution.forward(x, w, 2, packed=packed, **more)
            common.check(result, wanted, common.BOUNDS[dtype], f"{more}")


@in_each_set
@pytest.mark.parametrize("name", ["rests", "rests-of-8-stride-3", "singles", "many-images-stride-2"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_a_number_comes_through(native, name, dtype):
    """NaN where the definition has it and nowhere else, through the ReLU and both roundings."""
    case = next(case for case in ODD if case.name == name)
    x, w, dy, mask, structure = common.draw(case, dtype)
    x[0, 1, 2, 3], dy[0, 0, 1, 2] = np.nan, np.nan
    scale, bias = np.ones(case.cout, np.float32), np.zeros(case.cout, np.float32)
    scale[4], bias[5] = np.nan, np.nan
    convolution = Convolution(native, case, structure, dtype)
    # Where a product with the NaN is, its size counts: with the others' being one, NaN is what has any.
    lone_x, lone_dy = (np.isnan(array.astype(np.float32)).astype(np.float64) for array in (x, dy))
    reads, gets, _ = common.expected(lone_x, np.ones(w.shape), lone_dy, mask, case.geometry())
    assert reads.any() and gets.any() and not reads.all() and not gets.all()
    np.testing.assert_array_equal(np.isnan(convolution.forward(x, w, 2, relu=True).astype(np.float32)), reads > 0)
    np.testing.assert_array_equal(np.isnan(convolution.input_gradient(dy, w, 2).astype(np.float32)), gets > 0)
    y = np.isnan(convolution.forward(x, w, 2, scale=scale, bias=bias, relu=True).astype(np.float32))
    np.testing.assert_array_equal(y, (reads > 0) | np.isin(np.arange(case.cout), (4, 5)))


@in_each_set
@pytest.mark.parametrize("name", ["rests-of-8-stride-3", "many-images-stride-2", "corners-and-singles"])
def test_finite_differences(native, name):
    case = next(case for case in ODD if case.name == name)
    x, w, dy, mask, structure = common.draw(case, "float32")
    w = np.where(mask, w, 0)
    rng = np.random.default_rng(2)
    by_x, by_w = (rng.standard_normal(array.shape).astype(np.float32) for array in (x, w))
    convolution = Convolution(native, case, structure, "float32")

    def slope(x0, x1, w0, w1):
        rise = convolution.forward(x1, w1).astype(np.float64) - convolution.forward(x0, w0)
        return np.sum(rise * dy) / 2

    # The convolution is linear in each, so that the difference is exact for any step.
    _, dx, dw = convolution.all(x, w, dy, 3)
    np.testing.assert_allclose(slope(x - by_x, x + by_x, w, w), np.sum(dx.astype(np.float64) * by_x), rtol=1e-4)
    np.testing.assert_allclose(slope(x, x, w - by_w, w + by_w), np.sum(dw.astype(np.float64) * by_w), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", build.instruction_sets_here()[1:])
def test_through_jax_with_other_instructions(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", "-m", "not slow"]
    command.append(os.fspath(Path(__file__).with_name("test_cpu.py")))
    environment = {**os.environ, build.ENVIRONMENT: name}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
