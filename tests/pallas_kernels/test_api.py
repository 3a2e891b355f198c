"""What `pattern_conv` refuses and why, which backend it takes when none is named, and how it pads."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pallas_kernels as pk
from pallas_kernels import native
from pallas_kernels.pattern_conv import api, cases, dense, mosaic_gpu, reference, xla
from pallas_kernels.pattern_conv.cases import Case
from pallas_kernels.pattern_conv.geometry import make_geometry
from pallas_kernels.pattern_conv.structure import mask_of

MASK = np.zeros((3, 3, 4, 6), bool)
MASK[:2, :2, :, ::2] = True
STRUCTURE = pk.make_structure(MASK)
X, W = np.ones((2, 5, 5, 4), np.float32), np.ones((3, 3, 4, 6), np.float32)

# A plain 3x3 layer and its blocks: what `mosaic_gpu` can do.
BLOCKS = Case("blocks", (4, 4), 64, 128, 128, tile=(64, 64), dtype="bfloat16", layout="HWNC")


@pytest.fixture
def portable(monkeypatch):
    """As on a machine without native kernels."""
    monkeypatch.setattr(native, "is_fast", lambda: False)


@pytest.fixture
def fast(monkeypatch):
    """As on a CPU that has them, whether they could be built here or not."""
    monkeypatch.setattr(native, "why_not", lambda: None)
    monkeypatch.setattr(native, "is_fast", lambda: True)


def structure_of(case):
    return cases.structure_of(case, np.random.default_rng(0))


def shaped(case):
    """Stand-ins for x and w."""
    return jnp.zeros(case.x_shape, case.dtype), jnp.zeros(case.w_shape, case.dtype)


def test_what_is_refused_elsewhere_is_taken_here():
    assert pk.pattern_conv(X, W, STRUCTURE, strides=[1, np.int64(2)], padding=[(1, 1), [0, np.int64(2)]]).shape
    assert pk.pattern_conv(X, W, STRUCTURE, scale=np.ones(6), bias=np.ones(6), padding="valid").shape == (2, 3, 3, 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"structure": MASK}, r"comes from make_structure\(mask\), got ndarray"),
        ({"structure": None}, "got NoneType"),
        ({"x": X[0]}, r"x has four axes, .*, got \(5, 5, 4\)"),
        ({"x": X[..., :3]}, r"x of shape \(2, 5, 5, 3\) has 3 channels, a kernel \(3, 3, 4, 6\) takes 4"),
        ({"w": W[..., :5]}, r"w has shape \(3, 3, 4, 5\), the structure was made for \(3, 3, 4, 6\)"),
        ({"w": W.transpose(0, 1, 3, 2)}, r"w has shape \(3, 3, 6, 4\)"),
        ({"w": W.astype(jnp.bfloat16)}, "one floating dtype, got float32 and bfloat16: cast"),
        ({"x": X.astype(int), "w": W.astype(int)}, "one floating dtype, got int"),
        ({"layout": "NCHW"}, "layout is 'NHWC' or 'HWNC', got 'NCHW'"),
        ({"strides": (0, 1)}, r"two positive integers \(rows, columns\), got \(0, 1\)"),
        ({"strides": (1, 1, 1)}, r"two positive integers \(rows, columns\), got \(1, 1, 1\)"),
        ({"strides": 2}, r"two positive integers \(rows, columns\), got 2"),
        ({"strides": (1.5, 1)}, r"two positive integers \(rows, columns\), got \(1.5, 1\)"),
        ({"padding": "FULL"}, r"padding is 'SAME', 'VALID' or .*, got 'FULL'"),
        ({"padding": (1, 1)}, r"padding is 'SAME', 'VALID' or .*, got \(1, 1\)"),
        ({"padding": ((1, 1),)}, r"padding is 'SAME', 'VALID' or .*, got \(\(1, 1\),\)"),
        ({"padding": ((1, 1), (-1, 0))}, r"none negative, got \(\(1, 1\), \(-1, 0\)\)"),
        ({"padding": ((1, 1), (0.5, 0))}, r"none negative, got \(\(1, 1\), \(0.5, 0\)\)"),
        ({"x": X[:, :2], "padding": "VALID"}, r"image of \(2, 5\) with padding .* smaller than the window \(3, 3\)"),
        ({"scale": np.ones(5)}, r"scale has one entry a filter, \(6,\), got \(5,\)"),
        ({"bias": np.ones((1, 6))}, r"bias has one entry a filter, \(6,\), got \(1, 6\)"),
        ({"scale": 2.0}, r"scale has one entry a filter, \(6,\), got \(\)"),
        ({"backend": "cudnn"}, "one of reference, dense, xla, cpu, mosaic_gpu, or None for the best, got 'cudnn'"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"x": X, "w": W, "structure": STRUCTURE, **change}
    with pytest.raises(ValueError, match=message):
        pk.pattern_conv(arguments.pop("x"), arguments.pop("w"), arguments.pop("structure"), **arguments)


@pytest.mark.parametrize(
    ("x", "w", "more", "message"),
    [
        (X, W, {"layout": "NCHW"}, "layout is 'NHWC' or 'HWNC', got 'NCHW'"),
        (X, W, {"strides": 2}, "two positive integers"),
        (X, W, {"padding": 1}, "padding is 'SAME', 'VALID' or .*, got 1"),
        (X[0], W, {}, r"x has four axes, .*, got \(5, 5, 4\)"),
        (X, W[0], {}, r"w is \(kh, kw, cin, cout\), got \(3, 4, 6\)"),
        (X[..., :3], W, {}, "has 3 channels, a kernel .* takes 4"),
        (X, W.astype(jnp.bfloat16), {}, "one floating dtype, got float32 and bfloat16"),
    ],
)
def test_the_plain_convolution_refuses_the_same(x, w, more, message):
    with pytest.raises(ValueError, match=message):
        pk.dense_conv(x, w, **more)


def test_a_backend_that_is_named_and_cannot_is_refused_with_its_reason():
    with pytest.raises(ValueError, match="backend 'mosaic_gpu' cannot do this convolution: ") as refused:
        pk.pattern_conv(X, W, STRUCTURE, backend="mosaic_gpu")
    geometry = make_geometry(X.shape, (3, 3), (1, 1), "SAME", "NHWC")
    assert str(refused.value).endswith(mosaic_gpu.why_not(STRUCTURE, geometry, X.dtype, 2))


def test_a_backend_that_is_named_is_the_one_that_runs(portable, monkeypatch):
    ran = []
    for module in (reference, dense, xla):
        forward = module.forward
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "forward", lambda *args, f=forward, n=name: ran.append(n) or f(*args))
    for name in ("reference", "dense", "xla"):
        jax.eval_shape(lambda x, w: pk.pattern_conv(x, w, STRUCTURE, backend=name), X, W)  # noqa: B023
        assert ran and set(ran) == {name}
        ran.clear()
    for case, chosen in ((Case("d", (4, 4), 1, 32, 32, tile=(1, 1)), "dense"), (PAYS[0], "xla")):
        jax.eval_shape(lambda x, w: pk.pattern_conv(x, w, structure_of(case)), *shaped(case))  # noqa: B023
        assert ran and set(ran) == {chosen}
        ran.clear()


PAYS = (
    Case("tiles", (8, 8), 64, 64, 128, tile=(64, 1), removed=0.6),
    Case("blocks", (8, 8), 64, 128, 128, tile=(64, 64), removed=0.6),
    Case("channels", (8, 8), 64, 64, 64, tile=(None, 1)),
    Case("1x1", (8, 8), 64, 128, 128, window=(1, 1), tile=(64, 64), patterns=(), removed=0.75),
    Case("nearly-empty", (8, 8), 64, 64, 64, tile=(1, 1), removed=0.99),
    Case("empty", (8, 8), 64, 64, 64, tile=(16, 1), removed=1.0),
)
DOES_NOT = (
    Case("per-kernel", (8, 8), 64, 64, 64, tile=(1, 1)),
    Case("per-kernel-removed", (8, 8), 64, 64, 64, tile=(1, 1), removed=0.3),
    Case("whole-kernels", (8, 8), 64, 64, 64, tile=(None, None), patterns=()),
    Case("1x1-per-kernel", (8, 8), 64, 64, 64, window=(1, 1), tile=(1, 1), patterns=(), removed=0.5),
)


@pytest.mark.parametrize("case", (*PAYS, *DOES_NOT), ids=str)
def test_sparse_is_chosen_where_it_pays(case, portable):
    structure = structure_of(case)
    assert api.choose(structure, case.geometry(), jnp.float32, case.batch) == ("xla" if case in PAYS else "dense")
    assert (pk.estimated_gain(structure) > pk.LEAST_GAIN) is (case in PAYS)
    if case.name == "whole-kernels":
        assert pk.estimated_gain(structure) <= 1


@pytest.mark.parametrize("case", (*PAYS, *DOES_NOT), ids=str)
def test_the_native_kernels_are_chosen_where_anything_is_saved(case, fast):
    structure = structure_of(case)
    saved = mask_of(structure).size / max(int(np.asarray(mask_of(structure)).sum()), 1)
    # Patterns alone gain kernel by kernel as well: 2.25 times less work. A third less work does not.
    expected = "cpu" if saved > 1.9 else "dense"
    for direction in api.DIRECTIONS:
        assert api.choose(structure, case.geometry(), jnp.float32, case.batch, direction) == expected
    # What they cannot do is left to the others.
    hwnc = dataclasses.replace(case, layout="HWNC")
    assert api.choose(structure, hwnc.geometry(), jnp.float32, case.batch) in ("xla", "dense")


def test_few_pixels_do_not_pay_for_what_a_call_does_once(portable):
    case = Case("tiles of 16", (8, 8), 1, 512, 512, tile=(16, 1), removed=0.6)
    structure, geometry = structure_of(case), case.geometry()
    assert api.choose(structure, geometry, jnp.float32, 1) == "dense"
    assert api.choose(structure, geometry, jnp.float32, 32) == "xla"
    # What one direction gains another one loses.
    assert api.choose(structure, geometry, jnp.float32, 32, "input_gradient") == "dense"


def test_tensor_cores_are_chosen_where_they_are(monkeypatch):
    structure, geometry = structure_of(BLOCKS), BLOCKS.geometry()
    assert api.choose(structure, geometry, jnp.bfloat16, 64) in ("xla", "dense")
    monkeypatch.setattr(mosaic_gpu, "why_not_here", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda structure, geometry, dtype, batch: None)
    assert api.choose(structure, geometry, jnp.bfloat16, 64) == "mosaic_gpu"
    monkeypatch.setattr(mosaic_gpu, "why_not", lambda structure, geometry, dtype, batch: "too small")
    assert api.choose(structure, geometry, jnp.bfloat16, 64) in ("xla", "dense")


def test_supported_tells_every_backend_and_why_not():
    assert jax.default_backend() == "cpu"
    reasons = pk.supported(structure_of(BLOCKS), BLOCKS.geometry(), jnp.bfloat16, 64)
    assert tuple(reasons) == pk.BACKENDS == ("reference", "dense", "xla", "cpu", "mosaic_gpu")
    assert "takes the layout NHWC" in reasons["cpu"]
    assert [reasons[name] for name in ("reference", "dense", "xla")] == [None] * 3
    # The kernels could do it: it is the device that they lack.
    assert "jax runs on cpu here" in reasons["mosaic_gpu"]


def test_supported_says_what_the_kernels_cannot_do_where_they_run(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "why_not_here", lambda: None)
    reason = mosaic_gpu.why_not(structure_of(BLOCKS), BLOCKS.geometry(), jnp.float32, 64)
    assert reason and pk.supported(structure_of(BLOCKS), BLOCKS.geometry(), jnp.float32, 64)["mosaic_gpu"] == reason


def test_the_epilogue_of_16_bit_outputs_is_computed_in_32():
    y = jnp.asarray([1.0, 2.0, -3.0], jnp.bfloat16)
    scale, bias = jnp.asarray([1.001, 1.0, 1.0]), jnp.asarray([-1.0, 0.001, 0.0])
    out = api.epilogue(y, scale, bias, True)
    assert out.dtype == jnp.bfloat16
    # 1.001 is 1 in bfloat16.
    np.testing.assert_allclose(np.asarray(out, np.float32), [0.001, 2.0, 0.0], rtol=1e-2)


@given(st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_same_and_valid_pad_as_jax_does(data):
    image, window, strides = (tuple(data.draw(st.integers(1, most)) for _ in range(2)) for most in (9, 5, 4))
    for padding in ("SAME", "VALID", "same"):
        if padding == "VALID" and (image[0] < window[0] or image[1] < window[1]):
            continue
        geometry = make_geometry((3, *image, 2), window, strides, padding, "NHWC")
        assert [*geometry.padding] == jax.lax.padtype_to_pads(image, window, strides, padding.upper())
        x, w = jax.ShapeDtypeStruct((3, *image, 2), "float32"), jax.ShapeDtypeStruct((*window, 2, 4), "float32")
        conv = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jax.eval_shape(lambda x, w: conv(x, w, strides, padding.upper()), x, w)  # noqa: B023
        assert (3, *geometry.output, 4) == y.shape


def test_the_module_is_called_like_its_function():
    import inspect

    import pallas_kernels.pattern_conv.mosaic_gpu as mosaic_gpu

    assert mosaic_gpu.__name__.endswith(".mosaic_gpu") and callable(xla.forward)
    assert inspect.signature(pk.pattern_conv) == inspect.signature(api.pattern_conv)
    x, w = jnp.ones((1, 5, 5, 2)), jnp.ones((3, 3, 2, 4))
    structure = pk.make_structure(np.arange(72).reshape(3, 3, 2, 4) % 3 > 0)
    wanted = api.pattern_conv(x, w, structure, backend="reference")
    call = jax.jit(pk.pattern_conv, static_argnames=("backend", "layout"))
    for got in (pk.pattern_conv(x, w, structure, backend="xla"), call(x, w, structure, backend="xla", layout="NHWC")):
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    gradient = jax.grad(lambda w: pk.pattern_conv(x, w, structure).sum())(w)
    assert gradient.shape == w.shape
