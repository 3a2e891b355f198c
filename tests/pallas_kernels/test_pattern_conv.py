"""What `pattern_conv` computes, whatever the backend: values and gradients against plain numpy in float64.

Weights that are not retained are NaN or infinite here: none of them may reach a value or a gradient.
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

import pallas_kernels as pk
from pallas_kernels.pattern_conv import api, cases, dense, pieces, xla
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.vjp import epilogue
from tests.pallas_kernels.convolved import (
    ALL,
    GEOMETRIES,
    check,
    check_case,
    check_transformations,
    convolve,
    draw,
    expected,
    finite,
    quick_jit,
    value_and_gradients,
)

# One of each kind: the default layer's choice where all would take long.
SOME = ("per-channel-hwnc", "per-kernel-removed", "short-last-tiles", "stride-2", "wide-padding", "free-patterns")
ELSEWHERE = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in (*SOME, "one-pixel", "smaller-than-the-window", "smaller-than-a-5x5-window")
]


def some(*names):
    """All cases, but these alone by default."""
    assert set(names) <= set(ALL)
    return [case if name in names else pytest.param(case, marks=pytest.mark.slow) for name, case in ALL.items()]


def in_turns(values, *names):
    """(value, case): every pair with these cases; in the slow layer the others too, which take the values in turns."""
    others = [case for name, case in ALL.items() if name not in names]
    slow = [pytest.param(values[turn % len(values)], case, marks=pytest.mark.slow) for turn, case in enumerate(others)]
    return [*((value, ALL[name]) for value in values for name in names), *slow]


def test_a_tap_at_a_time_is_the_definition():
    case = dataclasses.replace(ALL["lopsided-padding"], strides=(2, 1))
    x, w, dy, mask, _ = draw(case, "float64")
    geometry = case.geometry()
    y, dx, dw = np.zeros(dy.shape), np.zeros(x.shape), np.zeros(w.shape)
    for n, r, s, f in np.ndindex(dy.shape):
        for i, j, c in np.ndindex(w.shape[:3]):
            row = r * case.strides[0] + i - case.padding[0][0]
            column = s * case.strides[1] + j - case.padding[1][0]
            if mask[i, j, c, f] and 0 <= row < case.image[0] and 0 <= column < case.image[1]:
                y[n, r, s, f] += x[n, row, column, c] * w[i, j, c, f]
                dx[n, row, column, c] += dy[n, r, s, f] * w[i, j, c, f]
                dw[i, j, c, f] += x[n, row, column, c] * dy[n, r, s, f]
    for result, wanted in zip(expected(x, w, dy, mask, geometry), (y, dx, dw)):
        check(result, wanted, 1e-13, "a tap at a time")


@pytest.mark.parametrize("case", ALL.values(), ids=str)
def test_value_and_gradients(case):
    check_case(case, "float64", "xla")


# So small, neighbouring tiles are merged into one by the estimate of their work: here they are not, or in pairs.
@pytest.mark.parametrize(
    ("merged", "case"), in_turns((1, 2), "short-last-tiles-hwnc", "free-patterns", "1x1-stride-2", "stride-2"), ids=str
)
def test_value_and_gradients_by_single_tiles(case, merged, monkeypatch):
    # One tile after another, as large ones are, or free.
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1 if merged == 1 else 1 << 30)
    monkeypatch.setattr(pieces, "_best_merge", lambda codes, size, tile, cout: min(merged, codes.shape[1]))
    structure = cases.structure_of(case, np.random.default_rng(0))
    assert all(piece.merged == min(merged, case.grid[1]) for piece in structure.pieces)
    check_case(case, "float64", "xla")


# Every stride, padding and window; to a dense convolution one mask is as good as another.
@pytest.mark.parametrize("case", some(*GEOMETRIES), ids=str)
@pytest.mark.parametrize("backend", ["reference", "dense"])
def test_value_and_gradients_of_the_dense_forms(case, backend):
    check_case(case, "float64", backend)


@pytest.mark.parametrize(("dtype", "case"), in_turns(("bfloat16", "float32"), *SOME[:4]), ids=str)
def test_lower_precision(case, dtype):
    for backend in ("xla", "dense", "reference") if case.name == SOME[0] else ("xla",):
        check_case(case, dtype, backend, seed=1)


def test_float16():
    check_case(ALL["short-last-tiles-hwnc"], "float16", "xla")


@pytest.mark.parametrize("few_pixels", [0, 128])
def test_16_bit_outputs_are_rounded_once(few_pixels, monkeypatch):
    monkeypatch.setattr(xla, "_FEW_PIXELS", few_pixels)
    case = ALL["window-5x5"]
    x, w, dy, mask, structure = draw(case, "bfloat16")
    y = quick_jit(lambda x, w, structure: convolve(x, w, structure, case, "xla"))(x, w, structure)
    wanted = expected(x, w, dy, mask, case.geometry())[0]
    # Many pieces are added up: sums in 16 bits would be off by far more where they cancel. Half a step is 2**-8.
    assert sum(len(piece.rooms) for piece in structure.pieces) > 2 or structure.pieces[0].merged > 1
    assert (np.abs(np.asarray(y, np.float64) - wanted) <= 1.01 * 2**-8 * np.abs(wanted) + 1e-5).all()


# Small sums are products of matrices; larger ones are convolutions.
@pytest.mark.parametrize("case", some(*SOME, "valid", "1x1-stride-2", "stride-2-by-1-hwnc"), ids=str)
def test_sums_over_many_pixels(case, monkeypatch):
    monkeypatch.setattr(xla, "_FEW_PIXELS", 0)
    with jax.enable_x64(True):
        x, w, dy, mask, structure = draw(case, "float64")
        forward = quick_jit(lambda x, w, structure: convolve(x, w, structure, case, "xla"))
        assert ("convolution" in forward.lower(x, w, structure).as_text()) is bool(mask.any())
        check(forward(x, w, structure), expected(x, w, dy, mask, case.geometry())[0], 1e-12, "value")


# Elsewhere what is for CPUs alone is left out: the order and the ranges of images, which such small cases do not have
# here either, products of matrices (without, all cases are above), the native kernels, which take float32, and a way
# round XLA where an image is smaller than the window.
@pytest.mark.parametrize("name", ["short-last-tiles-hwnc", "stride-2-even-padded", *ELSEWHERE])
def test_the_form_for_other_devices(name, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    check_case(ALL[name], "float64", "xla")
    check_case(ALL[name], "float32", "dense")


@pytest.mark.parametrize(("layout", "few_pixels"), [("NHWC", 0), ("HWNC", 128)])
def test_a_few_images_at_a_time(layout, few_pixels, monkeypatch):
    case = Case("c", (6, 5), 7, 6, 8, strides=(2, 1), tile=(4, 1), removed=0.3, layout=layout)
    bounds = []
    chunks = xla._chunks
    monkeypatch.setattr(xla, "_CACHE_BYTES", 1)
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1)
    monkeypatch.setattr(xla, "_FEW_PIXELS", few_pixels)
    monkeypatch.setattr(xla, "_MOST_CONVOLUTIONS", 9)
    monkeypatch.setattr(xla, "_chunks", lambda *args: bounds.append(chunks(*args)) or bounds[-1])
    check_case(case, "float64", "xla")
    # Ranges of unlike lengths, that leave out no image.
    for ranges in bounds:
        assert len(ranges) == 4 and len({end - begin for begin, end in ranges}) == 2
        assert [n for begin, end in ranges for n in range(begin, end)] == list(range(7))
    assert len(bounds) >= 3


def test_images_are_not_split_finer_than_there_are_and_weights_are_not_read_too_often(monkeypatch):
    case = Case("c", (6, 5), 3, 6, 8, tile=(None, 1))
    structure = cases.structure_of(case, np.random.default_rng(0))
    assert xla._chunks(3, structure, case.geometry(), jnp.float32) == [(0, 3)]
    monkeypatch.setattr(xla, "_CACHE_BYTES", 1)
    assert len(xla._chunks(3, structure, case.geometry(), jnp.float32)) in (2, 3)
    assert len(xla._chunks(1000, structure, case.geometry(), jnp.float32)) <= xla._MOST_CONVOLUTIONS
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert xla._chunks(1000, structure, case.geometry(), jnp.float32) == [(0, 1000)]


@pytest.mark.parametrize("retained", ["nothing in the middle tile", "one weight"])
def test_filters_that_retain_nothing_are_exact_zeros(retained):
    case = Case("c", (4, 4), 2, 6, 48, tile=(16, 1))
    mask = cases.make_mask(case, np.random.default_rng(0))
    if retained == "one weight":
        mask = np.zeros_like(mask)
        mask[1, 2, 3, 16:32] = True
        silent = np.r_[:16, 32:48]
    else:
        mask[..., 16:32] = False
        silent = np.r_[16:32]
    rng = np.random.default_rng(1)
    x, _, dy = cases.make_inputs(case, rng)
    w = np.where(mask, 1.0, np.nan).astype(np.float32)
    structure = pk.make_structure(mask, tile=(16, 1))
    y, dx, dw = quick_jit(functools.partial(value_and_gradients, case=case, backend="xla"))(x, w, dy, structure)
    for what, result, wanted in zip("y dx dw".split(), (y, dx, dw), expected(x, w, dy, mask, case.geometry())):
        check(result, wanted, 1e-5, what)
    assert not np.asarray(y)[..., silent].any() and not np.asarray(dw)[~mask].any()
    if retained == "one weight":
        assert not np.asarray(dx)[..., [0, 1, 2, 4, 5]].any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.slow
def test_any_convolution(data):
    def one(*values):
        return data.draw(st.sampled_from(values))

    window = one((1, 1), (3, 3), (3, 3), (2, 3), (5, 1))
    pads = st.integers(0, 3)
    taps = window[0] * window[1]
    pattern = st.lists(st.integers(0, taps - 1), min_size=1, unique=True).map(lambda taps: tuple(sorted(taps)))
    case = Case(
        "any",
        (data.draw(st.integers(window[0], 7)), data.draw(st.integers(window[1], 6))),
        one(1, 2, 5),
        one(1, 3, 8),
        one(1, 5, 16),
        window=window,
        strides=(one(1, 2, 3), one(1, 2)),
        padding=one("SAME", "VALID", tuple((data.draw(pads), data.draw(pads)) for _ in range(2))),
        tile=(one(1, 2, 5, None), one(1, 2, None)),
        patterns=tuple(data.draw(st.lists(pattern, max_size=4))),
        removed=one(0.0, 0.3, 0.8),
        layout=one("NHWC", "HWNC"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "_FEW_PIXELS", one(0, 128))
        patch.setattr(xla, "_CACHE_BYTES", one(1, 512 * 1024))
        check_case(case, "float64", "xla", seed=data.draw(st.integers(0, 99)))


@pytest.mark.parametrize("backend", [pytest.param("dense", marks=pytest.mark.slow), "xla"])
@pytest.mark.parametrize("name", ["one-pixel", "stride-2-by-1-hwnc", "per-kernel-removed", "1x1"])
def test_finite_differences(name, backend):
    with jax.enable_x64(True):
        case = ALL[name]
        x, w, structure, scale, bias = finite(case)

        @jax.jit
        def function(x, w, scale, bias):
            return convolve(x, w, structure, case, backend, scale=scale, bias=bias, relu=True)

        check_grads(function, (x, w, scale, bias), order=1, modes=["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("backend", ["reference", "dense", "xla"])
def test_second_derivatives(backend):
    case = ALL["1x1-stride-2"]
    with jax.enable_x64(True):
        x, w, structure, *_ = finite(case)

        def function(x, w):
            return jnp.sum(jnp.sin(convolve(x, w, structure, case, backend)))

        check_grads(jax.jit(jax.grad(function, (0, 1))), (x, w), order=1, modes=["rev"], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("scaled", "biased", "relu"), [*itertools.product((False, True), repeat=3)])
def test_the_epilogue(scaled, biased, relu):
    case = ALL["per-channel"]
    with jax.enable_x64(True):
        x, w, structure, scale, bias = finite(case)
        how = dict(scale=scale if scaled else None, bias=bias if biased else None, relu=relu)
        y = convolve(x, w, structure, case, "dense", **how)
        wanted = np.asarray(convolve(x, w, structure, case, "dense"))
    wanted = wanted * (scale if scaled else 1.0) + (bias if biased else 0.0)
    assert (wanted < 0).any()
    check(y, np.maximum(wanted, 0) if relu else wanted, 1e-14, "epilogue")


def test_left_open_the_result_is_the_same():
    # One that is sparse, one that is dense; see test_api for the choice.
    sparse = Case("sparse", (4, 4), 64, 32, 128, tile=(64, 1), removed=0.6)
    for case, chosen in ((sparse, "xla"), (ALL["per-kernel"], "dense")):
        structure = cases.structure_of(case, np.random.default_rng(0))
        assert api.choose(structure, case.geometry(), jnp.float64, case.batch) == chosen
        check_case(case, "float64", None)


@pytest.mark.parametrize("ways", [("xla", "dense", "dense"), ("dense", "dense", "xla")])
def test_each_direction_by_a_backend_of_its_own(ways, monkeypatch):
    ways, ran = dict(zip(("forward", "input_gradient", "weight_gradient"), ways)), set()
    monkeypatch.setattr(api, "choose", lambda *args: ways[args[4]])
    for name, module in (("xla", xla), ("dense", dense)):
        for direction in ways:
            function = getattr(module, direction)
            called = lambda *args, f=function, n=(direction, name): ran.add(n) or f(*args)  # noqa: E731
            monkeypatch.setattr(module, direction, called)
    check_case(ALL["short-last-tiles"], "float64", None)
    assert ran == set(ways.items())


def test_a_backend_that_applies_the_epilogue_itself(monkeypatch):
    case = ALL["per-channel"]
    forwards = []

    def forward(x, w, structure, geometry, scale=None, bias=None, relu=False):
        forwards.append((scale is not None, bias is not None, relu))
        return epilogue(dense.forward(x, w, structure, geometry), scale, bias, relu)

    with jax.enable_x64(True):
        x, w, structure, scale, bias = finite(case)
        fused = types.SimpleNamespace(**{**vars(dense), "forward": forward}, FUSES_EPILOGUE=True)

        def function(x, w, scale, bias):
            return convolve(x, w, structure, case, "dense", scale=scale, bias=bias, relu=True)

        def value_and_all_gradients(*args):
            return function(*args), *jax.grad(lambda *args: jnp.sum(function(*args) ** 2), (0, 1, 2, 3))(*args)

        wanted = jax.jit(lambda *args: value_and_all_gradients(*args))(x, w, scale, bias)
        monkeypatch.setattr(api, "module_of", lambda name: fused)
        for result, exact in zip(jax.jit(value_and_all_gradients)(x, w, scale, bias), wanted):
            check(result, np.asarray(exact), 1e-13, "fused")
    # Fused where the value is all that is asked for; apart where a gradient wants what lies between.
    assert forwards == [(True, True, True), (False, False, False)]


def test_eager_on_numpy_arrays_and_with_the_structure_as_a_constant():
    case = ALL["1x1"]
    x, w, dy, mask, structure = draw(case, "float32")
    wanted = expected(x, w, dy, mask, case.geometry())
    for backend in ("reference", "dense", "xla"):
        check(convolve(x, w, structure, case, backend), wanted[0], 1e-5, backend)
    constant = quick_jit(lambda x, w, dy: value_and_gradients(x, w, dy, structure, case, "xla"))(x, w, dy)
    for what, result, exact in zip(("value", "input gradient", "weight gradient"), constant, wanted):
        check(result, exact, 1e-5, what)


def test_no_images(monkeypatch):
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1)
    case = ALL["free-patterns"]
    x, w, dy, _, structure = draw(case, "float32")
    for backend in ("reference", "dense", "xla"):
        compute = quick_jit(functools.partial(value_and_gradients, case=case, backend=backend))
        y, dx, dw = compute(x[:0], w, dy[:0], structure)
        assert (y.shape, dx.shape) == (dy[:0].shape, x[:0].shape)
        assert dw.shape == w.shape and not np.asarray(dw).any()


@pytest.mark.parametrize("backend", ["dense", "xla"])
def test_transformations(backend, monkeypatch):
    monkeypatch.setattr(xla, "_ORDER_BYTES", -1)
    check_transformations(backend)


@pytest.mark.parametrize("name", ["per-kernel-removed", "short-last-tiles-hwnc", "all-removed"])
def test_packed_weights_do_the_same(name):
    case = ALL[name]
    x, w, dy, mask, structure = draw(case, "float32")
    packed = quick_jit(xla.pack)(w, structure)
    assert all(np.isfinite(weights).all() for tiles in packed for weights in tiles)
    # Each retained weight once, and zeros.
    retained = np.sort(w[np.isfinite(w)])
    entries = np.concatenate([np.ravel(weights) for tiles in packed for weights in tiles] or [np.zeros(0)])
    np.testing.assert_array_equal(np.sort(entries[entries != 0]), retained)
    geometry = case.geometry()
    y = quick_jit(lambda *args: xla.forward_packed(*args, geometry))(x, packed, structure)
    np.testing.assert_array_equal(y, quick_jit(lambda *args: xla.forward(*args, geometry))(x, w, structure))
    check(y, expected(x, w, dy, mask, geometry)[0], 1e-5, "packed")
