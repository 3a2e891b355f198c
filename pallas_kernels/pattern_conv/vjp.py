"""One differentiable operator from a backend's three functions: value, input gradient, weight gradient.

Each is linear in both of its arguments, and its derivatives are the other two: so derivatives of any order are the
backend's own. Its insides are not asked for theirs: kernels have none, and those of bits are silently zero.
"""

import functools
from collections.abc import Callable
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _input_gradient(dy: jax.Array, w: jax.Array, structure: Structure, geometry: Geometry, backend: Any) -> jax.Array:
    return backend.input_gradient(dy, w, structure, geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _weight_gradient(x: jax.Array, dy: jax.Array, structure: Structure, geometry: Geometry, backend: Any) -> jax.Array:
    return backend.weight_gradient(x, dy, structure, geometry)


def _keeping(function: Callable) -> Callable:
    """The forward rule of ``function``: its value, and its arguments for the backward rule."""

    def forward(*args):
        return function(*args), args[:3]

    return forward


def _forward_backward(geometry: Geometry, backend: Any, kept: tuple, dy: jax.Array) -> tuple:
    x, w, structure = kept
    dx = _input_gradient(dy, w, structure, geometry, backend).astype(x.dtype)
    dw = _weight_gradient(x, dy, structure, geometry, backend).astype(w.dtype)
    return dx, dw, _nothing(structure)


def _input_gradient_backward(geometry: Geometry, backend: Any, kept: tuple, ct: jax.Array) -> tuple:
    dy, w, structure = kept
    to_w = _weight_gradient(ct, dy, structure, geometry, backend).astype(w.dtype)
    return differentiable(ct, w, structure, geometry, backend), to_w, _nothing(structure)


def _weight_gradient_backward(geometry: Geometry, backend: Any, kept: tuple, ct: jax.Array) -> tuple:
    x, dy, structure = kept
    ct = ct.astype(x.dtype)
    to_x = _input_gradient(dy, ct, structure, geometry, backend).astype(x.dtype)
    return to_x, differentiable(x, ct, structure, geometry, backend), _nothing(structure)


def _nothing(structure: Structure) -> Structure:
    """Integers have no gradient: jax wants float0 for them."""
    return jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jax.dtypes.float0), structure)


differentiable.defvjp(_keeping(differentiable), _forward_backward)
_input_gradient.defvjp(_keeping(_input_gradient), _input_gradient_backward)
_weight_gradient.defvjp(_keeping(_weight_gradient), _weight_gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def with_epilogue(
    x: jax.Array,
    w: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    structure: Structure,
    relu: bool,
    geometry: Geometry,
    backend: Any,
) -> jax.Array:
    """`differentiable` and `epilogue` in one, for a backend whose `forward` applies it: ``backend.FUSES_EPILOGUE``.

    Where a gradient is taken the two run one after the other, as the gradient needs what lies between.
    """
    return backend.forward(x, w, structure, geometry, scale=scale, bias=bias, relu=relu)


def epilogue(y: jax.Array, scale: jax.Array | None, bias: jax.Array | None, relu: bool) -> jax.Array:
    """ReLU(y * scale + bias) in y's dtype, computed in float32 or wider."""
    if scale is None and bias is None:
        return jax.nn.relu(y) if relu else y
    wide = y.astype(jnp.promote_types(y.dtype, jnp.float32))
    wide = wide if scale is None else wide * scale
    wide = wide if bias is None else wide + bias
    return (jax.nn.relu(wide) if relu else wide).astype(y.dtype)


def _forward_with_epilogue(
    x: Any, w: Any, scale: Any, bias: Any, structure: Any, relu: bool, geometry: Geometry, backend: Any
) -> tuple:
    def apart(x: Any, w: Any, scale: Any, bias: Any) -> jax.Array:
        return epilogue(differentiable(x, w, structure, geometry, backend), scale, bias, relu)

    y, pull_back = jax.vjp(apart, x, w, scale, bias)
    return y, (pull_back, structure)


def _backward_with_epilogue(relu: bool, geometry: Geometry, backend: Any, kept: tuple, dy: jax.Array) -> tuple:
    pull_back, structure = kept
    return *pull_back(dy), jax.tree.map(lambda leaf: np.zeros(jnp.shape(leaf), jax.dtypes.float0), structure)


with_epilogue.defvjp(_forward_with_epilogue, _backward_with_epilogue)
