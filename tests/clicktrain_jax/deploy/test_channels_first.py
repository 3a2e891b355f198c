"""Maps with their channels first: the same function, with hardly a transpose in it."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax

from clicktrain_jax import models
from clicktrain_jax.deploy.channels_first import channels_first
from clicktrain_jax.deploy.fold import fold

NUMBERS = ("NHWC", "HWIO", "NHWC")


def primitives(function, images):
    return [equation.primitive.name for equation in jax.make_jaxpr(function)(images).jaxpr.eqns]


def check(function, arrays, shape, transposes):
    """The same result, and so many transposes of what comes from images."""
    images = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    moved = channels_first(function, arrays)
    np.testing.assert_allclose(jax.jit(moved)(images), jax.jit(function)(arrays, images), atol=1e-5, rtol=1e-5)
    found = primitives(moved, images)
    assert found.count("transpose") == transposes
    return found


def conv(images, kernel, numbers=NUMBERS, **settings):
    settings = {"window_strides": (1, 1), "padding": ((1, 1), (1, 1))} | settings
    return lax.conv_general_dilated(images, kernel, dimension_numbers=numbers, **settings)


@pytest.fixture
def kernel():
    return np.random.default_rng(1).normal(size=(3, 3, 4, 4)).astype(np.float32)


@pytest.mark.parametrize(("name", "transposes"), [("small", 1), ("resnet18", 1), ("vgg11", 2)])
def test_nets_of_the_zoo(name, transposes):
    """One transpose of the images; a VGG's classifier needs its own order."""
    model = models.build(name, num_classes=10, width=0.125)
    shape = models.default_image_shape(name)
    folded = fold(lambda variables, images: model.apply(variables, images, train=False), drawn(model, shape), shape)
    found = check(folded.function, folded.arrays, (2, *shape), transposes)
    assert found.count("conv_general_dilated") == len(models.conv_layers(model, shape))


def test_every_kind_of_step(kernel):
    def function(arrays, images):
        x = conv(images, arrays["kernel"], window_strides=(2, 1))
        x = jnp.concatenate([jnp.maximum(x, 0.1), jnp.tanh(x) * arrays["scale"]], axis=-1)
        pooled = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0)))
        summed = lax.reduce_window(x, 0.0, lax.add, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 1), (0, 1), (0, 0)))
        x = jnp.pad(pooled + summed, ((0, 0), (0, 0), (1, 0), (2, 3)), constant_values=0.5)
        x = lax.slice(x, (0, 1, 0, 1), x.shape, (1, 1, 2, 1))
        x = jnp.where(x > 0, x, 0.25 * x)
        return x.mean(axis=(1, 2)) + x.max(axis=(1, 2))

    found = check(function, {"kernel": kernel, "scale": np.arange(4, dtype=np.float32)}, (2, 9, 8, 4), 1)
    assert {"pad", "slice", "concatenate", "select_n", "reduce_sum", "reduce_max"} <= set(found)


def test_steps_that_want_their_own_order(kernel):
    def function(arrays, images):
        x = conv(images, arrays["kernel"])
        x = jnp.flip(x, axis=1)  # not known: in the order it had
        x = conv(x, arrays["kernel"])
        return jnp.moveaxis(x, 3, 1).reshape(x.shape[0], -1)

    check(function, {"kernel": kernel}, (2, 5, 6, 4), 5)


def test_a_reduction_over_channels_and_one_without(kernel):
    def function(arrays, images):
        x = conv(images, arrays["kernel"])
        return x.max(axis=-1).sum(axis=2) + x.sum(axis=0).max(axis=(0, 2))[:, None].sum()

    check(function, {"kernel": kernel}, (3, 5, 6, 4), 2)


def test_other_orders_and_other_dimensions(kernel):
    def function(arrays, images):
        x = conv(images, arrays["kernel"], ("HWNC", "HWIO", "NHWC"), rhs_dilation=(2, 1))
        numbers = ("NWC", "WIO", "NWC")
        line = lax.conv_general_dilated(x[:, 0], arrays["kernel"][0], (1,), "SAME", dimension_numbers=numbers)
        return jax.nn.relu(x).sum(axis=(1, 2)) + line.sum(axis=1)

    check(function, {"kernel": kernel}, (6, 7, 2, 4), 2)


def test_what_no_image_reaches_is_computed_at_once(kernel):
    def function(arrays, images):
        scaled = arrays["kernel"] * jnp.exp(arrays["scale"])
        return conv(images, scaled).sum(axis=(1, 2)) + jnp.exp(arrays["scale"])

    found = check(function, {"kernel": kernel, "scale": np.ones(4, np.float32)}, (2, 5, 6, 4), 1)
    assert "exp" not in found and "mul" not in found


def test_any_number_of_images(kernel):
    moved = channels_first(lambda arrays, images: conv(images, arrays["kernel"]).sum(axis=(1, 2)), {"kernel": kernel})
    (batch,) = jax.export.symbolic_shape("batch")
    closed = jax.make_jaxpr(moved)(jax.ShapeDtypeStruct((batch, 5, 6, 4), jnp.float32))
    assert closed.out_avals[0].shape == (batch, 4)


def test_a_result_without_images():
    moved = channels_first(lambda arrays, images: arrays["bias"] + 1, {"bias": np.ones(3, np.float32)})
    np.testing.assert_array_equal(moved(jnp.zeros((1, 2, 2, 3))), [2, 2, 2])
