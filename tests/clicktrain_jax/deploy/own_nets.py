"""What tests of users' own nets share: images, masks, a comparison."""

import functools

import jax
import numpy as np
from drawn import drawn_masks

import clicktrain_jax as ct
from clicktrain_jax.trees import named_leaves

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
X = np.random.default_rng(1).normal(size=(2, 9, 8, 3)).astype(np.float32)


def masks_for(params, removed, seed=0):
    """Masks by the package's own plan: half of the kernels of these layers go."""
    names = [name for name, leaf in named_leaves(params) if np.ndim(leaf) == 4]
    rules = {name: 0.5 if name.split("/")[-2] in removed else None for name in names}
    return drawn_masks(params, ct.make_plan(params, rules, tile=(4, 1)), seed)


def close(got, wanted, tolerance=1e-5):
    """Largest difference against the largest value, leaf by leaf."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        scale = np.abs(other).max()
        assert np.abs(np.asarray(one) - np.asarray(other)).max() <= tolerance * max(scale, 1e-3), one.shape
