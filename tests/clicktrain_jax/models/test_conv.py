"""The convolution for CPUs computes what `flax.linen.Conv` does, and has its parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clicktrain_jax.models import PatchConv, gpu_convolution, xla_convolution


@pytest.mark.parametrize(
    ("window", "stride", "size"),
    [
        *((3, stride, size) for stride in (1, 2) for size in ((8, 8), (9, 7))),
        *((window, stride, (8, 8) if stride == 2 else (9, 7)) for window in (1, 7) for stride in (1, 2)),
    ],
)
def test_values_and_gradients(window, stride, size):
    kernel_size, strides = (window, window), (stride, stride)
    pad = kernel_size[0] // 2
    options = {"strides": strides, "padding": ((pad, pad), (pad, pad)), "use_bias": False}
    ours, theirs = PatchConv(6, kernel_size, **options), nn.Conv(6, kernel_size, **options)
    x = np.random.default_rng(0).normal(size=(2, *size, 4)).astype(np.float32)
    shapes = jax.eval_shape(theirs.init, jax.random.key(1), x)
    assert jax.eval_shape(ours.init, jax.random.key(1), x) == shapes
    rng = np.random.default_rng(1)
    variables = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype) / 9, shapes)

    def outcome(variables, x, conv):
        y = conv.apply(variables, x)
        return y, *jax.vjp(conv.apply, variables, x)[1](jnp.cos(y))

    compute = jax.jit(outcome, static_argnames="conv")
    for ours_, theirs_ in zip(*(jax.tree.leaves(compute(variables, x, conv=conv)) for conv in (ours, theirs))):
        np.testing.assert_allclose(ours_, theirs_, rtol=2e-4, atol=2e-4)


def test_bfloat16_and_no_bias():
    x = jnp.ones((1, 4, 4, 2))
    conv = PatchConv(3, (1, 1), dtype=jnp.bfloat16)
    variables = conv.init(jax.random.key(0), x)
    assert variables["params"]["kernel"].dtype == jnp.float32
    assert conv.apply(variables, x).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="no bias"):
        PatchConv(3, (1, 1), use_bias=True).init(jax.random.key(0), x)


@pytest.mark.parametrize(
    ("size", "kernel", "strides", "is_product"),
    [
        ((2, 2), (3, 3), (1, 1), True),
        ((1, 2), (3, 3), (1, 1), True),
        ((3, 3), (5, 5), (1, 1), True),
        ((4, 4), (3, 3), (1, 1), False),
        ((2, 2), (3, 3), (2, 2), False),
    ],
)
def test_the_weights_gradient_is_a_product_where_a_kernel_reaches_every_pixel(size, kernel, strides, is_product):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, *size, 6), np.float32)
    w = rng.standard_normal((*kernel, 6, 7), np.float32)
    how = {"strides": strides, "padding": [(side // 2, side // 2) for side in kernel], "layout": "NHWC"}

    def both(convolve):
        def outcome(x, w):
            y, pull = jax.vjp(lambda x, w: convolve(x, w, **how), x, w)
            return y, *pull(jnp.cos(y))

        return jax.jit(outcome)(x, w)

    for one, two in zip(both(gpu_convolution), both(xla_convolution)):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)
    slope = jax.grad(lambda x, w: gpu_convolution(x, w, **how).sum(), 1)
    assert ("stablehlo.dot_general" in jax.jit(slope).lower(x, w).as_text()) == is_product
