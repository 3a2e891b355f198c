"""Masks as the optimizer state keeps them: small, and the same masks when read back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import clicktrain_jax as ct
from clicktrain_jax.encoding import decode, encode
from clicktrain_jax.masks import LayerChoice, expand

SHAPES = [(3, 3, 8, 4), (3, 3, 16, 3), (3, 3, 5, 4), (3, 3, 1, 1), (5, 5, 2, 3), (1, 1, 8, 3), (1, 1, 3, 5)]


def some_choice(shape, num_patterns):
    rng = np.random.default_rng(sum(shape))
    kernel = jnp.asarray(rng.random(shape[2:]) < 0.5)
    if shape[0] == 1:
        return LayerChoice(None, kernel, None)
    ids = jnp.asarray(rng.integers(0, num_patterns, shape[2:]), jnp.uint8)
    return LayerChoice(ids, kernel, jnp.asarray(rng.random((num_patterns, *shape[:2])) < 0.5))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("num_patterns", [4, 255])
def test_round_trip(shape, num_patterns):
    choice = some_choice(shape, num_patterns)
    pattern, kernel = decode(encode(choice))
    np.testing.assert_array_equal(kernel, np.broadcast_to(choice.kernel, shape))
    assert kernel.dtype == bool and kernel.shape == shape
    if shape[0] == 1:
        assert pattern is None
        return
    by_indexing = np.asarray(choice.patterns)[np.asarray(choice.pattern_ids)]  # (cin, cout, kh, kw)
    np.testing.assert_array_equal(pattern, by_indexing.transpose(2, 3, 0, 1))
    assert pattern.dtype == bool
    np.testing.assert_array_equal(pattern, expand(choice)[0])


def test_round_trip_under_jit():
    shape = (3, 3, 16, 3)
    choice = some_choice(shape, 4)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(lambda c: decode(encode(c)))(choice),
        decode(encode(choice)),
    )


def state_of(shape):
    params = {"conv": {"kernel": jnp.zeros(shape)}, "bias": jnp.zeros(3)}
    plan = ct.make_plan(params, {"conv/kernel": 0.5})
    return ct.clicktrain(optax.identity(), plan, select_step=1, prune_step=2, coeff=0.0).init(params)


def test_state_is_small():
    masks = state_of((3, 3, 64, 64)).masks
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(masks))
    kernels, weights = 64 * 64, 64 * 64 * 9
    assert num_bytes < weights * 4 / 20
    assert num_bytes == kernels + kernels / 8 + 4 * 9  # a byte and a bit a kernel, and the set of patterns


@pytest.mark.parametrize("shape", SHAPES[:3] + SHAPES[-1:], ids=str)
def test_all_is_kept_before_the_selection(shape):
    masks = ct.masks_of(state_of(shape))
    assert masks.kernel["bias"] is masks.pattern["bias"] is None
    assert masks.kernel["conv"]["kernel"].all() and masks.kernel["conv"]["kernel"].shape == shape
    if shape[0] == 1:
        assert masks.pattern["conv"]["kernel"] is None
    else:
        assert masks.pattern["conv"]["kernel"].all() and masks.pattern["conv"]["kernel"].shape == shape
