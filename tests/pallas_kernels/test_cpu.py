"""The CPU's native kernels through `pattern_conv`: values and gradients against plain numpy in float64.

Weights that are not retained are NaN or infinite here: none of them may reach a value or a gradient.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import pallas_kernels as pk
from pallas_kernels import native
from pallas_kernels.pattern_conv import api, cases, cpu, dense
from pallas_kernels.pattern_conv.cases import Case
from tests.pallas_kernels import convolved as common

NHWC = [case for case in common.ALL.values() if case.layout == "NHWC"]


@pytest.mark.parametrize("case", NHWC, ids=str)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_value_and_gradients(case, dtype):
    common.check_case(case, dtype, "cpu")


# As above, but in tiles of a whole vector of filters and more, with a rest.
@pytest.mark.parametrize("filters", [8, 16, 32, 64])
@pytest.mark.parametrize("size", [(8, 8), (17, 3), (2, 2), (1, 1)])
def test_wide_tiles(filters, size):
    case = Case("wide", size, 3, 20, 2 * filters + 5, tile=(filters, 1), removed=0.4)
    for strides in ((1, 1), (2, 2)):
        common.check_case(dataclasses.replace(case, strides=strides), "float32", "cpu")


@pytest.mark.parametrize("case", [case for case in NHWC if case.name in common.GEOMETRIES], ids=str)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_the_dense_entry(case, dtype):
    rng = np.random.default_rng(0)
    x, w, dy = (array.astype(jnp.dtype(dtype)) for array in cases.make_inputs(case, rng))

    def run(x, w, dy):
        how = {"strides": case.strides, "padding": case.padding, "backend": "cpu"}
        y, pull_back = jax.vjp(lambda x, w: pk.dense_conv(x, w, **how), x, w)
        return y, *pull_back(dy)

    wanted = common.expected(x, w, dy, np.ones(w.shape, bool), case.geometry())
    for what, result, exact in zip("y dx dw".split(), jax.jit(run)(x, w, dy), wanted):
        assert result.dtype == x.dtype
        common.check(result, exact, common.BOUNDS[dtype], what)


@pytest.mark.parametrize("name", ["one-pixel", "stride-2", "per-kernel-removed"])
def test_finite_differences(name):
    case = common.ALL[name]
    x, w, structure, scale, bias = common.finite(case, "float32")

    def function(x, w, scale, bias):
        return common.convolve(x, w, structure, case, "cpu", scale=scale, bias=bias)

    # Linear in each: a wide step costs little beside the rounding of float32.
    check_grads(jax.jit(function), (x, w, scale, bias), order=1, modes=["rev"], atol=2e-3, rtol=2e-3, eps=1e-2)


def test_second_derivatives():
    case = common.ALL["1x1-stride-2"]
    x, w, structure, *_ = common.finite(case, "float32")

    def gradients(backend):
        def function(x, w):
            return jnp.sum(jnp.sin(common.convolve(x, w, structure, case, backend)))

        def squared(x, w):
            return sum(jnp.sum(part**2) for part in jax.grad(function, (0, 1))(x, w))

        return jax.jit(jax.grad(squared, (0, 1)))(x, w)

    for result, wanted in zip(gradients("cpu"), gradients("reference")):
        common.check(result, np.asarray(wanted, np.float64), 1e-5, "second derivative")


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_the_epilogue_is_fused(scaled, biased, relu, dtype):
    case = common.ALL["tiles-one-channel"]
    x, w, structure, scale, bias = common.finite(case, dtype)
    scale, bias = scale.astype(np.float32), bias.astype(np.float32)
    how = dict(scale=scale if scaled else None, bias=bias if biased else None, relu=relu)
    forward = jax.jit(lambda x, w: common.convolve(x, w, structure, case, "cpu", **how))
    y = common.expected(x, w, np.zeros(case.y_shape), cases.make_mask(case, np.random.default_rng(0)), case.geometry())
    wanted = y[0] * (scale if scaled else 1.0) + (bias if biased else 0.0)
    common.check(forward(x, w), np.maximum(wanted, 0) if relu else wanted, common.BOUNDS[dtype], "epilogue")
    # One call of the handler, and nothing after it.
    assert "maximum" not in forward.lower(x, w).as_text()


@pytest.mark.parametrize("name", ["per-kernel-removed", "short-last-tiles", "all-removed", "1x1-stride-2"])
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_packed_weights_do_the_same(name, dtype):
    case = common.ALL[name]
    x, w, dy, mask, structure = common.draw(case, dtype)
    packed = pk.pack(w, structure, backend="cpu")
    assert packed.dtype == np.uint8 and packed.ctypes.data % 64 == 0
    how = {"strides": case.strides, "padding": case.padding}
    run = jax.jit(lambda x, packed: pk.packed_conv(x, packed, structure, **how, relu=True))
    wanted = common.convolve(x, w, structure, case, "cpu", relu=True)
    np.testing.assert_array_equal(run(x, packed), wanted)
    # In the program itself, and where the bytes do not start at a multiple of 64.
    np.testing.assert_array_equal(jax.jit(lambda x: run(x, packed))(x), wanted)
    shifted = np.zeros(packed.size + 65, np.uint8)[1:][: packed.size]
    shifted[:] = packed
    np.testing.assert_array_equal(run(x, shifted), wanted)
    assert np.isfinite(np.asarray(wanted, np.float64)).all()


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_corners_packed_for_the_size_of_their_output(dtype):
    rng = np.random.default_rng(0)
    mask = np.zeros((3, 3, 24, 40), bool)
    for channel in range(24):
        for tile in range(5):
            row, column = rng.integers(0, 2, 2)
            mask[row : row + 2, column : column + 2, channel, 8 * tile : 8 * tile + 8] = rng.random() < 0.7
    structure = pk.make_structure(mask, tile=(8, 1))
    w = jnp.asarray(np.where(mask, rng.standard_normal(mask.shape), np.nan), dtype)
    x = jnp.asarray(rng.standard_normal((2, 9, 11, 24)), dtype)
    packed = pk.pack(w, structure, backend="cpu", output=(9, 11))
    plain = pk.pack(w, structure, backend="cpu")
    # Nine numbers of each kernel in place of four; images that are small stay as they are.
    assert packed.size > 1.9 * plain.size
    np.testing.assert_array_equal(pk.pack(w, structure, backend="cpu", output=(7, 9)), plain)
    wanted = np.asarray(pk.packed_conv(x, plain, structure), np.float64)
    found = np.asarray(pk.packed_conv(x, packed, structure), np.float64)
    np.testing.assert_allclose(found, wanted, atol=(2e-6 if dtype == "float32" else 1e-2) * np.abs(wanted).max())
    assert dtype != "float32" or (found != wanted).any()
    with pytest.raises(Exception, match="packed weights are of another convolution"):
        jax.block_until_ready(pk.packed_conv(x, packed, structure, strides=(2, 2)))


def test_packed_weights_of_another_layer_are_refused():
    case = common.ALL["per-kernel-removed"]
    x, w, _, _, structure = common.draw(case, "float32")
    packed = pk.pack(w, structure, backend="cpu")
    wrong = pk.pack(w.astype(jnp.bfloat16), structure, backend="cpu")
    for other in (wrong, packed[:-1], packed[:10], np.zeros_like(packed), packed.view(np.int8)):
        with pytest.raises(Exception, match="INVALID_ARGUMENT: clicktrain_conv_packed: .*packed weights"):
            jax.block_until_ready(pk.packed_conv(x, other, structure))
    with pytest.raises(ValueError, match="packed for the backend 'xla' or 'cpu', got 'dense'"):
        pk.pack(w, structure, backend="dense")
    with pytest.raises(ValueError, match="w and the structure must be concrete"):
        jax.jit(lambda w: pk.pack(w, structure, backend="cpu"))(w)
    with pytest.raises(ValueError, match="pack weights of float32 or bfloat16 .*, got float64"):
        pk.pack(w.astype(np.float64), structure, backend="cpu")


@pytest.mark.parametrize(
    ("changes", "dtype", "message"),
    [
        ({"layout": "HWNC"}, "float32", "takes the layout NHWC, got HWNC"),
        ({}, "float16", "float32 or bfloat16, got float16; cast x and w"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(changes, dtype, message):
    case = dataclasses.replace(common.ALL["per-channel"], **changes)
    x, w, _, _, structure = common.draw(case, dtype)
    with pytest.raises(ValueError, match=f"backend 'cpu' cannot do this convolution: .*{message}"):
        common.convolve(x, w, structure, case, "cpu")
    with pytest.raises(ValueError, match=message):
        pk.dense_conv(x, w, layout=case.layout, backend="cpu")


def test_without_the_library_a_named_backend_is_refused(monkeypatch):
    monkeypatch.setenv(native.ENVIRONMENT, "0")
    case = common.ALL["per-channel"]
    x, w, _, _, structure = common.draw(case, "float32")
    with pytest.raises(ValueError, match="turned off by CLICKTRAIN_NATIVE=0"):
        common.convolve(x, w, structure, case, "cpu")
    assert not dense.is_native(case.geometry(), jnp.float32, 3)
    assert common.convolve(x, w, structure, case, None).shape == case.y_shape


def test_a_program_for_another_device_takes_another_backend():
    from pallas_kernels import compat

    with compat.traced_for():
        assert "jax runs on gpu here" in cpu.why_not_here()
    assert cpu.why_not_here() is None


def test_it_is_chosen_where_it_pays(monkeypatch):
    monkeypatch.setattr(native, "is_fast", lambda: True)
    chosen = {}
    for tile in ((64, 1), (16, 1), (1, 1)):
        for removed in (0.0, 0.6):
            case = Case("c", (8, 8), 1, 64, 128, tile=tile, removed=removed)
            structure = cases.structure_of(case, np.random.default_rng(0))
            chosen[tile, removed] = api.choose(structure, case.geometry(), jnp.float32, 1)
            assert api.choose(structure, case.geometry(), jnp.float64, 1) in ("xla", "dense")
            assert pk.estimated_gain(structure, "training", backend="cpu") > 1
    assert set(chosen.values()) == {"cpu"}
    whole = cases.structure_of(common.ALL["nothing-removed"], np.random.default_rng(0))
    assert api.choose(whole, common.ALL["nothing-removed"].geometry(), jnp.float32, 1) == "dense"


def test_shapes_that_do_not_fit_are_an_error_of_the_call():
    case = common.ALL["per-kernel"]
    x, w, _, _, structure = common.draw(case, "float32")
    geometry = case.geometry()
    wrong = {
        "lists are .* got": dataclasses.replace(structure, pairs=structure.pairs[:-1]),
        "its list has room": dataclasses.replace(structure, pair_counts=structure.pair_counts + 1000),
    }
    for message, other in wrong.items():
        with pytest.raises(Exception, match=f"INVALID_ARGUMENT: clicktrain_conv: .*{message}"):
            jax.block_until_ready(cpu.forward(x, w, other, geometry))
    with pytest.raises(Exception, match="a kernel of window"):
        jax.block_until_ready(cpu.forward(x, w[:, :, :-1], structure, geometry))


def test_transformations():
    common.check_transformations("cpu")


def test_mapped_images_are_one_batch():
    case = common.ALL["tiles-one-channel"]
    x, w, dy, _, structure = common.draw(case, "float32")
    xs = np.stack([x, 2 * x, -x])
    mapped = jax.jit(jax.vmap(functools.partial(common.convolve, case=case, backend="cpu"), (0, None, None)))
    text = mapped.lower(xs, w, structure).as_text()
    assert text.count("@clicktrain_conv(") == 1 and "while" not in text
    ys = mapped(xs, w, structure)
    whole = common.convolve(xs.reshape(-1, *x.shape[1:]), w, structure, case, "cpu")
    np.testing.assert_array_equal(ys, whole.reshape(ys.shape))
    for y, x in zip(ys, xs):
        np.testing.assert_array_equal(y, common.convolve(x, w, structure, case, "cpu"))


def test_no_images():
    case = common.ALL["free-patterns"]
    x, w, dy, _, structure = common.draw(case, "float32")
    compute = jax.jit(functools.partial(common.value_and_gradients, case=case, backend="cpu"))
    y, dx, dw = compute(x[:0], w, dy[:0], structure)
    assert (y.shape, dx.shape) == (dy[:0].shape, x[:0].shape)
    assert dw.shape == w.shape and not np.asarray(dw).any()


@pytest.mark.parametrize("tile", [(16, 1), (1, 1)])
def test_a_hundred_updates_follow_the_dense_masked_ones(tile):
    """By the same gradients: of two layers, the second with stride 2, on images that a hidden net labels."""
    layers = (
        Case("first", (8, 8), 16, 8, 32, tile=tile, removed=0.5),
        Case("second", (8, 8), 16, 32, 16, strides=(2, 2), padding=((1, 1), (1, 1)), tile=tile, removed=0.5),
    )
    rng = np.random.default_rng(0)
    masks = [cases.make_mask(case, rng) for case in layers]
    structures = [pk.make_structure(mask, tile=tile) for mask in masks]
    weights, hidden = ([cases.make_inputs(case, rng)[1] * mask for case, mask in zip(layers, masks)] for _ in range(2))
    images = rng.standard_normal((4, *layers[0].x_shape)).astype(np.float32)

    def predicted(weights, x, backend):
        for case, w, structure in zip(layers, weights, structures):
            x = jax.nn.relu(common.convolve(x, w, structure, case, backend))
        return x

    def train(backend):
        def loss(weights, x):
            return jnp.mean((predicted(weights, x, backend) - predicted(hidden, x, "reference")) ** 2)

        @jax.jit
        def update(weights, x):
            value, slopes = jax.value_and_grad(loss)(weights, x)
            return [w - 3.0 * slope for w, slope in zip(weights, slopes)], value

        now, losses = weights, []
        for step in range(100):
            now, value = update(now, images[step % len(images)])
            losses.append(float(value))
        return now, losses

    (by_pattern, pattern_losses), (dense_weights, dense_losses) = train("cpu"), train("dense")
    assert dense_losses[-1] < 0.5 * dense_losses[0]
    np.testing.assert_allclose(pattern_losses, dense_losses, rtol=1e-4)
    for w, wanted, mask in zip(by_pattern, dense_weights, masks):
        common.check(w, np.asarray(wanted, np.float64), 1e-3, "weights after all updates")
        assert not np.asarray(w)[~mask].any()


def test_the_dense_entry_takes_more_taps_than_a_structure():
    case = Case("9x9", (10, 9), 2, 3, 12, (9, 9), tile=(None, None), patterns=())
    x, w, dy = cases.make_inputs(case, np.random.default_rng(0))
    x, w = (array.astype(np.float32) for array in (x, w))
    wanted = common.expected(x, w, dy, np.ones(w.shape, bool), case.geometry())[0]
    common.check(pk.dense_conv(x, w, backend="cpu"), wanted, 1e-5, "9x9")


def test_images_without_pixels_are_an_error_of_the_call():
    case = common.ALL["wide-padding"]
    x, w, _, _, structure = common.draw(case, "float32")
    with pytest.raises(Exception, match="INVALID_ARGUMENT: clicktrain_conv: images have pixels"):
        jax.block_until_ready(common.convolve(x[:, :0], w, structure, case, "cpu"))
