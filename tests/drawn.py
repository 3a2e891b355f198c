"""Weights and masks for tests that need some, whichever: a net's own initialisation and a selection are compiled, a
program for each shape."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import clicktrain_jax as ct
from clicktrain_jax.masks import LayerMask, Masks, build_masks
from clicktrain_jax.trees import map_named


def drawn(model, shape, seed=0):
    """Variables of a linen net for images of ``shape`` (height, width, channels), float32 numpy arrays."""
    abstract = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape)), train=False))
    return drawn_like(abstract, seed)


def drawn_like(tree, seed=0):
    """Values for the shapes of a tree, float32 numpy arrays: vectors around one, the rest as large as kernels are;
    random keys are all one, and counts zero."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.key(seed)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return np.zeros(leaf.shape, leaf.dtype)
        if leaf.ndim == 1:
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        return (rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))).astype(np.float32)

    return jax.tree.map(draw, tree)


def drawn_masks(params, plan, seed=0):
    """Masks of the forms that a plan of fractions asks for, as many kernels removed, in numpy; which ones is chance."""
    rng, patterns = np.random.default_rng(seed), ct.patterns.fixed_set(4)
    return build_masks(params, {layer.name: _drawn_layer(layer, patterns, rng) for layer in plan.layers})


def _drawn_layer(layer, patterns, rng):
    def tiles(sizes):
        return -(-layer.shape[2] // sizes[1]), -(-layer.shape[3] // sizes[0])

    def spread(values, sizes):
        return values.repeat(sizes[1], 0).repeat(sizes[0], 1)[: layer.shape[2], : layer.shape[3]]

    assert layer.removal_scope == "layer" and not layer.floor and not layer.quads, layer
    units = tiles(layer.removal_tile)
    kernel = spread(rng.permutation(np.prod(units)).reshape(units) >= layer.num_removed, layer.removal_tile)
    kernel = kernel if layer.axes == "HWIO" else kernel.T[:, :, None, None]
    if not layer.has_patterns:
        return LayerMask(None, kernel, None)
    choices = np.arange(len(patterns))[:, None]
    if layer.superset is not None:  # two patterns a tile, which lie in so many taps together
        pairs = itertools.combinations(range(len(patterns)), 2)
        choices = np.array([pair for pair in pairs if patterns[list(pair)].any(0).sum() <= layer.superset])
    chosen = spread(rng.integers(len(choices), size=tiles(layer.tile)), layer.tile)
    ids = choices[chosen, rng.integers(choices.shape[1], size=chosen.shape)]
    return LayerMask(ids.astype(np.uint8), kernel, patterns)


def masked(params, masks):
    """The parameters with zeros where masks remove, as `clicktrain_jax.apply_masks` has them, in numpy."""
    layers = dict(Masks.of(masks).layers)
    return map_named(lambda name, leaf: _kept(leaf, layers[name]) if name in layers else leaf, params)


def _kept(leaf, layer):
    keep = np.asarray(layer.combined())
    return np.where(keep, leaf, np.zeros((), leaf.dtype))
