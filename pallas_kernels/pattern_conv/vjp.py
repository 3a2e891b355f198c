"""One differentiable operator from a backend's three functions: value, input gradient, weight gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pattern_conv.geometry import Geometry
from pallas_kernels.pattern_conv.structure import Structure


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def differentiable(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry, backend: Any) -> jax.Array:
    """``backend.forward``, whose gradients are the backend's own."""
    return backend.forward(x, w, structure, geometry)


def _forward(x: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry, backend: Any) -> tuple:
    return backend.forward(x, w, structure, geometry), (x, w, structure)


def _backward(geometry: Geometry, backend: Any, kept: tuple, dy: jax.Array) -> tuple:
    x, w, structure = kept
    dx = backend.input_gradient(dy, w, structure, geometry).astype(x.dtype)
    dw = backend.weight_gradient(x, dy, structure, geometry).astype(w.dtype)
    # Integers have no gradient: jax wants float0 for them.
    return dx, dw, jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jax.dtypes.float0), structure)


differentiable.defvjp(_forward, _backward)
