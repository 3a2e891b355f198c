"""Weights for tests that need some, whichever: quicker than a net's own initialisation, which is compiled."""

import jax
import jax.numpy as jnp
import numpy as np


def drawn(model, shape, seed=0):
    """Variables of a linen net for images of ``shape`` (height, width, channels), float32 numpy arrays."""
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree.map(draw, abstract)
