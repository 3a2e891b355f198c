"""Random importance: masks of like sparsity and like shapes that know nothing, the floor for every criterion."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp

from clicktrain_jax.importance import Criterion
from clicktrain_jax.methods.states import check_integer
from clicktrain_jax.trees import Tree, map_named


def random_importance(seed: int) -> Criterion:
    """A criterion that gives every weight a score from the uniform distribution.

    Args:
        seed: integer >= 0.

    Returns:
        A function ``(params, grads=None) -> scores`` for ``importance=`` of `clicktrain_jax.clicktrain` and
        `clicktrain_jax.phase_updates`: float32 in [0, 1), a tree like ``params``. A leaf's scores depend on the seed,
        its name and its shape alone, so that every update, and every net with such a leaf, gets the same ones.

    Raises:
        ValueError: a seed that is no integer >= 0.
    """
    seed = check_integer("seed", seed, 0)

    def scores(params: Tree, grads: Tree | None = None) -> Tree:
        return map_named(lambda name, weight: _uniform(jax.random.key(seed), name, weight), params)

    return scores


def random_scores(params: Tree, grads: Tree | None = None) -> Tree:
    """A criterion as of `random_importance`, with the weights themselves as the seed.

    For a program that serves runs of many seeds: each run draws its own scores, and the same ones when it is repeated
    to the bit. ``grads`` is not read.

    Returns:
        A tree like ``params``, float32 in [0, 1).
    """

    def draw(name: str, weight: Any) -> Any:
        if weight is None:
            return None
        bits = jax.lax.bitcast_convert_type(jnp.asarray(weight, jnp.float32), jnp.uint32)
        return _uniform(jax.random.fold_in(jax.random.key(0), jnp.sum(bits, dtype=jnp.uint32)), name, weight)

    return map_named(draw, params)


def _uniform(key: jax.Array, name: str, weight: Any) -> Any:
    if weight is None:
        return None
    return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), jnp.shape(weight), jnp.float32)
