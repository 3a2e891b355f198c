"""Layers in one call against the same layers one by one in XLA; what is refused. Drawn chains: `native/chains.h`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import native
from pallas_kernels.chain import Conv, Pool, Sum, chain

pytestmark = pytest.mark.skipif(not native.is_fast(), reason="there are no native kernels here")

SAME = ((1, 1), (1, 1))
SHAPE = (9, 7, 5)


def drawn(tile, batch, seed=0):
    """Convolutions, the last one strided, a shortcut and pools: (inputs, steps, arrays, weights)."""
    rng = np.random.default_rng(seed)
    arrays, weights = [], []

    def conv(source, shape, **options):
        keep = rng.random((*shape[:3], -(-shape[3] // tile))) < 0.5
        mask = np.repeat(keep, tile, axis=3)[..., : shape[3]]
        structure = pk.make_structure(mask, tile=(min(tile, shape[3]), 1))
        w = rng.standard_normal(shape).astype(np.float32)
        bias = rng.standard_normal(shape[3]).astype(np.float32)
        arrays.extend([pk.pack(np.where(mask, w, np.nan), structure, backend="cpu"), bias])
        weights.append((np.where(mask, w, 0), bias))
        return Conv(source, len(arrays) - 2, structure, bias=len(arrays) - 1, **options)

    steps = [
        conv(0, (3, 3, 5, 16), padding=SAME, relu=True),
        conv(1, (3, 3, 16, 16), padding=SAME),
        Sum(2, 1, relu=True),
        conv(3, (3, 3, 16, 16), padding=SAME, second=2, relu=True),
        Pool(4, "max", (3, 2), (2, 2), ((1, 1), (0, 1))),
        conv(5, (3, 3, 16, 20), strides=(2, 2), padding=((0, 1), (1, 1)), relu=True),
        Pool(6, "sum", (2, 2), (1, 1), factor=1 / 4),
    ]
    return [jnp.asarray(rng.standard_normal((batch, *SHAPE)).astype(np.float32))], steps, arrays, weights


def one_by_one(x, steps, weights):
    values, own = [x], iter(weights)
    for step in steps:
        y = values[step.source]
        if isinstance(step, Conv):
            w, bias = next(own)
            numbers = ("NHWC", "HWIO", "NHWC")
            y = jax.lax.conv_general_dilated(y, w, step.strides, step.padding, dimension_numbers=numbers) + bias
            y = y if step.second is None else y + values[step.second]
        elif isinstance(step, Sum):
            y = y + values[step.second]
        else:
            start, combine = (-jnp.inf, jax.lax.max) if step.kind == "max" else (0.0, jax.lax.add)
            padding = ((0, 0), *step.padding, (0, 0))
            window, strides = (1, *step.window, 1), (1, *step.strides, 1)
            y = step.factor * jax.lax.reduce_window(y, start, combine, window, strides, padding)
        values.append(jax.nn.relu(y) if step.relu else y)
    return values[-1]


@pytest.mark.parametrize("tile", [1, 16])
@pytest.mark.parametrize("batch", [1, 2, 5, 37])
def test_as_one_by_one(tile, batch):
    (x,), steps, arrays, weights = drawn(tile, batch)
    wanted = np.asarray(one_by_one(x, steps, weights))
    np.testing.assert_allclose(chain([x], steps, arrays), wanted, atol=2e-5 * np.abs(wanted).max())
    jitted = jax.jit(lambda x, arrays: chain([x], steps, arrays))
    np.testing.assert_allclose(jitted(x, arrays), wanted, atol=2e-5 * np.abs(wanted).max())


def test_several_inputs_and_images_that_are_mapped():
    (x,), steps, arrays, weights = drawn(16, 3)
    other = jnp.flip(x, 0)
    both = [Sum(0, 1), *(_after_another_input(step) for step in steps)]
    wanted = np.asarray(one_by_one(x + other, steps, weights))
    np.testing.assert_allclose(chain([x, other], both, arrays), wanted, rtol=1e-4, atol=1e-4)
    each = jax.vmap(lambda x: chain([x], steps, arrays))(jnp.stack([x, other]))
    np.testing.assert_allclose(each[0], one_by_one(x, steps, weights), rtol=1e-4, atol=1e-4)


def _after_another_input(step):
    """Of a chain that begins with a sum of two inputs, where one input was."""
    moved = {name: getattr(step, name, None) for name in ("source", "second")}
    moved = {name: index + 2 for name, index in moved.items() if index is not None}
    return dataclasses.replace(step, **moved)


def test_no_images():
    (x,), steps, arrays, _ = drawn(16, 1)
    assert chain([x[:0]], steps, arrays).shape == (0, 1, 1, 20)


def test_what_does_not_fit_is_refused():
    (x,), steps, arrays, _ = drawn(16, 2)
    with pytest.raises(ValueError, match="inputs are float32"):
        chain([x.astype(jnp.bfloat16)], steps, arrays)
    with pytest.raises(ValueError, match="does not fit images"):
        chain([x[..., :3]], steps, arrays)
    with pytest.raises(ValueError, match="sum of values of different shapes"):
        chain([x], [steps[0], Sum(0, 1)], arrays)
    with pytest.raises(ValueError, match="sum of values of different shapes"):
        chain([x], [dataclasses.replace(steps[0], second=0)], arrays)
    first, *others = arrays
    with pytest.raises(Exception, match="step 0: the packed weights are of another convolution"):
        jax.block_until_ready(chain([x], steps, [first[:-1], *others]))
    with pytest.raises(Exception, match="step 0: bias is float32"):
        jax.block_until_ready(chain([x], steps, [first, others[0][:3], *others[1:]]))
    with pytest.raises(Exception, match="step 0: its weights are no argument"):
        jax.block_until_ready(chain([x], [dataclasses.replace(steps[0], packed=9)], arrays[:2]))
